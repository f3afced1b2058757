"""The views of a variant: the forms of its graphs that a machine runs, and what PyTorch must compute for each.

| variant               | view       | what runs                              | PyTorch weights  | precision | gate    |
|-----------------------|------------|----------------------------------------|------------------|-----------|---------|
| fp32, trt_fp32        | as stored  | the graph                              | the checkpoint's | fp32      | fp32    |
| bf16, fp16            | exact      | activations and cache in float32       | the same **      | fp32      | fp32    |
|                       | rounded    | the graph; bf16: rounded in float32    | the checkpoint's | its own   | its own |
| q4f16                 | exact      | activations and cache in float32       | dequantised      | fp32      | fp32    |
|                       | rounded    | the graph                              | the same         | fp16      | fp16    |
| q4, q8                | exact      | the decode graph, nothing rounded      | dequantised      | fp32      | fp32    |
|                       | kernels    | the decode graph, inputs in 8 bits     | the same         | fp32 *    | kernels |
|                       | portable * | both of these, of the portable graph   | the same         | the same  | as they |
|                       | cache N *  | all of these, of the graphs with the   | the same         | the same  | as they |
|                       |            | KV cache N, which is not the default   |                  |           |         |
|                       | int8 exact | the prefill graph, nothing rounded     | its int8 weights | fp32      | fp32    |
|                       | int8       | the prefill graph                      | the same         | fp32 *    | kernels |
| trt_fp16, trt_bf16    | exact      | in float32, the stored weights         | as stored        | fp32      | fp32    |
|                       | rounded    | the graph; bf16: rounded in float32    | the checkpoint's | its own   | its own |
| trt_int4, _int8, _fp8 | exact      | in float32, inputs not quantised       | as stored        | fp32      | fp32    |
|                       | rounded    | rounded where the graph has fewer bits | the same         | bf16 *    | kernels |
| any, on a GPU         | as stored  | the graph; quantised static: device    | as in `rounded`  | its own * | its own |
| trt_*, on a TensorRT  | as stored  | its engine, or the graph's first call  | as in `rounded`  | its own * | its own |

* PyTorch rounds the inputs of linears as the variant does. ** Rounded as the graph stores them; `locate` alone looks.

The exact view finds bugs that rounding hides; what the views of one file agree on because they read it from the same
bytes, `weight_checks` finds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import onnx_ir as ir
import torch

import olmo2_export.catalog as catalog
from olmo2_export.config import ModelConfig
from olmo2_export.dtypes import HALVES, float_dtype
from olmo2_export.fuse.merge_projections import JOINT
from olmo2_export.graphs.lazy_tensors import LazyTensors
from olmo2_export.graphs.stored_blocks import stored_matrices
from olmo2_export.measure.parity import GATES, KERNELS, Gate
from olmo2_export.model.rotary import TABLES
from olmo2_export.quantize.blocks import QuantizedMatrix
from olmo2_export.quantize.linear import QuantizedLinear
from olmo2_export.stored_graph import load_graph
from olmo2_export.truth.reference import SCALED, Rounding, in_order, int8_blocks
from olmo2_export.truth.torch_layers import Weights
from olmo2_export.views import shared_forms, static_forms
from olmo2_export.views.first_call import at_first_call
from olmo2_export.weights.checkpoint import Checkpoint
from olmo2_export.weights.stored_names import stored_weight
from runtimes import Package
from runtimes.errors import PackageError
from runtimes.manifest import PortableGraph, Variant
from runtimes.targets import Target

Label = Literal["as stored", "exact", "rounded", "kernels", "portable exact", "portable", "int8 exact", "int8"]

FLOAT32_FACTOR, ROUNDED_FACTOR = 4.0, 2.0
"""most: error / PyTorch's own, of one operation on the graph's inputs. 4 is the fp32 gate of verify; where rounding to
fewer bits dominates, the same places are rounded, and less is ample"""
FIRST_CALL = 16
"""tokens of the one call of a TensorRT"""

_KV_ERROR_RATIO = {8: 4.0, 4: math.inf}  # where the cache is rounded too; what 4 bits cost, quality must tell
_ENGINE = dataclasses.replace(KERNELS, near_tie=GATES["bf16"].near_tie)


@dataclasses.dataclass(frozen=True)
class View:
    """One form of a variant's graph, and what it is compared with."""

    label: Label
    graph: Path
    """the stored graph; the weights of the form stay in its files"""
    model: ir.Model
    """the form, made in memory; where `first_call_only`, of the first call alone"""
    variant: Variant
    """its graph, and its cache as this form has it"""
    as_stored: bool
    """a runner opens the package's own graph, or the engine made of it, and no form made in memory"""
    weights: Weights
    """each weight as the form should have it: dequantised, or the checkpoint's, rounded to the graph's dtype"""
    replaced: Mapping[str, torch.Tensor]
    """the weights that transformers' whole model takes from the graph instead of the checkpoint; {}: none"""
    precision: str
    """of PyTorch's own arithmetic: fp32 | bf16 | fp16"""
    gate: Gate
    """of the logits of whole sequences"""
    factor: float
    """the limit of one operation's error, in units of PyTorch's own"""
    rounding: Mapping[str, Rounding] = dataclasses.field(default_factory=dict)
    """of the inputs of linears, by weight"""
    drawn: bool = False
    """a case beyond its gate is held to the largest of several draws of PyTorch's error; see `parity.compare`"""
    first_call_only: bool = False
    other_cache: str = ""
    """the name of its KV cache, where that is not the default"""

    @property
    def name(self) -> str:
        """The label, with the KV cache where that is not the default."""
        return f"cache {self.other_cache} {self.label}" if self.other_cache else self.label

    @property
    def tables(self) -> torch.dtype:
        """of the rotary tables: GroupQueryAttention wants them in the precision of its queries"""
        stored = self.model.graph.initializers.get(TABLES[0])
        dtype = stored.dtype if stored is not None else None
        return torch.float32 if dtype is None else HALVES.get(dtype, torch.float32)


def variant_views(
    package: Package,
    entry: Variant,
    checkpoint: Checkpoint,
    config: ModelConfig,
    target: Target,
) -> list[View]:
    """Return the views of a variant where it runs, the sharpest first.

    Args:
        package: the variant's.
        entry: the variant; of its KV caches, the default one: `cache_views` has the others.
        checkpoint: the reference weights.
        config: their shape.
        target: where it runs. A GPU has one view, as a CPU alone runs forms made in memory.

    Raises:
        PackageError: a graph stores other quantised weights than the manifest says.
    """
    entry = entry.with_cache(None)
    graph = _Graph.load(package, entry, checkpoint, config)
    _check_names(graph, package)
    if target.on_gpu:
        return [_on_gpu(graph, target)]
    if entry.kv_cache.form == "static":
        return _static_views(graph)
    if catalog.is_for_devices(entry.name):
        return [_exact(graph, static_forms.exact_form(graph.model)), _rounded(graph)]
    if entry.quantization is None:
        return [_portable(graph)]
    return _quantised_views(graph, package, checkpoint, config)


def portable_views(package: Package, entry: Variant, views: Sequence[View]) -> list[View]:
    """Return the exact view of the graph that other runtimes load, and the one with its kernels.

    They compute what the runner's graph computes: so they are compared with the same. No runner opens them: see
    `runners.open_step`.

    Args:
        package: the variant's.
        entry: the variant.
        views: of it, the first two of a variant with weights in blocks.

    Returns:
        Two views; [] where the variant has no such graph.
    """
    if entry.portable is None:
        return []
    graph = package.folder / entry.portable.graph
    model, variant = load_graph(graph), as_portable(entry, entry.portable)
    exact, kernels = (dataclasses.replace(view, graph=graph, variant=variant, as_stored=False) for view in views[:2])
    return [
        dataclasses.replace(exact, label="portable exact", model=shared_forms.exact_form(model)),
        dataclasses.replace(kernels, label="portable", model=model, gate=KERNELS),
    ]


def cache_views(package: Package, entry: Variant, views: Sequence[View]) -> list[View]:
    """Return the views of the graphs with the variant's other KV caches, in the order of the views of its default one.

    Their weights are those of the default one's graphs: so they are compared with the same.

    Args:
        package: the variant's.
        entry: the variant.
        views: of it, as `variant_views` gives them.
    """
    default, *others = entry.each_cache
    found = []
    for view in views:
        of_prefill = default.prefill is not None and view.graph == package.folder / default.prefill.graph
        for other in others:
            stored = other.prefill if of_prefill else other
            if stored is None:
                continue
            graph = package.folder / stored.graph
            model, variant = (
                load_graph(graph),
                dataclasses.replace(other, graph=stored.graph, data=stored.data, prefill=None),
            )
            if view.as_stored:
                form, gate = model, _kernels_gate(variant)
            else:
                form, gate, variant = shared_forms.exact_form(model), view.gate, in_float32(variant)
            other_cache = other.kv_cache.name
            found.append(
                dataclasses.replace(view, graph=graph, model=form, variant=variant, gate=gate, other_cache=other_cache)
            )
    return found


def as_portable(entry: Variant, portable: PortableGraph) -> Variant:
    """Return the variant that its portable graph is: it takes and gives the cache as the portable graph of fp32."""
    cache = dataclasses.replace(entry.kv_cache, form="concat", dtype="float32", quantization=None)
    return dataclasses.replace(
        entry,
        graph=portable.graph,
        inputs=portable.inputs,
        outputs=portable.outputs,
        kv_cache=cache,
        prefill=None,
        portable=None,
    )


def in_float32(entry: Variant) -> Variant:
    """Return a variant as its exact and rounded forms have it: a float32 cache, and no other graph for prompts; they
    take adapters in float32, too."""
    cache = dataclasses.replace(entry.kv_cache, dtype="float32", quantization=None)
    inputs = tuple(
        dataclasses.replace(spec, dtype="float32") if spec.role in ("lora_a", "lora_b") else spec
        for spec in entry.inputs
    )
    return dataclasses.replace(entry, inputs=inputs, kv_cache=cache, prefill=None)


def has_rounded_form(entry: Variant) -> bool:
    """Tell whether onnxruntime's CPU provider cannot run a variant's graph as users' machines do."""
    static_quantised = entry.kv_cache.form == "static" and entry.quantization is not None
    return entry.kv_cache.dtype == "bfloat16" or static_quantised


def quantized_weights(graph: ir.Model, config: ModelConfig, *, static: bool) -> Mapping[str, torch.Tensor]:
    """Return the weights that a graph stores in few bits, dequantised when asked for; {} where it has none.

    Args:
        graph: as it is stored.
        config: the model's shape.
        static: it is a static-cache graph.

    Raises:
        PackageError: it quantises a tensor that the model does not have.
    """
    if static:
        linears = static_forms.stored_linears(graph, config)
        return LazyTensors({name: partial(_dequantized, linears, name) for name in linears})
    matrices = stored_matrices(graph)
    return LazyTensors({name: partial(_dequantized, matrices, name) for name in matrices})


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


def _dequantized(stored: Mapping[str, QuantizedLinear | QuantizedMatrix], name: str) -> torch.Tensor:
    return stored[name].dequantize()


@dataclasses.dataclass(frozen=True)
class _Graph:
    """One stored graph of a variant, and its weights."""

    path: Path
    model: ir.Model
    variant: Variant
    """with this graph"""
    weights: Weights
    quantized: Mapping[str, torch.Tensor]
    stored: Mapping[str, torch.Tensor]
    """all that PyTorch can take from the graph: of a static-cache graph every weight, else the quantised ones"""

    @classmethod
    def load(cls, package: Package, entry: Variant, checkpoint: Checkpoint, config: ModelConfig) -> _Graph:
        path = package.folder / entry.graph
        model = load_graph(path)
        static = entry.kv_cache.form == "static"
        quantized = quantized_weights(model, config, static=static)
        stored = quantized
        if static:
            linears = static_forms.stored_linears(model, config)
            stored = static_forms.all_weights(linears, static_forms.stored_tensors(model))
        return cls(path, model, entry, stored_weights(model, checkpoint, config, quantized), quantized, stored)

    @property
    def precision(self) -> str:
        """Of what PyTorch computes in: that of the cache, but for a quantised one."""
        cache = self.variant.kv_cache
        return "fp32" if cache.quantization is not None else float_dtype(cache.dtype).precision

    @property
    def input_rounding(self) -> dict[str, Rounding]:
        quantization = self.variant.quantization
        scales = quantization.input_scales if quantization is not None else {}
        return {name: SCALED[self.variant.precision](scale) for name, scale in scales.items()}

    def as_run(self, label: Label, form: ir.Model, variant: Variant, *, as_stored: bool) -> View:
        """Return the view of what users run, in a form that this machine has."""
        static = self.variant.kv_cache.form == "static"
        return View(
            label=label,
            graph=self.path,
            model=form,
            variant=variant,
            as_stored=as_stored,
            weights=self.weights,
            replaced=self.stored if self.quantized else {},
            precision=self.precision,
            gate=KERNELS if static and self.quantized else GATES[self.precision],
            factor=ROUNDED_FACTOR,
            rounding=self.input_rounding,
        )


def _check_names(graph: _Graph, package: Package) -> None:
    quantization = graph.variant.quantization
    if graph.quantized.keys() != (quantization.tensors.keys() if quantization is not None else set()):
        verb = "build" if graph.variant.kv_cache.form == "static" else "export"
        raise PackageError(
            f"{package.folder}: {graph.variant.graph} quantises other weights than its manifest says; {verb} it again"
        )


def _on_gpu(graph: _Graph, target: Target) -> View:
    """The graph, or the engine made of it: it has no other form there."""
    quantised_static = graph.variant.kv_cache.form == "static" and bool(graph.quantized)
    form, as_stored = graph.model, True
    if target.needs_engine:
        form = at_first_call(graph.model, FIRST_CALL)
    elif quantised_static:
        form, as_stored = static_forms.device_form(graph.model), False
    view = graph.as_run("as stored", form, graph.variant, as_stored=as_stored)
    gate = _ENGINE if quantised_static else view.gate
    return dataclasses.replace(view, gate=gate, first_call_only=target.needs_engine)


def _portable(graph: _Graph) -> View:
    view = graph.as_run("as stored", graph.model, graph.variant, as_stored=True)
    return dataclasses.replace(view, factor=FLOAT32_FACTOR, drawn=True)


def _exact(graph: _Graph, form: ir.Model, label: Label = "exact") -> View:
    return View(
        label=label,
        graph=graph.path,
        model=form,
        variant=in_float32(graph.variant),
        as_stored=False,
        weights=graph.weights,
        replaced=graph.stored,
        precision="fp32",
        gate=GATES["fp32"],
        factor=FLOAT32_FACTOR,
        drawn=bool(graph.quantized),
    )


def _rounded(graph: _Graph) -> View:
    """The graph as it is where the CPU has its arithmetic and all of its operators; else its rounded form."""
    if not has_rounded_form(graph.variant):
        return graph.as_run("rounded", graph.model, graph.variant, as_stored=True)
    form = static_forms.rounded_form(graph.model)
    return graph.as_run("rounded", form, in_float32(graph.variant), as_stored=False)


def _static_views(graph: _Graph) -> list[View]:
    if graph.precision == "fp32":
        return [_portable(graph)]
    return [_exact(graph, static_forms.exact_form(graph.model)), _rounded(graph)]


def _quantised_views(graph: _Graph, package: Package, checkpoint: Checkpoint, config: ModelConfig) -> list[View]:
    inputs = shared_forms.block_inputs(graph.model)
    rounding = {name: int8_blocks(size) for name, (size, _) in inputs.items()}
    rounding |= {n: in_order(rounding[n], order) for n, (_, order) in inputs.items() if order is not None}
    views = [_exact(graph, shared_forms.exact_form(graph.model)), _kernels(graph, "kernels", rounding)]
    if graph.variant.prefill is None:
        return views
    prefill = dataclasses.replace(
        graph.variant, graph=graph.variant.prefill.graph, data=graph.variant.prefill.data, prefill=None
    )
    path = package.folder / prefill.graph
    model = load_graph(path)
    int8 = shared_forms.stored_int8(model)
    both = LazyTensors({name: partial(m.__getitem__, name) for m in (graph.quantized, int8) for name in m})
    other = _Graph(path, model, prefill, stored_weights(model, checkpoint, config, both), both, both)
    rounding = rounding | dict.fromkeys(int8, int8_blocks(0))
    return [
        *views,
        _exact(other, shared_forms.exact_form(model), "int8 exact"),
        _kernels(other, "int8", rounding),
    ]


def _kernels(graph: _Graph, label: Label, rounding: Mapping[str, Rounding]) -> View:
    """A graph whose kernels round the inputs of linears to 8 bits, and its cache where that is quantised."""
    variant = dataclasses.replace(graph.variant, prefill=None)
    view = graph.as_run(label, graph.model, variant, as_stored=True)
    return dataclasses.replace(view, precision="fp32", gate=_kernels_gate(variant), rounding=rounding, drawn=True)


def _kernels_gate(variant: Variant) -> Gate:
    cache = variant.kv_cache.quantization
    return KERNELS if cache is None else dataclasses.replace(KERNELS, error_ratio=_KV_ERROR_RATIO[cache.bits])
