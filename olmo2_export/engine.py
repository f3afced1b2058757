"""Package -> TensorRT engine: trt/model_{precision}.onnx, its weights, its plan, and trt/manifest.json.

    report = build(Path("packages/olmo2-1b"), precision="bf16")

No GPU is needed for TensorRT for RTX. The plan is compiled for a list of GPUs, always explicit, with two optimization
profiles, so that each phase gets kernels of its own:

| profile | sequence_length    | batch_size        |
|---------|--------------------|-------------------|
| decode  | 1                  | 1..max_batch_size |
| prefill | 1..prefill_chunk   | 1..max_batch_size |

Successive builds accumulate in trt/; a build of a precision that is there replaces it. The folder changes in one step,
when everything is written. Two builds of the same package are byte-identical.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import re
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from tqdm import tqdm

import runtimes.errors
from olmo2_export.atomic import locked, replace_folder
from olmo2_export.engine_compiler import CompileRequest, CompileResult
from olmo2_export.fuse import check_op_counts
from olmo2_export.graph_files import save_graph
from olmo2_export.trt_graph import PRECISIONS, Precision, expected_op_counts, load_static_graph, static_variant
from runtimes.errors import (
    EngineBuildError,
    IntegrityError,
    Olmo2ExportError,
    PackageError,
    ResourceError,
    UsageError,
    VariantNotFoundError,
)
from runtimes.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    TRT_FOLDER,
    Engine,
    FileEntry,
    Manifest,
    ModelSpec,
    ProfileRange,
    TrtManifest,
    Variant,
    check_files,
    hash_files,
    load_manifest,
    load_trt_manifest,
    package_checksum,
    seal,
    to_document,
)
from runtimes.nvidia import RTX_CAPABILITIES, TensorRTBackend, check_installed

logger = logging.getLogger(__name__)

COMPILER = "olmo2_export.engine_compiler"
"""the module that is run in a process of its own"""
_ENVIRONMENT = ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES")  # what a compiler may need

_MOST_ROWS = 1024

CAPABILITIES = ("8.0", "8.6", "8.9", "12.0")
"""the default GPUs: A100, RTX 30, RTX 40 and L4/L40, RTX 50; not 7.5, which has no bfloat16"""
MAX_CACHE_LENGTH = 4096
"""tokens: the default capacity, where the model's context is longer"""
PREFILL_CHUNK = 512
"""tokens: the default length of the longest prefill call"""
MAX_BATCH_SIZE = 4
"""rows: the default batch. A decode profile fixed at one row gets a weight layout of its own, so that the plan, and the
GPU's memory, hold every linear weight twice (1B bf16: 5.1 instead of 3.0 GB)"""


@dataclass(frozen=True)
class BuildReport:
    """What a build made and what it took."""

    engine: Engine
    seconds: float
    """all of it, checks and graph included"""
    compile_seconds: float
    """TensorRT's part"""
    peak_rss: int
    """bytes: the most memory of the process in which TensorRT ran, mapped weights included"""
    plan_bytes: int
    graph_bytes: int
    """the ONNX graph and its weights"""


def build(
    package: Path,
    *,
    precision: Precision = "bf16",
    compute_capabilities: Sequence[str] = CAPABILITIES,
    max_batch_size: int = MAX_BATCH_SIZE,
    max_cache_length: int | None = None,
    prefill_chunk: int | None = None,
    backend: TensorRTBackend = "trt_rtx",
    progress: bool = True,
) -> BuildReport:
    """Build a TensorRT engine of a package and put it into the package's trt/ folder.

    Args:
        package: a package folder with the variant fp32.
        precision: of weights, activations and cache: bf16, fp16 or fp32. fp32 is for comparison: TensorRT has no
            attention kernel for it and composes one, at some cost in speed and memory.
        compute_capabilities: the GPUs the plan is for, such as "8.9".
        max_batch_size: rows per call; 1 gives a larger plan, made for single tokens. See MAX_BATCH_SIZE.
        max_cache_length: tokens that each row's cache holds; None means the model's context, at most MAX_CACHE_LENGTH.
            Each decode step reads the whole cache, filled or not: shorter is faster.
        prefill_chunk: tokens per row and prefill call; None means PREFILL_CHUNK, or the cache if that is shorter.
        backend: trt_rtx, or trt, which builds on and for the GPU at hand.
        progress: show a bar on standard error.

    Raises:
        UsageError: an option that means nothing for this package or backend; nothing was read but the manifest.
        BackendError: the TensorRT library is not installed.
        PackageNotFoundError, IntegrityError, VariantNotFoundError: the package is not usable.
        FailedError: weights beyond the range of float16.
        FusionError: the graph or the network is not the expected one.
        EngineBuildError: TensorRT refused or failed.
        ResourceError: disk full, or another build holds the folder.
    """
    start = time.monotonic()
    manifest = load_manifest(package)
    if "fp32" not in manifest.variants:
        raise VariantNotFoundError(f"{package}: no variant fp32, which engines are built from; export it again")
    capabilities = tuple(dict.fromkeys(compute_capabilities))
    capacity, chunk = _lengths(manifest.model, max_cache_length, prefill_chunk)
    _check_options(precision, capabilities, max_batch_size, backend)
    check_installed(backend)
    _check_head_dim(manifest.model, precision)
    check_files(package, manifest.files, manifest.variants["fp32"].files)
    target = package / TRT_FOLDER
    # Nobody may replace the package while an engine is built from it.
    with locked(Path.cwd() / package), replace_folder(target, force=True) as staging:
        kept = _kept(package, precision)
        _link(kept.files, package, staging)
        variant = _write_graph(package, manifest, staging, precision, capacity)
        compile_start = time.monotonic()
        _check_space(staging, variant)
        plan = f"{TRT_FOLDER}/model_{precision}.{backend}.engine"
        request = CompileRequest(
            backend=backend,
            graph=str(staging / Path(variant.graph).name),
            plan=str(staging / Path(plan).name),
            profiles={
                "decode": _profile(variant, max_batch_size, 1),
                "prefill": _profile(variant, max_batch_size, chunk),
            },
            compute_capabilities=capabilities,
            layer_counts=_expected_layers(manifest.model),
        )
        result = _compile(request, progress)
        compile_seconds = time.monotonic() - compile_start
        engine = Engine(
            name=f"{backend}_{precision}",
            plan=plan,
            variant=variant.name,
            precision=precision,
            backend=backend,
            backend_version=result.backend_version,
            compute_capabilities=capabilities,
            profiles=request.profiles,
            max_batch_size=max_batch_size,
            max_cache_length=capacity,
            layer_counts=result.layer_counts,
            aliases=_checked_aliases(variant, result),
        )
        _write_manifest(package, staging, kept, variant, engine)
    sizes = {name: (package / name).stat().st_size for name in (*variant.files, plan)}
    return BuildReport(
        engine=engine,
        seconds=time.monotonic() - start,
        compile_seconds=compile_seconds,
        peak_rss=result.peak_rss,
        plan_bytes=sizes.pop(plan),
        graph_bytes=sum(sizes.values()),
    )


def _lengths(model: ModelSpec, max_cache_length: int | None, prefill_chunk: int | None) -> tuple[int, int]:
    """Return the capacity of the cache and the longest prefill call.

    Raises:
        UsageError: they are not 1 <= prefill_chunk <= max_cache_length <= context.
    """
    context = model.max_position_embeddings
    capacity = min(context, MAX_CACHE_LENGTH) if max_cache_length is None else max_cache_length
    if not 1 <= capacity <= context:
        raise UsageError(f"max_cache_length {capacity}: expected 1 to {context}, the model's context")
    chunk = min(PREFILL_CHUNK, capacity) if prefill_chunk is None else prefill_chunk
    if not 1 <= chunk <= capacity:
        raise UsageError(f"prefill_chunk {chunk}: expected 1 to {capacity}, the length of the cache")
    return capacity, chunk


def _check_options(precision: str, capabilities: Sequence[str], max_batch_size: int, backend: TensorRTBackend) -> None:
    """Refuse what TensorRT would refuse, or accept and not do, before anything expensive."""
    if backend not in get_args(TensorRTBackend):
        raise UsageError(f"backend {backend!r}: expected one of {', '.join(get_args(TensorRTBackend))}")
    if precision not in PRECISIONS:
        raise UsageError(f"precision {precision!r}: expected one of {', '.join(PRECISIONS)}")
    if not 1 <= max_batch_size <= _MOST_ROWS:
        raise UsageError(f"max_batch_size {max_batch_size}: expected 1 to {_MOST_ROWS}")
    if malformed := [c for c in capabilities if re.fullmatch(r"\d{1,2}\.\d", c) is None]:
        raise UsageError(f"compute capability {', '.join(map(repr, malformed))}: expected the form 8.9")
    if not capabilities:
        raise UsageError(f"no compute capability; TensorRT for RTX knows {', '.join(RTX_CAPABILITIES)}")
    if backend == "trt" and len(capabilities) != 1:
        raise UsageError(
            f"compute capabilities {', '.join(capabilities)}: backend trt builds for the GPU at hand; give that one"
        )
    if backend == "trt_rtx" and (foreign := [c for c in capabilities if c not in RTX_CAPABILITIES]):
        raise UsageError(
            f"compute capability {', '.join(foreign)}: TensorRT for RTX compiles for {', '.join(RTX_CAPABILITIES)}; "
            "other GPUs need full TensorRT, which compiles on the GPU itself"
        )
    if precision == "bf16" and (old := [c for c in capabilities if float(c) < 8.0]):
        raise UsageError(f"compute capability {', '.join(old)}: bf16 needs 8.0 or newer; use --precision fp16")


def _check_head_dim(model: ModelSpec, precision: Precision) -> None:
    """Refuse what TensorRT cannot compile, and warn of what it compiles to something slower."""
    size = model.head_dim
    if precision != "fp32" and size % 8:
        raise UsageError(f"head_dim {size}: in {precision} TensorRT takes multiples of 8; use --precision fp32")
    if precision != "fp32" and not 16 <= size <= 256:
        logger.warning("head_dim %d: TensorRT has attention kernels for 16 to 256 and composes a slower one", size)


def _kept(package: Path, precision: Precision) -> TrtManifest:
    """Return what stays of the trt folder: what is intact, of this export, and of other precisions."""
    checksum = package_checksum(package)
    version = importlib.metadata.version("olmo2-export")
    kept = TrtManifest(FORMAT_VERSION, version, checksum, {}, {}, {})
    try:
        old = load_trt_manifest(package)
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
            check_files(package, old.files, names, remedy="build it again")
        except IntegrityError as error:
            logger.warning("%s is not kept: %s", other, error)
            continue
        kept.engines.update(engines)
        kept.variants.update(variants)
        kept.files.update({name: old.files[name] for name in names})
    return kept


def _link(files: dict[str, FileEntry], package: Path, staging: Path) -> None:
    """Put the files that stay into the new folder, without copying them."""
    for name in files:
        os.link(package / name, staging / Path(name).name)


def _write_graph(package: Path, manifest: Manifest, staging: Path, precision: Precision, capacity: int) -> Variant:
    """Write the static-cache graph and its weights; return the manifest's entry."""
    graph, rounding = load_static_graph(package, manifest, precision, capacity)
    counts = check_op_counts(graph, expected_op_counts(manifest.model))
    variant = static_variant(manifest.model, precision, capacity, counts)
    save_graph(graph, staging / Path(variant.graph).name)
    rounding.check()
    return variant


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


def _expected_layers(model: ModelSpec) -> dict[str, int]:
    """Return the layers that the TensorRT network must have; RMSNorm is a layer, or its mean is."""
    layers = model.num_hidden_layers
    return {
        "ATTENTION_INPUT": layers,
        "KV_CACHE_UPDATE": 2 * layers,
        "ROTARY_EMBEDDING": 2 * layers,
        "NORMALIZATION|REDUCE": 4 * layers + 1,
    }


def _checked_aliases(variant: Variant, result: CompileResult) -> dict[str, str]:
    """Return present -> past, which must be exactly the caches of the graph."""
    pasts = [spec.name for spec in variant.inputs if spec.name.startswith("past_key_values.")]
    expected = {name.replace("past_key_values.", "present."): name for name in pasts}
    if result.aliases != expected:
        raise EngineBuildError(f"TensorRT updates {result.aliases} in place, expected {expected}")
    return expected


def _write_manifest(package: Path, staging: Path, kept: TrtManifest, variant: Variant, engine: Engine) -> None:
    """Hash what is new and write trt/manifest.json."""
    names = [*variant.files, engine.plan]
    hashed = hash_files(staging, [Path(name).name for name in names])
    manifest = TrtManifest(
        format_version=kept.format_version,
        exporter_version=kept.exporter_version,
        package_checksum=package_checksum(package),
        variants={**kept.variants, variant.name: variant},
        engines={**kept.engines, engine.name: engine},
        files={**kept.files, **{name: hashed[Path(name).name] for name in names}},
    )
    (staging / MANIFEST_NAME).write_bytes(seal(to_document(manifest)))


def _compile(request: CompileRequest, progress: bool) -> CompileResult:
    """Run the compiler's process; show its progress, log what it logs, raise what it raises."""
    with tempfile.TemporaryDirectory(dir=Path(request.plan).parent) as folder:  # swept with the staging folder
        request_file = Path(folder) / "request.json"
        request_file.write_text(json.dumps(asdict(request)))
        with (Path(folder) / "stderr").open("w+b") as stderr:
            command = [sys.executable, "-m", COMPILER, str(request_file)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, env=_environment()) as process:
                try:
                    outcome = _follow(process, Path(request.plan).name, progress)
                except BaseException:  # an interrupt included
                    process.kill()
                    raise
            stderr.seek(0)
            printed = stderr.read().decode(errors="replace").strip()
    if printed:
        logger.debug("printed by TensorRT: %s", printed)
    if "result" in outcome:
        return CompileResult(**outcome["result"])
    if "error" in outcome:
        kind = getattr(runtimes.errors, outcome["error"])
        assert issubclass(kind, Olmo2ExportError)  # the compiler sends no others
        raise kind(outcome["text"])
    if process.returncode == -signal.SIGKILL:
        raise ResourceError(
            "the TensorRT process was killed, as the system does when memory runs out; it needs about "
            "three times the plan"
        )
    last = printed.splitlines()[-1] if printed else "it printed nothing"
    raise EngineBuildError(f"the TensorRT process ended with code {process.returncode}: {last}")


def _environment() -> dict[str, str]:
    """Return the compiler's environment: it finds this package, and nothing else decides where its memory lies."""
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    kept = {name: value for name, value in os.environ.items() if name in _ENVIRONMENT}
    return {**kept, "PYTHONPATH": path, "PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"}


def _follow(process: subprocess.Popen[bytes], name: str, progress: bool) -> dict[str, Any]:
    """Show phases until the process closes its output; return its last message, the result or the error."""
    outcome: dict[str, Any] = {}
    with tqdm(desc=f"building {name}", bar_format="{desc} {elapsed}", leave=False, disable=not progress) as bar:
        for message in _messages(process):
            if message is None:
                bar.refresh()
            elif "phase" in message:
                bar.set_description_str(f"building {name}: {message['phase']}")
            elif "log" in message:
                logger.log(message["log"], "%s", message["text"])
            else:
                outcome = message
    return outcome


def _messages(process: subprocess.Popen[bytes]) -> Iterator[dict[str, Any] | None]:
    """Yield the messages of the compiler as they come, and None after every half second without one."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        buffer = b""
        while True:
            if not selector.select(timeout=0.5):
                yield None
                continue
            chunk = os.read(process.stdout.fileno(), 65536)
            if not chunk:
                return
            *lines, buffer = (buffer + chunk).split(b"\n")
            for line in lines:
                yield json.loads(line)
