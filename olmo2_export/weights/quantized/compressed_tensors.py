"""compressed-tensors, as llm-compressor stores it, in integers.

| format         | tensor            | dtype, shape                                                                  |
|----------------|-------------------|-------------------------------------------------------------------------------|
| pack-quantized | weight_packed     | int32 [N, K * bits / 32], the lowest first: the signed code + 2^(bits - 1)     |
|                | weight_scale      | float [N, G], or [N, 1] of a whole row                                        |
|                | weight_shape      | int64 [2]: N, K                                                               |
|                | weight_zero_point | int32 [N * bits / 32, G], packed along N, likewise moved; or signed [N, G]    |
|                | weight_g_idx      | int32 [K], with actorder group                                                |
| int-quantized  | weight            | int8 [N, K]                                                                   |
|                | weight_scale      | float [N, G], or [N, 1]                                                       |
|                | weight_zero_point | int8 [N, G]                                                                   |

Source: compressed-tensors 0.20, compressors/quantized_compressors/pack_quantized.py and naive_quantized.py.
"""

from __future__ import annotations

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
    given_groups,
    group_columns,
    unpack,
    unsigned,
)
from olmo2_export.weights.stored_tensors import TensorInfo
from runtimes.errors import CheckpointError, ConfigError

_FORMATS = ("pack-quantized", "int-quantized", "naive-quantized")
_BITS = (4, 8)
_UNUSED = ("input_scale", "input_zero_point", "output_scale", "output_zero_point", "input_global_scale")


def find_compressed(table: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> dict[str, StoredLinear]:
    """Return the linears of a checkpoint, by their weights' names.

    Raises:
        ConfigError: a scheme that changes more than weights, or is none of integers.
        CheckpointError: tensors whose shapes do not go together.
    """
    for name in ("kv_cache_scheme", "transform_config"):
        if table.get(name):
            raise ConfigError(f"compressed-tensors with {name}, which no graph here computes; {REMEDY}")
    sparsity = table.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format") not in (None, "dense"):
        raise ConfigError(f"compressed-tensors with sparsity_config {sparsity['format']}, read is dense; {REMEDY}")
    groups = table.get("config_groups")
    if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
        raise ConfigError(f"compressed-tensors without config_groups; {REMEDY}")
    for group in groups.values():
        _check_group(group, group.get("format") or table.get("format"))
    found = {}
    for name in tensors:
        stem = name.removesuffix("weight_packed") if name.endswith(".weight_packed") else name.removesuffix("weight")
        packed = name.endswith(".weight_packed")
        if not packed and not (name.endswith(".weight") and tensors[name].dtype == "I8"):
            continue
        weights = _of_module(groups, stem.removesuffix("."))
        found[f"{stem}weight"] = _linear(stem, tensors, weights, packed=packed)
    return found


def rounded_inputs(table: Mapping[str, Any]) -> bool:
    """Tell whether the library rounds the inputs of products, too."""
    groups = table.get("config_groups")
    return isinstance(groups, Mapping) and any(
        isinstance(group, Mapping) and (group.get("input_activations") or group.get("output_activations"))
        for group in groups.values()
    )


def _check_group(group: Mapping[str, Any], form: Any) -> None:
    weights = group.get("weights")
    if form not in _FORMATS:
        raise ConfigError(f"compressed-tensors in the format {form}, read are {', '.join(_FORMATS)}; {REMEDY}")
    if not isinstance(weights, Mapping) or weights.get("type", "int") != "int" or weights.get("num_bits") not in _BITS:
        shown = weights if not isinstance(weights, Mapping) else f"{weights.get('type')}{weights.get('num_bits')}"
        raise ConfigError(f"compressed-tensors with weights of {shown}, read are int4 and int8; {REMEDY}")
    if weights.get("strategy") not in ("group", "channel"):
        raise ConfigError(
            f"compressed-tensors with strategy {weights.get('strategy')}, read are group and channel; {REMEDY}"
        )


def _of_module(groups: Mapping[str, Mapping[str, Any]], module: str) -> Mapping[str, Any]:
    """Return how the weights of a module are quantised: of the first group that names it, or all linears."""

    def named(target: str) -> bool:
        return bool(re.match(target[3:], module)) if target.startswith("re:") else target == module

    targets = [(group, [str(target) for target in group.get("targets") or ()]) for group in groups.values()]
    found = [group for group, names in targets if any(map(named, names))]
    found += [group for group, names in targets if "Linear" in names]
    if not found:
        raise ConfigError(
            f"compressed-tensors: {module} is quantised, and no group of config_groups names it; {REMEDY}"
        )
    weights: Mapping[str, Any] = found[0]["weights"]
    return weights


def _linear(stem: str, tensors: Mapping[str, TensorInfo], weights: Mapping[str, Any], *, packed: bool) -> StoredLinear:
    bits = weights["num_bits"]
    size = weights.get("group_size") if weights["strategy"] == "group" else None
    names = (
        "weight_packed" if packed else "weight",
        "weight_scale",
        "weight_zero_point",
        "weight_g_idx",
        "weight_shape",
    )
    parts = {part: stem + part for part in names if stem + part in tensors}
    codes, scale = tensors[parts[names[0]]], tensors.get(f"{stem}weight_scale")
    rows, width = codes.shape if len(codes.shape) == 2 else (0, 0)
    columns = width * 32 // bits if packed else width
    if scale is None or len(scale.shape) != 2 or scale.shape[0] != rows or not 1 <= scale.shape[1] <= columns:
        raise CheckpointError(f"{stem}{names[0]}: expected a matrix, and weight_scale [N, groups] beside it; {REMEDY}")
    needed = {
        "weight_g_idx": weights.get("actorder") == "group",
        "weight_zero_point": weights.get("symmetric") is False,
    }
    if lost := [stem + part for part, is_needed in needed.items() if is_needed and part not in parts]:
        raise CheckpointError(f"{lost[0]} is missing, which config.json asks for: download the checkpoint again")
    unused = tuple(stem + part for part in _UNUSED if stem + part in tensors)
    decode, width = partial(_decode, bits=bits, size=size), group_columns(columns, size, scale.shape[1])
    symmetric = "weight_zero_point" not in parts
    return StoredLinear((rows, columns), bits, parts, decode, unused, width, symmetric)


def _decode(arrays: Arrays, bits: int, size: object) -> Codes:
    packed = "weight_packed" in arrays
    codes = unpack(arrays["weight_packed"], bits) if packed else unsigned(arrays["weight"], bits)
    rows, columns = codes.shape
    if packed and arrays.get("weight_shape", np.array(codes.shape)).tolist() != [rows, columns]:
        raise CheckpointError(f"weight_shape {arrays['weight_shape'].tolist()}, expected {[rows, columns]}; {REMEDY}")
    scales = np.ascontiguousarray(arrays["weight_scale"], np.float32)
    count, zeros = scales.shape[1], np.full(scales.shape, 1 << (bits - 1), np.uint8)
    if (stored := arrays.get("weight_zero_point")) is not None:
        whole = stored.dtype == np.int8 or stored.shape != (-(-rows * bits // 32), count)
        zeros = unsigned(stored, bits) if whole else np.ascontiguousarray(unpack(stored.T, bits).T[:rows])
    if zeros.shape != scales.shape:
        raise CheckpointError(f"weight_zero_point {list(zeros.shape)}, expected {list(scales.shape)}; {REMEDY}")
    index = arrays.get("weight_g_idx")
    if index is None or (index < 0).all():
        groups = even_groups(columns, size, count)
    else:
        groups = given_groups(index, size, count)
    return Codes(bits, codes, scales, zeros, groups)
