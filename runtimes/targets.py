"""The places where a graph runs, a row each, and which variants of a package run there. Standard library only.

| target  | backend | device | what it is                                        |
|---------|---------|--------|---------------------------------------------------|
| cpu     | ort     | cpu    | onnxruntime on the CPU                            |
| cuda    | ort     | cuda   | onnxruntime on an NVIDIA GPU                      |
| nv-rtx  | ort     | nv-rtx | onnxruntime with TensorRT for RTX inside, a plugin |
| trt_rtx | trt_rtx | cuda   | an engine, on TensorRT for RTX                    |
| trt     | trt     | cuda   | an engine, on full TensorRT                       |

Whoever offers, chooses or refuses a backend, a device or a variant asks here. `TARGETS` is read at each call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from runtimes.errors import BackendError, UsageError
from runtimes.manifest import Variant
from runtimes.package import Package

Backend: TypeAlias = Literal["ort", "trt_rtx", "trt"]
"""what runs a graph: onnxruntime, or an engine on TensorRT for RTX or on full TensorRT"""

Device: TypeAlias = Literal["cpu", "cuda", "nv-rtx"]
"""where onnxruntime runs a graph: its provider for CPUs, for CUDA, or of TensorRT for RTX"""


@dataclass(frozen=True)
class Target:
    """One place where a graph runs."""

    name: str
    backend: Backend
    device: Device
    backend_words: str
    """the backend, for people"""
    device_words: str
    """the device, for people; empty: the backend has no choice"""
    extra: str
    """of olmo2-export: pip installs the backend with it"""
    caches: Mapping[str, tuple[str, ...]] = field(hash=False)
    """form of the KV cache -> its dtypes that run there"""
    variants: tuple[str, ...] = ()
    """those made for it, the fastest first"""
    takes_others: bool = False
    """where no variant is named, one will do that was made for another target but runs"""
    needs_engine: bool = False
    """it runs what `olmo2-export build` compiles of a graph, and not the graph"""
    takes_threads: bool = True
    """threads of the CPU are its caller's to choose"""
    refits: bool = False
    """other weights can be put into an engine that was built for it, without building it again"""

    @property
    def on_gpu(self) -> bool:
        """Whether it computes on a GPU."""
        return self.device != "cpu"

    @property
    def place(self) -> str:
        """The device in a sentence."""
        return f"the GPU, as device {self.device}" if self.on_gpu else f"the CPU, as device {self.device}"

    @property
    def install(self) -> str:
        """The command that installs the backend."""
        return f"pip install 'olmo2-export[{self.extra}]'"

    @property
    def flags(self) -> tuple[str, ...]:
        """The options of a command line that choose it."""
        return ("--backend", self.backend, *(("--device", self.device) if self.device_words else ()))


TARGETS: tuple[Target, ...] = (
    Target(
        name="cpu",
        backend="ort",
        device="cpu",
        backend_words="onnxruntime",
        device_words="any machine",
        extra="cpu",
        caches={
            "concat": ("float32", "float16"),
            "static": ("float32", "float16"),
            "shared": ("float32", "float16", "int8", "uint8"),
        },
        variants=("q4", "q8", "fp32"),
        takes_others=True,
    ),
    Target(
        name="cuda",
        backend="ort",
        device="cuda",
        backend_words="onnxruntime",
        device_words="an NVIDIA GPU",
        extra="gpu",
        caches={
            "concat": ("float32", "float16"),  # the cache goes over the host
            "static": ("float32", "float16", "bfloat16"),
            "shared": ("float16", "bfloat16"),
        },
        variants=("bf16", "fp16", "q4f16"),
    ),
    Target(
        name="nv-rtx",
        backend="ort",
        device="nv-rtx",
        backend_words="onnxruntime",
        device_words="TensorRT for RTX inside",
        extra="nv-rtx",
        caches={"shared": ("float16", "bfloat16")},
        variants=("bf16", "fp16", "q4f16"),
    ),
    Target(
        name="trt_rtx",
        backend="trt_rtx",
        device="cuda",
        backend_words="TensorRT for RTX",
        device_words="",
        extra="tensorrt-rtx",
        caches={"static": ("float32", "float16", "bfloat16")},
        takes_others=True,  # none is made for it before the others: the first by name
        needs_engine=True,
        takes_threads=False,
    ),
    Target(
        name="trt",
        backend="trt",
        device="cuda",
        backend_words="full TensorRT",
        device_words="",
        extra="tensorrt",
        caches={"static": ("float32", "float16", "bfloat16")},
        takes_others=True,
        needs_engine=True,
        takes_threads=False,
        refits=True,
    ),
)
"""of a backend the first is where it runs unless a device is named"""


def backends(*, engines: bool | None = None) -> tuple[str, ...]:
    """Return the backends there are; `engines`: only those that need an engine, or only those that need none."""
    return tuple(dict.fromkeys(t.backend for t in TARGETS if engines is None or t.needs_engine == engines))


def devices(backend: str | None = None) -> tuple[str, ...]:
    """Return the devices there are, or those of a backend."""
    return tuple(dict.fromkeys(t.device for t in TARGETS if backend is None or t.backend == backend))


def ort_targets() -> tuple[Target, ...]:
    """Return where onnxruntime runs graphs."""
    return tuple(target for target in TARGETS if target.backend == "ort")


def find_target(backend: str = "ort", device: str | None = None) -> Target:
    """Return where a backend runs a graph.

    Args:
        backend: as a user names it.
        device: likewise; None: the backend's first.

    Raises:
        BackendError: there is no such backend, or no such device at all.
        UsageError: the device is of another backend.
    """
    if device is not None and device not in devices():
        raise BackendError(f"device {device!r}: there is {', '.join(devices())}")
    own = [target for target in TARGETS if target.backend == backend]
    if not own:
        raise BackendError(f"backend {backend!r}: there is {', '.join(backends())}")
    found = next((target for target in own if device in (None, target.device)), None)
    if found is None:
        places = " or ".join(target.place for target in own)
        raise UsageError(f"device {device}: backend {backend} runs on {places}; leave it out")
    return found


def runs(variant: Variant, target: Target) -> bool:
    """Tell whether a target has kernels for a variant's graph; whether there is an engine of it, it does not look."""
    return variant.kv_cache.dtype in target.caches.get(variant.kv_cache.form, ())


def runnable(package: Package, target: Target) -> list[str]:
    """Return the variants that a target is given where none is named, the best first.

    Args:
        package: whose; what it says of TensorRT is read for a target with engines alone.
        target: where they shall run.

    Returns:
        Those made for it, in their order; behind them any other that it runs, where it takes others: of an export in
        the order of the manifest, of engines by name. A static-cache graph that onnxruntime runs is to be named.
    """
    names: list[str]
    if target.needs_engine:
        engines = package.trt.engines.values() if package.trt is not None else ()
        names = sorted({engine.variant for engine in engines if engine.backend == target.backend})
    else:
        names = [name for name, variant in package.manifest.variants.items() if runs(variant, target)]
    best = [name for name in target.variants if name in names]
    return [*best, *(name for name in names if name not in best and target.takes_others)]


def describe_backends() -> str:
    """Return the backends for the help of a command line."""
    return "; ".join(
        f"{target.backend}: {'an engine made by olmo2-export build, on ' * target.needs_engine}{target.backend_words}"
        for target in {target.backend: target for target in TARGETS}.values()
    )


def describe_devices() -> str:
    """Return the devices that a user can choose, for the help of a command line."""
    return ", ".join(f"{target.device} ({target.device_words})" for target in TARGETS if target.device_words)


def engine_backend_words() -> str:
    """Return the options that choose a backend with an engine, for messages."""
    return f"--backend {' or '.join(backends(engines=True))}"
