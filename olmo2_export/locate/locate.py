"""Find the first tensor of a variant that departs from PyTorch, and say which operation gives it.

A variant is looked at in up to four views, in this order; the first that departs is reported.

| variant                | view           | what runs                              | PyTorch's weights  | precision    |
|------------------------|----------------|----------------------------------------|--------------------|--------------|
| quantised              | weights        | -                                      | the checkpoint's   | -            |
| fp32, trt_fp32         | as it is       | the graph                              | the checkpoint     | fp32         |
| all others, on a CPU   | exact          | activations and cache in float32       | stored, or rounded | fp32         |
| q4, q8                 | kernels        | the decode graph, inputs in 8 bits     | as stored          | fp32 *       |
|                        | int8           | the prefill graph                      | as stored          | fp32 *       |
|                        | portable exact | the graph for other runtimes, exact    | as stored          | fp32         |
| bf16, fp16, q4f16, trt | rounded        | rounded where the graph has fewer bits | stored, or rounded | bf16, fp16 * |
| any, on a GPU          | as it is       | the graph                              | stored, or rounded | bf16, fp16 * |

* PyTorch rounds the inputs of linears as the variant does. A quantised KV cache has the exact views alone: the others
show codes, whose scales `verify` checks. The kernels of the graph for other runtimes are those of the decode graph.

The graph is run a segment at a time, and PyTorch a layer at a time, so that the memory is that of one layer. All
operations are compared in one pass over the layers: halving the depth would need as many passes as it saves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import olmo2_export.catalog as catalog
from olmo2_export.architecture import of_layer, operations
from olmo2_export.config import ModelConfig, config_of
from olmo2_export.dtypes import float_dtype
from olmo2_export.graphs.taps import HIDDEN, layer_name
from olmo2_export.locate.explain import relative_error
from olmo2_export.locate.hidden_states import hidden_states_check
from olmo2_export.locate.layer_checks import (
    GATED,
    LAYER,
    LINEAR,
    Checked,
    LayerChecks,
    TensorParity,
    batch_check,
    embedded,
    embedding_check,
    head_checks,
)
from olmo2_export.locate.segments import joined, random_calls, run_batch, run_segments
from olmo2_export.locate.stored_values import tables_check, weight_check
from olmo2_export.truth.torch_layers import TorchModel
from olmo2_export.views.openers import Arrays, Opener, view_opener
from olmo2_export.views.shared_forms import float_cache_form
from olmo2_export.views.table import (
    FIRST_CALL,
    FLOAT32_FACTOR,
    View,
    cache_views,
    in_float32,
    portable_views,
    variant_views,
)
from olmo2_export.weights.checkpoint import Checkpoint
from olmo2_export.weights.merged import check_adapters
from olmo2_export.weights.stored_names import weight_shapes
from runtimes import Backend, Device, Package
from runtimes.errors import ConfigError, PackageError, UsageError, VariantNotFoundError
from runtimes.manifest import Variant
from runtimes.package import AnyPackage, open_package
from runtimes.targets import Target, find_target, runnable

TOKENS = (17, 6, 1)
"""of the calls: a prefill, a chunk, a step of decoding"""
MIN_TOKENS = 16
"""of the cache"""
GROWN = 4.0
"""most: error / PyTorch's own, of errors that have come through all layers"""
IN_ORDER = 0.3
"""RMS error of a sum of n products in float32, one after the other: this x 2^-24 x sqrt(n) of the sum's RMS"""
_SEED = 0

__all__ = ["Location", "TensorParity", "format_location", "locate"]


@dataclass(frozen=True)
class Location:
    """Where a variant departs from PyTorch."""

    variant: str
    backend: str
    layers: tuple[TensorParity, ...]
    """growth over depth, of the graph and of PyTorch from the tokens on: embedding, each layer's output, last norm,
    logits"""
    tensors: tuple[TensorParity, ...]
    """every tensor of the first bad layer, each operation on the graph's own inputs; empty if none is bad"""
    first: TensorParity | None
    """the first that departs beyond what is expected"""
    explanation: str
    """which operation it is, and where possible what about it is wrong"""


def locate(
    package: AnyPackage,
    checkpoint: Checkpoint,
    variant: str,
    *,
    backend: Backend = "ort",
    device: Device | None = None,
    opener: Opener | None = None,
) -> Location:
    """Find the first tensor that departs.

    Args:
        package: the package folder.
        checkpoint: the reference weights.
        variant: its name.
        backend: what runs the graph. A TensorRT compiles each segment for the GPU at hand, and sees the first call.
        device: where ort runs it; None: on the CPU.
        opener: what runs a segment; None: that of backend and device.

    Raises:
        IntegrityError: the variant's files changed.
        PackageError: its graph is not one of this exporter.
        ConfigError: package and reference are not of one shape.
        BackendError: what shall run it is not there.
        UsageError: the variant does not run there.
    """
    opened = open_package(package)
    entry = opened.variant(variant)
    opened.check([*entry.files, *([entry.portable.graph] if entry.portable else [])])
    check_adapters(opened.manifest.source, checkpoint)
    config = config_of(checkpoint.folder, opened.model)
    if opened.model != config.spec:
        raise ConfigError(
            f"{opened.folder}: not of the reference's shape; give the checkpoint that it was exported from"
        )
    if entry.kv_cache.max_cache_length < MIN_TOKENS:
        raise PackageError(
            f"{opened.folder}: a cache of {entry.kv_cache.max_cache_length} tokens; --locate needs {MIN_TOKENS}"
        )
    target = find_target(backend, device)
    _check_runs(entry, target)
    wrong = weight_check(opened, entry, checkpoint, config)
    own = variant_views(opened, entry, checkpoint, config, target)
    others = [] if target.on_gpu else cache_views(opened, entry, own)
    portable = [] if target.on_gpu else portable_views(opened, entry, own)
    views = [*_looked_at(own), *_without_codes(others), *portable[:1]]
    location = None
    steps = len(views) * (config.num_hidden_layers + 2)
    with tqdm(total=steps, desc=f"locating in {variant}", unit="segment", leave=False) as bar:
        for view in views:
            found = _Locator(view, opener or view_opener(view, target), checkpoint, config, bar).run()
            if location is None or found.first is not None or (view in own and view.label != "int8"):
                location = replace(found, variant=variant, backend=backend)
            if found.first is not None or wrong is not None:
                break
    assert location is not None  # there is a view of every variant
    if location.first is None and wrong is None:
        wrong = tables_check(opened, entry, checkpoint, config) or hidden_states_check(opened, entry, config)
    if wrong is not None:
        first, explanation = wrong
        return replace(location, first=first, tensors=(first, *location.tensors), explanation=explanation)
    return location


def locate_all(
    package: AnyPackage,
    checkpoint: Checkpoint,
    variants: Sequence[str] = (),
    *,
    backend: Backend = "ort",
    device: Device | None = None,
) -> list[Location]:
    """Locate in several variants; none means all that the backend can run, as in `verify`."""
    opened = open_package(package)
    names = list(dict.fromkeys(variants)) or _all_variants(opened, find_target(backend, device))
    return [locate(opened, checkpoint, name, backend=backend, device=device) for name in names]


def _all_variants(package: Package, target: Target) -> list[str]:
    """Return what can be looked at there: on a CPU every graph, in a form that it runs; no engine is needed.

    Raises:
        VariantNotFoundError: there is nothing.
    """
    graphs = list(package.trt.variants) if package.trt is not None else []
    if not target.needs_engine:
        graphs = [*(runnable(package, target) if target.on_gpu else package.manifest.variants), *graphs]
    if not graphs:
        way_out = (
            f"run: olmo2-export build {package.folder}"
            if target.needs_engine
            else f"export it with --variant {target.variants[0]}"
        )
        raise VariantNotFoundError(f"{package.folder}: no variant for {target.backend} on {target.device}; {way_out}")
    return graphs


def _check_runs(entry: Variant, target: Target) -> None:
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


def _looked_at(views: list[View]) -> list[View]:
    """Leave out the views that show nothing more; of a quantised cache others show codes."""
    if any(v.variant.kv_cache.quantization is not None for v in views):
        return list(_without_codes(views))
    return [view for view in views if view.label != "int8 exact"]


def _without_codes(views: list[View]) -> Iterator[View]:
    """Yield one view of each graph, in a form whose cache can be read."""
    for view in views:
        if view.label == "int8":
            form, variant = float_cache_form(view.model), in_float32(view.variant)
            yield replace(view, model=form, variant=variant, as_stored=False)
        elif view.label == "exact":
            yield view


def _floor(precision: str) -> float:
    """Return the error that is none: in 16 bits half the unit roundoff, in float32 all of it, as sums have."""
    roundoff = float_dtype(precision).roundoff
    return roundoff if precision == "fp32" else roundoff / 2


class _Locator:
    """Looks at one view."""

    def __init__(self, view: View, opener: Opener, checkpoint: Checkpoint, config: ModelConfig, bar: tqdm[Any]) -> None:
        self._view, self._opener, self._config, self._bar = view, opener, config, bar
        self._in_order = any(node.op_type == "MatMulNBits" for node in view.model.graph)
        folder = checkpoint.folder
        self._exact = TorchModel(folder, view.weights, "fp64", tables=view.tables)
        self._own = TorchModel(folder, view.weights, view.precision, view.rounding, view.tables)
        capacity = view.variant.kv_cache.max_cache_length
        sizes: tuple[int, ...] = TOKENS if capacity >= sum(TOKENS) else (capacity - 6, 5, 1)
        if view.first_call_only:
            sizes = (FIRST_CALL,)
        self._calls = random_calls(config, sizes, _SEED, vectors=config.inputs_embeds and not view.first_call_only)
        self._answer = "score" if config.labels else "logits"

    @torch.inference_mode()
    def run(self) -> Location:
        """Go through the layers once."""
        view, calls = self._view, self._calls
        growth: list[TensorParity] = []
        bad: tuple[TensorParity, list[TensorParity], str] | None = None
        exact, own = embedded(self._exact, calls), embedded(self._own, calls)
        rows = operations(self._config)
        segments = run_segments(
            view.model, view.variant, rows, calls, self._opener, first_call_only=view.first_call_only
        )
        depth = 0
        for segment, found in segments:
            if segment.source is None:
                checks = [embedding_check(found, calls, self._exact, self._own)]
                growth.append(checks[0].parity)
            elif segment.layer is not None:
                layers = self._exact.layer(segment.layer), self._own.layer(segment.layer)
                checks = LayerChecks(of_layer(rows, segment.layer), found, calls, *layers).run()
                exact, own = layers[0](exact), layers[1](own)
                name = layer_name(segment.layer, "output")
                growth.append(_growth(name, segment.layer, LAYER, joined(found, name), exact, own))
                depth += 1
                del layers
            else:
                checks = head_checks(found, calls, self._exact, self._own)
                if not view.first_call_only:
                    batch = calls.batch(found[0][HIDDEN])
                    checks.append(batch_check(run_batch(view.model, segment, batch, self._opener), batch, self._answer))
                growth += self._head_growth(found, exact, own)
            if bad is None:
                bad = self._first_bad(checks)
            self._bar.update()
        if bad is None:
            bad = self._grown(growth)
        if bad is None:
            return Location("", "", tuple(growth), (), None, self._nothing(growth))
        return Location("", "", tuple(growth), tuple(bad[1]), bad[0], bad[2])

    def _limit(self, parity: TensorParity) -> float:
        """Return the error at which a tensor departs.

        Where only the inputs of linears are rounded, everything else is float32 and held to that; kernels approximate
        the sigmoid by rational functions, whose error on the demo model is 3 x PyTorch's. Kernels for weights in blocks
        add products one after the other, so that their error grows with the root of the number of products; PyTorch's
        hardly does. At the 1B shape that of down_proj is 5.7 x PyTorch's, and 0.27 x 2^-24 x sqrt(8192).
        """
        units = FLOAT32_FACTOR
        if parity.operation == GATED:
            units *= 4
        elif parity.operation == LINEAR and self._in_order:
            units *= IN_ORDER * math.sqrt(self._products(parity.name))
        return max(self._view.factor * max(parity.expected, _floor(self._view.precision)), units * _floor("fp32"))

    def _products(self, name: str) -> int:
        """Return how many products a linear adds for one of its outputs."""
        shapes = weight_shapes(self._config)
        return shapes[f"{name}.weight"][1] if f"{name}.weight" in shapes else self._config.hidden_size

    def _first_bad(self, checks: Sequence[Checked]) -> tuple[TensorParity, list[TensorParity], str] | None:
        for checked in checks:
            parity = checked.parity
            if parity.relative <= self._limit(parity):
                continue
            operation, words = checked.explain()
            named = replace(parity, operation=operation)
            tensors = [named if c is checked else c.parity for c in checks]
            where = "" if parity.layer is None else f" of layer {parity.layer}"
            text = f"{self._label()}the {operation}{where} ({parity.name}) is wrong"
            text += f": {words}." if words else f": its error is {_ratio(parity)} times what PyTorch's own is."
            return named, tensors, text
        return None

    def _grown(self, growth: Sequence[TensorParity]) -> tuple[TensorParity, list[TensorParity], str] | None:
        """Return the first depth at which errors that are small by themselves have added up."""
        floor = _floor(self._view.precision)
        if self._in_order:
            floor = max(floor, IN_ORDER * _floor("fp32") * math.sqrt(self._config.hidden_size))
        for parity in growth:
            if not parity.relative <= GROWN * max(parity.expected, floor):
                text = f"{self._label()}each operation is right on its own inputs, but up to {parity.name} errors"
                return parity, [], f"{text} add up to {_ratio(parity)} times those of PyTorch."
        return None

    def _head_growth(self, found: Sequence[Arrays], exact: torch.Tensor, own: torch.Tensor) -> list[TensorParity]:
        names = ("model.norm", self._answer)
        rows = [self._rows(x) if found[0][self._answer].ndim == 2 else x for x in (exact, own)]
        normed = self._exact.norm(rows[0]), self._own.norm(rows[1])
        logits = self._exact.head(normed[0]), self._own.head(normed[1])
        return [
            _growth(name, None, operation, _flat(found, name), *pair)
            for name, operation, pair in zip(names, ("RMS norm", "linear"), (normed, logits), strict=True)
        ]

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, [start + self._calls.logit_index(stop - start) for start, stop in self._calls.spans()]]

    def _label(self) -> str:
        label = self._view.name
        return f"In the {label} view, " if label != "as stored" else "In the graph as it is, "

    def _nothing(self, growth: Sequence[TensorParity]) -> str:
        last = growth[-1]
        tokens, calls = len(self._calls.ids), len(list(self._calls.spans()))
        batch = "" if self._view.first_call_only else f", and of two rows together which tokens get {self._answer}"
        rounded = ", with the inputs of linears rounded likewise," if self._view.rounding else ""
        return (
            f"Nothing departs: every operation agrees with PyTorch's; the error of the {self._answer} is "
            f"{last.relative:.1e}, PyTorch's own at {self._view.precision}{rounded} is {last.expected:.1e}. Looked at: "
            f"one row of {tokens} tokens in {calls} calls{batch}; layers on batches, padding and a full cache are for "
            "`verify` without --locate."
        )


def _growth(
    name: str, layer: int | None, operation: str, graph: np.ndarray, exact: torch.Tensor, own: torch.Tensor
) -> TensorParity:
    found = torch.from_numpy(graph.astype(np.float64))
    relative = relative_error(found, exact) if found.shape == exact.shape else math.nan
    return TensorParity(name, layer, operation, relative, relative_error(own, exact))


def _flat(found: Sequence[Arrays], name: str) -> np.ndarray:
    arrays = [call[name] for call in found]
    return np.concatenate([a[:, None] if a.ndim == 2 else a for a in arrays], axis=1)


def _ratio(parity: TensorParity) -> str:
    return f"{parity.relative / parity.expected:.3g}" if parity.expected > 0 else "more than any"


def format_location(location: Location) -> str:
    """Return a table for people: growth over depth, the tensors of the first bad layer, and what is wrong."""
    first = location.first
    names = [p.name for p in (*location.layers, *location.tensors)]
    width = max(map(len, names), default=0)
    operations = max((len(p.operation) for p in (*location.layers, *location.tensors)), default=0)

    def line(p: TensorParity) -> str:
        ratio = p.relative / p.expected if p.expected > 0 else (math.inf if p.relative > 0 else 0.0)
        mark = "  <- the first that departs" if p is first else ""
        numbers = f"{p.relative:>9.2e}  {p.expected:>9.2e}  {ratio:>8.3g}"
        return f"{p.name:<{width}}  {p.operation:<{operations}}  {numbers}{mark}"

    head = f"{'':<{width}}  {'operation':<{operations}}  {'error':>9}  {'PyTorch':>9}  {'ratio':>8}"
    lines = [f"{location.variant} on {location.backend}: error against float64, from the tokens on", head]
    lines += [line(p) for p in location.layers]
    if location.tensors:
        where = "its layer" if first is None or first.layer is None else f"layer {first.layer}"
        lines += ["", f"{location.variant}: each operation of {where} on the graph's own inputs", head]
        lines += [line(p) for p in location.tensors]
    return "\n".join([*lines, "", f"{location.variant}: {location.explanation}"])
