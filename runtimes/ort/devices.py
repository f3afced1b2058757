"""The devices on which onnxruntime runs a graph: which provider each wants, and what is missing where it is not there.

| device | execution provider            | installed by                                  |
|--------|-------------------------------|-----------------------------------------------|
| cpu    | CPUExecutionProvider          | olmo2-export[cpu], or one of the others       |
| cuda   | CUDAExecutionProvider         | olmo2-export[gpu]: onnxruntime-gpu            |
| nv-rtx | NvTensorRTRTXExecutionProvider | olmo2-export[nv-rtx]: a plugin of onnxruntime |
"""

from __future__ import annotations

import contextlib
import ctypes
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped]
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state  # type: ignore[import-untyped]

from runtimes.errors import BackendError
from runtimes.targets import find_target

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "nv-rtx": "NvTensorRTRTXExecutionProvider",
}
"""device -> onnxruntime's name of the execution provider"""

Shapes: TypeAlias = Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
"""input -> its smallest, usual and largest shape; of an input of shape []: its values"""

_DRIVER = ("libcuda.so.1", "libnvidia-ml.so.1")


@dataclass(frozen=True)
class GpuMemory:
    """Memory of one GPU, as OrtValues."""

    kind: str = "cuda"
    """onnxruntime's name for memory of an NVIDIA GPU, whichever provider runs the graph"""
    index: int = 0
    info: Any = None
    """the OrtMemoryInfo of a plugin's device; None: that of the CUDA provider"""

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        """Return an OrtValue on the device, its content undefined.

        Raises:
            RuntimeError: no memory.
        """
        if self.info is not None:
            return ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype, memory_info=self.info)
        return ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype, self.kind, self.index)


@dataclass(frozen=True)
class Device:
    """One device that is there; see `find_device`."""

    name: str
    """a key of `PROVIDERS`"""
    memory: GpuMemory | None = None
    """None: the host's"""
    plugin_device: Any = None
    """the OrtEpDevice of a plugin's GPU"""

    def configure(self, options: ort.SessionOptions, *, capture: bool, shapes: Shapes | None = None) -> list[Any]:
        """Return the `providers` of a session; a plugin's device is added to its options instead.

        Of the plugin's options (tensorrt_rtx_provider_options.h in its wheel) the profile is set: without one it
        compiles for 0 to 32767 in every dimension. enable_cuda_graph is not, as it wants the same input shapes at every
        run, and prompts differ; nv_runtime_cache_path is not, as compiled kernels would be read from it unchecked.

        Args:
            options: of the session.
            capture: prepare it for CUDA graphs.
            shapes: for which a plugin compiles; None: any.
        """
        if self.plugin_device is not None:
            options.add_provider_for_devices([self.plugin_device], _profile(shapes or {}))
            return []
        if self.memory is None:
            return [PROVIDERS[self.name]]
        return [(PROVIDERS[self.name], {"enable_cuda_graph": "1"} if capture else {}), PROVIDERS["cpu"]]

    def check(self, found: list[str]) -> None:
        """Refuse a session, or an onnxruntime, that runs elsewhere.

        Raises:
            BackendError: the provider is not among those found.
        """
        if PROVIDERS[self.name] not in found:
            raise BackendError(
                f"device {self.name}: onnxruntime gave {', '.join(found)}, expected {PROVIDERS[self.name]}; "
                f"{find_target('ort', self.name).reinstall}"
            )


def _profile(shapes: Shapes) -> dict[str, str]:
    """Return the plugin's options that say for which shapes it compiles, as its parser reads it: `name:1x2,name:3`."""
    return {
        f"nv_profile_{bound}_shapes": ",".join(
            f"{name}:{'x'.join(map(str, bounds[index]))}" for name, bounds in shapes.items()
        )
        for index, bound in enumerate(("min", "opt", "max"))
        if shapes
    }


def available_providers() -> list[str]:
    """Return the execution providers that this onnxruntime was built with."""
    return list(ort.get_available_providers())


def find_device(name: str) -> Device:
    """Make a device ready for sessions.

    Args:
        name: a key of `PROVIDERS`.

    Raises:
        BackendError: the provider, its libraries or a GPU are not there; says which, and what to install.
    """
    match name:
        case "cuda":
            return _find_cuda()
        case "nv-rtx":
            gpu = _find_rtx_gpu()
            return Device(name, GpuMemory(info=gpu.memory_info(ort.OrtDeviceMemoryType.DEFAULT)), gpu)
        case _:
            return Device(name)


def _find_cuda() -> Device:
    cuda = Device("cuda", GpuMemory())
    cuda.check(ort.get_available_providers())
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it cannot find; that is said below
        ort.preload_dlls(cudnn=False)
    try:
        GpuMemory().allocate((1,), np.dtype(np.int64))
    except RuntimeError as error:
        raise BackendError(f"device cuda: {_why_no_cuda(error)}") from error
    return cuda


def _why_no_cuda(error: Exception) -> str:
    """Return why CUDA cannot be used, and the remedy: a library that is not there, or what onnxruntime says."""
    folder = Path(ort.__file__).parent / "capi"
    try:
        ctypes.CDLL(str(folder / "libonnxruntime_providers_shared.so"), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(folder / "libonnxruntime_providers_cuda.so"))
    except OSError as missing:
        if any(name in str(missing) for name in _DRIVER):
            return f"{missing}; this machine has no NVIDIA driver"
        return f"{missing}; {find_target('ort', 'cuda').reinstall} brings CUDA's libraries"
    return f"no usable GPU ({str(error).strip().splitlines()[0][:200]}); nvidia-smi shows what the driver sees"


def _find_rtx_gpu() -> Any:
    """Return the first device of the TensorRT for RTX provider; register its plugin where that is still to be done."""
    try:
        import onnxruntime_ep_nv_tensorrt_rtx as plugin  # type: ignore[import-not-found]
    except ImportError as error:
        raise BackendError(f"device nv-rtx: {error}; {find_target('ort', 'nv-rtx').install}") from error
    name = PROVIDERS["nv-rtx"]
    if not _rtx_gpus():
        try:
            ort.register_execution_provider_library(name, plugin.get_library_path())
        except ort_state.Fail as error:
            driver = any(name in str(error) for name in _DRIVER)
            why = "this machine has no NVIDIA driver" if driver else "see its requirements"
            text = str(error).strip().splitlines()[0].rpartition("error: ")[2][:200]
            raise BackendError(f"device nv-rtx: the plugin does not load ({text}); {why}") from error
    if gpus := _rtx_gpus():
        return gpus[0]
    raise BackendError(
        "device nv-rtx: no GPU that TensorRT for RTX runs on: compute capability 7.5, 8.0, 8.6, 8.9 or 12"
    )


def _rtx_gpus() -> list[Any]:
    return [device for device in ort.get_ep_devices() if device.ep_name == PROVIDERS["nv-rtx"]]
