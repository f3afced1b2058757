"""bitsandbytes: int8 with a scale per row, and the code books nf4 and fp4.

| form     | tensor                   | dtype, shape         | holds                                         |
|----------|--------------------------|----------------------|-----------------------------------------------|
| int8     | weight                   | int8 [N, K]          | codes; weight = code * SCB / 127              |
|          | SCB                      | float32 [N]          | the largest magnitude of a row                |
|          | weight_format            | uint8 []             | 0: row after row                              |
| nf4, fp4 | weight                   | uint8 [N * K / 2, 1] | places in quant_map, the higher 4 bits first  |
|          | weight.absmax            | float32, or uint8    | of each block of 64, which may cross rows     |
|          | weight.quant_map         | float32 [16]         |                                               |
|          | weight.nested_absmax     | float32              | of absmax in uint8, and nested_quant_map      |
|          | weight.quant_state.*     | uint8                | JSON: shape, blocksize, nested_offset, ...    |

int8: the library multiplies code * SCB * 0.00787401571, in that order, with a rounding after each; here the scale is
rounded first, as blocks need it. The two differ by one unit in the last place of float32, 1.2e-7 of the weight.

Source: bitsandbytes 0.50, functional.py: int8_vectorwise_dequant, dequantize_4bit, QuantState.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from olmo2_export.weights.quantized.codes import REMEDY, Arrays, Codes, StoredLinear, unsigned
from olmo2_export.weights.stored_tensors import TensorInfo
from runtimes.errors import CheckpointError, ConfigError

_STATE = ".quant_state.bitsandbytes__"
_KINDS = ("nf4", "fp4")
_ONE_127TH = np.float32(7.874015718698502e-3)


def find_bitsandbytes(
    tensors: Mapping[str, TensorInfo], read: Callable[[str], np.ndarray] | None
) -> dict[str, StoredLinear]:
    """Return the linears of a checkpoint, by their weights' names.

    Raises:
        ConfigError: a form that is not read.
        CheckpointError: tensors whose shapes do not go together, or that are not here.
    """
    found = {}
    for name, info in tensors.items():
        if not name.endswith(".weight"):
            continue
        stem = name.removesuffix("weight")
        if info.dtype == "I8":
            parts = {part: stem + part for part in ("weight", "SCB", "weight_format") if stem + part in tensors}
            scale = tensors.get(f"{stem}SCB")
            if scale is None or len(info.shape) != 2 or scale.shape != info.shape[:1]:
                raise CheckpointError(f"bitsandbytes: {name}: expected a matrix and SCB [{info.shape[0]}]; {REMEDY}")
            found[name] = StoredLinear((info.shape[0], info.shape[1]), 8, parts, _decode_int8)
        elif info.dtype == "U8":
            found[name] = _book(name, tensors, read)
    return found


def _decode_int8(arrays: Arrays) -> Codes:
    if int(arrays.get("weight_format", np.zeros(1)).reshape(-1)[0]) != 0:
        raise CheckpointError(f"weight_format {arrays['weight_format'].item()}, read is 0, row after row; {REMEDY}")
    rows, columns = arrays["weight"].shape
    scales = arrays["SCB"].astype(np.float32)[:, None] * _ONE_127TH
    zeros = np.full((rows, 1), 128, np.uint8)
    return Codes(8, unsigned(arrays["weight"], 8), scales, zeros, np.zeros(columns, np.int64))


def _book(name: str, tensors: Mapping[str, TensorInfo], read: Callable[[str], np.ndarray] | None) -> StoredLinear:
    states = [tensor for tensor in tensors if tensor.startswith(name + _STATE)]
    if len(states) != 1 or states[0].removeprefix(name + _STATE) not in _KINDS:
        shown = states[0].removeprefix(name) if states else "no quant_state"
        raise ConfigError(f"bitsandbytes: {name}: {shown}, read are {' and '.join(_KINDS)}; {REMEDY}")
    if read is None:
        raise CheckpointError(f"bitsandbytes: {name}: its shape is in the files, not in their headers; download them")
    try:
        state = json.loads(bytes(read(states[0]).tolist()))
        rows, columns = (int(size) for size in state["shape"])
        block, nested = int(state["blocksize"]), state.get("nested_blocksize")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{states[0]}: not the JSON of a quant_state; {REMEDY}") from error
    parts = {part: f"{name}.{part}" for part in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")}
    parts = {"weight": name} | {part: stored for part, stored in parts.items() if stored in tensors}
    sizes = tensors[name].size, tensors[parts["absmax"]].shape if "absmax" in parts else ()
    if "quant_map" not in parts or block < 1 or sizes != (rows * columns // 2, (-(-rows * columns // block),)):
        raise CheckpointError(f"bitsandbytes: {name}: tensors that are not of {rows} by {columns} weights; {REMEDY}")
    shape, offset = (rows, columns), float(state.get("nested_offset") or 0.0)
    decode = partial(_decode_book, shape=shape, block=block, nested=int(nested or 0), offset=offset)
    return StoredLinear(shape, None, parts, decode, (states[0],))


def _decode_book(arrays: Arrays, shape: tuple[int, int], block: int, nested: int, offset: float) -> np.ndarray:
    largest = arrays["absmax"]
    if largest.dtype == np.uint8:
        if "nested_absmax" not in arrays or "nested_quant_map" not in arrays or nested < 1:
            raise CheckpointError(f"absmax in 8 bits, without nested_absmax, nested_quant_map; {REMEDY}")
        scales = arrays["nested_absmax"].repeat(nested)[: len(largest)]
        largest = arrays["nested_quant_map"][largest] * scales + np.float32(offset)
    octets = arrays["weight"].reshape(-1)
    values = arrays["quant_map"][np.stack([octets >> 4, octets & 15], axis=-1).reshape(-1)]
    weight: np.ndarray = (values * largest.astype(np.float32).repeat(block)[: len(values)]).reshape(shape)
    return weight
