"""Write one static-cache graph into a package's trt folder: graph, weights, and its entry in the manifest."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from olmo2_export.architecture import operations
from olmo2_export.catalog import BlockFormat, listed, precisions, static_row
from olmo2_export.config import ModelConfig, config_of
from olmo2_export.fp16.safety import measure_safety, refuse_overflow
from olmo2_export.fuse import check_op_counts
from olmo2_export.graphs.files import save_graph
from olmo2_export.graphs.static import expected_op_counts, load_static_graph, static_variant
from olmo2_export.graphs.stored_blocks import folded_orders, stored_matrices
from olmo2_export.package.variants import BUNDLED_TEXT, SPOOL
from olmo2_export.quantize.imported import IMPORTED
from olmo2_export.quantize.static import (
    StaticWeights,
    check_recipe,
    imported_forms,
    imported_static_weights,
    static_weights,
    uses_calibration,
)
from olmo2_export.stored_graph import load_graph
from olmo2_export.weights.package_weights import PackageWeights
from olmo2_export.weights.stored_names import EMBEDDING
from runtimes.errors import UsageError
from runtimes.manifest import Manifest, Precision, Quantization, Variant
from runtimes.sealed import hash_file

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrtOptions:
    """How a static-cache graph is made."""

    precision: Precision
    max_cache_length: int
    """tokens"""
    top_k: int = 1
    """candidates that the graph picks per row"""
    recipe: str | None = None
    """out of the row's in `catalog`, which has some for int4; None: the default, or a quantised checkpoint's codes"""
    calibration: Path | None = None
    """UTF-8 text for int8, fp8 and the recipes that measure activations"""


def check_trt_options(package: Path, manifest: Manifest, options: TrtOptions) -> None:
    """Refuse options that mean nothing, or that the model's shape does not allow, before anything expensive.

    Raises:
        UsageError: saying what is expected.
    """
    if not 1 <= options.top_k <= manifest.model.vocab_size:
        raise UsageError(f"top_k {options.top_k}: expected 1 to {manifest.model.vocab_size}, the vocabulary")
    config = ModelConfig.from_json(package / "config.json")
    check_recipe(config, options.precision, options.recipe)
    if takes_codes(manifest, options):
        with _remedy(package, manifest, options):
            imported_forms(config, options.precision, _formats(_with_codes(manifest, options)))
    if options.calibration is None:
        return
    if not uses_calibration(options.precision, options.recipe):
        rows = [static_row(precision) for precision in precisions()]
        rounding = [row.weights.precision for row in rows if row.weights.inputs is not None]
        others = [f"{row.weights.precision} with --recipe gptq" for row in rows if "gptq" in row.weights.recipes]
        raise UsageError(f"calibration text: only {listed([*rounding, *others])} have use for one")
    if not options.calibration.is_file():
        raise UsageError(f"{options.calibration}: no such calibration text; it is a UTF-8 file")


def takes_codes(manifest: Manifest, options: TrtOptions) -> bool:
    """Tell whether a graph takes over a quantised checkpoint's codes, as it does unless a recipe is asked for."""
    blocks = static_row(options.precision).weights.layout == "blocks"
    return blocks and manifest.source.quantized is not None and options.recipe is None


def read_variants(manifest: Manifest, options: TrtOptions) -> list[Variant]:
    """Return the variants of the package whose files are read."""
    fp32 = manifest.variants["fp32"]
    return [fp32, _with_codes(manifest, options)] if takes_codes(manifest, options) else [fp32]


def _with_codes(manifest: Manifest, options: TrtOptions) -> Variant:
    """Return the variant that has them.

    Raises:
        UsageError: none has.
    """
    for variant in manifest.variants.values():
        taken = variant.quantization is not None and variant.quantization.recipe == IMPORTED
        if taken and variant.precision == options.precision:
            return variant
    raise UsageError("no variant q4 that has its codes; export it with --variant fp32 --variant q4")


def _formats(variant: Variant) -> dict[str, BlockFormat]:
    """Return the formats of what is in codes: what a recipe made beside them, of embedding and head, has an error."""
    assert variant.quantization is not None  # it has codes
    tensors = {name: t for name, t in variant.quantization.tensors.items() if not t.nmse and name != EMBEDDING}
    return {name: BlockFormat(t.bits, t.block_size, t.symmetric) for name, t in tensors.items()}


@contextmanager
def _remedy(package: Path, manifest: Manifest, options: TrtOptions) -> Iterator[None]:
    """Say of which package it is that codes cannot be taken over, and what else there is."""
    try:
        yield
    except UsageError as error:
        what = f"precision {options.precision} of {package} ({manifest.source.quantized})"
        recipes = " or ".join(static_row(options.precision).weights.recipes)
        raise UsageError(f"{what}: {error}; --recipe {recipes} quantises its float32 weights again") from error


def _imported(package: Path, manifest: Manifest, config: ModelConfig, options: TrtOptions) -> StaticWeights:
    """Return a package's codes as TensorRT takes them.

    Raises:
        UsageError: it does not; see `imported_static_weights`.
    """
    variant = _with_codes(manifest, options)
    graph, source = load_graph(package / variant.graph), PackageWeights(package, manifest)
    with _remedy(package, manifest, options):
        if orders := folded_orders(graph):
            raise UsageError(f"{next(iter(orders))}: act-order, which TensorRT's graphs have not")
        return imported_static_weights(source, config, options.precision, _formats(variant), stored_matrices(graph))


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
        if takes_codes(manifest, options):
            weights = _imported(package, manifest, config, options)
        elif row.weights.quantized:
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
        quantization = _describe(weights, options, text)
        if takes_codes(manifest, options):
            quantization = replace(quantization, recipe=IMPORTED)
            if rounded := [name for name, tensor in quantization.tensors.items() if tensor.nmse]:
                logger.warning(
                    "%s: the codes of %d linears are the checkpoint's, and their scales are rounded to bfloat16: no "
                    "weight changes by more than 0.4 %%",
                    variant.name,
                    len(rounded),
                )
        return replace(variant, quantization=quantization)
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
