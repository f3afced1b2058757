"""Make a graph, or a part of one, ready to run on arrays: on a provider of onnxruntime, or compiled by a TensorRT.

A form that is made in memory and fed like a package's variant is opened by `runners`.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from olmo2_export.graphs.files import save_graph
from olmo2_export.views.table import View
from runtimes import Device
from runtimes.errors import BackendError
from runtimes.manifest import EngineBackend, TensorSpec, Variant
from runtimes.ort.devices import find_device
from runtimes.ort.session import open_session
from runtimes.targets import Target
from runtimes.trt.nvidia import load_tensorrt, tensorrt_backend

Arrays = dict[str, np.ndarray]
Run = Callable[[Mapping[str, np.ndarray]], Arrays]
"""inputs by name -> outputs by name"""
Opener = Callable[[ir.Model], AbstractContextManager[Run]]
"""makes a graph ready to run"""


def view_opener(view: View, target: Target) -> Opener:
    """Return what opens segments of a view where it runs.

    Raises:
        BackendError: what shall run it is not there.
    """
    if target.needs_engine:
        return tensorrt_opener(tensorrt_backend(target.backend))
    return onnxruntime_opener(view.graph, view.variant, target.device)


def onnxruntime_opener(graph: Path, variant: Variant, device: Device = "cpu") -> Opener:
    """Return what opens segments on a provider of onnxruntime; the weights stay in the graph's file.

    Raises:
        BackendError: the device is not there.
    """

    @contextmanager
    def open_segment(part: ir.Model) -> Iterator[Run]:
        inputs, outputs = (tuple(_spec(v) for v in values) for values in (part.graph.inputs, part.graph.outputs))
        entry = dataclasses.replace(variant, inputs=inputs, outputs=outputs)
        proto = ir.to_proto(part).SerializeToString()
        session = open_session(graph, entry, None, proto, device=find_device(device))
        names = [spec.name for spec in outputs]
        yield lambda feeds: dict(zip(names, session.run(names, dict(feeds)), strict=True))

    return open_segment


def _spec(value: ir.Value) -> TensorSpec:
    """Return what `open_session` compares of a tensor, its name; what it is, nobody asks."""
    return TensorSpec(str(value.name), "float32", (), "hidden_state")


def tensorrt_opener(backend: EngineBackend, runner: Callable[[Path], Any] | None = None) -> Opener:
    """Return what compiles segments of a graph's first call for the GPU at hand.

    Args:
        backend: which TensorRT.
        runner: path of an ONNX file -> Polygraphy's runner of it; None: that TensorRT's.

    Raises:
        BackendError: the library is not installed, or there is no GPU.
    """
    make = runner or tensorrt_runner(backend)

    @contextmanager
    def open_segment(part: ir.Model) -> Iterator[Run]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "segment.onnx"
            save_graph(part, path)
            with make(path) as running:
                yield lambda feeds: {k: np.array(v) for k, v in running.infer(dict(feeds)).items()}

    return open_segment


def tensorrt_runner(backend: EngineBackend) -> Callable[[Path], Any]:
    """Return what makes Polygraphy's runner of a graph on a TensorRT, compiled for the GPU at hand.

    Raises:
        BackendError: the library is not installed, or there is no GPU.
    """
    _choose(backend)
    from polygraphy.backend.trt import (  # type: ignore[import-untyped]  # after the choice
        CreateConfig,
        EngineFromNetwork,
        NetworkFromOnnxPath,
        TrtRunner,
    )
    from polygraphy.exception import PolygraphyException  # type: ignore[import-untyped]

    def make(path: Path) -> Any:
        network = NetworkFromOnnxPath(str(path), strongly_typed=True)
        try:
            return TrtRunner(EngineFromNetwork(network, CreateConfig())(), name=backend)
        except PolygraphyException as error:
            raise BackendError(f"backend {backend}: no engine for this machine's GPU: {error}") from error

    return make


def _choose(backend: EngineBackend) -> None:
    """Let Polygraphy use one of the two TensorRTs from here on."""
    import polygraphy.config  # type: ignore[import-untyped]  # here: this room is also for those who have none

    module = load_tensorrt(backend).module
    if backend == "trt_rtx":
        polygraphy.config.USE_TENSORRT_RTX = True
        sys.modules.setdefault("tensorrt_rtx", module)
