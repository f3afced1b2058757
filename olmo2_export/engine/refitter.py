"""Put other weights into a plan that full TensorRT built with `refit`, without building it again. Needs its GPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from olmo2_export.engine.builder import OnProgress
from olmo2_export.engine.compiler import CompileResult, mapped_weights, parser_error, texts
from olmo2_export.peak_memory import peak_bytes
from runtimes.errors import EngineBuildError, first_names
from runtimes.manifest import EngineBackend
from runtimes.trt.nvidia import load_tensorrt


@dataclass(frozen=True)
class RefitRequest:
    """What to refit."""

    backend: EngineBackend
    backend_version: str
    """the only one that can load the plan"""
    refit_from: str
    """path of the plan, which a manifest vouches for: deserialising runs it"""
    graph: str
    """path of the ONNX file with the other weights, its data beside it"""
    plan: str
    """path of the file to write"""


def refit_plan(request: RefitRequest, on_progress: OnProgress) -> CompileResult:
    """Load a plan, replace all of its weights, and write it.

    Args:
        request: what to refit.
        on_progress: called as it goes on.

    Returns:
        A result without layer counts and aliases, which stay as they were.

    Raises:
        BackendError: the library is not installed.
        EngineBuildError: TensorRT refused the plan or a weight; with its own words.
    """
    tensorrt = load_tensorrt(request.backend)
    trt = tensorrt.module
    if tensorrt.version != request.backend_version:
        raise EngineBuildError(
            f"the plan is of TensorRT {request.backend_version}, {tensorrt.version} is installed; build it again"
        )
    on_progress("Loading the plan", 0.0)
    with tensorrt.collected() as messages, mapped_weights(Path(request.graph)) as (model, weights):
        runtime = trt.Runtime(tensorrt.log)
        runtime.engine_host_code_allowed = True  # of a portable plan
        engine = runtime.deserialize_cuda_engine(Path(request.refit_from).read_bytes())
        if engine is None:
            raise EngineBuildError(f"TensorRT {tensorrt.version} cannot load the plan: {texts(messages)}")
        on_progress("Replacing the weights", 0.3)
        refitter = trt.Refitter(engine, tensorrt.log)
        parser = trt.OnnxParserRefitter(refitter, tensorrt.log)
        ok = parser.load_model_proto(model)
        refused = [n for n, (address, size) in weights.items() if not parser.load_initializer(n, address, size)]
        if refused:
            raise EngineBuildError(f"TensorRT {tensorrt.version} did not take the weights {first_names(refused)}")
        if not (ok and parser.refit_model_proto()):
            errors = [parser_error(parser.get_error(index)) for index in range(parser.num_errors)]
            raise EngineBuildError(f"the weights do not fit the plan: {'; '.join(errors) or texts(messages)}")
        if missing := refitter.get_missing_weights():
            raise EngineBuildError(f"the graph has no weights for {first_names(missing)} of the plan")
        if not refitter.refit_cuda_engine():
            raise EngineBuildError(f"TensorRT {tensorrt.version} could not refit the plan: {texts(messages)}")
        on_progress("Writing the plan", 0.7)
        config = engine.create_serialization_config()
        config.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)
        config.set_flag(trt.SerializationFlag.INCLUDE_REFIT)  # it can be refitted again
        Path(request.plan).write_bytes(engine.serialize_with_config(config))
    return CompileResult(tensorrt.version, {}, {}, peak_bytes())
