"""Write one static-cache graph into a package's trt folder: graph, weights, and its entry in the manifest."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from olmo2_export.architecture import operations
from olmo2_export.catalog import listed, precisions, static_row
from olmo2_export.config import ModelConfig, config_of
from olmo2_export.fp16.safety import measure_safety, refuse_overflow
from olmo2_export.fuse import check_op_counts
from olmo2_export.graphs.files import save_graph
from olmo2_export.graphs.static import expected_op_counts, load_static_graph, static_variant
from olmo2_export.package.variants import BUNDLED_TEXT, SPOOL
from olmo2_export.quantize.static import StaticWeights, check_recipe, static_weights, uses_calibration
from olmo2_export.weights.package_weights import PackageWeights
from runtimes.errors import UsageError
from runtimes.manifest import Manifest, Precision, Quantization, Variant
from runtimes.sealed import hash_file


@dataclass(frozen=True)
class TrtOptions:
    """How a static-cache graph is made."""

    precision: Precision
    max_cache_length: int
    """tokens"""
    top_k: int = 1
    """candidates that the graph picks per row"""
    recipe: str | None = None
    """out of the row's in `catalog`, which has some for int4; None: the default"""
    calibration: Path | None = None
    """UTF-8 text for int8, fp8 and the recipes that measure activations"""


def check_trt_options(package: Path, manifest: Manifest, options: TrtOptions) -> None:
    """Refuse options that mean nothing, or that the model's shape does not allow, before anything expensive.

    Raises:
        UsageError: saying what is expected.
    """
    if not 1 <= options.top_k <= manifest.model.vocab_size:
        raise UsageError(f"top_k {options.top_k}: expected 1 to {manifest.model.vocab_size}, the vocabulary")
    check_recipe(ModelConfig.from_json(package / "config.json"), options.precision, options.recipe)
    if options.calibration is None:
        return
    if not uses_calibration(options.precision, options.recipe):
        rows = [static_row(precision) for precision in precisions()]
        rounding = [row.weights.precision for row in rows if row.weights.inputs is not None]
        others = [f"{row.weights.precision} with --recipe gptq" for row in rows if "gptq" in row.weights.recipes]
        raise UsageError(f"calibration text: only {listed([*rounding, *others])} have use for one")
    if not options.calibration.is_file():
        raise UsageError(f"{options.calibration}: no such calibration text; it is a UTF-8 file")


def default_text(package: Path) -> Path | None:
    """Return the calibration text where none is given; None: random ids, for want of a tokenizer."""
    return BUNDLED_TEXT if (package / "tokenizer.json").is_file() else None


def write_trt_variant(package: Path, manifest: Manifest, folder: Path, options: TrtOptions) -> Variant:
    """Write the static-cache graph and its weights; return the manifest's entry.

    Args:
        package: has the variant fp32, which the caller has checked.
        manifest: the package's.
        folder: gets the graph and its data; it becomes the package's trt folder.
        options: see there.

    Raises:
        UsageError: see `check_trt_options`, and a calibration text that is no text or too short.
        FailedError: weights, or on text activations, beyond the range of float16.
        FusionError: a pass did not find what it must find.
        NumericError: activations on the calibration tokens that are not finite.
        ResourceError: disk full.
    """
    check_trt_options(package, manifest, options)
    precision, capacity, top_k = options.precision, options.max_cache_length, options.top_k
    config = config_of(package, manifest.model)
    weights, text = None, None
    row = static_row(precision)
    if row.dtype == "float16":
        found = measure_safety(PackageWeights(package, manifest), config)
        refuse_overflow(found, f"{package}, precision fp16", can_have_islands=False)
    spool = folder / SPOOL
    try:
        if row.weights.quantized:
            if uses_calibration(precision, options.recipe):
                text = options.calibration or default_text(package)
            weights = static_weights(
                PackageWeights(package, manifest),
                config,
                precision,
                recipe=options.recipe,
                calibration=text,
                spool=spool,
            )
        graph, rounding = load_static_graph(package, manifest, precision, capacity, top_k, weights)
        counts = check_op_counts(graph, expected_op_counts(operations(config), precision))
        variant = static_variant(manifest.model, precision, capacity, top_k, counts)
        save_graph(graph, folder / Path(variant.graph).name)
        rounding.check()
        if weights is None:
            return variant
        return replace(variant, quantization=_describe(weights, options, text))
    finally:
        shutil.rmtree(spool, ignore_errors=True)


def _describe(weights: StaticWeights, options: TrtOptions, text: Path | None) -> Quantization:
    """Return the manifest's entry of weights that have been written."""
    return Quantization(
        recipe=options.recipe or static_row(options.precision).weights.recipe or "",
        calibration=hash_file(text).sha256 if text is not None else None,
        bits_per_weight=weights.bits_per_weight,
        tensors=weights.tensors(),
        input_scales={n: form.input_scale for n, form in weights.forms.items() if form.input_scale is not None},
    )
