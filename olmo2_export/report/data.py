"""Gather what a report says: package, parity report, logits beside PyTorch's, errors over depth, a benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from olmo2_export.catalog import QualityGate, names
from olmo2_export.config import config_of
from olmo2_export.locate.locate import Location, locate
from olmo2_export.measure.quality import gate_of, quality_tokens
from olmo2_export.report.bench_file import Bench, read_bench
from olmo2_export.report.logit_samples import LogitSample, sample_logits
from olmo2_export.summary.package import PackageSummary, VariantSummary, describe
from olmo2_export.truth.torch_layers import reference_logits
from olmo2_export.weights.checkpoint import Checkpoint
from olmo2_export.weights.merged import MergedCheckpoint, check_adapters
from runtimes.errors import ConfigError, Olmo2ExportError, UsageError, VariantNotFoundError
from runtimes.manifest import PARITY_NAME
from runtimes.package import open_package
from runtimes.sealed import read_sealed

_LENGTH = 256  # tokens of a sequence


def _order(name: str) -> tuple[int, str]:
    """Order variants as they are explained: fp32, then for CPUs, for CUDA, for TensorRT."""
    known = names()
    return (known.index(name) if name in known else len(known), name)


@dataclass(frozen=True)
class VariantData:
    """What a report says of one variant."""

    summary: VariantSummary
    parity: dict[str, Any] | None = field(hash=False)
    """its part of `parity.json`; None: not verified, or an earlier graph of it was"""
    stale: bool
    """an earlier graph was verified"""
    location: Location | None
    sample: LogitSample | None
    problem: str | None
    """why the two are missing; None: they are there"""
    quality_gate: QualityGate | None
    """None where nothing is quantised"""

    @property
    def name(self) -> str:
        """the variant's name"""
        return self.summary.variant.name


@dataclass(frozen=True)
class ReportData:
    """All that a report says."""

    package: PackageSummary
    reference: str
    """the model that was compared with, and its revision"""
    reference_options: tuple[str, ...]
    """of a command that shall compare with the same"""
    variants: tuple[VariantData, ...]
    tokens: int
    """at which logits were compared"""
    tokens_from: str
    """text | random ids"""
    bench: Bench | None


def gather(
    package: Path,
    checkpoint: Checkpoint,
    *,
    variants: Sequence[str] = (),
    bench: Path | None = None,
    parity: Path | None = None,
    tokens: int | None = None,
) -> ReportData:
    """Read the package and run its variants beside PyTorch, on the CPU.

    Args:
        package: the package folder.
        checkpoint: the reference weights.
        variants: which; none means all, those for TensorRT included.
        bench: the JSON of a benchmark.
        parity: what `verify` wrote; None: the package's own, if there is one.
        tokens: at which logits are compared, at most; None: as many as `quality.quality_tokens` takes.

    Raises:
        UsageError: the benchmark is none, no parity report, or fewer than 2 tokens; said before anything is run.
        ConfigError: package and reference are not of one shape.
        IntegrityError: a file of the package changed.
    """
    if tokens is not None and tokens < 2:
        raise UsageError(f"tokens {tokens}: a report compares logits at 2 or more")
    measured = read_bench(bench) if bench is not None else None
    if parity is not None and not parity.is_file():
        raise UsageError(f"--parity {parity}: expected the file that olmo2-export verify --out wrote")
    opened = open_package(package)
    opened.check_logits("report")
    check_adapters(opened.manifest.source, checkpoint)
    summary = describe(opened, parity=parity)
    config = config_of(checkpoint.folder, summary.model)
    if summary.model != config.spec:
        raise ConfigError(f"{package}: not of the reference's shape; give the checkpoint that it was exported from")
    by_name = {v.variant.name: v for v in summary.variants}
    chosen = list(dict.fromkeys(variants)) or sorted(by_name, key=_order)
    if unknown := [name for name in chosen if name not in by_name]:
        raise VariantNotFoundError(f"{package}: no variant {', '.join(unknown)}; it has {', '.join(by_name)}")
    verified = _parity(parity or opened.folder / PARITY_NAME)
    stale = {v.variant for v in summary.parity if v.stale}
    length = None if tokens is None else min(tokens, _LENGTH)
    sequences, origin = quality_tokens(checkpoint, config, length=length, most=tokens)
    gathered = []
    with tqdm(total=1 + 2 * len(chosen), desc="reporting", unit="step", leave=False) as bar:
        reference = list(reference_logits(checkpoint, config, sequences))
        bar.update()
        for name in chosen:
            entry = by_name[name].variant
            location, sample, problem = None, None, None
            try:
                sample = sample_logits(opened, name, sequences, reference)
                bar.update()
                location = locate(opened, checkpoint, name)
                bar.update()
            except Olmo2ExportError as error:  # a report says so of one variant, and goes on with the others
                problem = " ".join(str(error).split())
            gathered.append(
                VariantData(
                    summary=by_name[name],
                    parity=verified.get(name) if name not in stale else None,
                    stale=name in stale,
                    location=location,
                    sample=sample,
                    problem=problem,
                    quality_gate=gate_of(entry, config) if entry.quantization is not None else None,
                )
            )
    at = f"@{checkpoint.revision}" if checkpoint.revision else ""
    options = ["--reference", str(checkpoint.folder) if checkpoint.kind == "folder" else checkpoint.model]
    options += ["--revision", checkpoint.revision] if checkpoint.revision else []
    if isinstance(checkpoint, MergedCheckpoint):
        options += [word for adapter in checkpoint.adapters for word in ("--lora", adapter.given)]
    return ReportData(
        package=summary,
        reference=f"{checkpoint.model}{at}",
        reference_options=tuple(options),
        variants=tuple(gathered),
        tokens=sum(map(len, sequences)),
        tokens_from=origin,
        bench=measured,
    )


def _parity(path: Path) -> dict[str, Any]:
    """Return the variants of a parity report, which `describe` has checked."""
    if not path.is_file():
        return {}
    return {name: report for name, report in read_sealed(path)["variants"].items() if isinstance(report, dict)}
