"""Write one variant into the folder of a package in the making: its graph or two, and its entry in the manifest.

fp32 is the portable graph. q4 and q8 have a decode graph with weights in blocks of 4 or 8 bits, a portable one on the
same weights, and, where a quality gate lets it pass, a prefill graph that multiplies int8 by int8; decode and prefill
graph are written for each KV cache, over one file of weights each. bf16, fp16 and q4f16 are for GPUs.
"""

from __future__ import annotations

import base64
import dataclasses
import logging
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import onnx_ir as ir
from tqdm import tqdm

import olmo2_export.catalog as catalog
from olmo2_export.architecture import Operation, count, operations
from olmo2_export.catalog import KVCacheFormat, VariantRow
from olmo2_export.config import ModelConfig
from olmo2_export.dtypes import ir_dtype
from olmo2_export.fp16.safety import Safety, measure_safety, refuse_overflow
from olmo2_export.fp16.values import Float32Islands
from olmo2_export.fuse import DEVICE, check_op_counts
from olmo2_export.fuse.quantized_kv_cache import KEPT_INSIDE, quantized_kv_cache
from olmo2_export.graphs.by_layer import Recorded, in_pieces, logits_by_layer
from olmo2_export.graphs.device import device_graph, device_outputs
from olmo2_export.graphs.files import attach_weights, save_beside, save_graph, save_weights
from olmo2_export.graphs.lora_inputs import lora_specs, take_adapters_at
from olmo2_export.graphs.shared import (
    decode_graph,
    padded_graph,
    prefill_graph,
    shared_graph,
    shared_inputs,
    shared_outputs,
)
from olmo2_export.graphs.stored_blocks import folded_orders
from olmo2_export.graphs.trace import OPSET, expected_op_counts, portable_inputs, portable_outputs, trace
from olmo2_export.measure.quality import (
    LONG,
    PIECE,
    broken_limits,
    gate_of,
    is_large,
    measure_quality,
    quality_tokens,
)
from olmo2_export.package.imported import imported_weights, is_imported
from olmo2_export.package.kv_caches import with_default, written_caches
from olmo2_export.package.weight_choice import Options, choose_weights, defaults_of
from olmo2_export.quantize.calibration import calibration_tokens
from olmo2_export.quantize.imported import IMPORTED
from olmo2_export.quantize.kv_cache import kv_cache_scales
from olmo2_export.quantize.recipes import CALIBRATED, DISTILLED, RECIPES, SPOOLED, QuantizedWeights
from olmo2_export.quantize.self_text import check_writes
from olmo2_export.weights.checkpoint import Checkpoint
from olmo2_export.weights.stored_names import weight_shapes
from runtimes.errors import CheckpointError, ConfigError, FusionError, UsageError
from runtimes.manifest import (
    Dtype,
    KVCacheQuantization,
    KVCacheSpec,
    PortableGraph,
    PrefillGraph,
    Quality,
    Quantization,
    QuantizedTensor,
    TokensFrom,
    Variant,
)
from runtimes.ort.open import open_ort
from runtimes.ort.versions import oldest_onnxruntime
from runtimes.sealed import hash_file

logger = logging.getLogger(__name__)

PREFILL_MIN_ROWS = 8
"""tokens in a step from which the int8 graph is faster than the one of 4 bits"""

Reference: TypeAlias = tuple[list[np.ndarray], TokensFrom, list[np.ndarray]]
"""sequences for measuring quality, their origin, and PyTorch's logits"""

LARGE_GRAPH = 1 << 28
"""bytes of weights from which a graph's quality is measured with one layer in memory at a time"""

SPOOL = ".spool"
"""a folder in the staging folder, for finished tensors; gone when the package is"""

BUNDLED_TEXT = Path(__file__).parents[1] / "demo" / "calibration.txt"
"""what a KV cache is calibrated on where no other text is given"""


_HEAD_DIM_STEP = 16
_MOST_BITS = 32


def check_variants(variants: Sequence[str], config: ModelConfig, options: Options) -> None:
    """Refuse what cannot be exported, before anything is read or written.

    Raises:
        UsageError: no variant, an unknown one, or an option that does not go with it.
        ConfigError: a shape that the variant's operators do not take.
    """
    exported = catalog.exported()
    unknown = [v for v in variants if v not in exported]
    if unknown or not variants:
        raise UsageError(f"variant {', '.join(unknown) or '(none)'}: this version writes {', '.join(exported)}")
    wanted = [catalog.find(name) for name in variants]
    quantized_cache = any(cache.bits is not None for row in wanted for cache in written_caches(row, config, options))
    catalog.kv_caches(options.kv_caches)
    if options.recipe is not None and options.recipe not in RECIPES:
        raise UsageError(f"recipe {options.recipe}: this version has {', '.join(RECIPES)}")
    if options.recipe == DISTILLED:
        check_writes(config)
    if options.distill_steps is not None and (options.recipe != DISTILLED or options.distill_steps < 1):
        raise UsageError(f"steps of distillation {options.distill_steps}: 1 or more, of recipe {DISTILLED} alone")

    def only_for(what: str, has: Callable[[VariantRow], object], why: str = "") -> None:
        if not any(map(has, wanted)):
            raise UsageError(f"{what} are for {catalog.listed(catalog.exported(has))}{why}")

    if options.kv_caches or not options.prefill_graph:
        only_for("KV cache and prefill graph", lambda row: row.quantized_cache)
    if options.fp16_islands:
        only_for("float32 islands", lambda r: r.dtype == "float16", ": the other variants have the range of float32")
    if dataclasses.replace(options, fp16_islands=False, hidden_states=(), inputs_embeds=False) != Options():
        only_for("recipe, calibration, size budget, steps and block size", lambda row: row.defaults)
    if options.calibration is not None and options.recipe not in CALIBRATED and not quantized_cache:
        raise UsageError(f"calibration text: only {', '.join(CALIBRATED)} and a quantised KV cache have use for one")
    if options.size_budget is not None and not 0 < options.size_budget <= _MOST_BITS:
        raise UsageError(f"size budget {options.size_budget:g}: expected bits per weight, up to {_MOST_BITS}")
    if options.calibration is not None and not options.calibration.is_file():
        raise UsageError(f"{options.calibration}: no such calibration text; it is a UTF-8 file")
    if any(row.form == "shared" for row in wanted) and config.head_dim % _HEAD_DIM_STEP:
        raise ConfigError(
            f"head_dim {config.head_dim}: onnxruntime's GroupQueryAttention takes multiples of {_HEAD_DIM_STEP}; "
            "export fp32"
        )


def check_takes_adapters(config: ModelConfig) -> None:
    """Refuse what has no adapters as inputs.

    Raises:
        UsageError: a classifier.
    """
    if config.labels:
        raise UsageError("--lora-inputs: a classifier takes no adapters at run time, language models do; use --lora")


def cache_spec(config: ModelConfig, row: VariantRow, dtype: Dtype) -> KVCacheSpec:
    """Return the KV cache of a model in a package, not quantised.

    Layers with a window keep it alone where the runner of the variant gives memory back: on CPUs, in a shared buffer.
    """
    return KVCacheSpec(
        form=row.form,
        dtype=dtype,
        num_layers=config.num_hidden_layers,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        max_cache_length=config.max_position_embeddings,
        windows=config.windows if row.graph == "blocks" else (),
    )


class VariantWriter:
    """Writes the variants of one checkpoint; traces it once, and asks PyTorch for its logits once."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        staging: Path,
        options: Options,
        graphs_of: Path | None = None,
        adapted: Sequence[Operation] = (),
    ) -> None:
        """Open nothing yet.

        Args:
            checkpoint, config: what is exported.
            staging: the folder to write to.
            options: how quantised variants are made.
            graphs_of: a package of the same shape whose graph files are taken as they are; only weights are written.
            adapted: linears that take LoRA adapters at run time.
        """
        self._checkpoint = checkpoint
        self._config, self._rows = config, operations(config)
        self._staging = staging
        self._options = options
        self._graphs_of = graphs_of
        self._adapted = adapted
        self._cache_scales: dict[int, dict[str, np.ndarray]] = {}

    def write(self, name: str) -> Variant:
        """Write one variant and return the manifest's entry."""
        row = catalog.find(name)
        match row.graph:
            case "portable":
                return self._adaptable(self._portable(row))
            case "blocks":
                return self._adaptable(self._quantized(row))
            case "device":
                return self._adaptable(self._device(row), row.dtype)
            case "static":
                raise UsageError(f"variant {name}: made from a package, by olmo2-export build")

    def _adaptable(self, variant: Variant, dtype: Dtype = "float32") -> Variant:
        """Let a finished variant's graphs take adapters: all that was measured of them holds without one."""
        if not self._adapted:
            return variant
        portable = variant.portable
        for entry in (*variant.each_graph, *filter(None, [portable])):
            take_adapters_at(self._staging / entry.graph, self._adapted, dtype)
        specs = lora_specs(self._adapted, dtype)
        if portable is not None:
            portable = dataclasses.replace(portable, inputs=(*portable.inputs, *specs))
        others = (dataclasses.replace(other, inputs=(*other.inputs, *specs)) for other in variant.other_caches)
        inputs = (*variant.inputs, *specs)
        return dataclasses.replace(variant, inputs=inputs, portable=portable, other_caches=tuple(others))

    @cached_property
    def _traced(self) -> ir.Model:
        with tqdm(total=1, desc="tracing", bar_format="{desc} {elapsed}", leave=False):
            return trace(self._config)

    @cached_property
    def _reference(self) -> Reference:
        return self._asked(*quality_tokens(self._checkpoint, self._config))

    @cached_property
    def _long_reference(self) -> Reference:
        """The same on sequences as long as those on which verify measures a quantised cache, if the model is small."""
        sequences, origin = quality_tokens(self._checkpoint, self._config, length=LONG)
        if is_large(self._config) or len(sequences[0]) == len(self._reference[0][0]):
            return self._reference
        return self._asked(sequences, origin)

    def _asked(self, sequences: list[np.ndarray], origin: TokensFrom) -> Reference:
        from olmo2_export.truth.torch_layers import reference_logits  # transformers loads for seconds; fp32 needs none

        with tqdm(total=1, desc="reference logits", bar_format="{desc} {elapsed}", leave=False):
            return sequences, origin, list(reference_logits(self._checkpoint, self._config, sequences))

    @cached_property
    def _safety(self) -> Safety:
        """What fits float16 and what does not."""
        return self._options.fp16_safety or measure_safety(self._checkpoint, self._config)

    def _portable(self, row: VariantRow) -> Variant:
        model = self._traced.clone()
        cache = self._cache_spec(row, row.dtype)
        return Variant(
            name=row.name,
            precision=row.weights.precision,
            graph=row.path,
            data=self._save(model, row.path),
            opset=OPSET,
            inputs=portable_inputs(self._config),
            outputs=portable_outputs(self._config),
            kv_cache=cache,
            op_counts=check_op_counts(model, expected_op_counts(self._rows)),
            min_onnxruntime=oldest_onnxruntime(cache),
        )

    def _quantized(self, row: VariantRow) -> Variant:
        options = self._options
        shared = shared_graph(self._traced, self._rows)
        padded = padded_graph(shared, self._rows)
        weights = self._weights(row)
        forms = self._forms(shared, row)
        written: list[Variant] = []
        for stored, (graph, cache) in forms.items():
            written.append(self._decode(graph, weights, row, stored, cache, written[0] if written else None))
        portable = self._for_others(padded, weights, row, written[0])
        written = [dataclasses.replace(own, portable=portable) for own in written]
        if self._config.labels:  # there are no logits to judge int8 by
            return with_default(written, None)
        written = [self._judged(own) if own is written[0] else self._measured(own) for own in written]
        if row.prefill_graph and options.prefill_graph and not is_imported(self._checkpoint, row, options):
            for number, (stored, (graph, _)) in enumerate(forms.items()):
                first = written[0].prefill if number else None
                if first is not None or not number:  # they share its data
                    prefill = self._prefill(graph, weights, row, stored, written[number], first)
                    written[number] = dataclasses.replace(written[number], prefill=prefill)
        return with_default(written, gate_of(written[0], self._config))

    def _forms(self, shared: ir.Model, row: VariantRow) -> dict[KVCacheFormat, tuple[ir.Model, KVCacheSpec]]:
        """Return a shared-cache graph with each KV cache; one that nobody asked for may be left out."""
        found = {}
        for stored in written_caches(row, self._config, self._options):
            try:
                found[stored] = self._stored_in(shared, row, stored)
            except (CheckpointError, UsageError) as error:
                if self._options.kv_caches or self._options.calibration is not None:
                    raise
                logger.warning("%s: no %s KV cache, which cannot be calibrated: %s", row.name, stored.name, error)
        return found

    def _stored_in(self, shared: ir.Model, row: VariantRow, stored: KVCacheFormat) -> tuple[ir.Model, KVCacheSpec]:
        """Return a shared-cache graph that keeps keys and values in a format."""
        cache, graph = self._cache_spec(row, stored.dtype), shared.clone()
        if stored.bits is None:
            return graph, cache
        return graph, dataclasses.replace(cache, quantization=self._quantize_cache(graph, stored.bits))

    def _decode(
        self,
        shared: ir.Model,
        weights: QuantizedWeights,
        row: VariantRow,
        stored: KVCacheFormat,
        cache: KVCacheSpec,
        first: Variant | None,
    ) -> Variant:
        """Write the decode graph with one KV cache, its weights where those of the first one are."""
        spec, graph = self._config.spec, row.with_cache(row.path, stored)
        model, counts = decode_graph(shared, weights, self._rows)
        return Variant(
            name=row.name,
            precision=row.weights.precision,
            graph=graph,
            data=self._save(model, graph, row.data, first.graph if first is not None else None),
            opset=OPSET,
            inputs=shared_inputs(spec, cache),
            outputs=shared_outputs(spec, cache),
            kv_cache=cache,
            op_counts=counts,
            quantization=self._describe(row, weights) if first is None else first.quantization,
            min_onnxruntime=oldest_onnxruntime(cache),
        )

    def _device(self, row: VariantRow) -> Variant:
        spec, graph, dtype = self._config.spec, row.path, ir_dtype(row.dtype)
        cache = self._cache_spec(row, row.dtype)
        safety = self._safety if row.dtype == "float16" else None
        if safety is not None and (safety.blocked or not self._options.fp16_islands):
            refuse_overflow(safety, f"{self._checkpoint.model}, variant {row.name}")
        wide = safety.wide if safety is not None else Float32Islands()
        weights = self._weights(row, wide) if row.defaults is not None else None
        shared = shared_graph(self._traced, self._rows, DEVICE)
        model, rounding, counts = device_graph(shared, self._checkpoint, self._config, dtype, weights, wide)
        self._write(model, graph, row.data)
        rounding.check()
        variant = Variant(
            name=row.name,
            precision=row.weights.precision,
            graph=graph,
            data=(row.data,),
            opset=OPSET,
            inputs=shared_inputs(spec, cache),
            outputs=device_outputs(spec, cache),
            kv_cache=cache,
            op_counts=counts,
            float32_islands=safety.reasons if safety is not None else {},
            min_onnxruntime=oldest_onnxruntime(cache),
        )
        if weights is None:
            return variant
        described = dataclasses.replace(
            variant, quantization=self._describe(row, weights, scale_bytes=int(dtype.itemsize))
        )
        return described if self._config.labels else self._judged(described)

    def _for_others(
        self, padded: ir.Model, weights: QuantizedWeights, row: VariantRow, variant: Variant
    ) -> PortableGraph:
        """Write the graph that other runtimes load, over the weights that are written; its cache is not quantised."""
        model, _ = decode_graph(padded, weights, self._rows)
        self._save(model, row.portable_path, row.data, variant.graph)
        spec, cache = self._config.spec, self._cache_spec(row, row.dtype)
        return PortableGraph(row.portable_path, shared_inputs(spec, cache), shared_outputs(spec, cache))

    def _measured(self, variant: Variant) -> Variant:
        """Return a variant with what its decode graph costs."""
        return dataclasses.replace(variant, quality=self._measure(variant))

    def _judged(self, variant: Variant) -> Variant:
        """Return a variant with what it costs; warn where that misses its gate."""
        quality = self._measure(variant)
        if broken := broken_limits(quality, gate_of(variant, self._config)):
            known = variant.quantization is not None and variant.quantization.recipe == IMPORTED
            why = "its weights are the checkpoint's, its kernels round inputs" if known else "try another recipe"
            logger.warning("%s misses its quality gate: %s; %s", variant.name, "; ".join(broken), why)
        return dataclasses.replace(variant, quality=quality)

    def _prefill(
        self,
        shared: ir.Model,
        weights: QuantizedWeights,
        row: VariantRow,
        stored: KVCacheFormat,
        variant: Variant,
        first: PrefillGraph | None,
    ) -> PrefillGraph | None:
        """Write the int8 graph, measure it, and keep it if it passes the variant's gate or is no worse than it.

        Args:
            shared: a graph with one KV cache.
            weights, row: of the variant.
            stored: the cache.
            variant: with that cache, its decode graph measured.
            first: of the cache whose prefill graph brought the weights; None: they are to be written.
        """
        graph = row.with_cache(row.prefill_path, stored)
        in_blocks, decode = defaults_of(row).rounded_blocks, self._staging / variant.graph
        model, _ = prefill_graph(shared, weights, self._rows, in_blocks, decode)
        data = self._save(model, graph, f"{row.prefill_path}_data", first.graph if first is not None else None)
        measured = self._measure(dataclasses.replace(variant, graph=graph, data=data))
        broken = broken_limits(measured, gate_of(variant, self._config))
        assert variant.quality is not None  # it was measured
        if broken and measured.kl_mean > variant.quality.kl_mean:
            of = "" if first is None else f" for the {stored.name} KV cache"
            words = "; ".join(broken)
            logger.warning("%s has no prefill graph%s: int8 misses its quality gate: %s", variant.name, of, words)
            for file in (graph, *(data if first is None else ())):
                (self._staging / file).unlink()
            return None
        return PrefillGraph(
            graph=graph,
            data=data,
            min_rows=PREFILL_MIN_ROWS,
            quality=measured,
            min_onnxruntime=oldest_onnxruntime(variant.kv_cache, prefill=True),
        )

    def _save(self, model: ir.Model, graph: str, data: str | None = None, stored: str | None = None) -> tuple[str, ...]:
        """Write a graph and its weights; `stored`: the graph alone, on the weights of one that is written."""
        attach_weights(model, self._checkpoint, self._config)
        data = data or f"{graph}_data"
        if stored is None:
            self._write(model, graph, data)
        else:
            save_beside(model, self._staging / graph, self._staging / stored)
        return (data,)

    def _write(self, model: ir.Model, graph: str, data: str) -> None:
        own = any(KEPT_INSIDE in value.meta for value in model.graph.initializers.values()) or folded_orders(model)
        if self._graphs_of is not None and not own and (self._graphs_of / graph).is_file():
            save_weights(model, self._staging / graph, self._graphs_of / graph, Path(data).name)
        else:
            save_graph(model, self._staging / graph, self._staging / data)

    def _measure(self, variant: Variant) -> Quality:
        """Measure one graph on text; a large one layer by layer, whatever memory there is: two exports are equal."""
        quantized = variant.kv_cache.quantization is not None
        sequences, origin, reference = self._long_reference if quantized else self._reference
        graph = self._staging / variant.graph
        if sum((self._staging / name).stat().st_size for name in variant.data) > LARGE_GRAPH:
            plans = in_pieces(sequences, PIECE)
            recorded = Recorded(plans, logits_by_layer(graph, variant, self._rows, plans))
            return measure_quality(recorded, sequences, reference, origin).quality
        with open_ort(self._staging, variant, self._config.spec, None) as runner:
            return measure_quality(runner, sequences, reference, origin).quality

    def _cache_spec(self, row: VariantRow, dtype: Dtype) -> KVCacheSpec:
        return cache_spec(self._config, row, dtype)

    def _quantize_cache(self, shared: ir.Model, bits: Literal[8, 4]) -> KVCacheQuantization:
        """Calibrate the cache and rewrite the graph in place."""
        if bits not in self._cache_scales:
            with tqdm(total=1, desc="calibrating the KV cache", bar_format="{desc} {elapsed}", leave=False):
                found = kv_cache_scales(self._checkpoint, self._config, self._calibration, bits)
            self._cache_scales[bits] = found
        scales = self._cache_scales[bits]
        expected = count(self._rows, "attention")
        if (rewritten := quantized_kv_cache(shared, scales, bits)) != expected:
            raise FusionError(f"quantized_kv_cache: expected {expected}, applied {rewritten} times")
        return KVCacheQuantization(
            bits=bits,
            calibration_tokens=sum(map(len, self._calibration)),
            scales={name: base64.b64encode(array.tobytes()).decode() for name, array in scales.items()},
        )

    def _weights(self, row: VariantRow, wide: Float32Islands | None = None) -> QuantizedWeights:
        """Quantise, but for what is to be multiplied in float32: MatMulNBits has no kernel for it on GPUs."""
        choice, options = choose_weights(row, self._options, self._rows, wide), self._options
        if is_imported(self._checkpoint, row, options):
            return imported_weights(self._checkpoint, self._config, row, options, choice)
        return choice.quantize(
            self._checkpoint,
            self._config,
            options.calibration if choice.recipe in CALIBRATED else None,
            self._staging / SPOOL if choice.recipe in SPOOLED else None,
        )

    def _describe(self, row: VariantRow, weights: QuantizedWeights, scale_bytes: int = 4) -> Quantization:
        """Return the manifest's entry of the weights, which have been written and so measured."""
        recipe, calibration = self._options.recipe or defaults_of(row).recipe, self._options.calibration
        if is_imported(self._checkpoint, row, self._options):
            recipe = IMPORTED
        shapes = weight_shapes(self._config)
        size = sum(
            form.nbytes(*shapes[tensor]) - (4 - scale_bytes) * shapes[tensor][0] * form.blocks(shapes[tensor][1])
            for tensor, form in weights.formats.items()
        )
        calibrated = recipe in CALIBRATED and calibration is not None
        return Quantization(
            recipe=recipe,
            calibration=hash_file(calibration).sha256 if calibrated and calibration is not None else None,
            bits_per_weight=8 * size / sum(shapes[n][0] * shapes[n][1] for n in weights.formats),
            tensors={
                error.name: QuantizedTensor(
                    error.bits, error.block_size, weights.formats[error.name].symmetric, error.nmse
                )
                for error in weights.errors()
            },
        )

    @cached_property
    def _calibration(self) -> list[np.ndarray]:
        """Return the token sequences on which the KV cache is calibrated."""
        text = self._options.calibration
        if text is None and (self._checkpoint.folder / "tokenizer.json").is_file():
            text = BUNDLED_TEXT
        return calibration_tokens(self._checkpoint, self._config, text, sequences=8, length=128)
