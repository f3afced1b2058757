"""Open an engine of a package on the GPU: with TensorRT for RTX, or with full TensorRT.

An engine is native code. Before TensorRT sees it, everything is compared that the manifests say: the files, the
version, the GPU, the memory; and after it is loaded, the engine itself. Whatever differs is refused.
"""

from __future__ import annotations

import logging
import mmap
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import runtimes.trt.cuda as cuda
from runtimes.dtypes import tensorrt_dtype
from runtimes.errors import (
    BackendError,
    FailedError,
    PackageError,
    ResourceError,
    UsageError,
    VariantNotFoundError,
    first_names,
)
from runtimes.manifest import OLDEST_GPU, Engine, EngineBackend, ModelSpec, TrtManifest, Variant
from runtimes.package import Package
from runtimes.runners.static import StaticRunner
from runtimes.targets import find_target, runnable
from runtimes.trt.jit_cache import JitCache
from runtimes.trt.nvidia import TensorRT, check_version, load_engine, load_tensorrt
from runtimes.trt.session import TrtSession, plan_memory

logger = logging.getLogger(__name__)

PORTABLE, WEIGHT_STREAMING = "portable", "weight_streaming"
"""flags of an engine that a runner has to know"""

_PORTABLE_FROM = 8.0
"""the oldest compute capability that a portable engine runs on, if its precision does"""
_HEADROOM = 256_000_000
"""bytes of the GPU's memory, or a twentieth of it if that is more: left free when weights are streamed, for contexts,
kernels and what other programs take meanwhile"""
_PHASES = ("decode", "prefill")


@dataclass(frozen=True)
class MemoryBudget:
    """What an engine takes of the GPU's memory, in bytes."""

    weights: int
    """of the plan; with weight streaming any part of them may stay in the host's memory"""
    activations: int
    """0: not known before the engine is loaded"""
    kv_cache: int
    buffers: int
    """inputs and outputs"""
    rows: int
    max_cache_length: int

    def __str__(self) -> str:
        activations = f"activations {_mb(self.activations)}, " if self.activations else ""
        return (
            f"weights {_mb(self.weights)}, {activations}KV cache {_mb(self.kv_cache)} ({self.rows} rows of "
            f"{self.max_cache_length} tokens), inputs and outputs {_mb(self.buffers)}"
        )

    def check(self, free: int, *, loaded: bool, streaming: bool) -> None:
        """Refuse what does not fit.

        Args:
            free: bytes of the GPU's memory.
            loaded: the weights are on the GPU already.
            streaming: they need not be.

        Raises:
            ResourceError: with the numbers.
        """
        needed = self.activations + self.kv_cache + self.buffers + (0 if loaded or streaming else self.weights)
        if needed > free:
            raise ResourceError(
                f"the engine needs {_mb(needed)} more of GPU memory, {_mb(free)} are free: {self}; close other "
                "programs, or build it with a smaller --max-batch-size or --max-cache-length"
            )


def open_trt(
    package: Package,
    backend: EngineBackend,
    variant: str | None,
    *,
    check_hashes: bool,
    max_slots: int | None = None,
) -> StaticRunner:
    """Load an engine of a package onto the GPU.

    Args:
        package: which.
        backend: trt_rtx or trt.
        variant: of the graph that the engine was compiled from; None means the first by name that has one.
        check_hashes: compare the sha256 of graph and plan with the manifest; without it only presence and size.
        max_slots: sequences at once, for a server; None: as many as the engine was built for.

    Raises:
        UsageError: more slots than that.
        VariantNotFoundError: there is no such engine for this backend; the message has the command that builds one.
        IntegrityError, PackageError: a file, or the engine, is not what the manifest says.
        BackendError: no library, no GPU, or others than the engine was built for.
        ResourceError: the GPU's memory does not hold it.
        FailedError: TensorRT or CUDA failed.
    """
    model, folder = package.model, package.folder
    entry, graph, manifest = find_engine(package, backend, variant)
    remedy = f"build it again: {_command(folder, entry)}"
    package.check([entry.plan, graph.graph], hashes=check_hashes, remedy=remedy)
    check_entry(entry, graph, model, remedy)
    if max_slots is not None and max_slots > entry.max_batch_size:
        raise UsageError(
            f"max_slots {max_slots}: engine {entry.name} was built for batch <= {entry.max_batch_size}; build it with "
            f"--max-batch-size {max_slots}"
        )
    portable = PORTABLE in entry.flags
    tensorrt = load_tensorrt(backend, portable=portable)
    check_version(tensorrt, entry.backend_version, portable=portable)
    gpu = cuda.find_gpu()
    check_capability(gpu, entry, folder)
    streaming = WEIGHT_STREAMING in entry.flags
    budget = _budget(entry, graph, manifest.files[entry.plan].size)
    budget.check(gpu.free_bytes, loaded=False, streaming=streaming)
    runtime, engine = _load(tensorrt, folder / entry.plan, portable=portable)
    check_engine(tensorrt, engine, entry, graph, remedy)
    if streaming:
        _stream_weights(engine, budget, gpu.total_bytes)
    budget = _budget(entry, graph, budget.weights, activations=int(engine.device_memory_size_v2))
    free = cuda.free_bytes()
    logger.info("%s on %s, GPU memory: %s; %s of %s are free", entry.name, gpu.name, budget, _mb(free),
                _mb(gpu.total_bytes))  # fmt: skip
    budget.check(free, loaded=True, streaming=streaming)
    jit_cache = JitCache(folder / entry.plan, manifest.files[entry.plan].sha256, gpu.compute_capability)
    session = TrtSession(tensorrt, runtime, engine, entry, graph, jit_cache)
    return StaticRunner(session, graph, model, max_slots or entry.max_batch_size)


def find_engine(package: Package, backend: EngineBackend, variant: str | None) -> tuple[Engine, Variant, TrtManifest]:
    """Return an engine of a package, the graph it was compiled from, and the manifest that vouches for both.

    Raises:
        VariantNotFoundError: there is none; the message has the command that builds it.
        IntegrityError, PackageError: the manifest was changed.
    """
    manifest, folder = package.trt, package.folder
    engines = {e.variant: e for e in manifest.engines.values() if e.backend == backend} if manifest else {}
    name = variant
    if name is None:
        name = next(iter(runnable(package, find_target(backend))), None)
    if manifest is None or name not in engines:
        there = f"it has those of {', '.join(sorted(engines))}" if engines else "it has none"
        wanted = "" if variant is None else f" of variant {variant!r}"
        precision = f" --precision {variant.removeprefix('trt_')}" if variant and variant.startswith("trt_") else ""
        raise VariantNotFoundError(
            f"{folder}: no engine{wanted} for backend {backend}, {there}; "
            f"run: olmo2-export build {shlex.quote(str(folder))} --backend {backend}{precision}"
        )
    entry = engines[name]
    if name not in manifest.variants:
        raise PackageError(f"{folder}: engine {entry.name} is of variant {name}, which the manifest has not; "
                           f"build it again: {_command(folder, entry)}")  # fmt: skip
    return entry, manifest.variants[name], manifest


def check_capability(gpu: cuda.Gpu, entry: Engine, package: Path) -> None:
    """Refuse a GPU that an engine does not run on.

    Raises:
        BackendError: naming the GPUs that it runs on.
    """
    found = gpu.compute_capability
    oldest = max(_PORTABLE_FROM, float(OLDEST_GPU[entry.precision])) if PORTABLE in entry.flags else None
    if found in entry.compute_capabilities or (oldest is not None and float(found) >= oldest):
        return
    if oldest is None:
        raise BackendError(
            f"engine {entry.name} was built for compute capability {', '.join(entry.compute_capabilities)}; "
            f"{gpu.name} has {found}: {_command(package, entry)} --compute-capability {found}"
        )
    other = replace(entry, precision="bf16" if float(found) >= float(OLDEST_GPU["bf16"]) else "fp16")
    raise BackendError(
        f"engine {entry.name} is portable, and in {entry.precision} that is compute capability {oldest} or newer; "
        f"{gpu.name} has {found}: build one for it: {_command(package, other)}"
    )


def check_entry(entry: Engine, graph: Variant, model: ModelSpec, remedy: str) -> None:
    """Compare what the manifest says of an engine with what it says of its graph and its model.

    Raises:
        PackageError: naming what differs.
    """
    caches, spec = graph.caches, graph.kv_cache
    cache = (model.num_key_value_heads, entry.max_cache_length, model.head_dim)
    sizes = {name: {r.name: r for r in ranges} for name, ranges in entry.profiles.items()}
    wrong = []
    if entry.aliases != {present: past for past, present in caches.items()}:
        wrong.append("its alias table is not that of its graph")
    if len(caches) != 2 * model.num_hidden_layers or spec.num_layers != model.num_hidden_layers:
        wrong.append(f"{len(caches)} caches, the model has {model.num_hidden_layers} layers")
    if (spec.num_key_value_heads, spec.max_cache_length, spec.head_dim) != cache:
        wrong.append(f"a KV cache of {spec.num_key_value_heads} x {spec.max_cache_length} x {spec.head_dim}, "
                     f"expected {' x '.join(map(str, cache))}")  # fmt: skip
    if tuple(sizes) != _PHASES or any(set(r) != {i.name for i in graph.inputs} for r in sizes.values()):
        wrong.append(f"optimization profiles {', '.join(sizes)} are not decode and prefill of all inputs")
    else:
        for phase, width in zip(_PHASES, (1, entry.prefill_chunk), strict=True):
            if sizes[phase]["input_ids"].max != (entry.max_batch_size, width):
                wrong.append(f"profile {phase} ends at {sizes[phase]['input_ids'].max}, "
                             f"expected {(entry.max_batch_size, width)}")  # fmt: skip
    if wrong:
        raise PackageError(f"engine {entry.name}: {'; '.join(wrong)}; {remedy}")


def check_engine(tensorrt: TensorRT, engine: Any, entry: Engine, graph: Variant, remedy: str) -> None:
    """Compare a loaded engine with its manifest: its tensors, its optimization profiles, and what it updates in place.

    Raises:
        PackageError: naming the first five differences.
    """
    module = tensorrt.module
    expected = {**{t.name: (t, "INPUT") for t in graph.inputs}, **{t.name: (t, "OUTPUT") for t in graph.outputs}}
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    wrong = [f"{name}: missing" for name in expected if name not in names]
    wrong += [f"{name}: unexpected" for name in names if name not in expected]
    for name in (n for n in names if n in expected):
        tensor, mode = expected[name]
        shape = tuple(-1 if isinstance(d, str) else d for d in tensor.shape)
        found = (
            engine.get_tensor_mode(name).name,
            tensorrt_dtype(engine.get_tensor_dtype(name).name),
            tuple(engine.get_tensor_shape(name)),
        )
        if found != (mode, tensor.dtype, shape):
            wrong.append(f"{name}: {found}, expected {(mode, tensor.dtype, shape)}")
        if engine.get_tensor_location(name) != module.TensorLocation.DEVICE:
            wrong.append(f"{name}: not in the GPU's memory")
        past = engine.get_aliased_input_tensor(name) if mode == "OUTPUT" else None
        if past != entry.aliases.get(name):
            wrong.append(f"{name}: shares the memory of {past}, expected {entry.aliases.get(name)}")
    if engine.num_optimization_profiles != len(entry.profiles):
        wrong.append(f"{engine.num_optimization_profiles} optimization profiles, expected {len(entry.profiles)}")
    elif not wrong:
        for index, (phase, ranges) in enumerate(entry.profiles.items()):
            for r in ranges:
                shapes = [tuple(s) for s in engine.get_tensor_profile_shape(r.name, index)]
                if shapes != [r.min, r.opt, r.max]:
                    wrong.append(f"{r.name} in profile {phase}: {shapes}, expected {[r.min, r.opt, r.max]}")
    if wrong:
        raise PackageError(f"engine {entry.name} is not what its manifest says: {first_names(wrong)}; {remedy}")


def _load(tensorrt: TensorRT, plan: Path, *, portable: bool) -> tuple[Any, Any]:
    with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return load_engine(tensorrt, content, portable=portable)


def _budget(entry: Engine, graph: Variant, weights: int, activations: int = 0) -> MemoryBudget:
    sizes = plan_memory(entry, graph)
    buffers = sizes.inputs_size + sizes.outputs_size
    return MemoryBudget(weights, activations, sizes.caches_size, buffers, entry.max_batch_size, entry.max_cache_length)


def _stream_weights(engine: Any, budget: MemoryBudget, total: int) -> None:
    """Keep as many weights on the GPU as there is room for; the others are copied there at each step.

    Args:
        engine: ICudaEngine, without contexts.
        budget: what else needs room; its activations are not looked at, as they depend on what is streamed.
        total: bytes of the GPU's memory.

    Raises:
        FailedError: TensorRT does not take the budget.
    """
    streamable = int(engine.streamable_weights_size)
    # With none of them on the GPU, what is free is what they can have, and the scratch memory is what streaming takes.
    _set_streaming_budget(engine, 0)
    scratch = int(engine.weight_streaming_scratch_memory_size)
    others = int(engine.device_memory_size_v2) - scratch + budget.kv_cache + budget.buffers
    wanted, room = streamable, cuda.free_bytes() - others
    if streamable > room:
        wanted = max(0, room - scratch - max(_HEADROOM, total // 20))
    _set_streaming_budget(engine, wanted)
    if wanted < streamable:
        logger.warning(
            "%s of %s of weights stay on the GPU, the others are copied there at each step, which is slow",
            _mb(wanted),
            _mb(streamable),
        )


def _set_streaming_budget(engine: Any, size: int) -> None:
    engine.weight_streaming_budget_v2 = size
    if engine.weight_streaming_budget_v2 != size:  # the setter of the bindings does not tell
        raise FailedError(f"TensorRT refused a weight streaming budget of {size:,} bytes")


def _command(package: Path, entry: Engine) -> str:
    return f"olmo2-export build {shlex.quote(str(package))} --backend {entry.backend} --precision {entry.precision}"


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
