"""The graphs that a variant is looked at through, and the weights that PyTorch computes each with; see `locate`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

import olmo2_export.catalog as catalog
from olmo2_export.config import ModelConfig
from olmo2_export.dtypes import HALVES, float_dtype
from olmo2_export.fuse.merge_projections import JOINT
from olmo2_export.graphs import shared as ort_graph
from olmo2_export.graphs.trace import ROTARY_TABLES
from olmo2_export.locate.explain import relative_error
from olmo2_export.locate.layer_checks import TensorParity
from olmo2_export.locate.segments import Opener, one_call, onnxruntime_opener, tensorrt_opener
from olmo2_export.quantize.linear import QuantizedLinear
from olmo2_export.stored_graph import load_graph
from olmo2_export.truth.reference import SCALED, Rounding, int8_blocks
from olmo2_export.truth.torch_layers import Weights, rotary_tables
from olmo2_export.verify.weight_checks import check_int8, check_linears, check_matrices
from olmo2_export.views import static_forms as trt_forms
from olmo2_export.views.static_forms import Lazy
from olmo2_export.weights.checkpoint import Checkpoint
from olmo2_export.weights.stored_names import stored_weight
from runtimes.errors import UsageError
from runtimes.manifest import Quantization, Variant
from runtimes.targets import Target
from runtimes.trt.nvidia import tensorrt_backend

EXACT, ROUNDED = 4.0, 2.0
"""most: error / PyTorch's own, of one operation on the graph's inputs. 4 is the fp32 gate of verify; where rounding to
fewer bits dominates, the same places are rounded, and less is ample"""
INT8 = "int8"
"""the view of a prefill graph"""
_TABLE_ERROR = float_dtype("bfloat16").roundoff  # of a number from -1 to 1
FIRST_CALL = 16
"""tokens of the one call of a TensorRT"""


@dataclasses.dataclass(frozen=True)
class View:
    """One form of a variant's graph, and what it is compared with."""

    label: str
    """exact | kernels | int8 | rounded; empty: the graph as it is"""
    model: ir.Model
    variant: Variant
    """its cache as this form has it"""
    opener: Opener
    weights: Weights
    precision: str
    """of PyTorch's own arithmetic: fp32 | bf16 | fp16"""
    factor: float
    rounding: Mapping[str, Rounding] = dataclasses.field(default_factory=dict)
    """of the inputs of linears, by weight"""
    first_call_only: bool = False

    @property
    def tables(self) -> torch.dtype:
        """of the rotary tables: GroupQueryAttention wants them in the precision of its queries"""
        stored = self.model.graph.initializers.get(ROTARY_TABLES[0])
        dtype = stored.dtype if stored is not None else None
        return torch.float32 if dtype is None else HALVES.get(dtype, torch.float32)


def variant_views(
    package: Path,
    entry: Variant,
    checkpoint: Checkpoint,
    config: ModelConfig,
    target: Target,
    opener: Opener | None = None,
) -> list[View]:
    """Return the views of a variant where it runs, the sharpest first; the other arguments as those of `locate`."""
    device = target.device
    graph = load_graph(package / entry.graph)
    static = entry.kv_cache.form == "static"
    quantized = _quantized_weights(graph, config, static=static) if entry.quantization is not None else {}
    weights = stored_weights(graph, checkpoint, config, quantized)
    stored = entry.kv_cache
    arithmetic = "fp32" if stored.quantization is not None else float_dtype(stored.dtype).precision
    scales = entry.quantization.input_scales if entry.quantization is not None else {}
    rounding = {name: SCALED[entry.precision](scale) for name, scale in scales.items()}
    if target.needs_engine:
        made = opener or tensorrt_opener(tensorrt_backend(target.backend))
        once = one_call(graph, FIRST_CALL)
        return [View("", once, entry, made, weights, arithmetic, ROUNDED, rounding=rounding, first_call_only=True)]
    made = opener or onnxruntime_opener(package / entry.graph, entry, device)
    if target.on_gpu:
        form = trt_forms.device_form(graph) if static and quantized else graph
        return [View("", form, entry, made, weights, arithmetic, ROUNDED, rounding=rounding)]
    if entry.kv_cache.form == "concat" or (arithmetic == "fp32" and static):
        return [View("", graph, entry, made, weights, "fp32", EXACT)]
    wide = dataclasses.replace(
        entry, kv_cache=dataclasses.replace(entry.kv_cache, dtype="float32", quantization=None), prefill=None
    )
    if static or catalog.is_for_devices(entry.name):
        exact = View("exact", trt_forms.exact_form(graph), wide, made, weights, "fp32", EXACT)
        as_is = arithmetic == "fp16" and not quantized
        form, variant = (graph, entry) if as_is else (trt_forms.rounded_form(graph), wide)
        return [exact, View("rounded", form, variant, made, weights, arithmetic, ROUNDED, rounding=rounding)]
    views = [View("exact", ort_graph.exact_form(graph), wide, made, weights, "fp32", EXACT)]
    if entry.kv_cache.quantization is not None:
        return views  # its numbers are codes; their scales are `verify`'s to check
    rounded = {name: int8_blocks(size) for name, size in ort_graph.block_sizes(graph).items()}
    views.append(View("kernels", graph, wide, made, weights, "fp32", ROUNDED, rounding=rounded))
    if entry.prefill is not None:
        path = package / entry.prefill.graph
        prefill = load_graph(path)
        int8 = stored_int8(prefill)
        both = Lazy({name: partial(m.__getitem__, name) for m in (quantized, int8) for name in m})
        views.append(
            View(
                INT8,
                prefill,
                wide,
                opener or onnxruntime_opener(path, wide, device),
                stored_weights(prefill, checkpoint, config, both),
                "fp32",
                ROUNDED,
                rounding=rounded | dict.fromkeys(int8, int8_blocks(0)),
            )
        )
    return views


def check_runs(entry: Variant, target: Target) -> None:
    """Refuse a variant that does not run there.

    Raises:
        UsageError: it does not.
    """
    static = entry.kv_cache.form == "static"
    if static or not target.on_gpu:
        return
    if target.needs_engine:
        raise UsageError(f"variant {entry.name}: backend {target.backend} runs the graphs for TensorRT, trt_*")
    if not catalog.is_for_devices(entry.name):
        raise UsageError(
            f"variant {entry.name}: device {target.device} runs {', '.join(catalog.names('device'))} and trt_*"
        )


def stored_weights(
    graph: ir.Model, checkpoint: Checkpoint, config: ModelConfig, quantized: Mapping[str, torch.Tensor]
) -> Weights:
    """Return what gives a weight as the graph should have it: dequantised, or the checkpoint's rounded to its dtype."""
    dtypes = {
        part: HALVES[value.dtype]
        for name, value in graph.graph.initializers.items()
        for part in name.split(JOINT)
        if value.dtype in HALVES
    }

    def weight(name: str) -> torch.Tensor:
        if name in quantized:
            return quantized[name]
        tensor = stored_weight(checkpoint, config, name)
        return tensor.to(dtypes[name]) if name in dtypes else tensor

    return weight


def stored_int8(graph: ir.Model) -> Lazy[torch.Tensor]:
    """Return the weights of a prefill graph, one at a time, as `graphs.shared.stored_int8` returns all."""
    initializers = graph.graph.initializers

    def load(name: str) -> torch.Tensor:
        codes, scales = initializers[f"{name}.int8"].const_value, initializers[f"{name}.channel_scales"].const_value
        assert codes is not None  # loaded from a file
        assert scales is not None
        return torch.from_numpy((codes.numpy().astype(np.float32) * scales.numpy()).T)

    names = [n.removesuffix(".int8") for n in initializers if n.endswith(".int8")]
    return Lazy({name: partial(load, name) for name in names})


def tables_check(package: Path, entry: Variant, checkpoint: Checkpoint) -> tuple[TensorParity, str] | None:
    """Compare the stored rotary tables with transformers' at every position; return what is wrong."""
    stored = load_graph(package / entry.graph).graph.initializers
    tensors = [stored[name].const_value for name in ROTARY_TABLES if name in stored]
    found = [torch.from_numpy(t.numpy().astype(np.float32)) for t in tensors if t is not None]
    if len(found) != len(ROTARY_TABLES):
        return None
    wanted = rotary_tables(checkpoint.folder, len(found[0]))
    for name, table, truth in zip(ROTARY_TABLES, found, wanted, strict=True):
        wrong = (table - truth).abs().amax(dim=1) > _TABLE_ERROR
        if bool(wrong.any()):
            first = int(wrong.int().argmax())
            words = (
                f"The rotary table {name} is wrong at {int(wrong.sum())} of {len(truth)} positions, first at {first}."
            )
            return TensorParity(name, None, "rotary table", relative_error(table, truth), 0.0), words
    return None


def _quantized_weights(graph: ir.Model, config: ModelConfig, *, static: bool) -> Mapping[str, torch.Tensor]:
    if static:
        linears = trt_forms.stored_linears(graph, config)
        return Lazy({name: partial(_dequantized_linear, linears, name) for name in linears})
    matrices = ort_graph.stored_matrices(graph)
    return Lazy({name: matrix.dequantize for name, matrix in matrices.items()})


def _dequantized_linear(linears: Lazy[QuantizedLinear], name: str) -> torch.Tensor:
    return linears[name].dequantize()


def weight_check(
    package: Path, entry: Variant, checkpoint: Checkpoint, config: ModelConfig
) -> tuple[TensorParity, str] | None:
    """Compare stored quantised weights with the checkpoint; return the first that is wrong, and what about it."""
    if entry.quantization is None:
        return None
    graph = load_graph(package / entry.graph)
    weights = _quantized_weights(graph, config, static=entry.kv_cache.form == "static")
    if entry.kv_cache.form == "static":
        checks = [(check_linears(trt_forms.stored_linears(graph, config), checkpoint, config), weights)]
    else:
        checks = [(check_matrices(ort_graph.stored_matrices(graph), checkpoint, config), weights)]
    if entry.prefill is not None:
        int8 = stored_int8(load_graph(package / entry.prefill.graph))
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
            relative_error(stored[name], stored_weight(checkpoint, config, name)),
            tensor.nmse**0.5 if tensor is not None else 0.0,
        )
        return parity, f"The stored weight {name} is not the checkpoint's: {words}."
    return None


def _wrong_input_scale(graph: ir.Model, quantization: Quantization) -> tuple[TensorParity, str] | None:
    """Compare the scales with which a graph rounds the inputs of linears with the manifest's."""
    stored, expected = trt_forms.stored_input_scales(graph), quantization.input_scales
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
