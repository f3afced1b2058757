"""What an export would write, need and take, said before anything is written; no weight is read.

Sizes of files follow from the graphs themselves, see `graph_sizes`. Memory and time are estimates, see `costs`.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import olmo2_export.catalog as catalog
from olmo2_export.architecture import operations, tensor_shapes
from olmo2_export.catalog import find
from olmo2_export.config import ModelConfig
from olmo2_export.graphs.lora_inputs import adapted_linears
from olmo2_export.package.costs import Costs, estimate_costs
from olmo2_export.package.graph_sizes import VariantSizes, engine_graph_bytes, variant_sizes
from olmo2_export.package.imported import check_import
from olmo2_export.package.kv_caches import written_caches
from olmo2_export.package.texts import write_texts
from olmo2_export.package.variants import check_takes_adapters, check_variants
from olmo2_export.package.weight_choice import Options, choose_weights
from olmo2_export.quantize.distill import training_bytes
from olmo2_export.quantize.recipes import DISTILLED, SPOOLED
from olmo2_export.weights.checkpoint import Checkpoint
from olmo2_export.weights.merged import switchable_adapters
from olmo2_export.weights.stored_names import EMBEDDING, HEAD, weight_shapes
from runtimes.errors import ResourceError
from runtimes.free_memory import available_memory

_KEPT_FREE = 1 << 20  # bytes
_SPEC, _TENSOR = 250, 188  # bytes that the manifest takes for an input or output, and for a quantised tensor,
_VARIANT, _MANIFEST = 700, 2500  # for all else of a variant, or of one with another KV cache, and besides
_SCALE = 40  # for what stands around the scales of the keys or the values of a layer
_MOST_PER_WEIGHT = 4.25  # bytes that any graph stores of a weight, scales included


@dataclass(frozen=True)
class EngineSizes:
    """What `build` would make of the package, in one precision."""

    precision: str
    graph: int
    """bytes of the graph that is compiled, and its data, exact but for the graph's own few percent"""
    plan: int
    """bytes of an engine that holds its weights once, without the kernels: some MB for each GPU that it is for"""


@dataclass(frozen=True)
class ExportPlan:
    """What one export would do."""

    model: str
    revision: str | None
    quantized: str | None
    """the format of a quantised checkpoint, in words"""
    weights: int
    """numbers in the model"""
    source_bytes: int
    """of the checkpoint's tensors; 0: its headers could not be had"""
    variants: tuple[VariantSizes, ...]
    texts: int
    """bytes of tokenizer and configs, exact, of the manifest, an estimate, and of what adapters hold"""
    spool: int
    """bytes that are on disk only while a recipe with GPTQ, or distillation, runs"""
    engines: tuple[EngineSizes, ...]
    costs: Costs
    free_disk: int | None
    """bytes, where it would be written; None: not asked"""
    free_memory: int | None
    """bytes that this process could still have; None: the system does not say"""

    @property
    def package(self) -> int:
        """Bytes of the package."""
        return sum(variant.nbytes for variant in self.variants) + self.texts

    @property
    def disk(self) -> int:
        """Bytes of disk that the export needs; a package that it replaces goes last."""
        return self.package + self.spool + _KEPT_FREE

    def to_document(self) -> dict[str, Any]:
        """Return the JSON form; sizes are bytes, times seconds."""
        names = {variant.name: variant for variant in self.variants}
        document = asdict(self) | {"package": self.package, "disk": self.disk}
        for variant in document["variants"]:
            variant["nbytes"] = names[variant["name"]].nbytes
        return document


def plan_export(
    checkpoint: Checkpoint,
    *,
    variants: Sequence[str] = ("fp32",),
    options: Options | None = None,
    out: Path | None = None,
    default_variant: str | None = None,
) -> ExportPlan:
    """Say what an export would do.

    Args:
        checkpoint: what `open_headers` or `open_checkpoint` found; its headers are compared with the model, no weight
            is read.
        variants: names out of `catalog.exported`.
        options: how quantised variants are made; None: the defaults.
        out: the folder that would be written; None: not asked how much room is there.
        default_variant: as `export`.

    Raises:
        ConfigError, CheckpointError: the checkpoint cannot be exported, as far as its headers and texts tell.
        UsageError: an unknown variant, or an option that does not go with it.
        FusionError: the traced graph is not the expected one.
    """
    options = options or Options()
    config = ModelConfig.from_json(checkpoint.folder / "config.json").giving(
        options.hidden_states, inputs_embeds=options.inputs_embeds
    )
    check_variants(variants, config, options)
    adapters = switchable_adapters(checkpoint)
    if adapters:
        check_takes_adapters(config)
    adapted_linears(adapters, operations(config))
    check_import(checkpoint, variants, options)
    if checkpoint.tensors:
        check_headers(checkpoint, config)
    names = list(dict.fromkeys(variants))
    sizes = tuple(variant_sizes(name, checkpoint, config, options) for name in names)
    shapes = tensor_shapes(operations(config))
    weights = sum(math.prod(shape) for name, shape in shapes.items() if name != HEAD or not config.tie_word_embeddings)
    return ExportPlan(
        model=checkpoint.model,
        revision=checkpoint.revision,
        quantized=checkpoint.quantized.title if checkpoint.quantized else None,
        weights=weights,
        source_bytes=checkpoint.nbytes,
        variants=sizes,
        texts=_text_bytes(checkpoint, config, names, sizes, options, default_variant)
        + sum(a.numbers * 4 for a in adapters),
        spool=max((_spool(name, config, options) for name in names), default=0),
        engines=tuple(_engines(checkpoint, config, names, options)) if "fp32" in names else (),
        costs=estimate_costs(config, sizes, options, source_bytes=checkpoint.nbytes or 2 * weights),
        free_disk=None if out is None else free_disk(out),
        free_memory=available_memory(),
    )


def check_headers(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Check that a checkpoint's headers have the tensors of the model; see `export.check_weights`."""
    expected = tensor_shapes(operations(config))
    if config.tie_word_embeddings:
        del expected[HEAD]
        checkpoint.validate_headers(expected, aliases={HEAD: EMBEDDING})
    else:
        checkpoint.validate_headers(expected)


def free_disk(out: Path) -> int:
    """Return the bytes that are free where a folder is, or will be."""
    place = (Path.cwd() / out).resolve()
    return shutil.disk_usage(next(p for p in (place, *place.parents) if p.is_dir())).free


def check_room(
    checkpoint: Checkpoint, config: ModelConfig, out: Path, variants: Sequence[str], options: Options
) -> None:
    """Refuse an export that the disk cannot hold, before anything is written.

    The sizes are made only where the disk could be too small: where no package of so many weights would fill it, they
    do not matter.

    Args:
        checkpoint: nothing of it is read.
        config: its shape.
        out: the folder that will be written.
        variants: of the export.
        options: how they are made.

    Raises:
        ResourceError: it cannot, with what is needed and what is free.
    """
    free = free_disk(out)
    names = list(dict.fromkeys(variants))
    weights = sum(math.prod(shape) for shape in tensor_shapes(operations(config)).values())
    tables = 4 * config.max_position_embeddings * config.head_dim
    graphs = sum(2 if find(name).prefill_graph and not config.labels else 1 for name in names)
    spool = max((_spool(name, config, options) for name in names), default=0)
    if graphs * (_MOST_PER_WEIGHT * weights + tables + (64 << 20)) + spool < free:
        return
    sizes = [variant_sizes(name, checkpoint, config, options) for name in names]
    needed = sum(variant.nbytes for variant in sizes) + spool
    needed += _text_bytes(checkpoint, config, names, sizes, options)
    if needed + _KEPT_FREE <= free:
        return
    parts = ", ".join(
        f"{Path(path).name} {files.graph + files.data:,}" for v in sizes for path, files in v.graphs.items()
    )
    prefill = any(len(variant.graphs) > 1 for variant in sizes)
    remedy = "free some, choose another --out" + (", or leave the prefill graph out (--no-prefill-graph)" * prefill)
    raise ResourceError(f"{out}: needs {needed + _KEPT_FREE:,} bytes ({parts}), {free:,} are free; {remedy}")


def _engines(checkpoint: Checkpoint, config: ModelConfig, names: Sequence[str], options: Options) -> list[EngineSizes]:
    found = ((p, engine_graph_bytes(p, checkpoint, config, names, options)) for p in catalog.precisions())
    return [EngineSizes(name, size.graph + size.data, size.data) for name, size in found if size is not None]


def _spool(name: str, config: ModelConfig, options: Options) -> int:
    row = find(name)
    if row.defaults is None:
        return 0
    choice = choose_weights(row, options, operations(config))
    if choice.recipe not in SPOOLED:
        return 0
    shapes = weight_shapes(config)
    bits = choice.size_budget
    if bits is not None:
        return int(sum(bits * shapes[n][0] * shapes[n][1] for n in choice.formats(config)) / 8)
    training = training_bytes(config, choice.formats(config)) if choice.recipe == DISTILLED else 0
    return training + sum(form.nbytes(*shapes[n]) for n, form in choice.formats(config).items())


def _text_bytes(
    checkpoint: Checkpoint,
    config: ModelConfig,
    names: Sequence[str],
    variants: Sequence[VariantSizes],
    options: Options,
    default: str | None = None,
) -> int:
    """Write the texts of a package aside, and count them; add what the manifest is likely to take."""
    with tempfile.TemporaryDirectory(prefix="olmo2-export-plan-") as folder:
        write_texts(checkpoint.folder, config, Path(folder), names, default)
        texts = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    quantised = sum(len(weight_shapes(config)) for name in names if find(name).defaults is not None)
    caches = [cache for name in names for cache in written_caches(find(name), config, options)]
    tables = len(caches) + sum(len(variant.portable) for variant in variants)
    specs = (4 * config.num_hidden_layers + 6 + len(config.hidden_states)) * tables
    in_base64 = 16 * config.num_key_value_heads * config.head_dim // 3  # of float32
    scales = 2 * config.num_hidden_layers * (_SCALE + in_base64) * sum(cache.bits is not None for cache in caches)
    return texts + _MANIFEST + _VARIANT * len(caches) + _SPEC * specs + _TENSOR * quantised + scales
