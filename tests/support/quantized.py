"""Checkpoints of few bits: integers chosen here, and packed as each library packs them, a bit at a time.

What a weight must be is computed from the integers themselves. torchao and bitsandbytes are not written here: what
they wrote is in `tests/data/quantized`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import make_checkpoint

SHAPE: dict[str, Any] = {
    "vocab_size": 21,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 20,
    "eos_token_id": 20,
    "pad_token_id": 19,
}
"""K is 64 or 128, N 32, 64 or 128: whole words of every format"""
LINEARS = {
    **{f"self_attn.{name}_proj": "attention" for name in "qkv"},
    "self_attn.o_proj": "o",
    "mlp.gate_proj": "mlp",
    "mlp.up_proj": "mlp",
    "mlp.down_proj": "down",
}
"""a linear of a layer -> what it reads: those of one input have one act-order"""


@dataclass(frozen=True)
class Integers:
    """One linear, as its format is told to hold it."""

    bits: int
    codes: np.ndarray
    """int64 [N, K], from 0"""
    zeros: np.ndarray
    """int64 [N, G], from 0"""
    scales: np.ndarray
    """float32 [N, G], numbers that float16 and bfloat16 have"""
    groups: np.ndarray
    """int64 [K]"""

    @property
    def weight(self) -> np.ndarray:
        """float32 [N, K]: exact, as scales have 7 bits"""
        exact = (self.codes - self.zeros[:, self.groups]) * self.scales[:, self.groups].astype(np.float64)
        return exact.astype(np.float32)


Writer = Callable[[Integers], dict[str, np.ndarray]]
"""integers -> tensors, by what follows the linear's name; scales are float32 and stored in 16 bits"""


def integers(
    rows: int, columns: int, seed: int, *, bits: int, group: int, symmetric: bool, order: int | None
) -> Integers:
    """Draw a linear; `order` is a seed for the groups of its columns, None: neighbours share one."""
    random = np.random.default_rng(seed)
    size = group if group > 0 else columns
    count = columns // size
    scales = random.integers(64, 128, (rows, count)) * 2.0 ** (-bits - 7)
    zeros = np.full((rows, count), 1 << (bits - 1))
    if not symmetric:
        zeros = random.integers(0, 1 << bits, (rows, count))
        zeros[0, 0], zeros[-1, -1] = 0, (1 << bits) - 1
    groups = np.arange(columns) // size
    if order is not None:
        np.random.default_rng(order).shuffle(groups)
    codes = random.integers(0, 1 << bits, (rows, columns))
    return Integers(bits, codes, zeros, scales.astype(np.float32), groups)


def words(values: np.ndarray, bits: int) -> np.ndarray:
    """[R, M] -> int32 [R, M * bits / 32]: the first value in the lowest bits."""
    per = 32 // bits
    packed = [[sum(int(v) << (bits * i) for i, v in enumerate(row[at : at + per])) for at in range(0, len(row), per)]
              for row in values]  # fmt: skip
    return np.array(packed, np.uint64).astype(np.uint32).view(np.int32)


def gptq(of: Integers, *, first_format: bool = True) -> dict[str, np.ndarray]:
    """As AutoGPTQ and GPTQModel store it; the first format takes 1 from each word of zero points, with borrows."""
    zeros = words(of.zeros.T, of.bits)
    if first_format:
        one = sum(1 << (of.bits * i) for i in range(32 // of.bits))
        zeros = ((zeros.view(np.uint32).astype(np.int64) - one) % (1 << 32)).astype(np.uint32).view(np.int32)
    return {
        "qweight": np.ascontiguousarray(words(of.codes, of.bits).T),
        "qzeros": zeros,
        "scales": of.scales.T,
        "g_idx": of.groups.astype(np.int32),
    }


def awq(of: Integers) -> dict[str, np.ndarray]:
    """As AutoAWQ's gemm: the outputs of a word are 0, 2, 4, 6, 1, 3, 5, 7."""

    def packed(values: np.ndarray) -> np.ndarray:
        eights = values.reshape(len(values), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]]
        return words(eights.reshape(len(values), -1), 4)

    return {"qweight": packed(of.codes.T), "qzeros": packed(of.zeros.T), "scales": of.scales.T}


def pack_quantized(of: Integers, *, packed_zeros: bool = True) -> dict[str, np.ndarray]:
    """As compressed-tensors packs integers along K, and zero points along N, or not at all."""
    middle = 1 << (of.bits - 1)
    tensors = {
        "weight_packed": words(of.codes, of.bits),
        "weight_scale": of.scales,
        "weight_shape": np.array(of.codes.shape, np.int64),
    }
    if (of.zeros != middle).any():
        whole = (of.zeros - middle).astype(np.int8)
        tensors["weight_zero_point"] = np.ascontiguousarray(words(of.zeros.T, of.bits).T) if packed_zeros else whole
    if (np.diff(of.groups) < 0).any():
        tensors["weight_g_idx"] = of.groups.astype(np.int32)
    return tensors


def int_quantized(of: Integers) -> dict[str, np.ndarray]:
    """As compressed-tensors stores whole bytes."""
    return {"weight": (of.codes - (1 << (of.bits - 1))).astype(np.int8), "weight_scale": of.scales}


def compressed(form: str, bits: int, *, group: int, symmetric: bool, **changed: Any) -> dict[str, Any]:
    """Return a quantization_config of compressed-tensors; `changed` are fields of its weights."""
    weights = {
        "num_bits": bits,
        "type": "int",
        "strategy": "group" if group > 0 else "channel",
        "group_size": group if group > 0 else None,
        "symmetric": symmetric,
        "actorder": None,
        **changed,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


def make_base(out: Path, **fields: Any) -> Path:
    """Write the plain checkpoint, float32."""
    return make_checkpoint(out, **(SHAPE | fields))


def make_quantized(
    out: Path,
    base: Path,
    config: Mapping[str, Any],
    write: Writer,
    *,
    bits: int = 4,
    group: int = 32,
    symmetric: bool = True,
    act_order: bool = False,
    scales: torch.dtype = torch.float16,
    only: Sequence[str] = tuple(LINEARS),
) -> dict[str, np.ndarray]:
    """Write a quantised checkpoint; return what its weights are, by name.

    Args:
        out: the folder.
        base: the checkpoint that the rest is taken from.
        config: its quantization_config.
        write: packs a linear.
        bits, group, symmetric, act_order: of the integers; see `integers`.
        scales: the dtype that they are stored in.
        only: the linears that are quantised.
    """
    out.mkdir(parents=True)
    stored = load_file(base / "model.safetensors")
    weights: dict[str, np.ndarray] = {}
    for seed, linear in enumerate(only):
        name = f"model.layers.0.{linear}"
        rows, columns = stored.pop(f"{name}.weight").shape
        order = sorted(set(LINEARS.values())).index(LINEARS[linear]) if act_order else None
        drawn = integers(rows, columns, seed, bits=bits, group=group, symmetric=symmetric, order=order)
        weights[f"{name}.weight"] = drawn.weight
        for part, array in write(drawn).items():
            tensor = torch.from_numpy(np.ascontiguousarray(array))
            stored[f"{name}.{part}"] = tensor.to(scales) if array.dtype == np.float32 else tensor
    save_file(stored, out / "model.safetensors", {"format": "pt"})
    raw = json.loads((base / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(raw | {"quantization_config": dict(config)}))
    return weights
