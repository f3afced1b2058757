"""A checkpoint to measure with: the shape of a real model, weights that nobody trained.

Time and memory do not depend on the values, with two exceptions. Quality gates want a model that is sure of something,
and prompt lookup wants text that repeats itself. So the likeliest next token is a fixed function of the last one
(`echo_successor`): the head's row of each token is the embedding of its predecessor, and the norms behind attention
and MLP let through so little that the last hidden state is nearly that embedding.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from tqdm import tqdm

from olmo2_export.config import ModelConfig
from olmo2_export.model.olmo import OlmoForCausalLM

SIZES: dict[str, dict[str, int]] = {
    "demo": {
        "num_hidden_layers": 6,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 4096,
    },
    "1B": {
        "num_hidden_layers": 16,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": 100_352,
    },
    "7B": {
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 100_352,
    },
    "13B": {
        "num_hidden_layers": 40,
        "hidden_size": 5120,
        "intermediate_size": 13_824,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "vocab_size": 100_352,
    },
    "32B": {
        "num_hidden_layers": 64,
        "hidden_size": 5120,
        "intermediate_size": 27_648,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "vocab_size": 100_352,
    },
}
"""the shapes that can be measured; all but demo are those of allenai's OLMo 2"""

Form: TypeAlias = Literal["olmo2", "llama"]
"""llama: a Llama of the same shape, for the peers that have no OLMo 2"""

ECHO_CYCLE = 64
_BLOCK = 1 << 22  # weights
_STRIDE = 104_729  # prime
_ROWS = 2048
_LAYER_NORM = 0.002  # a tenth of an embedding's standard deviation


def echo_successor(token_id: int, vocab_size: int) -> int:
    """Return the token that follows another in the greedy text.

    In the lower half of the vocabulary text repeats after 64 tokens; in the upper half not before all of it was used.
    """
    half = vocab_size // 2
    if token_id < half:
        start = token_id - token_id % ECHO_CYCLE
        return start + (token_id + 1) % ECHO_CYCLE
    return half + (token_id + 1 - half) % (vocab_size - half)


def shape_of(checkpoint: Path) -> dict[str, int]:
    """Return the shape of another checkpoint, as `SIZES` has them."""
    config = json.loads((checkpoint / "config.json").read_text())
    return {name: config[name] for name in SIZES["1B"]}


def write_checkpoint(folder: Path, sizes: dict[str, int], form: Form = "olmo2") -> int:
    """Write a bfloat16 checkpoint of a shape, as `SIZES` has them; return its bytes."""
    config: dict[str, Any] = {
        **sizes,
        "model_type": form,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 500_000.0,
        "eos_token_id": sizes["vocab_size"] - 1,
    }
    with torch.device("meta"):
        model = OlmoForCausalLM(ModelConfig.from_dict({**config, "model_type": "olmo2"}))
    shapes = {name: weight.shape for name, weight in model.state_dict().items()}
    if form == "llama":
        config |= {"architectures": ["LlamaForCausalLM"], "bos_token_id": 0, "hidden_act": "silu"}
        renamed = {name.replace("post_feedforward", "input"): shape for name, shape in shapes.items()}
        shapes = {
            name: shape for name, shape in renamed.items() if not name.endswith(("q_norm.weight", "k_norm.weight"))
        }
    (folder / "config.json").write_text(json.dumps(config))

    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * shape.numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with (
        (folder / "model.safetensors").open("wb") as file,
        tqdm(total=end, desc=f"{form} checkpoint", unit="B", unit_scale=True, leave=False) as progress,
    ):
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for part in _weights(shapes):
            file.write(part)
            progress.update(len(part))
    return end


def _weights(shapes: dict[str, torch.Size]) -> Iterator[bytes]:
    """Yield the bytes of all tensors in order."""
    vocab_size, hidden_size = shapes["model.embed_tokens.weight"]
    generator = torch.Generator().manual_seed(0)
    embedding = torch.empty(vocab_size, hidden_size, dtype=torch.bfloat16)
    for rows in torch.split(embedding, _ROWS):
        rows.copy_(_random(rows.numel(), generator).view_as(rows))
    successor = torch.tensor([echo_successor(t, vocab_size) for t in range(vocab_size)])
    pool = _random(2 * _BLOCK, generator)
    for number, (name, shape) in enumerate(shapes.items()):
        if name == "model.embed_tokens.weight":
            yield from map(_bytes, torch.split(embedding, _ROWS))
        elif name == "lm_head.weight":
            yield from map(_bytes, torch.split(embedding[successor.argsort()], _ROWS))
        elif len(shape) == 1:
            yield _bytes(torch.full(shape, _LAYER_NORM if "layernorm" in name else 1.0))
        else:
            block = pool[number * _STRIDE % _BLOCK :][:_BLOCK]  # no tensor twice, or an exporter would share it
            for start in range(0, shape.numel(), _BLOCK):
                yield _bytes(block[: shape.numel() - start])


def _random(count: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(count, generator=generator).mul_(0.02)


def _bytes(weights: torch.Tensor) -> bytes:
    return weights.to(torch.bfloat16).view(torch.int16).numpy().tobytes()
