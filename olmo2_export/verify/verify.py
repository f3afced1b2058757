"""Verify a package: run each variant against PyTorch, print one verdict per case, write `parity.json`.

What is run and compared of one variant is in `variant.py`.
"""

from __future__ import annotations

import importlib.metadata
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import olmo2_export.catalog as catalog
from olmo2_export.atomic import can_write, write_file
from olmo2_export.config import config_of
from olmo2_export.measure.parity import GATES, CaseResult, ParityReport
from olmo2_export.verify.by_layer import LONGEST_BY_LAYER, why_by_layer
from olmo2_export.verify.feeds import MIN_CAPACITY
from olmo2_export.verify.measure import LONGEST, ask_pytorch
from olmo2_export.verify.variant import measure_variant
from olmo2_export.weights.checkpoint import Checkpoint
from olmo2_export.weights.merged import check_adapters, check_switchable
from runtimes import Backend, Device, Package, open_runner
from runtimes.errors import IntegrityError, PackageError, UsageError, VariantNotFoundError
from runtimes.manifest import PARITY_NAME, Variant
from runtimes.manifest_file import package_checksum
from runtimes.ort.devices import find_device
from runtimes.package import AnyPackage, open_package
from runtimes.sealed import FORMAT_VERSION, read_sealed, seal
from runtimes.targets import Target, find_target, runnable

REFERENCE = f"transformers {importlib.metadata.version('transformers')}"
"""what computes the logits that are taken as true"""

logger = logging.getLogger(__name__)


def verify(
    package: AnyPackage,
    checkpoint: Checkpoint,
    *,
    variants: Sequence[str] = (),
    backend: Backend = "ort",
    device: Device | None = None,
    longest: int = LONGEST,
    low_memory: bool = False,
    out: Path | None = None,
    show: Callable[[Sequence[ParityReport]], None] | None = None,
) -> list[ParityReport]:
    """Compare variants of a package with PyTorch on the reference weights, and write `parity.json` beside the manifest.

    A package that may not be written is verified all the same; that its report is not kept is logged as a warning.

    Args:
        package: the package folder; all its files are checked against the manifest first.
        checkpoint: the reference weights.
        variants: which; none means all that the backend can run: for ort those of the export and the TensorRT graphs,
            or on another device than the CPU those for GPUs; for a TensorRT those with an engine for it.
        backend: what runs the graphs.
        device: where ort runs them; None: on the CPU.
        longest: tokens of the longest rows, where a cache holds more; at least MIN_CAPACITY.
        low_memory: run layers one at a time, whatever memory there is; see `by_layer`. False: only where the model in
            float64 or a graph is beyond the memory that is free.
        out: the file to write, in the place of `parity.json`.
        show: is given the reports before they are written, which a full disk may prevent.

    Returns:
        One report per variant; look at `passed`.

    Raises:
        IntegrityError: a file of the package changed.
        ConfigError: package and reference are not of one shape.
        UsageError: `out` cannot be written, or other adapters are merged; said before anything is run.
        ResourceError: the disk is full.
    """
    if longest < MIN_CAPACITY:
        raise UsageError(f"longest rows of {longest} tokens: verification needs {MIN_CAPACITY}")
    opened = open_package(package)
    opened.check()
    check_adapters(opened.manifest.source, checkpoint)
    check_switchable(opened.manifest, checkpoint)
    path = _report_path(opened, out)
    target = find_target(backend, device)
    if target.on_gpu and not target.needs_engine:
        find_device(target.device)  # before PyTorch is asked
    names = list(dict.fromkeys(variants)) or _all_variants(opened, target)
    entries = {name: opened.variant(name) for name in names}
    for entry in entries.values():
        _check_runs(entry, target)
    if target.needs_engine:
        open_runner(opened, variant=names[0], backend=target.backend).close()  # likewise
    reports = []
    try:
        for report in _measure(opened, entries, checkpoint, target, longest, low_memory=low_memory):
            reports.append(report)
    except IntegrityError as error:
        _check_the_same(opened, error)
        raise
    if show is not None:
        show(reports)
    _check_the_same(opened)
    if path is not None:
        _write(path, opened.checksum, checkpoint, reports)
    return reports


def _measure(
    package: Package,
    entries: Mapping[str, Variant],
    checkpoint: Checkpoint,
    target: Target,
    longest: int,
    *,
    low_memory: bool,
) -> Iterator[ParityReport]:
    """Ask PyTorch once about the checkpoint itself, then measure each variant."""
    rounded = [entry for entry in entries.values() if entry.quantization is None]
    precisions = {entry.precision for entry in rounded}
    if unknown := precisions - GATES.keys():
        found = ", ".join(sorted(unknown))
        raise PackageError(f"{package.folder}: precision {found}; there are gates for {', '.join(GATES)}")
    config = config_of(checkpoint.folder, package.model)
    if checkpoint.quantized is not None:
        said = "PyTorch computes with the dequantised weights, in float32 and without the library's own rounding"
        logger.warning("%s (%s): %s", checkpoint.model, checkpoint.quantized.title, said)
    why = why_by_layer(package, entries.values(), config, low_memory=low_memory)
    if why:
        logger.warning("%s: layers run one at a time: %s", package.folder, why)
        longest = min(longest, LONGEST_BY_LAYER)
    steps = len(entries) + (1 + len(precisions | {"fp32"}) if precisions else 0)
    with tqdm(total=steps, desc="verifying", unit="step", leave=False) as bar:
        truth = None
        if rounded:
            capacity = min(entry.kv_cache.max_cache_length for entry in rounded)
            truth = ask_pytorch(package, checkpoint, precisions, min(capacity, longest), bar, by_layer=bool(why))
        for name in entries:
            yield measure_variant(package, name, checkpoint, truth=truth, target=target, longest=longest, by_layer=why)
            bar.update()


def _check_runs(entry: Variant, target: Target) -> None:
    """Refuse a variant that is not verified there.

    Raises:
        UsageError: it is not.
    """
    static = entry.kv_cache.form == "static" and "static" in target.caches
    if target.on_gpu and not target.needs_engine and not static and not catalog.is_for_devices(entry.name):
        known = ", ".join(catalog.names("device"))
        raise UsageError(f"variant {entry.name}: verify has {known} for device {target.device}")


def _check_the_same(package: Package, cause: Exception | None = None) -> None:
    """Refuse a package that another has taken the place of.

    Raises:
        PackageError: it has.
    """
    if package_checksum(package.folder) != package.checksum:
        raise PackageError(f"{package.folder}: was replaced while it was verified; verify it again") from cause


def _report_path(package: Package, out: Path | None) -> Path | None:
    """Return the file to write; None where the package may not be written and no other file was given.

    Raises:
        UsageError: the one that was given cannot be written.
    """
    if out is not None:
        if not can_write(out):
            raise UsageError(f"--out {out}: expected a file that can be written, in a folder that is there")
        return out.resolve() if out.is_file() else out
    path = package.folder / PARITY_NAME
    if not package.on_hub and can_write(path):
        return path
    logger.warning("%s is not writable: the report is not kept; --out FILE writes it elsewhere", package.folder)
    return None


def _all_variants(package: Package, target: Target) -> list[str]:
    """Return what can be verified there: on a CPU every graph, in a form that it runs.

    Raises:
        VariantNotFoundError: there is nothing.
    """
    if not target.on_gpu:
        return [*package.manifest.variants, *(package.trt.variants if package.trt is not None else ())]
    names = runnable(package, target)
    if not names and target.needs_engine:
        folder = package.folder
        raise VariantNotFoundError(
            f"{folder}: no engine for {target.backend}; run: olmo2-export build {folder} --backend {target.backend}"
        )
    if not names:
        raise VariantNotFoundError(
            f"{package.folder}: no variant for {target.device}; export it with --variant {target.variants[0]}"
        )
    return names


def format_reports(reports: Sequence[ParityReport]) -> str:
    """Return the table that the command line prints: a line per mode with the worst of its cases, then what failed."""
    head = "variant mode cases positions max_abs NMSE relative err/torch".split()
    head += "top-1 top-5 top-10 KL_mean KL_p99 KL_max verdict".split()
    rows, notes = [head], []
    for report in reports:
        for mode in dict.fromkeys(case.mode for case in report.cases):
            rows.append([report.variant, *_worst([case for case in report.cases if case.mode == mode])])
        notes += _notes(report)
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    left = {0, 1, len(head) - 1}
    lines = [
        "  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    return "\n".join([line.rstrip() for line in lines] + notes)


def _worst(cases: Sequence[CaseResult]) -> list[str]:
    """Return the words of a line: the worst of each metric over the cases of a mode."""

    def most(metric: str, form: str) -> str:
        return _shown(float(np.max([getattr(case, metric) for case in cases])), form)  # NaN if any is

    def least(metric: str) -> str:
        return _shown(float(np.min([getattr(case, metric) for case in cases])), ".1%")

    failed = sum(not case.passed for case in cases)
    return [
        cases[0].mode,
        str(len(cases)),
        str(sum(case.positions for case in cases)),
        *(most(metric, ".1e") for metric in ("max_abs", "nmse", "relative_error")),
        most("error_ratio", ".2f"),
        *(least(metric) for metric in ("top1", "top5", "top10")),
        *(most(metric, ".1e") for metric in ("kl_mean", "kl_p99", "kl_max")),
        f"FAIL {failed}" if failed else "ok",
    ]


def _shown(number: float, form: str) -> str:
    return "-" if math.isnan(number) else format(number, form)


def _notes(report: ParityReport) -> list[str]:
    """Return a report's other lines: the cases that failed, greedy decoding, the checks and the verdicts."""
    name, notes = report.variant, []
    for c in report.cases:
        where = f"{name} {c.mode} batch {c.batch_size} length {c.length}"
        notes += [f"{where}: {failure}" for failure in c.failures]
    g = report.greedy
    ties = f" ({g.near_ties} prompts part at a near-tie)" if g.near_ties else ""
    if g.prompts:
        notes.append(f"{name} greedy: {g.equal} of {g.tokens} tokens equal over {g.prompts} prompts{ties}")
    notes += [f"{name} greedy: {failure}" for failure in g.failures]
    for check in report.checks:
        notes.append(f"{name} {check.name}: {check.found}: {'ok' if check.passed else 'FAIL'}")
        notes += [f"{name} {check.name}: {failure}" for failure in check.failures]
    if report.own_error_of != "transformers":
        notes.append(f"{name} err/torch: in units of the error of {report.own_error_of}")
    lengths = ", ".join(str(n) for n in sorted({case.length for case in report.cases}))
    batches = " and ".join(str(n) for n in sorted({case.batch_size for case in report.cases}))
    held = "" if report.capacity == report.max_cache_length else f"; its cache holds {report.max_cache_length}"
    notes.append(f"{name} rows: first of {lengths} tokens{held}; batches of {batches}")
    notes += [f"{name} coverage: {report.coverage}"] if report.coverage else []
    said = ", ".join(f"{verdict} {'passed' if passed else 'FAILED'}" for verdict, passed in report.verdicts.items())
    return [*notes, f"{name} on {report.backend}: {said}"]


def _write(path: Path, checksum: str, checkpoint: Checkpoint, reports: Sequence[ParityReport]) -> None:
    """Write parity.json, keeping what it says of other variants of the same export.

    Raises:
        ResourceError: the disk is full.
    """
    kept: dict[str, Any] = {}
    if path.is_file():
        try:
            before = read_sealed(path)
        except PackageError:  # damaged or of another version: it is only a report, and is written anew
            before = {}
        same = before.get("package_checksum") == checksum and isinstance(before.get("variants"), dict)
        kept = before["variants"] if same else {}
    document = {
        "format_version": FORMAT_VERSION,
        "package_checksum": checksum,
        "reference": {
            "model": checkpoint.model,
            "revision": checkpoint.revision,
            "kernel_parity": f"{REFERENCE}, its whole model",
            "quality": f"{REFERENCE}, its layers one at a time",
            **({"weights": f"dequantised: {found.title}"} if (found := checkpoint.quantized) is not None else {}),
        },
        "variants": kept | {report.variant: report.to_document() for report in reports},
    }
    write_file(path, seal(document))
