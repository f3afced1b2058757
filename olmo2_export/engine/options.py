"""What an engine can be asked to be, and what is refused before anything expensive happens."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from olmo2_export.catalog import precisions, static_row
from runtimes.errors import BackendError, UsageError
from runtimes.manifest import EngineBackend, EngineFlag, ModelSpec, Precision
from runtimes.trt.nvidia import RTX_CAPABILITIES, check_installed

logger = logging.getLogger(__name__)

Profile = Literal["latency", "compact"]
CURRENT = "current"
"""as a compute capability: the GPU at hand"""
CAPABILITIES = ("8.0", "8.6", "8.9", "12.0")
"""the default GPUs of TensorRT for RTX, as far as the precision runs on them: A100, RTX 30, RTX 40 and L4/L40, RTX 50;
not 7.5, which has no bfloat16"""
MAX_CACHE_LENGTH = 4096
"""tokens: the default capacity, where the model's context is longer"""
PREFILL_CHUNK = 512
"""tokens: the default length of the longest prefill call"""
MAX_BATCH_SIZE = 4
"""rows: the default batch of profile compact"""

_MOST_ROWS = 1024
_FULL_CAPABILITIES = (
    "7.5",
    "8.0",
    "8.6",
    "8.7",
    "8.9",
    "9.0",
    "10.0",
    "10.3",
    "11.0",
    "12.0",
    "12.1",
)  # of full TensorRT


@dataclass(frozen=True)
class EngineOptions:
    """What to build; None leaves the choice to `resolve_options`."""

    precision: Precision = "bf16"
    """of weights, activations and cache. fp32 is for comparison: TensorRT has no attention kernel for it and composes
    one, at some cost in speed and memory"""
    backend: EngineBackend = "trt_rtx"
    """trt_rtx builds without a GPU; trt builds on the GPU at hand, and for it"""
    compute_capabilities: Sequence[str] | None = None
    """such as 8.9, or `current`; None: CAPABILITIES for trt_rtx, current for trt"""
    profile: Profile | None = None
    """latency: batch fixed at 1. The decode kernels get a weight layout of their own, so that the plan, and the GPU's
    memory, hold linear weights of bf16, fp16, int8 and fp8 twice. compact: batch of 2 or more, weights once. None:
    what max_batch_size says"""
    max_batch_size: int | None = None
    """rows per call; None: 1 for latency, else MAX_BATCH_SIZE"""
    max_cache_length: int | None = None
    """tokens that each row's cache holds; None: the model's context, at most MAX_CACHE_LENGTH. Each decode step reads
    the whole cache, filled or not: shorter is faster"""
    prefill_chunk: int | None = None
    """tokens per row and prefill call; None: PREFILL_CHUNK, or the cache if that is shorter"""
    top_k: int = 1
    """candidates that the engine picks per row"""
    recipe: str | None = None
    """of int4; see TrtOptions"""
    calibration: Path | None = None
    """of int4, int8 and fp8; see TrtOptions"""
    portable: bool = False
    """backend trt: the plan runs on later versions, on the lean runtime, and on other GPUs of 8.0 or newer; slower"""
    weight_streaming: bool = False
    """weights may stay in host memory, for GPUs that do not hold them"""
    refit: bool = False
    """backend trt: other weights can be put into the plan without building it; see `engine.refit`"""
    timing_cache: Path | None = None
    """backend trt: a file that keeps measured kernels from one build to the next; made if it is not there"""


@dataclass(frozen=True)
class ResolvedOptions:
    """What an engine will be: nothing is left to choose."""

    compute_capabilities: tuple[str, ...]
    profile: Profile
    max_batch_size: int
    max_cache_length: int
    prefill_chunk: int
    flags: tuple[EngineFlag, ...]
    """portable, refit, weight_streaming: those that were asked for"""


def resolve_options(options: EngineOptions, model: ModelSpec) -> ResolvedOptions:
    """Choose what is left open, and refuse what TensorRT would refuse, or accept and not do.

    Args:
        options: what was asked for.
        model: the shape of the model.

    Raises:
        UsageError: an option that means nothing for this package or backend.
        BackendError: the library is not installed, or `current` without a GPU.
    """
    for name, value, known in (
        ("backend", options.backend, get_args(EngineBackend)),
        ("precision", options.precision, precisions()),
        ("profile", options.profile, (None, *get_args(Profile))),
    ):
        if value not in known:
            raise UsageError(f"{name} {value!r}: expected one of {', '.join(filter(None, known))}")
    _check_backend_options(options)
    profile, batch = _batch(options)
    capacity, chunk = _lengths(model, options.max_cache_length, options.prefill_chunk)
    _check_head_dim(model, options.precision)
    asked = _asked_capabilities(options)
    _check_capabilities(options, [c for c in asked if c != CURRENT])
    check_installed(options.backend)
    capabilities = _with_gpu_at_hand(options, asked)
    return ResolvedOptions(capabilities, profile, batch, capacity, chunk, _flags(options))


def _check_backend_options(options: EngineOptions) -> None:
    """Refuse what only full TensorRT can do, or can do without a GPU.

    Raises:
        UsageError: naming the options.
    """
    if options.backend == "trt":
        if options.timing_cache is not None and not options.timing_cache.absolute().parent.is_dir():
            raise UsageError(f"timing_cache {options.timing_cache}: no such folder; make it first")
        if options.timing_cache is not None and not os.access(options.timing_cache.absolute().parent, os.W_OK):
            raise UsageError(f"timing_cache {options.timing_cache}: its folder is not writable; choose another file")
        return
    only_full = {"portable": options.portable, "refit": options.refit, "timing_cache": options.timing_cache is not None}
    if asked := [name for name, value in only_full.items() if value]:
        raise UsageError(f"{', '.join(asked)}: TensorRT for RTX has no such thing; full TensorRT has: --backend trt")


def _batch(options: EngineOptions) -> tuple[Profile, int]:
    """Return the profile and its rows, of which at least one may be left open."""
    batch = options.max_batch_size
    if batch is None:
        batch = 1 if options.profile == "latency" else MAX_BATCH_SIZE
    if not 1 <= batch <= _MOST_ROWS:
        raise UsageError(f"max_batch_size {batch}: expected 1 to {_MOST_ROWS}")
    profile: Profile = options.profile or ("latency" if batch == 1 else "compact")
    if profile == "latency" and batch != 1:
        raise UsageError(f"max_batch_size {batch}: profile latency has one row; use --profile compact")
    if profile == "compact" and batch == 1:
        raise UsageError("max_batch_size 1: profile compact needs 2 or more; use --profile latency")
    return profile, batch


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


def _check_head_dim(model: ModelSpec, precision: Precision) -> None:
    """Refuse what TensorRT cannot compile, and warn of what it compiles to something slower."""
    size = model.head_dim
    if static_row(precision).dtype == "float32":
        return  # it composes its attention in any case
    if size % 8:
        raise UsageError(f"head_dim {size}: in {precision} TensorRT takes multiples of 8; use --precision fp32")
    if not 16 <= size <= 256:
        logger.warning("head_dim %d: TensorRT has attention kernels for 16 to 256 and composes a slower one", size)


def _asked_capabilities(options: EngineOptions) -> tuple[str, ...]:
    if options.compute_capabilities is not None:
        return tuple(dict.fromkeys(options.compute_capabilities))
    if options.backend == "trt":
        return (CURRENT,)
    return tuple(c for c in CAPABILITIES if float(c) >= float(static_row(options.precision).weights.oldest_gpu))


def _check_capabilities(options: EngineOptions, capabilities: Sequence[str]) -> None:
    """Refuse GPUs that the backend does not compile for, or that do not compute in the precision.

    Raises:
        UsageError: naming them, and what to use.
    """
    if malformed := [c for c in capabilities if re.fullmatch(r"\d{1,2}\.\d", c) is None]:
        raise UsageError(f"compute capability {', '.join(map(repr, malformed))}: expected the form 8.9, or {CURRENT}")
    if options.compute_capabilities is not None and not options.compute_capabilities:
        raise UsageError(f"no compute capability; TensorRT for RTX knows {', '.join(RTX_CAPABILITIES)}")
    if unknown := [c for c in capabilities if c not in _FULL_CAPABILITIES]:
        raise UsageError(
            f"compute capability {', '.join(unknown)}: not known here; known are {', '.join(_FULL_CAPABILITIES)}"
        )
    if options.backend == "trt" and len(options.compute_capabilities or (CURRENT,)) != 1:
        raise UsageError(
            f"compute capabilities {', '.join(options.compute_capabilities or ())}: backend trt builds for the GPU at "
            f"hand; give that one, or {CURRENT}"
        )
    if options.backend == "trt_rtx" and (foreign := [c for c in capabilities if c not in RTX_CAPABILITIES]):
        raise UsageError(
            f"compute capability {', '.join(foreign)}: TensorRT for RTX compiles for {', '.join(RTX_CAPABILITIES)}; "
            "use full TensorRT (--backend trt on that GPU)"
        )
    stored = static_row(options.precision).weights
    if old := [c for c in capabilities if float(c) < float(stored.oldest_gpu)]:
        raise UsageError(
            f"compute capability {', '.join(old)}: {options.precision} needs {stored.oldest_gpu} or newer"
            f"{f'; use --precision {stored.on_older}' if stored.on_older else ''}"
        )


def _with_gpu_at_hand(options: EngineOptions, asked: Sequence[str]) -> tuple[str, ...]:
    """Return the capabilities with `current` replaced by that of the GPU at hand.

    Raises:
        UsageError: the GPU at hand is not one that the backend and the precision are for, or not the one asked for.
        BackendError: there is none, and one is needed.
    """
    if options.backend == "trt_rtx" and CURRENT not in asked:
        return tuple(asked)
    found = gpu_at_hand(options.backend)
    _check_capabilities(options, [found])
    if options.backend == "trt" and asked[0] not in (CURRENT, found):
        raise UsageError(f"compute capability {asked[0]}: backend trt builds for the GPU at hand, which is {found}")
    return tuple(dict.fromkeys(found if c == CURRENT else c for c in asked))


def gpu_at_hand(backend: EngineBackend) -> str:
    """Return the compute capability of the GPU of this machine.

    Raises:
        BackendError: there is none; says what can be done without.
    """
    remedy = (
        f"name the GPU to build for: --compute-capability {CAPABILITIES[2]}"
        if backend == "trt_rtx"
        else "backend trt builds on the GPU itself; --backend trt_rtx builds without one"
    )
    try:
        from runtimes.trt.cuda import find_gpu

        return find_gpu().compute_capability
    except (ImportError, BackendError) as error:
        raise BackendError(f"no GPU to ask ({error}); {remedy}") from error


def _flags(options: EngineOptions) -> tuple[EngineFlag, ...]:
    flags: dict[EngineFlag, bool] = {
        "portable": options.portable,
        "refit": options.refit,
        "weight_streaming": options.weight_streaming,
    }
    return tuple(name for name, asked in flags.items() if asked)
