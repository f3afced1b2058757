"""The one place that chooses between TensorRT for RTX and full TensorRT, and knows where they differ.

| backend | module                | GPUs                                                     | builds without a GPU |
|---------|-----------------------|----------------------------------------------------------|----------------------|
| trt_rtx | tensorrt_rtx_bindings | compute capability 7.5, 8.0, 8.6, 8.9, 12.0, 12.1        | yes                  |
| trt     | tensorrt              | data centre, desktop and Jetson, 9.0 and 10.x included   | no                   |

Both share the API that is used here. Neither is typed, so their objects are `Any`.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal

from runtimes.errors import BackendError

logger = logging.getLogger(__name__)

TensorRTBackend = Literal["trt_rtx", "trt"]

RTX_VERSION = "1.7.1.116"
RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
"""the compute capabilities that TensorRT for RTX compiles for"""

_MODULES: dict[TensorRTBackend, str] = {"trt_rtx": "tensorrt_rtx_bindings", "trt": "tensorrt"}
_INSTALL: dict[TensorRTBackend, str] = {
    "trt_rtx": f"pip install tensorrt-rtx-cu13-libs=={RTX_VERSION} tensorrt-rtx-cu13-bindings=={RTX_VERSION}",
    "trt": "pip install tensorrt --extra-index-url https://pypi.nvidia.com",
}
# Said of every int64 input; the runners bind int64.
_HARMLESS = ("has Int64 binding",)
_PHASE_DEPTH = 2  # below it there are thousands


@dataclass(frozen=True)
class Message:
    """Something TensorRT said, at the level of a warning or above."""

    level: int
    """of `logging`"""
    text: str


@dataclass(frozen=True)
class TensorRT:
    """One of the two libraries, loaded."""

    backend: TensorRTBackend
    module: Any
    """tensorrt or tensorrt_rtx_bindings"""
    version: str
    log: Any
    """its ILogger, the only one of this process; it forwards to `logging`"""
    messages: list[Message]
    """what `log` has heard since `collected` was entered"""

    @contextmanager
    def collected(self) -> Iterator[list[Message]]:
        """Yield the list to which the warnings and errors of the body are added."""
        self.messages.clear()
        yield self.messages

    def set_compute_capabilities(self, config: Any, capabilities: Sequence[str]) -> None:
        """Say for which GPUs to compile. TensorRT for RTX needs to be told; full TensorRT takes the GPU it runs on.

        Args:
            config: IBuilderConfig.
            capabilities: such as "8.9".

        Raises:
            BackendError: this version does not know one of them.
        """
        if self.backend == "trt":
            return
        known = self.module.ComputeCapability.__members__
        names = ["SM" + capability.replace(".", "") for capability in capabilities]
        if unknown := [c for c, name in zip(capabilities, names, strict=True) if name not in known]:
            raise BackendError(f"compute capability {', '.join(unknown)}: unknown to TensorRT for RTX {self.version}")
        config.num_compute_capabilities = len(names)
        for index, name in enumerate(names):
            if not config.set_compute_capability(known[name], index):
                raise BackendError(f"compute capability {capabilities[index]}: refused by TensorRT {self.version}")

    def progress_monitor(self, on_phase: Callable[[str], None]) -> Any:
        """Return an IProgressMonitor that calls `on_phase` with the name of each larger phase as it starts."""
        base: Any = self.module.IProgressMonitor

        class Monitor(base):  # type: ignore[misc]  # the bindings are untyped
            def __init__(self) -> None:
                base.__init__(self)
                self.depths: dict[str | None, int] = {None: -1}

            def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:  # noqa: ARG002
                self.depths[phase_name] = depth = self.depths.get(parent_phase, 0) + 1
                if depth <= _PHASE_DEPTH:
                    on_phase(phase_name)

            def step_complete(self, phase_name: str, step: int) -> bool:  # noqa: ARG002
                return True

            def phase_finish(self, phase_name: str) -> None:
                pass

        return Monitor()

    def build_to_file(self, builder: Any, network: Any, config: Any, file: BinaryIO) -> bool:
        """Build a plan and write it as it is made, without a second copy of it in memory.

        Returns:
            Whether TensorRT could build it; if not, `messages` say why.

        Raises:
            OSError: the file could not be written.
        """
        base: Any = self.module.IStreamWriter
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


def check_installed(backend: TensorRTBackend) -> None:
    """Look for a library without loading it, which takes a second and 300 MB.

    Raises:
        BackendError: it is not installed; the message has the pip line.
    """
    if importlib.util.find_spec(_MODULES[backend]) is None:
        raise BackendError(f"backend {backend}: {_MODULES[backend]} is not installed; {_INSTALL[backend]}")


_loaded: dict[TensorRTBackend, TensorRT] = {}


def load_tensorrt(backend: TensorRTBackend) -> TensorRT:
    """Import one of the two libraries.

    Args:
        backend: trt_rtx or trt.

    Raises:
        BackendError: it is not installed, or does not load; the message has the pip line.
    """
    if backend not in _loaded:
        try:
            module = importlib.import_module(_MODULES[backend])
        except (ImportError, OSError) as error:
            raise BackendError(
                f"backend {backend}: {_MODULES[backend]} cannot be imported ({error}); {_INSTALL[backend]}"
            ) from error
        messages: list[Message] = []
        _loaded[backend] = TensorRT(
            backend, module, str(module.__version__), _create_logger(module, messages), messages
        )
    return _loaded[backend]


def _create_logger(module: Any, messages: list[Message]) -> Any:
    """Return an ILogger; TensorRT keeps the first one it is given for the life of the process."""
    base: Any = module.ILogger
    levels = {
        base.INTERNAL_ERROR: logging.ERROR,
        base.ERROR: logging.ERROR,
        base.WARNING: logging.WARNING,
        base.INFO: logging.DEBUG,
    }

    class Logger(base):  # type: ignore[misc]  # the bindings are untyped
        def __init__(self) -> None:
            base.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            level = levels.get(severity)
            if level is None:  # verbose: thousands of lines
                return
            if any(phrase in text for phrase in _HARMLESS):
                level = logging.DEBUG
            if level >= logging.WARNING:
                messages.append(Message(level, text))
            logger.log(level, "%s", text)

    return Logger()
