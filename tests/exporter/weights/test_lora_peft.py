"""A merged model computes what PEFT's own does, unmerged, for every form of LoRA that is read."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from support.adapters import LINEARS
from transformers import Olmo2ForCausalLM

from olmo2_export.truth.reference import open_reference
from olmo2_export.weights.merged import open_merged

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`", "ignore:Setting `save_embedding_layers`", "ignore:fan_in_fan_out is set"
)
IDS = np.random.default_rng(0).integers(0, 131, 23)


def trained(base: Path, out: Path, **fields: Any) -> Path:
    """Write an adapter with PEFT, its numbers drawn as if it was trained."""
    torch.manual_seed(0)
    model = peft.get_peft_model(Olmo2ForCausalLM.from_pretrained(base), peft.LoraConfig(r=4, lora_alpha=8, **fields))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "magnitude" in name:
                weight.mul_(torch.rand_like(weight) + 0.5)
            elif "lora_" in name:
                weight.normal_(0, 0.08)
            elif "modules_to_save" in name:
                weight.add_(torch.randn_like(weight) * 0.05)
    model.save_pretrained(out)
    return out


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": list(LINEARS)},
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.[02]\..*(q|up)_proj", "use_rslora": True},
        {
            "target_modules": ["q_proj", "down_proj", "model.layers.2.mlp.up_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 7, "down_proj": 5},
            "alpha_pattern": {"^model.layers.0.mlp.down_proj": 3},
            "layers_to_transform": [0, 1],
            "exclude_modules": ["model.layers.1.mlp.down_proj"],
        },
        {"target_modules": list(LINEARS), "use_dora": True},
        {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
        {"target_modules": ["q_proj"], "fan_in_fan_out": True},
    ],
    ids=["names", "all-linear", "regex, rslora", "patterns", "dora", "embedding and head", "modules_to_save", "fan"],
)
def test_merged_logits_are_those_of_peft(tiny_checkpoint: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    folder = trained(tiny_checkpoint, tmp_path / "lora", **fields)
    base = Olmo2ForCausalLM.from_pretrained(tiny_checkpoint)
    with torch.no_grad():
        plain = base(torch.from_numpy(IDS)[None]).logits[0].numpy()
        want = peft.PeftModel.from_pretrained(base, folder).eval()(torch.from_numpy(IDS)[None]).logits[0].numpy()
    with open_reference(open_merged(str(tiny_checkpoint), lora=[str(folder)]), "fp32") as model:
        (found,) = model.logits([IDS])
    assert np.abs(found - want).max() < 6e-6
    assert np.abs(plain - want).max() > 0.5


def test_merged_weights_are_those_of_peft(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = trained(tiny_checkpoint, tmp_path / "lora", target_modules=list(LINEARS), use_dora=True)
    found = open_merged(str(tiny_checkpoint), lora=[str(folder)])
    base = Olmo2ForCausalLM.from_pretrained(tiny_checkpoint)
    with warnings.catch_warnings():
        model: Any = peft.PeftModel.from_pretrained(base, folder).merge_and_unload()
    for name, weight in model.state_dict().items():
        assert (found.tensor(name) - weight).abs().max() < 1e-6, name
