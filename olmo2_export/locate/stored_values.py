"""Compare what a graph stores, weights, scales and rotary tables, and name the first that is wrong; see `locate`."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import torch

from olmo2_export.config import ModelConfig
from olmo2_export.dtypes import float_dtype
from olmo2_export.graphs.stored_blocks import stored_matrices
from olmo2_export.locate.explain import relative_error
from olmo2_export.locate.layer_checks import TensorParity
from olmo2_export.measure.parity import Check
from olmo2_export.model.rotary import table_names
from olmo2_export.stored_graph import load_graph
from olmo2_export.truth.torch_layers import rotary_tables
from olmo2_export.views.shared_forms import stored_int8
from olmo2_export.views.static_forms import stored_input_scales, stored_linears
from olmo2_export.views.table import quantized_weights
from olmo2_export.views.weight_checks import (
    check_imported,
    check_int8,
    check_linears,
    check_matrices,
    in_stored_order,
    was_taken_over,
)
from olmo2_export.weights.checkpoint import Checkpoint
from olmo2_export.weights.stored_names import stored_weight
from runtimes import Package
from runtimes.manifest import Quantization, Variant

_TABLE_ERROR = float_dtype("bfloat16").roundoff  # of a number from -1 to 1


def tables_check(
    package: Package, entry: Variant, checkpoint: Checkpoint, config: ModelConfig
) -> tuple[TensorParity, str] | None:
    """Compare the stored rotary tables with transformers' at every position; return what is wrong."""
    stored = load_graph(package.folder / entry.graph).graph.initializers
    layers = {config.rope_of(layer): layer for layer in range(config.num_hidden_layers)}
    for which, names in table_names(config).items():
        tensors = [stored[name].const_value for name in names if name in stored]
        found = [torch.from_numpy(t.numpy().astype(np.float32)) for t in tensors if t is not None]
        if len(found) != len(names):
            continue
        wanted = rotary_tables(checkpoint.folder, layers[which], len(found[0]))
        for name, table, truth in zip(names, found, wanted, strict=True):
            wrong = (table - truth).abs().amax(dim=1) > _TABLE_ERROR * truth.abs().max()
            if bool(wrong.any()):
                first, count = int(wrong.int().argmax()), int(wrong.sum())
                words = f"The rotary table {name} is wrong at {count} of {len(truth)} positions, first at {first}."
                return TensorParity(name, None, "rotary table", relative_error(table, truth), 0.0), words
    return None


def weight_check(
    package: Package, entry: Variant, checkpoint: Checkpoint, config: ModelConfig
) -> tuple[TensorParity, str] | None:
    """Compare stored quantised weights with the checkpoint; return the first that is wrong, and what about it."""
    if entry.quantization is None:
        return None
    graph = load_graph(package.folder / entry.graph)
    weights = quantized_weights(graph, config, static=entry.kv_cache.form == "static")
    taken_over, ordered = was_taken_over(entry, checkpoint), in_stored_order(graph, checkpoint)
    if entry.kv_cache.form == "static":
        linears = stored_linears(graph, config)
        found = [check_linears(linears, checkpoint, config)]
        found += [check_imported(linears, checkpoint)] if taken_over else []
    else:
        matrices = stored_matrices(graph)
        found = [check_matrices(matrices, ordered, config)]
        found += [check_imported(matrices, ordered)] if taken_over else []
    checks: list[tuple[Check, Mapping[str, torch.Tensor]]] = [(check, weights) for check in found]
    if entry.prefill is not None:
        int8 = stored_int8(load_graph(package.folder / entry.prefill.graph))
        checks.append((check_int8(int8, checkpoint, config), int8))
    if entry.kv_cache.form == "static" and (wrong := _wrong_input_scale(graph, entry.quantization)) is not None:
        return wrong
    for check, stored in checks:
        if check.passed:
            continue
        name, _, words = check.failures[0].partition(": ")
        tensor = entry.quantization.tensors.get(name)
        parity = TensorParity(
            name,
            _layer_of(name),
            f"stored weight ({check.name})",
            relative_error(stored[name], stored_weight(ordered, config, name)),
            tensor.nmse**0.5 if tensor is not None else 0.0,
        )
        return parity, f"The stored weight {name} is not the checkpoint's: {words}."
    return None


def _wrong_input_scale(graph: ir.Model, quantization: Quantization) -> tuple[TensorParity, str] | None:
    """Compare the scales with which a graph rounds the inputs of linears with the manifest's."""
    stored, expected = stored_input_scales(graph), quantization.input_scales
    for name in sorted(stored.keys() | expected.keys()):
        found, wanted = stored.get(name), expected.get(name)
        if found != wanted:
            off = abs(found / wanted - 1) if found and wanted else 1.0
            parity = TensorParity(name, _layer_of(name), "quantisation of the input", off, 0.0)
            said = "is not rounded to 8 bits" if found is None else f"is rounded with the scale {found:.4g}"
            return parity, f"The input of {name} {said}; the manifest's scale is {wanted}."
    return None


def _layer_of(name: str) -> int | None:
    layer = re.search(r"layers\.(\d+)\.", name)
    return int(layer[1]) if layer else None
