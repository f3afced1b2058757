"""The wrapper of CUDA: what it says without a GPU, and that every status is looked at. The fake is checked, too."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda.bindings import runtime as real  # type: ignore[import-untyped]
from support.fake_gpu import CODES, FakeCudart

from runtimes.errors import BackendError, FailedError, ResourceError
from runtimes.trt import cuda

FUNCTIONS = [name for name in vars(FakeCudart) if name.startswith("cuda")]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCudart:
    cudart = FakeCudart(total=10_000)
    monkeypatch.setattr(cuda, "cudart", cudart)
    return cudart


@pytest.mark.parametrize("name", FUNCTIONS)
def test_fake_takes_what_the_real_function_takes(name: str) -> None:
    expected = list(inspect.signature(getattr(real, name)).parameters)
    assert list(inspect.signature(getattr(FakeCudart, name)).parameters)[1:] == expected


def test_the_real_library_without_a_gpu_is_one_line() -> None:
    status, count = real.cudaGetDeviceCount()
    if status == CODES.cudaSuccess and count:
        pytest.skip("there is a GPU")
    with pytest.raises(BackendError, match=r"CUDA finds no GPU \(.+\); a GPU and its driver are needed") as caught:
        cuda.find_gpu()
    assert "\n" not in str(caught.value)
    with pytest.raises(BackendError, match="a GPU and its driver are needed"):
        cuda.Stream()


def test_gpu(fake: FakeCudart) -> None:  # noqa: ARG001  # it is put in place
    buffer = cuda.DeviceBuffer(3_000, "x")
    assert cuda.find_gpu() == cuda.Gpu("Fake RTX", "8.9", 7_000, 10_000)
    assert cuda.free_bytes() == 7_000
    buffer.close()
    assert cuda.free_bytes() == 10_000


def test_gpu_that_shares_the_hosts_memory_has_what_files_are_cached_in(
    fake: FakeCudart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:       90 kB\nMemFree:       1 kB\nMemAvailable:      20 kB\n")
    monkeypatch.setattr(cuda, "_MEMINFO", tmp_path / "meminfo")
    assert cuda.find_gpu().free_bytes == 10_000
    fake._integrated = 1
    assert cuda.find_gpu().free_bytes == 20 * 1024
    (tmp_path / "meminfo").write_text("MemTotal: 90 kB\n")
    assert cuda.free_bytes() == 10_000


def test_no_device_is_no_gpu(fake: FakeCudart) -> None:
    fake._faults["cudaGetDeviceCount"] = CODES.cudaErrorNoDevice
    with pytest.raises(BackendError, match=r"no GPU \(no CUDA-capable device is detected\)"):
        cuda.find_gpu()


def test_memory_that_ran_out_is_said_with_numbers(fake: FakeCudart) -> None:
    held = cuda.DeviceBuffer(4_000, "x")
    with pytest.raises(ResourceError, match=r"out of GPU memory: 7,000 bytes for the KV cache, 6,000 are free") as e:
        cuda.DeviceBuffer(7_000, "the KV cache")
    assert e.value.exit_code == 1
    held.close()
    assert fake._in_use("device") == 0


def test_bytes_go_there_and_back_when_the_stream_is_synchronised(fake: FakeCudart) -> None:
    stream, device, host = cuda.Stream(), cuda.DeviceBuffer(600, "x"), cuda.PinnedBuffer(600)
    assert device.address % cuda.ALIGNMENT == 0
    host.array[:] = np.arange(600) % 251
    cuda.copy_to_device(device.address + 100, host.address, 400, stream)
    stream.synchronize()
    host.array[:] = 9
    cuda.copy_to_host(host.address, device.address, 600, stream)
    assert (host.array == 9).all()
    stream.synchronize()
    assert host.array.tolist() == [0] * 100 + [n % 251 for n in range(400)] + [0] * 100
    device.clear(110, pitch=50, width=20, height=3, stream=stream)
    cuda.copy_to_host(host.address, device.address, 600, stream)
    stream.synchronize()
    cleared = np.flatnonzero(host.array != [0] * 100 + [n % 251 for n in range(400)] + [0] * 100)
    assert set(cleared) <= {*range(110, 130), *range(160, 180), *range(210, 230)}
    assert len(cleared) == 60
    for resource in (stream, device, host):
        resource.close()
    assert fake._memory == fake._streams == {}


def test_graph_does_it_again(fake: FakeCudart) -> None:
    stream, device, host = cuda.Stream(), cuda.DeviceBuffer(8, "x"), cuda.PinnedBuffer(8)
    with cuda.captured(stream) as graphs:
        cuda.copy_to_device(device.address, host.address, 4, stream)
        cuda.copy_to_host(host.address + 4, device.address, 4, stream)
    (graph,) = graphs
    stream.synchronize()
    for value in (3, 5):
        host.array[:4] = value
        graph.launch(stream)
        stream.synchronize()
        assert host.array.tolist() == [value] * 8
    graph.close()
    assert fake._graphs == {}


def test_recording_ends_when_its_body_fails(fake: FakeCudart) -> None:
    stream = cuda.Stream()
    with pytest.raises(ValueError, match="mine"), cuda.captured(stream):
        raise ValueError("mine")
    message = "cudaStreamSynchronize failed: operation not permitted when stream is capturing"
    with pytest.raises(FailedError, match=message), cuda.captured(stream):
        stream.synchronize()
    stream.synchronize()
    assert fake._recording == fake._graphs == {}
    fake._faults["cudaGraphInstantiate"] = CODES.cudaErrorInvalidValue
    with pytest.raises(FailedError, match="cudaGraphInstantiate failed: invalid argument"), cuda.captured(stream):
        pass
    assert fake._graphs == {}


CALLS: dict[str, Any] = {
    "cudaSetDevice": cuda.find_gpu,
    "cudaGetDeviceProperties": cuda.find_gpu,
    "cudaMemGetInfo": cuda.find_gpu,
    "cudaDeviceGetAttribute": cuda.free_bytes,
    "cudaMalloc": lambda: cuda.DeviceBuffer(8, "x"),
    "cudaMemset": lambda: cuda.DeviceBuffer(8, "x"),
    "cudaDeviceSynchronize": lambda: cuda.DeviceBuffer(8, "x"),
    "cudaMallocHost": lambda: cuda.PinnedBuffer(8),
    "cudaStreamCreateWithFlags": cuda.Stream,
    "cudaStreamSynchronize": lambda: cuda.Stream().synchronize(),
    "cudaMemcpy2DAsync": lambda: cuda.DeviceBuffer(8, "x").copy(0, 4, 1, 1, 1, cuda.Stream()),
    "cudaMemset2DAsync": lambda: cuda.DeviceBuffer(8, "x").clear(0, 1, 1, 1, cuda.Stream()),
    "cudaMemcpyAsync": lambda: cuda.copy_to_device(0, 0, 0, cuda.Stream()),
    "cudaStreamBeginCapture": lambda: cuda.captured(cuda.Stream()).__enter__(),
    "cudaGraphLaunch": lambda: cuda.Graph(1).launch(cuda.Stream()),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_failure_is_an_error_that_names_the_call(fake: FakeCudart, name: str) -> None:
    fake._faults[name] = CODES.cudaErrorIllegalAddress
    with pytest.raises(FailedError, match=rf"CUDA: {name} failed: an illegal memory access was encountered"):
        CALLS[name]()
    fake._faults[name] = CODES.cudaErrorInsufficientDriver
    with pytest.raises(BackendError, match="CUDA driver version is insufficient"):
        CALLS[name]()
