"""What of a package is published: the files that its manifests vouch for, each intact, each variant verified."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from olmo2_export.summary.package import ParityVerdict, read_parity
from runtimes.errors import PackageError, UsageError
from runtimes.manifest import MANIFEST_NAME, PARITY_NAME, TRT_FOLDER, Engine, Variant
from runtimes.package import Package, open_package
from runtimes.sealed import read_sealed

_TRT_MANIFEST = f"{TRT_FOLDER}/{MANIFEST_NAME}"


@dataclass(frozen=True)
class Contents:
    """What is sent of a package, and what is known of it."""

    package: Package
    files: dict[str, int] = field(hash=False)
    """path in the package -> bytes; sorted"""
    left_out: tuple[str, ...]
    """files of the folder that no manifest vouches for"""
    trt_left_out: bool
    """there are graphs and engines for TensorRT that are not sent"""
    variants: dict[str, Variant] = field(hash=False)
    engines: dict[str, Engine] = field(hash=False)
    verdicts: dict[str, ParityVerdict] = field(hash=False)
    """of the variants that were verified as they are"""
    reports: dict[str, Mapping[str, Any]] = field(hash=False)
    """what parity.json says of these"""
    reference: str | None
    """what they were compared with; None: nothing was"""


def gather(folder: Path, *, engines: bool = False, unverified: bool = False) -> Contents:
    """Check a package that is to be published, and list what is sent.

    Args:
        folder: the package.
        engines: also what `build` made: graphs for TensorRT, and engines for the GPUs they were compiled for.
        unverified: also variants that failed, or were never verified; the card says so.

    Raises:
        PackageNotFoundError: it is none.
        IntegrityError: a file or a report was changed, or is of another export.
        PackageError: a variant was not verified, or failed.
        UsageError: engines, and nothing was built.
    """
    package = open_package(folder)
    trt = package.trt if engines else None
    if engines and trt is None:
        raise UsageError(f"--engines: {folder} has none; run: olmo2-export build {folder}")
    variants = package.manifest.variants | (trt.variants if trt else {})
    vouched = package.manifest.files | (trt.files if trt else {})
    graphs = {name: vouched[v.graph].sha256 for name, v in variants.items() if v.graph in vouched}
    reference, found = read_parity(package, graphs)
    verdicts = {v.variant: v for v in found if v.variant in variants and not v.stale}
    if not unverified:
        _refuse_unverified(folder, variants, verdicts)
    package.check(vouched.keys() | {name for variant in variants.values() for name in variant.files})
    reports = read_sealed(folder / PARITY_NAME)["variants"] if verdicts else {}
    names = [*vouched, MANIFEST_NAME, *([PARITY_NAME] if reference else []), *([_TRT_MANIFEST] if trt else [])]
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    others = sorted(there - set(names))
    built = package.trt is not None and trt is None
    return Contents(
        package=package,
        files={name: (folder / name).stat().st_size for name in sorted(names)},
        left_out=tuple(name for name in others if not (built and name.startswith(f"{TRT_FOLDER}/"))),
        trt_left_out=built,
        variants=variants,
        engines=trt.engines if trt else {},
        verdicts=verdicts,
        reports={name: reports[name] for name in verdicts},
        reference=reference,
    )


def _refuse_unverified(folder: Path, variants: Mapping[str, Variant], verdicts: Mapping[str, ParityVerdict]) -> None:
    failed = [name for name in variants if name in verdicts and not verdicts[name].passed]
    unknown = [name for name in variants if name not in verdicts]
    if failed or unknown:
        said = [f"{', '.join(failed)} failed when verified"] if failed else []
        said += [f"{', '.join(unknown)} not verified"] if unknown else []
        raise PackageError(
            f"{folder}: {'; '.join(said)}; run: olmo2-export verify {folder} --reference MODEL, or publish it with "
            "--unverified, which its card will say"
        )
