"""What each variant would write: the files of its graphs, made as the writer makes them but for a model of two layers.

Formats, graphs and the order of tensors are the writer's own; only weights are never asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch

import olmo2_export.catalog as catalog
from olmo2_export.architecture import operations
from olmo2_export.catalog import BlockFormat, VariantRow
from olmo2_export.config import ModelConfig
from olmo2_export.dtypes import ir_dtype
from olmo2_export.fuse import DEVICE
from olmo2_export.fuse.quantized_kv_cache import quantized_kv_cache
from olmo2_export.graphs.device import device_graph
from olmo2_export.graphs.files import attach_weights
from olmo2_export.graphs.predicted import GraphBytes, cache_bytes, cache_bytes_per_token, predicted_bytes, shortened
from olmo2_export.graphs.shared import decode_graph, padded_graph, prefill_graph, shared_graph
from olmo2_export.graphs.static import static_graph
from olmo2_export.graphs.trace import trace
from olmo2_export.package.imported import imported_weights, is_imported
from olmo2_export.package.kv_caches import written_caches
from olmo2_export.package.variants import cache_spec
from olmo2_export.package.weight_choice import Options, choose_weights, defaults_of
from olmo2_export.quantize.blocks import QuantizedMatrix
from olmo2_export.quantize.recipes import MIXED, QuantizedWeights
from olmo2_export.quantize.static import LinearForm, StaticWeights, check_recipe, imported_forms, static_forms
from olmo2_export.weights.checkpoint import Checkpoint
from olmo2_export.weights.stored_names import weight_shapes
from runtimes.errors import UsageError
from runtimes.manifest import KVCacheQuantization, Precision

STATIC_CACHE = 4096
"""tokens: the capacity of an engine's cache where the context is longer; its graph has rotary tables of that length"""


_GUESSED = "an estimate: of the codes that it takes over, zero points and act-order are in the files alone"


@dataclass(frozen=True)
class VariantSizes:
    """What one variant would be."""

    name: str
    graphs: Mapping[str, GraphBytes]
    """path in the package -> its files; the prefill graph, which a quality gate may leave out, is the second"""
    portable: Mapping[str, int]
    """path of the graph that other runtimes load, where that is another -> its bytes, on the first one's weights"""
    other_caches: Mapping[str, int]
    """paths of the graphs with other KV caches than the first -> their bytes, on the same weights"""
    cache_bytes_per_token: int
    """of one row, over all layers, in the first of its KV caches"""
    cache_bytes: int
    """the same of a row that fills the context, where layers with a window may keep it alone"""
    windowed: int
    """layers that keep a window alone"""
    bits_per_weight: float
    """over embedding, layers and head, as the decode graph stores them; of codes taken over, over those"""
    at_most: bool
    """the recipe chooses formats within a budget, which is taken to be spent"""
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all its files."""
        beside = (*self.portable.values(), *self.other_caches.values())
        return sum(files.graph + files.data for files in self.graphs.values()) + sum(beside)


def variant_sizes(name: str, checkpoint: Checkpoint, config: ModelConfig, options: Options) -> VariantSizes:
    """Predict one variant of an export.

    Args:
        name: of the variant.
        checkpoint: nothing of it is read.
        config: its shape.
        options: how quantised variants are made; `check_variants` has seen them.

    Raises:
        UsageError: a size budget that does not pay for the smallest choice.
        FusionError: the traced graph is not the expected one.
    """
    row = catalog.find(name)
    stored = written_caches(row, config, options)[0]
    cache = cache_spec(config, row, stored.dtype if row.quantized_cache else row.dtype)
    if stored.bits is not None:
        cache = dataclasses.replace(cache, quantization=KVCacheQuantization(stored.bits, 0, {}))
    found = dict(_graphs(row, checkpoint, config, options))
    with_data = [row.with_cache(path, stored) for path in (row.path, row.prefill_path)]
    graphs = {path: files for path, files in found.items() if path in with_data}
    beside = {path: files.graph for path, files in found.items() if path not in graphs}
    portable = {path: nbytes for path, nbytes in beside.items() if path == row.portable_path}
    others = {path: nbytes for path, nbytes in beside.items() if path not in portable}
    bits, extra, mixed = float(row.weights.bits), 0, False
    notes: tuple[str, ...] = ()
    if row.defaults is not None:
        choice = choose_weights(row, options, operations(config))
        mixed = choice.recipe in MIXED
        if is_imported(checkpoint, row, options):
            small = shortened(config)
            bits, _ = _bits_per_weight(small, imported_weights(checkpoint, small, row, options, choice).formats, None)
            notes = () if checkpoint.is_here else (_GUESSED,)
        else:
            bits, extra = _bits_per_weight(config, choice.formats(config), choice.size_budget)
    if row.dtype == "float16" and options.fp16_islands:
        notes = ("float32 islands are found by running the model: what they add is not counted",)
    if extra:  # the tensors that the budget pays for have the format of 8 bits
        path, first = next(iter(graphs.items()))
        graphs[path] = dataclasses.replace(first, data=first.data + extra)
    return VariantSizes(
        name=name,
        graphs=graphs,
        portable=portable,
        other_caches=others,
        cache_bytes_per_token=cache_bytes_per_token(cache),
        cache_bytes=cache_bytes(cache, cache.max_cache_length),
        windowed=sum(map(bool, cache.windows)),
        bits_per_weight=bits,
        at_most=mixed,
        notes=notes,
    )


def _bits_per_weight(
    config: ModelConfig, formats: Mapping[str, BlockFormat], budget: float | None
) -> tuple[float, int]:
    """Return bits per weight, and the bytes that a budget adds to what the formats take."""
    shapes = weight_shapes(config)
    weights = sum(shapes[name][0] * shapes[name][1] for name in formats)
    spent = sum(form.nbytes(*shapes[name]) for name, form in formats.items())
    if budget is None:
        return 8 * spent / weights, 0
    if 8 * spent > budget * weights:
        raise UsageError(
            f"size budget {budget:g} bits per weight: the smallest choice takes {spent * 8 / weights:.3f}; "
            "raise the budget or choose larger blocks"
        )
    return budget, int(budget * weights / 8) - spent


def _graphs(
    row: VariantRow, checkpoint: Checkpoint, config: ModelConfig, options: Options
) -> Iterator[tuple[str, GraphBytes]]:
    small, layers = shortened(config), config.num_hidden_layers
    rows, traced = operations(small), trace(small)
    weights: QuantizedWeights | None = None
    if row.defaults is not None:
        choice = choose_weights(row, options, rows)
        weights = QuantizedWeights(choice.formats(small), _never, _never_read)
        if is_imported(checkpoint, row, options):
            weights = imported_weights(checkpoint, small, row, options, choice)
    match row.graph:
        case "portable":
            graph = traced.clone()
            attach_weights(graph, checkpoint, small)
            yield row.path, predicted_bytes(graph, layers)
        case "blocks":
            assert weights is not None  # all of them have defaults
            shared = shared_graph(traced, rows)
            padded = padded_graph(shared, rows)
            imported = is_imported(checkpoint, row, options)
            for stored in written_caches(row, config, options):
                form = shared.clone()
                if stored.bits is not None:
                    quantized_kv_cache(form, _cache_scales(small), stored.bits)
                graph, _ = decode_graph(form, weights, rows)
                attach_weights(graph, checkpoint, small)
                yield row.with_cache(row.path, stored), predicted_bytes(graph, layers)
                if row.prefill_graph and not imported and options.prefill_graph and not config.labels:
                    graph, _ = prefill_graph(form, weights, rows, defaults_of(row).rounded_blocks)
                    attach_weights(graph, checkpoint, small)
                    yield row.with_cache(row.prefill_path, stored), predicted_bytes(graph, layers)
            graph, _ = decode_graph(padded, weights, rows)
            attach_weights(graph, checkpoint, small)
            yield row.portable_path, predicted_bytes(graph, layers)
        case "device":
            shared = shared_graph(traced, rows, DEVICE)
            graph, _, _ = device_graph(shared, checkpoint, small, ir_dtype(row.dtype), weights)
            yield row.path, predicted_bytes(graph, layers)
        case "static":
            raise UsageError(f"variant {row.name}: made from a package, by olmo2-export build")


def engine_graph_bytes(
    precision: Precision, checkpoint: Checkpoint, config: ModelConfig, variants: Sequence[str], options: Options
) -> GraphBytes | None:
    """Predict the graph that TensorRT compiles; its weights are nearly all of an engine that holds them once.

    Args:
        precision: out of `catalog.precisions`.
        checkpoint: nothing of it is read, but of one that is quantised.
        config: its shape.
        variants: of the package: of a quantised checkpoint that whose codes it would take over is among them, or not.
        options: how they are made.

    Returns:
        Its files; None where the precision does not go with the shape, or with the checkpoint's codes.
    """
    try:
        check_recipe(config, precision, None)
    except UsageError:
        return None
    small = shortened(config)
    graph: ir.Model = trace(small)
    attach_weights(graph, checkpoint, small)
    weights = None
    if catalog.static_row(precision).weights.quantized:
        try:
            forms = _static_forms(small, precision, checkpoint, variants, options)
        except UsageError:
            return None
        weights = StaticWeights(checkpoint, small, precision, forms, None)
    capacity = min(config.max_position_embeddings, STATIC_CACHE)
    static, _ = static_graph(graph, small, precision, capacity, 1, weights)
    return predicted_bytes(static, config.num_hidden_layers)


def _static_forms(
    small: ModelConfig, precision: Precision, checkpoint: Checkpoint, variants: Sequence[str], options: Options
) -> dict[str, LinearForm]:
    """Return how the linears of a graph for TensorRT are stored: as codes that are taken over, if there are any.

    Raises:
        UsageError: codes that it has not.
    """
    for row in map(catalog.find, variants):
        if row.weights.precision == precision and row.graph == "blocks" and is_imported(checkpoint, row, options):
            choice = choose_weights(row, options, operations(small))
            formats = imported_weights(checkpoint, small, row, Options(), choice).formats
            return imported_forms(small, precision, formats)
    return static_forms(small, precision, {})


def _cache_scales(config: ModelConfig) -> dict[str, np.ndarray]:
    """Return scales of the shapes that calibration gives."""
    ones = np.ones((config.num_key_value_heads, 1, config.head_dim), np.float32)
    return {f"{layer}.{kind}": ones for layer in range(config.num_hidden_layers) for kind in ("key", "value")}


def _never(name: str, _: BlockFormat) -> QuantizedMatrix:
    raise AssertionError(f"{name}: a prediction reads no weights")


def _never_read(name: str) -> torch.Tensor:
    raise AssertionError(f"{name}: a prediction reads no weights")
