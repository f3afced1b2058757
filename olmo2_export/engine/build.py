"""Package -> TensorRT engine: trt/model_{precision}.onnx, its weights, its plan, and trt/manifest.json.

    report = build(Path("packages/olmo2-1b"), EngineOptions(precision="bf16"))

No GPU is needed for TensorRT for RTX. The plan is compiled for a list of GPUs, always explicit, with two optimization
profiles, so that each phase gets kernels of its own:

| profile | sequence_length    | batch_size        |
|---------|--------------------|-------------------|
| decode  | 1                  | 1..max_batch_size |
| prefill | 1..prefill_chunk   | 1..max_batch_size |

Successive builds accumulate in trt/; a build of a precision that is there replaces it. The folder changes in one step,
when everything is written. Two builds of the same package by the same installation are byte-identical; with gptq, which
sums over the calibration text, on the same number of threads.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from olmo2_export.architecture import Operation, count, norms, operations
from olmo2_export.atomic import locked, replace_folder
from olmo2_export.config import config_of
from olmo2_export.engine.compiler import CompileRequest, CompileResult
from olmo2_export.engine.options import EngineOptions, gpu_at_hand, resolve_options
from olmo2_export.engine.plan import count_kernels
from olmo2_export.engine.process import run_worker
from olmo2_export.engine.refitter import RefitRequest
from olmo2_export.package.trt_variants import TrtOptions, check_trt_options, read_variants, write_trt_variant
from runtimes.errors import (
    EngineBuildError,
    IntegrityError,
    PackageError,
    ResourceError,
    UsageError,
    VariantNotFoundError,
)
from runtimes.manifest import (
    MANIFEST_NAME,
    TRT_FOLDER,
    Engine,
    EngineBackend,
    Precision,
    ProfileRange,
    TrtManifest,
    Variant,
)
from runtimes.manifest_file import to_document
from runtimes.package import Package, open_package
from runtimes.sealed import FORMAT_VERSION, FileEntry, hash_file, hash_files, seal
from runtimes.trt.nvidia import check_installed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuildReport:
    """What a build made and what it took."""

    engine: Engine
    seconds: float
    """all of it, checks and graph included"""
    compile_seconds: float
    """TensorRT's part"""
    peak_rss: int | None
    """bytes, where they are counted: the most memory of the process in which TensorRT ran, mapped weights included"""
    plan_bytes: int
    graph_bytes: int
    """the ONNX graph and its weights"""


def build(package: Path, options: EngineOptions, *, progress: bool = True) -> BuildReport:
    """Build a TensorRT engine of a package and put it into the package's trt/ folder.

    Args:
        package: a package folder with the variant fp32.
        options: what to build.
        progress: show a bar on standard error.

    Raises:
        UsageError: an option that means nothing for this package or backend; nothing was read but the manifest.
        BackendError: the TensorRT library is not installed, or a GPU is needed and not there.
        PackageNotFoundError, IntegrityError, VariantNotFoundError: the package is not usable.
        FailedError: weights beyond the range of float16.
        FusionError: the graph or the network is not the expected one.
        EngineBuildError: TensorRT refused or failed.
        ResourceError: disk full, or another build holds the folder.
    """
    start = time.monotonic()
    opened = open_package(package)
    manifest = opened.manifest
    resolved = resolve_options(options, manifest.model)
    graph = TrtOptions(options.precision, resolved.max_cache_length, options.top_k, options.recipe, options.calibration)
    check_trt_options(package, manifest, graph)
    with _staged(opened, graph) as (staging, kept):
        variant = write_trt_variant(package, manifest, staging, graph)
        _keep_other_backends(opened, staging, kept, variant, options.backend)
        compile_start = time.monotonic()
        _check_space(staging, variant)
        plan = _plan_name(options)
        request = CompileRequest(
            backend=options.backend,
            graph=Path(variant.graph).name,
            plan=Path(plan).name,
            profiles={
                "decode": _profile(variant, resolved.max_batch_size, 1),
                "prefill": _profile(variant, resolved.max_batch_size, resolved.prefill_chunk),
            },
            compute_capabilities=resolved.compute_capabilities,
            layer_counts=expected_layers(operations(config_of(package, manifest.model))),
            flags=resolved.flags,
            timing_cache=str(options.timing_cache.resolve()) if options.timing_cache else None,
        )
        result = run_worker(request, staging, progress=progress)
        compile_seconds = time.monotonic() - compile_start
        engine = Engine(
            name=f"{options.backend}_{options.precision}",
            plan=plan,
            variant=variant.name,
            precision=options.precision,
            backend=options.backend,
            backend_version=result.backend_version,
            compute_capabilities=resolved.compute_capabilities,
            profiles=request.profiles,
            max_batch_size=resolved.max_batch_size,
            max_cache_length=resolved.max_cache_length,
            prefill_chunk=resolved.prefill_chunk,
            profile=resolved.profile,
            flags=resolved.flags,
            layer_counts=result.layer_counts,
            aliases=_checked_aliases(variant, result),
        )
        engine = replace(engine, kernels=count_kernels(staging / request.plan, engine))
        _write_manifest(opened, staging, kept, variant, engine)
    return _report(package, variant, engine, result, start, compile_seconds)


def refit(package: Path, source: Path, options: EngineOptions, *, progress: bool = True) -> BuildReport:
    """Take an engine of another package, put this package's weights into it, and into this package's trt/ folder.

    Of a sweep over checkpoints only the first is built, with `refit`; the others take seconds.

    Args:
        package: a package folder with the variant fp32.
        source: a package of the same shape, with an engine of backend trt, the precision and `refit`.
        options: backend and precision say which engine; recipe and calibration are used, and nothing else is given.
        progress: show a bar on standard error.

    Raises:
        UsageError: the engine was not built for this, the packages differ in more than weights, or other options.
        BackendError: the TensorRT library is not installed, or the GPU of the engine is not there.
        PackageNotFoundError, IntegrityError, VariantNotFoundError: a package is not usable.
        EngineBuildError: TensorRT refused or failed.
    """
    start = time.monotonic()
    used = EngineOptions(options.precision, options.backend, recipe=options.recipe, calibration=options.calibration)
    if options != used:
        raise UsageError(f"refit from {source}: the engine stays as it is; give backend, precision and recipe alone")
    opened, other = open_package(package), open_package(source)
    manifest = opened.manifest
    engine, engines = _refittable(other, options)
    check_installed(options.backend)
    if (found := gpu_at_hand(options.backend)) != engine.compute_capabilities[0]:
        raise UsageError(
            f"{engine.plan}: for compute capability {engine.compute_capabilities[0]}, the GPU at hand is {found}"
        )
    former = engines.variants[engine.variant]
    other.check([engine.plan, former.graph], remedy="build it again")
    graph = TrtOptions(options.precision, engine.max_cache_length, former.top_k, options.recipe, options.calibration)
    check_trt_options(package, manifest, graph)
    with _staged(opened, graph) as (staging, kept):
        variant = write_trt_variant(package, manifest, staging, graph)
        if hash_file(staging / Path(variant.graph).name) != engines.files[former.graph]:
            raise UsageError(f"{package}: its graph is not that of {source}; refit takes checkpoints of one shape")
        compile_start = time.monotonic()
        request = RefitRequest(
            backend=options.backend,
            backend_version=engine.backend_version,
            refit_from=str((source / engine.plan).resolve()),
            graph=Path(variant.graph).name,
            plan=Path(engine.plan).name,
        )
        result = run_worker(request, staging, progress=progress)
        compile_seconds = time.monotonic() - compile_start
        _write_manifest(opened, staging, kept, variant, engine)
    return _report(package, variant, engine, result, start, compile_seconds)


def _refittable(package: Package, options: EngineOptions) -> tuple[Engine, TrtManifest]:
    """Return the engine to start from, and the manifest it is in.

    Raises:
        UsageError: there is none, or it was not built for this.
    """
    source, name = package.folder, f"{options.backend}_{options.precision}"
    if options.backend != "trt":
        raise UsageError(f"refit from {source}: TensorRT for RTX has no such thing; full TensorRT has: --backend trt")
    engines = package.trt
    remedy = f"run: olmo2-export build {source} --backend trt --precision {options.precision} --refit"
    if engines is None or name not in engines.engines:
        raise UsageError(f"{source}: no engine {name} to refit; {remedy}")
    engine = engines.engines[name]
    if "refit" not in engine.flags:
        raise UsageError(f"{source}: {name} was built without refit; {remedy}")
    return engine, engines


@contextmanager
def _staged(package: Package, options: TrtOptions) -> Iterator[tuple[Path, TrtManifest]]:
    """Yield a folder that takes the place of trt/ after the body, with what stays of it, and the manifest of that."""
    folder = package.folder
    if package.manifest.adapters:
        names = ", ".join(package.manifest.adapters)
        raise UsageError(
            f"{folder}: takes {names} at run time, which no engine does; export it with --lora, which merges"
        )
    if "fp32" not in package.manifest.variants:
        raise VariantNotFoundError(f"{folder}: no variant fp32, which engines are built from; export it again")
    # Nobody may replace the package while an engine is built from it.
    with locked(Path.cwd() / folder), replace_folder(folder / TRT_FOLDER, force=True) as staging:
        package.check([file for variant in read_variants(package.manifest, options) for file in variant.files])
        kept = _kept(package, options.precision)
        _link(kept.files, folder, staging)
        yield staging, kept


def _plan_name(options: EngineOptions) -> str:
    return f"{TRT_FOLDER}/model_{options.precision}.{options.backend}.engine"


def _report(
    package: Path, variant: Variant, engine: Engine, result: CompileResult, start: float, compile_seconds: float
) -> BuildReport:
    sizes = {name: (package / name).stat().st_size for name in (*variant.files, engine.plan)}
    return BuildReport(
        engine=engine,
        seconds=time.monotonic() - start,
        compile_seconds=compile_seconds,
        peak_rss=result.peak_rss,
        plan_bytes=sizes.pop(engine.plan),
        graph_bytes=sum(sizes.values()),
    )


def _kept(package: Package, precision: Precision) -> TrtManifest:
    """Return what stays of the trt folder: what is intact, of this export, and of other precisions."""
    version = importlib.metadata.version("olmo2-export")
    kept = TrtManifest(FORMAT_VERSION, version, package.checksum, {}, {}, {})
    try:
        old = package.trt
    except PackageError as error:
        logger.warning("the engines that are there are not kept: %s", error)
        return kept
    if old is None:
        return kept
    for other in sorted({v.precision for v in old.variants.values()} - {precision}):
        engines = {name: engine for name, engine in old.engines.items() if engine.precision == other}
        variants = {name: variant for name, variant in old.variants.items() if variant.precision == other}
        names = [*(e.plan for e in engines.values()), *(file for v in variants.values() for file in v.files)]
        try:
            package.check(names, remedy="build it again")
        except IntegrityError as error:
            logger.warning("%s is not kept: %s", other, error)
            continue
        kept.engines.update(engines)
        kept.variants.update(variants)
        kept.files.update({name: old.files[name] for name in names})
    return kept


def _keep_other_backends(
    package: Package, staging: Path, kept: TrtManifest, variant: Variant, backend: EngineBackend
) -> None:
    """Keep the engines that the other TensorRT has of this precision, where they are of the very graph just written."""
    try:
        old = package.trt
    except PackageError:  # said by _kept
        return
    if old is None:
        return
    others = {name: e for name, e in old.engines.items() if e.variant == variant.name and e.backend != backend}
    if not others:
        return
    written = hash_files(staging, [Path(file).name for file in variant.files])
    plans = {engine.plan: old.files[engine.plan] for engine in others.values()}
    try:
        if any(old.files.get(file) != written[Path(file).name] for file in variant.files):
            raise IntegrityError("it was built from another graph")
        package.check(plans, remedy="build it again")
    except IntegrityError as error:
        logger.warning("%s is not kept: %s", ", ".join(others), error)
        return
    kept.engines.update(others)
    kept.files.update(plans)
    _link(plans, package.folder, staging)


def _link(files: dict[str, FileEntry], package: Path, staging: Path) -> None:
    """Put the files that stay into the new folder, without copying them where the file system can; links stay links."""
    for name in files:
        path = package / name
        for kept in (path, *path.parent.glob(f"{path.name}.*.jit")):  # kernels of a runner; see runtimes.trt.jit_cache
            place = staging / kept.name
            if kept.is_symlink():
                place.symlink_to(kept.readlink())
                continue
            try:
                os.link(kept, place)
            except OSError:  # a file system without hard links
                shutil.copyfile(kept, place)


def _check_space(staging: Path, variant: Variant) -> None:
    """Refuse to compile a plan that the disk cannot hold: it is at least as large as the weights.

    Raises:
        ResourceError: with both numbers.
    """
    needed = sum((staging / Path(name).name).stat().st_size for name in variant.files)
    free = shutil.disk_usage(staging).free
    if needed > free:
        raise ResourceError(f"{staging.parent}: the plan needs {needed:,} bytes or more, {free:,} are free")


def _profile(variant: Variant, max_batch_size: int, max_sequence_length: int) -> tuple[ProfileRange, ...]:
    """Return the shapes of every input: from one row and token, best at one row, to the maximum of both."""

    def shape(spec_shape: tuple[int | str, ...], batch: int, sequence: int) -> tuple[int, ...]:
        sizes = {"batch_size": batch, "sequence_length": sequence}
        return tuple(sizes[d] if isinstance(d, str) else d for d in spec_shape)

    return tuple(
        ProfileRange(
            name=spec.name,
            min=shape(spec.shape, 1, 1),
            opt=shape(spec.shape, 1, max_sequence_length),
            max=shape(spec.shape, max_batch_size, max_sequence_length),
        )
        for spec in variant.inputs
    )


def expected_layers(rows: Sequence[Operation]) -> dict[str, int]:
    """Return the layers that the TensorRT network must have; a norm is a layer, or its mean is."""
    attention = count(rows, "attention")
    return {
        "ATTENTION_INPUT": attention,
        "KV_CACHE_UPDATE": 2 * attention,
        "ROTARY_EMBEDDING": count(rows, "rotary"),
        "NORMALIZATION|REDUCE": count(rows, *norms()),
    }


def _checked_aliases(variant: Variant, result: CompileResult) -> dict[str, str]:
    """Return present -> past, which must be exactly the caches of the graph."""
    expected = {present: past for past, present in variant.caches.items()}
    if result.aliases != expected:
        raise EngineBuildError(f"TensorRT updates {result.aliases} in place, expected {expected}")
    return expected


def _write_manifest(package: Package, staging: Path, kept: TrtManifest, variant: Variant, engine: Engine) -> None:
    """Hash what is new and write trt/manifest.json."""
    names = [*variant.files, engine.plan]
    hashed = hash_files(staging, [Path(name).name for name in names])
    manifest = TrtManifest(
        format_version=kept.format_version,
        exporter_version=kept.exporter_version,
        package_checksum=package.checksum,
        variants={**kept.variants, variant.name: variant},
        engines={**kept.engines, engine.name: engine},
        files={**kept.files, **{name: hashed[Path(name).name] for name in names}},
    )
    (staging / MANIFEST_NAME).write_bytes(seal(to_document(manifest)))
