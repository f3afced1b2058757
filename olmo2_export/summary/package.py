"""Check every file of a package against its manifests, and gather what is in it: the data behind `inspect`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from olmo2_export.config import ModelConfig, config_of
from olmo2_export.graphs.predicted import cache_bytes_per_token
from olmo2_export.summary.engine import EngineSummary, summarize_engine
from olmo2_export.summary.graph import (
    GraphSummary,
    IoRow,
    OpChange,
    io_rows,
    op_changes,
    portable_ops,
    summarize_graph,
)
from runtimes.errors import IntegrityError, PackageError, VariantNotFoundError
from runtimes.manifest import (
    PARITY_NAME,
    Manifest,
    ModelSpec,
    TrtManifest,
    Variant,
)
from runtimes.package import AnyPackage, Package, open_package
from runtimes.sealed import FileEntry, read_sealed


@dataclass(frozen=True)
class VariantSummary:
    """One variant: its graph or two."""

    variant: Variant
    """the manifest's entry"""
    graphs: tuple[GraphSummary, ...]
    """decode, and prefill where it has a graph of its own"""
    changes: tuple[tuple[OpChange, ...], ...]
    """per graph: its operators beside those of the portable graph"""
    io: tuple[IoRow, ...]
    cache_bytes_per_token: int
    """of one row, over all layers"""


@dataclass(frozen=True)
class ParityVerdict:
    """What `parity.json` says of one variant."""

    variant: str
    backend: str
    passed: bool
    stale: bool
    """of an earlier graph than the one in the package"""
    worst_error_ratio: float
    """error in units of PyTorch's own; NaN where no case was compared"""


@dataclass(frozen=True)
class PackageSummary:
    """All that `inspect` says."""

    package: Path
    manifest: Manifest
    portable: dict[str, int] = field(hash=False)
    """operators of the portable graph"""
    portable_from: str
    variants: tuple[VariantSummary, ...]
    engines: tuple[EngineSummary, ...]
    files: dict[str, FileEntry] = field(hash=False)
    parity_reference: str | None
    """the model it was compared with; None: never verified"""
    parity: tuple[ParityVerdict, ...]

    @property
    def model(self) -> ModelSpec:
        """the model's shape"""
        return self.manifest.model

    def to_document(self) -> dict[str, Any]:
        """Return the JSON form: the same content, sizes in bytes."""
        manifest = self.manifest
        return {
            "package": str(self.package),
            "exporter_version": manifest.exporter_version,
            "format_version": manifest.format_version,
            "source": {k: v for k, v in asdict(manifest.source).items() if k != "files"},
            "model": asdict(manifest.model),
            "libraries": manifest.libraries,
            "portable_ops": self.portable,
            "portable_ops_from": self.portable_from,
            "variants": {summary.variant.name: _variant_document(summary) for summary in self.variants},
            "engines": {engine.name: asdict(engine) for engine in self.engines},
            "files": {name: asdict(entry) for name, entry in self.files.items()},
            "bytes": sum(entry.size for entry in self.files.values()),
            "parity": {
                "reference": self.parity_reference,
                "variants": {
                    v.variant: asdict(v)
                    | {"worst_error_ratio": v.worst_error_ratio if v.worst_error_ratio == v.worst_error_ratio else None}
                    for v in self.parity
                },
            },
        }


def describe(package: AnyPackage, variant: str | None = None, *, parity: Path | None = None) -> PackageSummary:
    """Check a package and gather what it holds.

    Args:
        package: the package folder, or one that is open.
        variant: only that one, and the engines compiled from it; None: all. All files are checked in any case.
        parity: what `verify` wrote; None: the package's own.

    Raises:
        PackageNotFoundError: it is none.
        VariantNotFoundError: it has no such variant.
        IntegrityError: naming every file that is not the one that was written.
    """
    opened = open_package(package)
    folder, manifest, trt = opened.folder, opened.manifest, opened.trt
    variants = manifest.variants | (trt.variants if trt else {})
    files = manifest.files | (trt.files if trt else {})
    if variant is not None and variant not in variants:
        raise VariantNotFoundError(f"{folder}: no variant {variant!r}; it has {', '.join(variants) or 'none'}")
    opened.check(manifest.files.keys() | _listed(manifest))
    if trt:
        opened.check(trt.files.keys() | _listed(trt), remedy=f"run: olmo2-export build {folder}")
    reference, verdicts = read_parity(opened, {n: files[v.graph].sha256 for n, v in variants.items()}, parity)
    wanted = [v for name, v in variants.items() if variant in (None, name)]
    config = config_of(folder, manifest.model)
    portable, origin = portable_ops(folder, manifest, config)
    engines = [e for e in (trt.engines.values() if trt else ()) if variant in (None, e.variant)]
    return PackageSummary(
        package=folder,
        manifest=manifest,
        portable=portable,
        portable_from=origin,
        variants=tuple(_summarize(folder, entry, config, portable) for entry in wanted),
        engines=tuple(summarize_engine(folder, engine, files[engine.plan].size) for engine in engines),
        files=files,
        parity_reference=reference,
        parity=tuple(v for v in verdicts if variant in (None, v.variant)),
    )


def read_parity(
    package: Package, graphs: Mapping[str, str], parity: Path | None = None
) -> tuple[str | None, tuple[ParityVerdict, ...]]:
    """Return which model the package was verified against, and the verdicts; None if it never was.

    Args:
        package: which.
        graphs: variant -> sha256 of its graph now.
        parity: what `verify` wrote; None: the package's own.

    Raises:
        IntegrityError: the report was changed, or is of another export.
        PackageError: it is no parity report.
    """
    path = parity or package.folder / PARITY_NAME
    if not path.is_file():
        return None, ()
    document = read_sealed(path)
    if document.get("package_checksum") != package.checksum:
        raise IntegrityError(f"{path}: of another export; run: olmo2-export verify {package.folder} --reference MODEL")
    try:
        verdicts = []
        for name, report in document["variants"].items():
            worst = max((float(c["error_ratio"]) for c in report["cases"]), default=float("nan"))
            stale = report["graph_sha256"] != graphs.get(name)
            verdicts.append(ParityVerdict(name, str(report["backend"]), bool(report["passed"]), stale, worst))
        return str(document["reference"]["model"]), tuple(verdicts)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PackageError(f"{path}: not a parity report ({error}); verify the package again") from error


def _listed(manifest: Manifest | TrtManifest) -> set[str]:
    """Return the files that the variants name, which the table of files must have."""
    variants = manifest.variants.values()
    portable = {variant.portable.graph for variant in variants if variant.portable is not None}
    return portable | {name for variant in variants for name in variant.files}


def _summarize(package: Path, variant: Variant, config: ModelConfig, portable: Mapping[str, int]) -> VariantSummary:
    paths = [variant.graph, *([variant.prefill.graph] if variant.prefill else [])]
    graphs = tuple(summarize_graph(package, path, config, variant.quantization) for path in paths)
    return VariantSummary(
        variant=variant,
        graphs=graphs,
        changes=tuple(op_changes(portable, graph.ops) for graph in graphs),
        io=io_rows(variant),
        cache_bytes_per_token=cache_bytes_per_token(variant.kv_cache),
    )


def _variant_document(summary: VariantSummary) -> dict[str, Any]:
    entry, cache = summary.variant, summary.variant.kv_cache
    quantization, bits = entry.quantization, cache.quantization
    return {
        "precision": entry.precision,
        "opset": entry.opset,
        "graphs": [
            asdict(graph) | {"op_changes": [asdict(change) for change in changes]}
            for graph, changes in zip(summary.graphs, summary.changes, strict=True)
        ],
        "io": [asdict(row) for row in summary.io],
        "kv_cache": {k: v for k, v in asdict(cache).items() if k != "quantization"}
        | {"bits": bits.bits if bits else None, "bytes_per_token": summary.cache_bytes_per_token},
        "recipe": quantization.recipe if quantization else None,
        "bits_per_weight": quantization.bits_per_weight if quantization else None,
        "quality": asdict(entry.quality) if entry.quality else None,
        "prefill_quality": asdict(entry.prefill.quality) if entry.prefill else None,
        "portable": entry.portable.graph if entry.portable else None,
        "other_caches": [
            {
                "graph": other.graph,
                "kv_cache": other.kv_cache.name,
                "bytes_per_token": cache_bytes_per_token(other.kv_cache),
                "quality": asdict(other.quality) if other.quality else None,
                "prefill_graph": other.prefill.graph if other.prefill else None,
                "prefill_quality": asdict(other.prefill.quality) if other.prefill else None,
                "missed": list(other.missed),
            }
            for other in entry.other_caches
        ],
    }
