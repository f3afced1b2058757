"""torchao's tensors in safetensors, whose types are in the files' headers; older ones are pickles.

| type                     | _weight_qdata             | _weight_scale   | _weight_zero_point | weight               |
|--------------------------|---------------------------|-----------------|--------------------|----------------------|
| Int8Tensor               | int8 [N, K]               | float [N, G]    | int8 [N, G]        | (q - z) * s          |
| IntxUnpackedToInt8Tensor | int8 [N, K], of few bits  | float [N, G]    | int8 [N, G]        | (q - z) * s          |
| Int4Tensor               | int8 [N, K / 2], the lower 4 bits first, signed | float [G, N] | float [G, N] | q * s + z |

Source: torchao 0.18, quantization/quantize_/workflows and prototype/safetensors; fbgemm for Int4Tensor's zero point.
"""

from __future__ import annotations

import json
import re
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
    unsigned,
)
from olmo2_export.weights.stored_tensors import TensorInfo
from runtimes.errors import CheckpointError, ConfigError

_PARTS = ("qdata", "scale", "zero_point")
_BITS = (4, 8)


def find_torchao(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> dict[str, StoredLinear]:
    """Return the linears of a checkpoint, by their weights' names.

    Raises:
        ConfigError: a type of tensor that is not read.
        CheckpointError: tensors whose shapes do not go together, or no word of their types.
    """
    found = {}
    for name in tensors:
        if not name.endswith("._weight_qdata"):
            continue
        weight = f"{name.removesuffix('_weight_qdata')}weight"
        described = _described(weight, metadata)
        parts = {part: f"{name.removesuffix('qdata')}{part}" for part in _PARTS}
        parts = {part: stored for part, stored in parts.items() if stored in tensors}
        shapes = [tensors[stored].shape for stored in parts.values()]
        if len(parts) < len(_PARTS) and not (described["_type"] == "Int8Tensor" and "scale" in parts):
            raise CheckpointError(f"torchao: {weight}: expected _weight_ + {', '.join(_PARTS)}; {REMEDY}")
        if any(len(shape) != 2 for shape in shapes):
            raise CheckpointError(f"torchao: {weight}: expected matrices, found {shapes}; {REMEDY}")
        found[weight] = _linear(weight, described, parts, shapes)
    return found


def _described(weight: str, metadata: Mapping[str, str]) -> Mapping[str, Any]:
    try:
        described = json.loads(metadata.get(weight) or metadata[weight.removeprefix("model.")])
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"torchao: {weight}: the file's header does not say its type; download the files, or save them "
            "with torchao 0.15 or later"
        ) from error
    if not isinstance(described, dict) or not isinstance(described.get("_data"), dict):
        raise CheckpointError(f"torchao: {weight}: the file's header says {str(described)[:60]}; {REMEDY}")
    return described


def _linear(
    weight: str, described: Mapping[str, Any], parts: Mapping[str, str], shapes: list[tuple[int, ...]]
) -> StoredLinear:
    kind, data = described.get("_type"), described["_data"]
    (rows, columns), scale = shapes[0], shapes[1]
    size = (data.get("block_size") or [1, columns])[-1]
    match kind:
        case "Int8Tensor":
            bits = 8
        case "IntxUnpackedToInt8Tensor":
            word = re.search(r"int(\d+)", str(data.get("target_dtype")))
            bits = int(word[1]) if word else 0
        case "Int4Tensor":
            return StoredLinear((rows, columns * 2), None, parts, _decode_floats)
        case _:
            raise ConfigError(
                f"torchao as {kind}, read are Int8Tensor, IntxUnpackedToInt8Tensor and Int4Tensor; {REMEDY}"
            )
    if bits not in _BITS:
        raise ConfigError(f"torchao: {weight} of {bits} bits, read are 4 and 8; {REMEDY}")
    if scale[0] != rows or any(shape != scale for shape in shapes[2:]):
        raise CheckpointError(f"torchao: {weight}: expected scales and zero points [{rows}, groups]; {REMEDY}")
    width = group_columns(columns, size, scale[1])
    return StoredLinear((rows, columns), bits, parts, partial(_decode, bits=bits, size=size), group=width)


def _decode(arrays: Arrays, bits: int, size: object) -> Codes:
    codes, scales = unsigned(arrays["qdata"], bits), np.ascontiguousarray(arrays["scale"], np.float32)
    zeros = arrays.get("zero_point", np.zeros(scales.shape, np.int8))
    if zeros.dtype != np.int8 and (zeros != np.rint(zeros)).any():
        raise CheckpointError(f"zero points that are no integers; {REMEDY}")
    groups = even_groups(codes.shape[1], size, scales.shape[1])
    return Codes(bits, codes, scales, unsigned(zeros, bits), groups)


def _decode_floats(arrays: Arrays) -> np.ndarray:
    octets = arrays["qdata"].view(np.int8)
    codes = np.stack([octets << 4 >> 4, octets >> 4], axis=-1).reshape(len(octets), -1).astype(np.float32)
    scales, zeros = (np.ascontiguousarray(arrays[part].T, np.float32) for part in ("scale", "zero_point"))
    if codes.shape[1] % max(1, scales.shape[1]) or scales.shape != zeros.shape or len(scales) != len(codes):
        raise CheckpointError(f"scales {list(scales.shape)} of a weight {list(codes.shape)}; {REMEDY}")
    size = codes.shape[1] // scales.shape[1]
    weight: np.ndarray = codes * scales.repeat(size, axis=1) + zeros.repeat(size, axis=1)
    return weight
