"""A GPU that is none: CUDA's runtime on host memory, and TensorRT's classes on onnxruntime.

The memory of the device is filled with NaN, has bounds, and is apart from the host's. What is given to a stream happens
when the stream is synchronised, and not before: whoever reads or overwrites too early gets something wrong. Methods
have the names and parameters of the real classes, which `test_nvidia.py` and `test_cuda.py` compare.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import tensorrt_rtx_bindings as real_trt  # type: ignore[import-untyped]
from cuda.bindings import runtime as real_cuda  # type: ignore[import-untyped]

from runtimes.manifest import Engine, Variant
from runtimes.trt.nvidia import Message, TensorRT

CODES = real_cuda.cudaError_t
OK = (CODES.cudaSuccess,)
ALIGNMENT = 256


class FakeCudart:
    """`cuda.bindings.runtime`, as far as runtimes/trt/cuda.py uses it."""

    def __init__(self, total: int = 1 << 24, capability: str = "8.9", name: str = "Fake RTX") -> None:
        self._total, self._capability, self._name = total, capability, name
        self._memory: dict[int, tuple[str, np.ndarray]] = {}
        self._streams: dict[int, list[Callable[[], None]]] = {}
        self._recording: dict[int, list[Callable[[], None]]] = {}
        self._graphs: dict[int, list[Callable[[], None]]] = {}
        self._integrated = 0
        self._handles = iter(range(1, 1 << 30))
        self._faults: dict[str, Any] = {}
        """function -> the status it returns instead of doing anything"""
        self._calls: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if name.startswith("cuda"):
            self._calls.append(name)
            if name in self._faults:
                return lambda *_: (self._faults[name], None)
        return value

    def __getattr__(self, name: str) -> Any:
        return getattr(real_cuda, name)  # the enumerations; an unknown name fails

    # What the tests ask

    def _in_use(self, kind: str) -> int:
        return sum(len(m) for k, m in self._memory.values() if k == kind)

    def _view(self, address: int, size: int, kind: str) -> np.ndarray:
        for start, (found, memory) in self._memory.items():
            if start <= address and address + size <= start + len(memory):
                assert found == kind, f"{found} memory, expected {kind}"
                return memory[address - start : address - start + size]
        raise AssertionError(f"{size} bytes at {address}: not {kind} memory")

    def _enqueue(self, stream: int, work: Callable[[], None]) -> None:
        (self._recording if stream in self._recording else self._streams)[stream].append(work)

    # The device

    def cudaGetDeviceCount(self) -> Any:  # noqa: N802
        return *OK, 1

    def cudaSetDevice(self, device: int) -> Any:  # noqa: N802
        assert device == 0
        return OK

    def cudaGetDeviceProperties(self, device: int) -> Any:  # noqa: N802
        assert device == 0
        major, minor = map(int, self._capability.split("."))
        return *OK, SimpleNamespace(name=self._name.encode(), major=major, minor=minor)

    def cudaDeviceGetAttribute(self, attr: Any, device: int) -> Any:  # noqa: N802
        assert (attr, device) == (real_cuda.cudaDeviceAttr.cudaDevAttrIntegrated, 0)
        return *OK, self._integrated

    def cudaGetErrorString(self, error: Any) -> Any:  # noqa: N802
        return real_cuda.cudaGetErrorString(error)

    def cudaDeviceSynchronize(self) -> Any:  # noqa: N802
        return OK

    # Memory

    def cudaMemGetInfo(self) -> Any:  # noqa: N802
        return *OK, self._total - self._in_use("device"), self._total

    def _allocate(self, size: int, kind: str) -> int:
        raw = np.full(size + ALIGNMENT, 0xFF, np.uint8)
        offset = -raw.ctypes.data % ALIGNMENT
        memory = raw[offset : offset + size]
        self._memory[memory.ctypes.data] = (kind, memory)
        return int(memory.ctypes.data)

    def _charge(self, size: int) -> int:
        """Take memory that nobody looks into, and that the host need not have."""
        handle = -next(self._handles)
        self._memory[handle] = ("device", np.broadcast_to(np.uint8(0xFF), size))
        return handle

    def cudaMalloc(self, size: int) -> Any:  # noqa: N802
        if size > self._total - self._in_use("device"):
            return CODES.cudaErrorMemoryAllocation, None
        return *OK, self._allocate(size, "device")

    def cudaMallocHost(self, size: int) -> Any:  # noqa: N802
        return *OK, self._allocate(size, "host")

    def cudaFree(self, devPtr: int) -> Any:  # noqa: N802, N803
        assert self._memory.pop(devPtr)[0] == "device"
        return OK

    def cudaFreeHost(self, ptr: int) -> Any:  # noqa: N802
        assert self._memory.pop(ptr)[0] == "host"
        return OK

    def cudaMemset(self, devPtr: int, value: int, count: int) -> Any:  # noqa: N802, N803
        self._view(devPtr, count, "device")[:] = value
        return OK

    def cudaMemset2DAsync(self, devPtr: int, pitch: int, value: int, width: int, height: int, stream: int) -> Any:  # noqa: N802, N803
        def work() -> None:
            for row in range(height):
                self._view(devPtr + row * pitch, width, "device")[:] = value

        self._enqueue(stream, work)
        return OK

    def cudaMemcpy2DAsync(  # noqa: N802
        self, dst: int, dpitch: int, src: int, spitch: int, width: int, height: int, kind: Any, stream: int
    ) -> Any:
        assert kind == real_cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        pairs = [
            (self._view(dst + n * dpitch, width, "device"), self._view(src + n * spitch, width, "device"))
            for n in range(height)
        ]

        def work() -> None:
            for target, source in pairs:
                np.copyto(target, source)

        self._enqueue(stream, work)
        return OK

    def cudaMemcpyAsync(self, dst: int, src: int, count: int, kind: Any, stream: int) -> Any:  # noqa: N802
        names = {
            real_cuda.cudaMemcpyKind.cudaMemcpyHostToDevice: ("device", "host"),
            real_cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost: ("host", "device"),
        }
        target, source = self._view(dst, count, names[kind][0]), self._view(src, count, names[kind][1])
        self._enqueue(stream, lambda: np.copyto(target, source))
        return OK

    # Streams

    def cudaStreamCreateWithFlags(self, flags: int) -> Any:  # noqa: N802
        assert flags == real_cuda.cudaStreamNonBlocking
        handle = next(self._handles)
        self._streams[handle] = []
        return *OK, handle

    def cudaStreamSynchronize(self, stream: int) -> Any:  # noqa: N802
        if stream in self._recording:
            return (CODES.cudaErrorStreamCaptureUnsupported,)
        for work in self._streams[stream]:
            work()
        self._streams[stream].clear()
        return OK

    def cudaStreamDestroy(self, stream: int) -> Any:  # noqa: N802
        assert self._streams.pop(stream) == []
        return OK

    # Graphs

    def cudaStreamBeginCapture(self, stream: int, mode: Any) -> Any:  # noqa: N802
        assert mode == real_cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._recording[stream] = []
        return OK

    def cudaStreamEndCapture(self, stream: int) -> Any:  # noqa: N802
        handle = next(self._handles)
        self._graphs[handle] = self._recording.pop(stream)
        return *OK, handle

    def cudaGraphInstantiate(self, graph: int, flags: int) -> Any:  # noqa: N802
        assert flags == 0
        handle = next(self._handles)
        self._graphs[handle] = list(self._graphs[graph])
        return *OK, handle

    def cudaGraphLaunch(self, graphExec: int, stream: int) -> Any:  # noqa: N802, N803
        for work in self._graphs[graphExec]:
            self._enqueue(stream, work)
        return OK

    def cudaGraphExecDestroy(self, graphExec: int) -> Any:  # noqa: N802, N803
        del self._graphs[graphExec]
        return OK

    def cudaGraphDestroy(self, graph: int) -> Any:  # noqa: N802
        del self._graphs[graph]
        return OK


@dataclass
class Plan:
    """What the fake makes of a plan's bytes, and what is wrong with it."""

    entry: Engine
    variant: Variant
    graph: Path
    aliases: dict[str, str] | None = None
    """others than the manifest's"""
    modes: dict[str, Any] = field(default_factory=dict)
    dtypes: dict[str, Any] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    locations: dict[str, Any] = field(default_factory=dict)
    extra_names: tuple[str, ...] = ()
    profiles: list[dict[str, list[tuple[int, ...]]]] | None = None
    activation_bytes: int = 1000
    weight_bytes: int = 3000
    streamable_bytes: int = 2500
    scratch_bytes: int = 700
    """more activation memory, when weights are streamed"""
    stubborn: bool = False
    """takes no weight streaming budget"""
    cache_fails: bool = False
    """IRuntimeCache.serialize raises"""
    contexts: bool = True
    """whether it makes any"""
    fail_at: int | None = None
    """the run, from 0 on, that fails"""
    loads: int = 0
    runs: int = 0
    made: list[FakeRuntimeConfig] = field(default_factory=list)
    """of each context"""
    caches: list[bytes] = field(default_factory=list)
    """what was given to IRuntimeCache.deserialize"""


class _Strict:
    """Refuses attributes that the real class has not, or that cannot be set there."""

    _real: Any

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_"):
            assert getattr(self._real, name).fset is not None, name
        object.__setattr__(self, name, value)


class FakeRuntimeCache(_Strict):
    _real = real_trt.IRuntimeCache

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def deserialize(self, blob: bytes) -> bool:
        self._plan.caches.append(bytes(blob))
        return bytes(blob).startswith(b"kernels")

    def serialize(self) -> bytes:
        if self._plan.cache_fails:
            raise RuntimeError("no memory to serialize")
        return b"kernels of %d contexts" % len(self._plan.made)


class FakeRuntimeConfig(_Strict):
    _real = real_trt.IRuntimeConfig
    cuda_graph_strategy: Any = real_trt.CudaGraphStrategy.DISABLED

    def __init__(self, plan: Plan, backend: str) -> None:
        self._plan, self._backend = plan, backend
        self._strategy: Any = None
        self._cache: Any = None

    def __setattr__(self, name: str, value: Any) -> None:
        assert name != "cuda_graph_strategy" or self._backend == "trt_rtx"
        super().__setattr__(name, value)

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self._strategy = strategy

    def create_runtime_cache(self) -> FakeRuntimeCache:
        assert self._backend == "trt_rtx"
        return FakeRuntimeCache(self._plan)

    def set_runtime_cache(self, cache: Any) -> bool:
        assert self._backend == "trt_rtx"
        self._cache = cache
        return isinstance(cache, FakeRuntimeCache)


class FakeExecutionContext(_Strict):
    _real = real_trt.IExecutionContext

    def __init__(self, engine: FakeCudaEngine, config: FakeRuntimeConfig) -> None:
        self._engine, self._plan, self._cudart = engine, engine._plan, engine._cudart
        self._config = config
        self._profile = -1
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._memory = (0, -1)
        self._plan.made.append(config)

    def set_device_memory(self, memory: int, size: int) -> None:
        self._memory = (memory, size)

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        assert stream_handle in self._cudart._streams
        self._profile = profile_index
        return profile_index < len(self._engine._profiles())

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self._engine._profiles()[self._profile][name]
        inside = len(low) == len(shape) and all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))
        if not inside:
            self._engine._say(f"{name}: {shape} is not in {low} to {high}")
            return False
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return memory % ALIGNMENT == 0

    def execute_async_v3(self, stream_handle: int) -> bool:
        plan, run = self._plan, self._plan.runs
        plan.runs += 1
        names = [t.name for t in (*plan.variant.inputs, *plan.variant.outputs)]
        problems = [f"{n}: address not set" for n in names if not self._addresses.get(n)]
        problems += [f"{t.name}: shape not set" for t in plan.variant.inputs if t.name not in self._shapes]
        problems += [
            f"{present}: not the memory of {past}"
            for present, past in plan.entry.aliases.items()
            if self._addresses.get(present) != self._addresses.get(past)
        ]
        if (
            self._config._strategy != real_trt.ExecutionContextAllocationStrategy.USER_MANAGED
            or self._memory[1] < self._engine.device_memory_size_v2
        ):
            problems.append("no activation memory")
        if run == plan.fail_at:
            problems.append("injected failure")
        if problems:
            self._engine._say("\n".join(problems))
            return False
        self._cudart._view(*self._memory, "device")
        shapes, addresses = dict(self._shapes), dict(self._addresses)
        self._cudart._enqueue(stream_handle, lambda: self._compute(shapes, addresses))
        return True

    def _compute(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        sizes = {"batch_size": shapes["input_ids"][0], "sequence_length": shapes["input_ids"][1]}

        def tensor(spec: Any) -> np.ndarray:
            shape = [sizes[d] if isinstance(d, str) else d for d in spec.shape]
            size = int(np.prod(shape)) * np.dtype(spec.dtype).itemsize
            return self._cudart._view(addresses[spec.name], size, "device").view(spec.dtype).reshape(shape)

        variant = self._plan.variant
        feeds = {spec.name: tensor(spec) for spec in variant.inputs}
        assert {n: v.shape for n, v in feeds.items()} == shapes
        results = self._engine._session.run([o.name for o in variant.outputs], feeds)
        for spec, result in zip(variant.outputs, results, strict=True):
            tensor(spec)[...] = result


class FakeCudaEngine(_Strict):
    _real = real_trt.ICudaEngine

    def __init__(self, plan: Plan, cudart: FakeCudart, backend: str, log: FakeLog) -> None:
        self._plan, self._cudart, self._backend, self._log = plan, cudart, backend, log
        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        self._session = onnxruntime.InferenceSession(plan.graph, options, providers=["CPUExecutionProvider"])
        streams = "weight_streaming" in plan.entry.flags  # then they are in the host's memory until a budget is set
        self._budget = plan.streamable_bytes
        self._fixed = cudart._charge(plan.weight_bytes - plan.streamable_bytes)
        self._streamed = cudart._charge(0 if streams else plan.streamable_bytes)

    def __del__(self) -> None:
        self._cudart._memory.pop(self._fixed, None)
        self._cudart._memory.pop(self._streamed, None)

    def _say(self, text: str) -> None:
        self._log.messages.append(Message(logging.ERROR, text))

    def _profiles(self) -> list[dict[str, list[tuple[int, ...]]]]:
        if self._plan.profiles is not None:
            return self._plan.profiles
        return [{r.name: [r.min, r.opt, r.max] for r in ranges} for ranges in self._plan.entry.profiles.values()]

    def _spec(self, name: str) -> Any:
        return next(t for t in (*self._plan.variant.inputs, *self._plan.variant.outputs) if t.name == name)

    @property
    def num_io_tensors(self) -> int:
        return len(self._plan.variant.inputs) + len(self._plan.variant.outputs) + len(self._plan.extra_names)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._profiles())

    @property
    def device_memory_size_v2(self) -> int:
        return self._plan.activation_bytes + self.weight_streaming_scratch_memory_size

    @property
    def weight_streaming_scratch_memory_size(self) -> int:
        return self._plan.scratch_bytes if self._budget < self._plan.streamable_bytes else 0

    @property
    def streamable_weights_size(self) -> int:
        return self._plan.streamable_bytes

    @property
    def weight_streaming_budget_v2(self) -> int:
        return self._budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, budget: int) -> None:
        assert "weight_streaming" in self._plan.entry.flags
        _, held = self._cudart._memory[self._streamed]
        if self._plan.stubborn or budget - len(held) > self._cudart._total - self._cudart._in_use("device"):
            return  # as the real one, which does not tell
        del self._cudart._memory[self._streamed]
        self._streamed, self._budget = self._cudart._charge(budget), budget

    def get_tensor_name(self, index: int) -> str:
        named = (*self._plan.variant.inputs, *self._plan.variant.outputs)
        return [*(t.name for t in named), *self._plan.extra_names][index]

    def get_tensor_mode(self, name: str) -> Any:
        is_input = any(t.name == name for t in self._plan.variant.inputs)
        mode = real_trt.TensorIOMode.INPUT if is_input else real_trt.TensorIOMode.OUTPUT
        return self._plan.modes.get(name, mode)

    def get_tensor_dtype(self, name: str) -> Any:
        dtypes = {"float32": real_trt.DataType.FLOAT, "int64": real_trt.DataType.INT64}
        return self._plan.dtypes.get(name, dtypes[self._spec(name).dtype])

    def get_tensor_shape(self, name: str) -> Any:
        shape = tuple(-1 if isinstance(d, str) else d for d in self._spec(name).shape)
        return real_trt.Dims(self._plan.shapes.get(name, shape))

    def get_tensor_location(self, name: str) -> Any:
        return self._plan.locations.get(name, real_trt.TensorLocation.DEVICE)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> Any:
        return [real_trt.Dims(shape) for shape in self._profiles()[profile_index][name]]

    def get_aliased_input_tensor(self, name: str) -> Any:
        return (self._plan.entry.aliases if self._plan.aliases is None else self._plan.aliases).get(name)

    def create_runtime_config(self) -> FakeRuntimeConfig:
        return FakeRuntimeConfig(self._plan, self._backend)

    def create_execution_context(self, runtime_config: FakeRuntimeConfig) -> FakeExecutionContext | None:
        if not self._plan.contexts:
            self._say("no memory for a context")
            return None
        return FakeExecutionContext(self, runtime_config)


@dataclass
class FakeLog:
    messages: list[Message]


def fake_tensorrt(backend: Any, version: str, plans: dict[bytes, Plan], cudart: FakeCudart) -> TensorRT:
    """A library that knows some plans by their bytes."""
    messages: list[Message] = []

    class FakeRuntime(_Strict):
        _real = real_trt.Runtime
        engine_host_code_allowed = False

        def __init__(self, logger: Any) -> None:
            self._log: FakeLog = logger

        def deserialize_cuda_engine(self, serialized_engine: Any) -> FakeCudaEngine | None:
            content = bytes(serialized_engine)
            if content not in plans:
                self._log.messages.append(Message(logging.ERROR, "magic tag does not match"))
                return None
            plans[content].loads += 1
            return FakeCudaEngine(plans[content], cudart, backend, self._log)

    module = SimpleNamespace(
        Runtime=FakeRuntime,
        TensorLocation=real_trt.TensorLocation,
        ExecutionContextAllocationStrategy=real_trt.ExecutionContextAllocationStrategy,
    )
    if backend == "trt_rtx":  # full TensorRT has none of it
        module.CudaGraphStrategy = real_trt.CudaGraphStrategy
    return TensorRT(backend, module, version, FakeLog(messages), messages)
