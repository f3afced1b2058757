"""What the builder of a TensorRT needs told: target GPUs, flags, who watches, where timings and the plan go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, BinaryIO

from olmo2_export.engine.progress import Progress
from runtimes.errors import BackendError, EngineBuildError
from runtimes.trt.nvidia import TensorRT

OnProgress = Callable[[str, float], None]
"""takes the name of the phase and the fraction of the build that is done"""


def set_compute_capabilities(tensorrt: TensorRT, config: Any, capabilities: Sequence[str]) -> None:
    """Say for which GPUs to compile. TensorRT for RTX needs to be told; full TensorRT takes the GPU it runs on.

    Args:
        config: IBuilderConfig.
        capabilities: such as "8.9".

    Raises:
        BackendError: this version does not know one of them.
    """
    if tensorrt.backend == "trt":
        return
    known = tensorrt.module.ComputeCapability.__members__
    names = ["SM" + capability.replace(".", "") for capability in capabilities]
    if unknown := [c for c, name in zip(capabilities, names, strict=True) if name not in known]:
        raise BackendError(f"compute capability {', '.join(unknown)}: unknown to TensorRT for RTX {tensorrt.version}")
    config.num_compute_capabilities = len(names)
    for index, name in enumerate(names):
        if not config.set_compute_capability(known[name], index):
            raise BackendError(f"compute capability {capabilities[index]}: refused by TensorRT {tensorrt.version}")


def set_flags(tensorrt: TensorRT, config: Any, flags: Sequence[str]) -> None:
    """Set what was asked for beyond the defaults.

    Args:
        config: IBuilderConfig.
        flags: portable, refit, weight_streaming. The first two only full TensorRT has.
    """
    trt = tensorrt.module
    config.clear_flag(trt.BuilderFlag.TF32)  # float32 means float32
    if "portable" in flags:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if "refit" in flags:
        config.set_flag(trt.BuilderFlag.REFIT)
    if "weight_streaming" in flags:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)


@contextmanager
def timing_cache(config: Any, path: Path | None) -> Iterator[None]:
    """Let the body build with the timings that a file holds; afterwards the file holds those of the build too.

    Args:
        config: IBuilderConfig of full TensorRT.
        path: the file, which need not be there; None does nothing.

    Raises:
        EngineBuildError: the file is not a timing cache of this GPU and version.
    """
    if path is None:
        yield
        return
    cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
    if cache is None or not config.set_timing_cache(cache, False):
        raise EngineBuildError(f"{path}: not a timing cache of this GPU and TensorRT version; name another file")
    yield
    with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        file.write(cache.serialize())
    Path(file.name).replace(path)


def progress_monitor(tensorrt: TensorRT, on_progress: OnProgress) -> Any:
    """Return an IProgressMonitor that calls `on_progress` whenever there is something to show."""
    base: Any = tensorrt.module.IProgressMonitor

    class Monitor(base):  # type: ignore[misc]  # the bindings are untyped
        def __init__(self) -> None:
            base.__init__(self)
            self.progress = Progress()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.show(self.progress.start(phase_name, parent_phase, num_steps))

        def step_complete(self, phase_name: str, step: int) -> bool:  # noqa: ARG002
            self.show(self.progress.step(phase_name))
            return True

        def phase_finish(self, phase_name: str) -> None:
            self.show(self.progress.finish(phase_name))

        def show(self, changed: bool) -> None:
            if changed:
                on_progress(self.progress.name, self.progress.fraction)

    return Monitor()


def build_to_file(tensorrt: TensorRT, builder: Any, network: Any, config: Any, file: BinaryIO) -> bool:
    """Build a plan and write it as it is made, without a second copy of it in memory.

    Returns:
        Whether TensorRT could build it; if not, `messages` say why.

    Raises:
        OSError: the file could not be written.
    """
    base: Any = tensorrt.module.IStreamWriter
    failures: list[OSError] = []

    class Writer(base):  # type: ignore[misc]  # the bindings are untyped
        def __init__(self) -> None:
            base.__init__(self)

        def write(self, data: bytes) -> int:
            try:
                return file.write(data)
            except OSError as error:  # it cannot pass through the library
                failures.append(error)
                return 0

    writer = Writer()
    built = bool(builder.build_serialized_network_to_stream(network, config, writer))
    if failures:
        raise failures[0]
    return built
