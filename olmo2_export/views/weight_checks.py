"""Compare stored weights with the checkpoint's: a graph with wrong weights computes exactly what they say."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import replace

import onnx_ir as ir
import torch

from olmo2_export.config import ModelConfig
from olmo2_export.graphs.stored_blocks import folded_orders, stored_matrices
from olmo2_export.measure.parity import Check
from olmo2_export.quantize.blocks import QuantizedMatrix
from olmo2_export.quantize.encode import cut
from olmo2_export.quantize.imported import IMPORTED, FoldedOrders
from olmo2_export.quantize.linear import QuantizedLinear
from olmo2_export.stored_graph import load_graph
from olmo2_export.views.shared_forms import stored_int8
from olmo2_export.views.static_forms import stored_input_scales, stored_linears, stored_tensors
from olmo2_export.weights.checkpoint import Checkpoint
from olmo2_export.weights.source import WeightSource
from olmo2_export.weights.stored_names import stored_weight
from runtimes import Package
from runtimes.errors import first_names
from runtimes.manifest import Variant

SCALE_ERROR = 0.25
"""a block's scale against the one that fits its codes best; seen: 0.1 with GPTQ"""
CHANNEL_SCALE_ERROR = 0.05
"""the same for a whole channel of 8 bits; seen: 0.002 with int8, 0.015 with fp8 in channels of 96 weights"""

_ROWS = 4096


def in_stored_order(graph: ir.Model, checkpoint: Checkpoint) -> Checkpoint | FoldedOrders:
    """Return a checkpoint's weights in the order in which a graph stores them, where that is another."""
    orders = folded_orders(graph)
    return FoldedOrders(checkpoint, orders) if orders else checkpoint


def check_matrices(matrices: Mapping[str, QuantizedMatrix], checkpoint: WeightSource, config: ModelConfig) -> Check:
    """Compare each block's scale with the one that fits its codes to the checkpoint's weights best."""
    worst = 0.0
    failures: list[str] = []
    for name, matrix in matrices.items():
        source = stored_weight(checkpoint, config, name)
        for start in range(0, matrix.rows, _ROWS):
            truth = cut(source[start : start + _ROWS], matrix.form)
            stored = cut(matrix.dequantize(start, start + _ROWS), matrix.form)
            off = scale_error(truth, stored)
            worst = max(worst, float(off.max()))
            if bool((off > SCALE_ERROR).any()):
                block = int(off.argmax())
                row, column = divmod(block, matrix.form.blocks(matrix.columns))
                failures.append(
                    f"{name}: row {start + row}, block {column}: its scale is off by {float(off.max()):.0%}"
                )
                break
    return Check("weights", f"{len(matrices)} tensors, scales within {worst:.1%} of the best", tuple(failures[:5]))


def check_imported(
    stored: Mapping[str, QuantizedMatrix | QuantizedLinear], checkpoint: Checkpoint | FoldedOrders
) -> Check:
    """Compare weights that were taken over with what the checkpoint's codes say: equal in every number."""
    assert checkpoint.quantized is not None  # the caller has seen to it
    names = [name for name in stored if name in checkpoint.quantized.linears]
    failures: list[str] = []
    for name in names:
        found = stored[name]
        wrong = found.dequantize() != _as_taken_over(checkpoint, name, rounded=isinstance(found, QuantizedLinear))
        if bool(wrong.any()):
            row, column = (int(place) for place in wrong.nonzero()[0])
            failures.append(
                f"{name}: {int(wrong.sum())} numbers are not what the checkpoint's codes say, the first in row {row}, "
                f"column {column}"
            )
    found_words = f"{len(names)} tensors, {len(failures)} differ from the checkpoint's"
    return Check("imported weights", found_words, tuple(failures[:5]))


def _as_taken_over(checkpoint: Checkpoint | FoldedOrders, name: str, *, rounded: bool) -> torch.Tensor:
    """Return what codes say, [N, K]; `rounded`: with scales of bfloat16, as graphs for TensorRT have."""
    codes = checkpoint.codes(name) if rounded else None
    if codes is None:
        return checkpoint.tensor(name)
    scales = torch.from_numpy(codes.scales).to(torch.bfloat16).float().numpy()
    return torch.from_numpy(replace(codes, scales=scales).dequantize())


def check_int8(weights: Mapping[str, torch.Tensor], checkpoint: Checkpoint, config: ModelConfig) -> Check:
    """The same for the int8 weights of a prefill graph, whose scales are per output channel."""
    worst = 0.0
    failures: list[str] = []
    for name, stored in weights.items():
        off = scale_error(stored_weight(checkpoint, config, name).float(), stored)
        worst = max(worst, float(off.max()))
        if worst > SCALE_ERROR and not failures:
            failures.append(f"{name}: channel {int(off.argmax())}: its scale is off by {float(off.max()):.0%}")
    return Check("int8 weights", f"{len(weights)} tensors, scales within {worst:.1%} of the best", tuple(failures))


def check_linears(linears: Mapping[str, QuantizedLinear], checkpoint: Checkpoint, config: ModelConfig) -> Check:
    """The same for the linears of a static-cache graph: blocks of 4 bits, or channels of 8."""
    worst = 0.0
    failures: list[str] = []
    for name, linear in linears.items():
        limit = SCALE_ERROR if linear.block_size else CHANNEL_SCALE_ERROR
        size = linear.block_size or len(linear.codes)
        source = stored_weight(checkpoint, config, name)
        for start in range(0, len(source), _ROWS):
            truth = source[start : start + _ROWS].float().reshape(-1, size)
            off = scale_error(truth, linear.dequantize(start, start + _ROWS).reshape(-1, size))
            worst = max(worst, float(off.max()))
            if bool((off > limit).any()):
                row, block = divmod(int(off.argmax()), len(linear.codes) // size)
                failures.append(
                    f"{name}: channel {start + row}, block {block}: its scale is off by {float(off.max()):.0%}"
                )
                break
    return Check("scales", f"{len(linears)} tensors, scales within {worst:.1%} of the best", tuple(failures[:5]))


def check_rounded(tensors: Mapping[str, torch.Tensor], checkpoint: Checkpoint, config: ModelConfig) -> Check:
    """Compare stored weights that are not quantised with the checkpoint's, rounded as they are: equal in every bit.

    Args:
        tensors: by the checkpoint's names, in its layout and the dtype that they are stored in.
        checkpoint: the reference weights.
        config: their shape.
    """
    different = []
    for name, stored in tensors.items():
        truth = stored_weight(checkpoint, config, name)
        if not torch.equal(truth.float().to(stored.dtype), stored):
            different.append(name)
    failures = (f"not the checkpoint's, rounded: {first_names(different)}",) if different else ()
    return Check("weights", f"{len(tensors)} tensors, {len(different)} differ from the checkpoint's", failures)


def scale_error(truth: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
    """Return per row |<truth, stored> / <stored, stored> - 1|: 0 where the scale is the least-squares one."""
    energy = stored.square().sum(1)
    fit = (truth * stored).sum(1) / energy.clamp_min(1e-30)
    lost = (energy <= 1e-12 * truth.square().sum(1)) & (truth.square().sum(1) > 1e-30)  # all zero where weights were
    return torch.where(lost, torch.ones_like(energy), torch.where(energy > 1e-30, (fit - 1).abs(), energy))


def check_input_scales(stored: Mapping[str, float], expected: Mapping[str, float]) -> Check:
    """Compare the scales in the graph with the manifest's, which the reference rounds with."""
    wrong = [name for name in sorted(stored.keys() | expected.keys()) if stored.get(name) != expected.get(name)]
    failures = [f"{n}: {stored.get(n)}, the manifest says {expected.get(n)}" for n in wrong[:5]]
    return Check("input scales", f"{len(stored)} in the graph, {len(wrong)} not the manifest's", tuple(failures))


def check_cache_scales(package: Package, entry: Variant) -> Check:
    """Every graph with a quantised cache rounds it with the scales of the manifest."""
    failures, counts = [], []
    for own in entry.each_cache:
        scales = own.kv_cache.quantization.scales if own.kv_cache.quantization is not None else {}
        for graph in own.each_graph if scales else ():
            initializers = load_graph(package.folder / graph.graph).graph.initializers
            counts.append(len(scales))
            for name, text in scales.items():
                value = initializers.get(f"kv_cache.{name}.scale")
                stored = None if value is None or value.const_value is None else value.const_value.numpy()
                if stored is None or stored.astype("<f4").tobytes() != base64.b64decode(text):
                    failures.append(f"{graph.graph}: kv_cache.{name}.scale is not the manifest's")
    return Check("cache scales", f"{max(counts)} in each graph", tuple(failures[:5]))


def was_taken_over(entry: Variant, checkpoint: Checkpoint) -> bool:
    """Tell whether a variant has a checkpoint's codes, and is compared with one that has codes."""
    taken = entry.quantization is not None and entry.quantization.recipe == IMPORTED
    return taken and checkpoint.quantized is not None


def weight_checks(package: Package, entry: Variant, checkpoint: Checkpoint, config: ModelConfig) -> list[Check]:
    """Compare all that a variant's graphs store with the checkpoint, and the scales of inputs with the manifest.

    Args:
        package: the variant's.
        entry: the variant; of one with a float32 or rounded shared cache nothing is compared, as parity shows it.
        checkpoint: the reference weights.
        config: their shape.
    """
    graph = load_graph(package.folder / entry.graph)
    if entry.kv_cache.form == "static":
        rounded = check_rounded(stored_tensors(graph), checkpoint, config)
        if entry.quantization is None:
            return [rounded]
        scales = check_input_scales(stored_input_scales(graph), entry.quantization.input_scales)
        linears = stored_linears(graph, config)
        checks = [rounded, check_linears(linears, checkpoint, config), scales]
        return [*checks, check_imported(linears, checkpoint)] if was_taken_over(entry, checkpoint) else checks
    if entry.quantization is None:
        return []
    matrices, ordered = stored_matrices(graph), in_stored_order(graph, checkpoint)
    checks = [check_matrices(matrices, ordered, config)]
    if was_taken_over(entry, checkpoint):
        checks.append(check_imported(matrices, ordered))
    if entry.prefill is not None:
        int8 = stored_int8(load_graph(package.folder / entry.prefill.graph))
        checks.append(check_int8(int8, checkpoint, config))
    return checks
