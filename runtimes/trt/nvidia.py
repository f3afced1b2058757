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
import mmap
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias, get_args

from runtimes.errors import BackendError, FailedError
from runtimes.manifest import EngineBackend
from runtimes.targets import find_target

logger = logging.getLogger(__name__)

Buffer: TypeAlias = bytes | memoryview | mmap.mmap

RTX_VERSION = "1.7.1.116"
RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
"""the compute capabilities that TensorRT for RTX compiles for"""

_MODULES: dict[EngineBackend, str] = {"trt_rtx": "tensorrt_rtx_bindings", "trt": "tensorrt"}
_LEAN = "tensorrt_lean"
# Said of every int64 input; the runners bind int64.
_HARMLESS = ("has Int64 binding",)


@dataclass(frozen=True)
class Message:
    """Something TensorRT said, at the level of a warning or above."""

    level: int
    """of `logging`"""
    text: str


@dataclass(frozen=True)
class TensorRT:
    """One of the two libraries, loaded."""

    backend: EngineBackend
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


def tensorrt_backend(name: str) -> EngineBackend:
    """Return the backend of that name, which is a TensorRT.

    Raises:
        BackendError: it is another one.
    """
    found: EngineBackend | None = next((known for known in get_args(EngineBackend) if known == name), None)
    if found is None:
        raise BackendError(f"backend {name}: no TensorRT; there is {', '.join(get_args(EngineBackend))}")
    return found


def check_installed(backend: EngineBackend) -> None:
    """Look for a library without loading it, which takes a second and 300 MB.

    Raises:
        BackendError: it is not installed; the message has the pip line.
    """
    if importlib.util.find_spec(_MODULES[backend]) is None:
        raise BackendError(f"backend {backend}: {_MODULES[backend]} is not installed; {find_target(backend).install}")


_loaded: dict[EngineBackend, TensorRT] = {}


def load_tensorrt(backend: EngineBackend, *, portable: bool = False) -> TensorRT:
    """Import one of the two libraries.

    Args:
        backend: trt_rtx or trt.
        portable: for plans that were built to be: where full TensorRT is not installed its lean runtime will do.

    Raises:
        BackendError: it is not installed, or does not load; the message has the pip line.
    """
    if backend not in _loaded:
        name = _MODULES[backend]
        if portable and importlib.util.find_spec(name) is None and importlib.util.find_spec(_LEAN) is not None:
            name = _LEAN
        try:
            module = importlib.import_module(name)
        except (ImportError, OSError) as error:
            raise BackendError(
                f"backend {backend}: {name} cannot be imported ({error}); {find_target(backend).install}"
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


def check_version(tensorrt: TensorRT, built_with: str, *, portable: bool) -> None:
    """Refuse a plan that this library cannot run.

    Args:
        tensorrt: the library.
        built_with: the version that built the plan.
        portable: it was built to run on later versions of the same major number too.

    Raises:
        BackendError: with both versions.
    """
    found, built = (tuple(int(n) for n in re.findall(r"\d+", v)) for v in (tensorrt.version, built_with))
    if tensorrt.version == built_with or (portable and found[:1] == built[:1] and found >= built):
        return
    kind = f"{built_with} or a later {built[0]}" if portable else built_with
    raise BackendError(
        f"the engine was built with {tensorrt.backend} {built_with}, {tensorrt.version} is installed: install {kind}, "
        "or build it again with olmo2-export build"
    )


def load_engine(tensorrt: TensorRT, plan: Buffer, *, portable: bool) -> tuple[Any, Any]:
    """Deserialise a plan, which is native code: the caller has checked that it is the one its manifest vouches for.

    Args:
        tensorrt: the library.
        plan: its bytes.
        portable: it brings a runtime of its own along, as host code.

    Returns:
        IRuntime, which must live as long as the engine, and ICudaEngine.

    Raises:
        BackendError: TensorRT refuses it; with its own words.
    """
    runtime = tensorrt.module.Runtime(tensorrt.log)
    runtime.engine_host_code_allowed = portable
    with tensorrt.collected() as messages:
        engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise BackendError(
            f"{tensorrt.backend} {tensorrt.version} cannot load the engine: {said(messages)}; build it again with "
            "olmo2-export build"
        )
    return runtime, engine


def captures_itself(tensorrt: TensorRT) -> bool:
    """Tell whether contexts made with `cuda_graph` record and launch CUDA graphs by themselves."""
    return tensorrt.backend == "trt_rtx"


def create_runtime_cache(tensorrt: TensorRT, engine: Any, content: bytes | None) -> Any:
    """Return an IRuntimeCache, which keeps what is compiled when contexts are made; None: full TensorRT has none.

    Args:
        tensorrt: the library.
        engine: ICudaEngine.
        content: what another process serialised; TensorRT checks that it is of this version, GPU and driver.
    """
    if tensorrt.backend == "trt":
        return None
    cache = engine.create_runtime_config().create_runtime_cache()
    if content is not None and not cache.deserialize(content):
        logger.info("the kernels that were kept are of another GPU, driver or version: compiling them again")
    return cache


def create_context(tensorrt: TensorRT, engine: Any, cache: Any, *, cuda_graph: bool) -> Any:
    """Return an IExecutionContext whose activation memory the caller sets.

    Args:
        tensorrt: the library.
        engine: ICudaEngine.
        cache: of `create_runtime_cache`.
        cuda_graph: record its work and launch it as one, where the library can do so by itself.

    Raises:
        FailedError: TensorRT could not make one.
    """
    module = tensorrt.module
    with tensorrt.collected() as messages:
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(module.ExecutionContextAllocationStrategy.USER_MANAGED)
        ok = True
        if captures_itself(tensorrt):
            strategy = module.CudaGraphStrategy
            config.cuda_graph_strategy = strategy.WHOLE_GRAPH_CAPTURE if cuda_graph else strategy.DISABLED
            ok = config.set_runtime_cache(cache)
        context = engine.create_execution_context(config) if ok else None
    if context is None:
        raise FailedError(f"{tensorrt.backend} {tensorrt.version} makes no execution context: {said(messages)}")
    return context


def said(messages: Sequence[Message]) -> str:
    """Return what TensorRT said, as one line."""
    return "; ".join(dict.fromkeys(m.text.strip().replace("\n", " ") for m in messages)) or "it did not say why"
