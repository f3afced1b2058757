"""AWQ in the layout gemm, as AutoAWQ, GPTQModel, llm-awq's users and auto-round store it.

| tensor  | dtype, shape        | holds                                                             |
|---------|---------------------|-------------------------------------------------------------------|
| qweight | int32 [K, N / 8]    | codes: integer i of a word is output 8 c + (0,2,4,6,1,3,5,7)[i]   |
| qzeros  | int32 [G, N / 8]    | zero points, in the same order                                    |
| scales  | float16, bfloat16 [G, N] |                                                              |

Source: AutoAWQ 0.2.9, awq/utils/packing_utils.py; its own order, and no 1 to add to a zero point.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from olmo2_export.weights.quantized.codes import (
    REMEDY,
    Arrays,
    Codes,
    StoredLinear,
    even_groups,
    group_columns,
    refuse_rules,
    unpack,
)
from olmo2_export.weights.stored_tensors import TensorInfo
from runtimes.errors import CheckpointError, ConfigError

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_BITS = 4


def find_awq(table: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> dict[str, StoredLinear]:
    """Return the linears of a checkpoint, by their weights' names.

    Raises:
        ConfigError: another layout, or other bits.
        CheckpointError: tensors whose shapes do not go together.
    """
    form = str(table.get("version") or table.get("format") or "gemm").lower()
    bits = table.get("bits", table.get("w_bit", _BITS))
    if form != "gemm":
        raise ConfigError(f"AWQ in the layout {form}, read is gemm; {REMEDY}")
    if bits != _BITS:
        raise ConfigError(f"AWQ of {bits} bits, read is 4; {REMEDY}")
    refuse_rules(table)
    size = table.get("group_size", table.get("q_group_size"))
    symmetric = bool(table.get("sym", not table.get("zero_point", True)))
    found = {}
    for name in tensors:
        if not name.endswith(".qweight"):
            continue
        stem = name.removesuffix("qweight")
        parts = {part: stem + part for part in ("qweight", "qzeros", "scales")}
        packed, zeros, scales = (tensors.get(part) for part in parts.values())
        if packed is None or zeros is None or scales is None or len(packed.shape) != 2 or packed.dtype != "I32":
            raise CheckpointError(f"{name}: expected int32 [K, N / 8], qzeros and scales beside it")
        columns, rows = packed.shape[0], packed.shape[1] * 8
        groups = scales.shape[0] if scales.shape else 0
        if scales.shape != (groups, rows) or zeros.shape != (groups, packed.shape[1]):
            raise CheckpointError(f"{stem}*: shapes that are not of one linear of {_BITS} bits; {REMEDY}")
        decode, width = partial(_decode, size=size), group_columns(columns, size, groups)
        found[f"{stem}weight"] = StoredLinear((rows, columns), _BITS, parts, decode, group=width, symmetric=symmetric)
    return found


def _decode(arrays: Arrays, size: object) -> Codes:
    codes, zeros = (np.ascontiguousarray(_in_order(arrays[part]).T) for part in ("qweight", "qzeros"))
    scales = np.ascontiguousarray(arrays["scales"].T.astype(np.float32))
    return Codes(_BITS, codes, scales, zeros, even_groups(codes.shape[1], size, scales.shape[1]))


def _in_order(words: np.ndarray) -> np.ndarray:
    """int32 [R, W] -> uint8 [R, W * 8], by output"""
    stored = unpack(words, _BITS).reshape(len(words), -1, len(_ORDER))
    result = np.empty_like(stored)
    result[..., list(_ORDER)] = stored
    return result.reshape(len(words), -1)
