"""Our model, run eagerly, is transformers' model; and its rotary tables are transformers' own numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import make_checkpoint
from transformers import Olmo2ForCausalLM as TransformersOlmo2
from transformers.models.olmo2.modeling_olmo2 import Olmo2RotaryEmbedding

from olmo2_export.config import ModelConfig
from olmo2_export.model.olmo import OlmoForCausalLM, RMSNorm
from olmo2_export.model.rotary import model_tables
from olmo2_export.weights.checkpoint import open_checkpoint


def load(folder: Path) -> tuple[OlmoForCausalLM, ModelConfig]:
    checkpoint, config = open_checkpoint(str(folder)), ModelConfig.from_json(folder / "config.json")
    model = OlmoForCausalLM(config).eval()
    state = {name: checkpoint.tensor(name).float() for name in checkpoint.tensors}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    for name, table in model_tables(config).items():
        setattr(model, name, table)
    return model, config


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_key_value_heads": 6},
        {"num_key_value_heads": 1, "attention_bias": True},
        {"tie_word_embeddings": True, "rms_norm_eps": 1e-3},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
    ],
    ids=["gqa", "mha", "mqa-bias", "tied-eps", "theta"],
)
@torch.inference_mode()
def test_logits_and_cache_are_those_of_transformers(tmp_path: Path, fields: dict[str, Any]) -> None:
    folder = make_checkpoint(tmp_path / "c", **fields)
    model, config = load(folder)
    theirs = TransformersOlmo2.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(0, config.vocab_size, (2, 11), generator=torch.Generator().manual_seed(1))
    expected = theirs(ids, use_cache=True)

    past = [(torch.zeros(2, config.num_key_value_heads, 0, 16),) * 2 for _ in range(config.num_hidden_layers)]
    ones = torch.ones(2, 11, dtype=torch.int64)
    positions = torch.arange(11).expand(2, -1)
    first, past = model(ids[:, :7], ones[:, :7], positions[:, :7], past, 0)
    second, past = model(ids[:, 7:], ones, positions[:, 7:], past, 3)
    assert first.shape == (2, 7, 131)
    assert second.shape == (2, 3, 131)
    # float32 rounding in another order of summation
    torch.testing.assert_close(first, expected.logits[:, :7], atol=2e-5, rtol=0)
    torch.testing.assert_close(second, expected.logits[:, 8:], atol=2e-5, rtol=0)
    for layer, (key, value) in enumerate(past):
        torch.testing.assert_close(key, expected.past_key_values.layers[layer].keys, atol=2e-5, rtol=0)
        torch.testing.assert_close(value, expected.past_key_values.layers[layer].values, atol=2e-5, rtol=0)


def test_rotary_tables_are_bit_identical_to_those_of_transformers(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c", max_position_embeddings=4096)
    config = ModelConfig.from_json(folder / "config.json")
    theirs = Olmo2RotaryEmbedding(TransformersOlmo2.from_pretrained(folder).config)
    cos, sin = theirs(torch.zeros(1), torch.arange(4096)[None])
    ours = model_tables(config)
    assert torch.equal(ours["rotary_cos"], cos[0, :, :8])
    assert torch.equal(ours["rotary_sin"], sin[0, :, :8])


def test_norm_weight_is_multiplied_before_the_cast_down() -> None:
    """OLMo 2 and Llama differ here: Llama rounds to bfloat16 first, then multiplies."""
    norm = RMSNorm(64, 1e-6)
    torch.manual_seed(0)
    with torch.no_grad():
        norm.weight.uniform_(0.25, 1.75)
        norm.to(torch.bfloat16)
        x = torch.randn(50, 64).to(torch.bfloat16)
        normalised = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
        assert torch.equal(norm(x), (normalised * norm.weight.float()).to(torch.bfloat16))
        assert not torch.equal(norm(x), normalised.to(torch.bfloat16) * norm.weight)
