"""CUDA as far as a runner needs it, on cuda-bindings: no torch, no cupy. The only file that imports it.

Every call's status is checked. Addresses and handles are plain integers, as TensorRT takes them.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from cuda.bindings import runtime as cudart  # type: ignore[import-untyped]

from runtimes.errors import BackendError, FailedError, ResourceError

ALIGNMENT = 256
"""bytes: addresses that TensorRT is given are multiples of it, as cudaMalloc's are"""

_MEMINFO = Path("/proc/meminfo")
_NO_GPU = "a GPU and its driver are needed: nvidia-smi should list one; --backend ort runs on the CPU"


@dataclass(frozen=True)
class Gpu:
    """The GPU that this process uses: the first that CUDA_VISIBLE_DEVICES leaves."""

    name: str
    compute_capability: str
    """as in 8.9"""
    free_bytes: int
    """of its memory, when asked"""
    total_bytes: int


def find_gpu() -> Gpu:
    """Return the GPU at hand.

    Raises:
        BackendError: there is none, or no driver for it.
    """
    status, count = cudart.cudaGetDeviceCount()
    if status != cudart.cudaError_t.cudaSuccess or not count:
        reason = "no GPU" if status == cudart.cudaError_t.cudaSuccess else _text(status)
        raise BackendError(f"CUDA finds no GPU ({reason}); {_NO_GPU}")
    _call("cudaSetDevice", 0)
    properties = _call("cudaGetDeviceProperties", 0)
    _, total = _call("cudaMemGetInfo")
    name = bytes(properties.name).split(b"\0")[0].decode(errors="replace")
    return Gpu(name, f"{properties.major}.{properties.minor}", free_bytes(), int(total))


class Stream:
    """Work that the GPU does in order, beside the default stream."""

    def __init__(self) -> None:
        self.handle = int(_call("cudaStreamCreateWithFlags", cudart.cudaStreamNonBlocking))

    def synchronize(self) -> None:
        """Wait until the work is done.

        Raises:
            FailedError: some of it failed.
        """
        _call("cudaStreamSynchronize", self.handle)

    def close(self) -> None:
        _release("cudaStreamDestroy", self.handle)


class DeviceBuffer:
    """Memory of the GPU, zeros at first."""

    def __init__(self, size: int, what: str) -> None:
        """Allocate `size` bytes.

        Raises:
            ResourceError: there is not so much; says what it was for.
        """
        self.size = size
        self.address = int(_call("cudaMalloc", max(size, 1), what=f"{size:,} bytes for {what}"))
        _call("cudaMemset", self.address, 0, max(size, 1))
        _call("cudaDeviceSynchronize")  # a stream of ours would not wait for it

    def clear(self, offset: int, pitch: int, width: int, height: int, stream: Stream) -> None:
        """Zero `height` pieces of `width` bytes, from `offset` on, `pitch` bytes apart."""
        _call("cudaMemset2DAsync", self.address + offset, pitch, 0, width, height, stream.handle)

    def copy(self, source: int, target: int, pitch: int, width: int, height: int, stream: Stream) -> None:
        """Copy `height` pieces of `width` bytes, `pitch` bytes apart, from one offset to another."""
        kind = cudart.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        to, of = self.address + target, self.address + source
        _call("cudaMemcpy2DAsync", to, pitch, of, pitch, width, height, kind, stream.handle)

    def close(self) -> None:
        _release("cudaFree", self.address)


class PinnedBuffer:
    """Memory of the host that the GPU copies from and to by itself."""

    def __init__(self, size: int) -> None:
        self.address = int(_call("cudaMallocHost", size, what=f"{size:,} bytes of pinned host memory"))
        self.array: npt.NDArray[np.uint8] = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.address))

    def close(self) -> None:
        self.array = np.zeros(0, np.uint8)
        _release("cudaFreeHost", self.address)


def copy_to_device(target: int, source: int, size: int, stream: Stream) -> None:
    """Begin to copy bytes from pinned memory to the GPU; neither may change until the stream is synchronised."""
    _call("cudaMemcpyAsync", target, source, size, cudart.cudaMemcpyKind.cudaMemcpyHostToDevice, stream.handle)


def copy_to_host(target: int, source: int, size: int, stream: Stream) -> None:
    """Begin to copy bytes from the GPU to pinned memory; they are there when the stream is synchronised."""
    _call("cudaMemcpyAsync", target, source, size, cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost, stream.handle)


class Graph:
    """Work recorded from a stream, to be launched as one."""

    def __init__(self, executable: Any) -> None:
        self._executable = executable

    def launch(self, stream: Stream) -> None:
        _call("cudaGraphLaunch", self._executable, stream.handle)

    def close(self) -> None:
        _release("cudaGraphExecDestroy", self._executable)


@contextmanager
def captured(stream: Stream) -> Iterator[list[Graph]]:
    """Record what the body gives to the stream, instead of doing it; the list holds the graph afterwards.

    Raises:
        FailedError: something in the body cannot be recorded.
    """
    graphs: list[Graph] = []
    # Other threads of the process may allocate while this one records.
    _call("cudaStreamBeginCapture", stream.handle, cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
    try:
        yield graphs
    except BaseException:
        # The stream must not go on recording, whatever went wrong.
        _, unfinished = cudart.cudaStreamEndCapture(stream.handle)
        if unfinished is not None and int(unfinished):
            _release("cudaGraphDestroy", unfinished)
        raise
    graph = _call("cudaStreamEndCapture", stream.handle)
    try:
        graphs.append(Graph(_call("cudaGraphInstantiate", graph, 0)))
    finally:
        _release("cudaGraphDestroy", graph)


def free_bytes() -> int:
    """Return how much memory the GPU has left. One that shares the host's can also have what caches files there."""
    free, _ = _call("cudaMemGetInfo")
    if _call("cudaDeviceGetAttribute", cudart.cudaDeviceAttr.cudaDevAttrIntegrated, 0) and _MEMINFO.is_file():
        available = re.search(r"^MemAvailable: +(\d+) kB$", _MEMINFO.read_text(), re.MULTILINE)
        return max(int(free), 1024 * int(available[1]) if available else 0)
    return int(free)


def _call(name: str, *arguments: Any, what: str = "") -> Any:
    """Call a function of the CUDA runtime; return its result, or a tuple of several.

    Raises:
        ResourceError: memory ran out.
        BackendError: there is no driver or no GPU.
        FailedError: anything else, which may come from work that was begun earlier.
    """
    status, *results = getattr(cudart, name)(*arguments)
    codes = cudart.cudaError_t
    if status == codes.cudaErrorMemoryAllocation:
        free = f", {free_bytes():,} are free" if name == "cudaMalloc" else ""
        raise ResourceError(f"out of GPU memory: {what or name}{free}; close other programs, or use a smaller engine")
    if status in (codes.cudaErrorInsufficientDriver, codes.cudaErrorNoDevice):
        raise BackendError(f"CUDA: {_text(status)}; {_NO_GPU}")
    if status != codes.cudaSuccess:
        raise FailedError(f"CUDA: {name} failed: {_text(status)}")
    return results[0] if len(results) == 1 else tuple(results)


def _release(name: str, handle: Any) -> None:
    """Free something; a failure to is not worth an error of its own, as what caused it has been raised."""
    getattr(cudart, name)(handle)


def _text(status: Any) -> str:
    _, text = cudart.cudaGetErrorString(status)
    return text.decode() if isinstance(text, bytes) else str(text)
