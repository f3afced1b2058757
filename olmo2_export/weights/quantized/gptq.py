"""GPTQ, as AutoGPTQ, GPTQModel and auto-round store it.

| tensor  | dtype, shape             | holds                                                              |
|---------|--------------------------|--------------------------------------------------------------------|
| qweight | int32 [K * bits / 32, N] | codes: a word has inputs that follow each other, the lowest first  |
| qzeros  | int32 [G, N * bits / 32] | zero points: a word has outputs; in the first format each less one |
| scales  | float16 [G, N]           |                                                                    |
| g_idx   | int32 [K]                | the group of each input; not sorted with desc_act                  |

The first format took 1 from the word, with its borrows: 1 is added to the word, with carry, and not to each integer.

Source: GPTQModel 7.7, gptqmodel/nn_modules/qlinear/torch.py and utils/model.py, convert_gptq_v1_to_v2_format.
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
    given_groups,
    group_columns,
    refuse_rules,
    unpack,
)
from olmo2_export.weights.stored_tensors import TensorInfo
from runtimes.errors import CheckpointError, ConfigError

BITS = (4, 8)
_ONES = {4: 0x11111111, 8: 0x01010101}
_FORMATS = ("gptq", "gptq_v2")


def find_gptq(table: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> dict[str, StoredLinear]:
    """Return the linears of a checkpoint, by their weights' names.

    Raises:
        ConfigError: what this version does not read.
        CheckpointError: tensors whose shapes do not go together.
    """
    bits, words = table.get("bits"), table.get("pack_dtype") or "int32"
    form = table.get("checkpoint_format") or table.get("format") or "gptq"
    if table.get("is_marlin_format") or form not in _FORMATS:
        shown = "marlin" if table.get("is_marlin_format") else form
        raise ConfigError(f"GPTQ in the layout {shown}, read are {' and '.join(_FORMATS)}; {REMEDY}")
    if bits not in BITS:
        raise ConfigError(f"GPTQ of {bits!r} bits, read are 4 and 8; {REMEDY}")
    if words != "int32":
        raise ConfigError(f"GPTQ with pack_dtype {words}, read is int32; {REMEDY}")
    refuse_rules(table)
    size, symmetric = table.get("group_size"), bool(table.get("sym", True))
    found = {}
    for name in tensors:
        if not name.endswith(".qweight"):
            continue
        stem = name.removesuffix("qweight")
        parts = {part: stem + part for part in ("qweight", "qzeros", "scales", "g_idx") if stem + part in tensors}
        packed, scales = tensors[name], tensors.get(f"{stem}scales")
        if scales is None or "qzeros" not in parts or len(packed.shape) != 2 or packed.dtype != "I32":
            raise CheckpointError(f"{name}: expected int32 [K / {32 // bits}, N], qzeros and scales beside it")
        columns, rows = packed.shape[0] * 32 // bits, packed.shape[1]
        index = tensors.get(f"{stem}g_idx")
        groups = scales.shape[0] if scales.shape else 0
        same = index is None or index.shape == (columns,)
        if scales.shape != (groups, rows) or tensors[parts["qzeros"]].shape != (groups, rows * bits // 32) or not same:
            raise CheckpointError(f"{stem}*: shapes that are not of one linear of {bits} bits: mixed bits? {REMEDY}")
        if table.get("desc_act") and index is None:
            raise CheckpointError(f"{stem}g_idx is missing, which desc_act needs: download the checkpoint again")
        if type(size) is int and size > 0 and groups != -(-columns // size):
            raise CheckpointError(f"{stem}scales: {groups} groups of {columns} inputs, config.json says {size} each")
        decode = partial(_decode, bits=bits, size=size, first_format=form == "gptq")
        width = group_columns(columns, size, groups)
        found[f"{stem}weight"] = StoredLinear((rows, columns), bits, parts, decode, group=width, symmetric=symmetric)
    return found


def _decode(arrays: Arrays, bits: int, size: object, *, first_format: bool) -> Codes:
    zeros = arrays["qzeros"].view(np.uint32)
    if first_format:
        zeros = zeros + np.uint32(_ONES[bits])  # with carry from one integer to the next, and out of the word
    codes = unpack(arrays["qweight"].T, bits)
    scales = np.ascontiguousarray(arrays["scales"].T.astype(np.float32))
    index = arrays.get("g_idx")
    columns, count = codes.shape[1], scales.shape[1]
    return Codes(
        bits=bits,
        codes=codes,
        scales=scales,
        zero_points=np.ascontiguousarray(unpack(zeros.view(np.int32), bits).T),
        groups=even_groups(columns, size, count) if index is None else given_groups(index, size, count),
    )
