"""Every kind of RoPE -> the tables of cos and sin that a graph holds.

The steps are those of transformers, in its order and in float32, so that the tables are its numbers bit for bit: a more
exact table would be further from what the models were trained with, by up to 1e-4 at position 4096.

Source: transformers, modeling_rope_utils.py, and Olmo3RotaryEmbedding in models/olmo3/modeling_olmo3.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from olmo2_export.config import ModelConfig
from olmo2_export.rope import Rope

TABLES = ("rotary_cos", "rotary_sin")


def table_names(config: ModelConfig) -> dict[str, tuple[str, str]]:
    """Return which of `config.ropes` -> the names of its cos and sin in model and graph."""
    return {which: (f"{TABLES[0]}{which}", f"{TABLES[1]}{which}") for which in config.ropes}


def inverse_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Return the angle per position of each pair of channels, in radians: float32 [head_dim / 2]."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    plain = 1.0 / (rope.theta**exponent)
    match rope.rope_type:
        case "default" | "dynamic":
            return plain
        case "linear":
            return plain / rope.factor
        case "llama3":
            return _llama3(rope, plain)
        case "yarn":
            return _yarn(rope, head_dim, rope.theta**exponent)
        case "longrope":
            return 1.0 / (torch.tensor(rope.factors, dtype=torch.float32) * rope.theta**exponent)


def _llama3(rope: Rope, plain: Tensor) -> Tensor:
    """Long waves are stretched, short ones are not, and between the two it changes by degrees."""
    longest, shortest = rope.original_length / rope.low_freq_factor, rope.original_length / rope.high_freq_factor
    wave = 2 * math.pi / plain
    stretched = torch.where(wave > longest, plain / rope.factor, plain)
    share = (rope.original_length / wave - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    between = (1 - share) * stretched / rope.factor + share * stretched
    return torch.where(~(wave < shortest) * ~(wave > longest), between, stretched)


def _yarn(rope: Rope, head_dim: int, powers: Tensor) -> Tensor:
    """Channels that turn often over the original length keep their speed, those that turn seldom are stretched."""

    def channel(turns: float) -> float:
        return head_dim * math.log(rope.original_length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = channel(rope.beta_fast), channel(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    return 1.0 / (rope.factor * powers) * (1 - kept) + 1.0 / powers * kept


def rotary_tables(rope: Rope, head_dim: int, positions: int) -> tuple[Tensor, Tensor]:
    """Return cos and sin, each float32 [positions, head_dim / 2], times the kind's attention factor."""
    steps = torch.arange(positions, dtype=torch.float32)
    angles = steps[:, None] * inverse_frequencies(rope, head_dim)
    return angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor


def model_tables(config: ModelConfig) -> dict[str, Tensor]:
    """Return all tables of a model, of max_position_embeddings positions, by the names of `table_names`."""
    found: dict[str, Tensor] = {}
    for which, names in table_names(config).items():
        tables = rotary_tables(config.ropes[which], config.head_dim, config.max_position_embeddings)
        found |= zip(names, tables, strict=True)
    return found
