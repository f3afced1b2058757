"""What is asked of full TensorRT, whose names and parameters are checked; it cannot be installed here."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import full_tensorrt
from support.full_tensorrt import Strict
from test_engine_process import MATMUL, graph_of, request_for

from olmo2_export.engine import build as engine_module
from olmo2_export.engine import compiler as engine_compiler
from olmo2_export.engine import options as engine_options
from olmo2_export.engine import refitter as engine_refitter
from olmo2_export.engine.build import build, refit
from olmo2_export.engine.compiler import CompileRequest, compile_plan
from olmo2_export.engine.options import EngineOptions
from olmo2_export.engine.refitter import RefitRequest, refit_plan
from runtimes.errors import BackendError, EngineBuildError, UsageError
from runtimes.package import open_package
from runtimes.sealed import check_files
from runtimes.trt import nvidia


class Library:
    """Full TensorRT, as far as a build or a refit speaks to it."""

    def __init__(self, **changes: Any) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.changes = changes
        trt = full_tensorrt.module(
            Builder=lambda log: self.of(  # noqa: ARG005
                "Builder",
                create_network=lambda _: self.network(),
                create_builder_config=lambda: self.config,
                create_optimization_profile=lambda: self.of("IOptimizationProfile"),
                build_serialized_network_to_stream=lambda network, config, writer: writer.write(b"plan") == 4,  # noqa: ARG005
            ),
            OnnxParser=lambda network, log: self.of("OnnxParser", num_errors=0),  # noqa: ARG005
            Runtime=lambda log: self.of("Runtime", deserialize_cuda_engine=lambda _: self.engine),  # noqa: ARG005
            Refitter=lambda engine, log: self.of("Refitter", get_missing_weights=lambda: []),  # noqa: ARG005
            OnnxParserRefitter=lambda refitter, log: self.of("OnnxParserRefitter", num_errors=0),  # noqa: ARG005
        )
        self.trt = trt
        self.cache = self.of("ITimingCache", serialize=lambda: b"timings")
        self.config = self.of(
            "IBuilderConfig", create_timing_cache=lambda _: self.cache, add_optimization_profile=lambda _: 0
        )
        self.serialization = self.of("ISerializationConfig")
        self.engine = self.of(
            "ICudaEngine",
            create_serialization_config=lambda: self.serialization,
            serialize_with_config=lambda _: b"refitted plan",
        )
        self.tensorrt = nvidia.TensorRT("trt", trt, full_tensorrt.VERSION, None, [])

    def of(self, kind: str, **behaviour: Any) -> Strict:
        return Strict(kind, self.calls, **{**behaviour, **self.changes.get(kind, {})})

    def network(self) -> Strict:
        tensor = self.of("ITensor", name="q")
        product = self.of("ILayer", type=self.trt.LayerType.MATRIX_MULTIPLY, num_inputs=1, get_input=lambda _: tensor)
        return self.of(
            "INetworkDefinition",
            num_layers=1,
            num_inputs=1,
            get_layer=lambda _: product,
            get_input=lambda _: tensor,
        )

    def flags(self) -> set[str]:
        return {value.name for name, *values in self.calls if name == "set_flag" for value in values}


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    found = Library()
    monkeypatch.setattr(engine_compiler, "load_tensorrt", lambda _: found.tensorrt)
    monkeypatch.setattr(engine_refitter, "load_tensorrt", lambda _: found.tensorrt)
    return found


def request(tmp_path: Path, **changes: Any) -> CompileRequest:
    graph = graph_of([MATMUL], tmp_path)
    return request_for(graph, backend="trt", compute_capabilities=("9.0",), **changes)


def refit_request(tmp_path: Path) -> RefitRequest:
    (tmp_path / "old").write_bytes(b"plan")
    graph = graph_of([MATMUL], tmp_path)
    return RefitRequest("trt", full_tensorrt.VERSION, str(tmp_path / "old"), str(graph), str(tmp_path / "new"))


def test_the_table_is_strict() -> None:
    config = Strict("IBuilderConfig")
    with pytest.raises(AttributeError, match="has no set_int8_calibrator"):
        config.set_int8_calibrator(None)
    with pytest.raises(TypeError, match="set_timing_cache takes"):
        config.set_timing_cache(None, False, 3)
    with pytest.raises(AttributeError, match="num_optimization_profiles of IBuilderConfig"):
        config.num_optimization_profiles = 2
    assert "FP16" not in full_tensorrt.enums()["BuilderFlag"].__members__


def test_build_without_options(library: Library, tmp_path: Path) -> None:
    result = compile_plan(request(tmp_path, layer_counts={"MATRIX_MULTIPLY": 1}), lambda *_: None)
    assert (result.backend_version, result.layer_counts) == (full_tensorrt.VERSION, {"MATRIX_MULTIPLY": 1})
    assert (tmp_path / "small.engine").read_bytes() == b"plan"
    assert ("clear_flag", library.trt.BuilderFlag.TF32) in library.calls
    assert library.flags() == set()
    assert not [call for call in library.calls if call[0] in ("create_timing_cache", "hardware_compatibility_level")]


def test_flags(library: Library, tmp_path: Path) -> None:
    compile_plan(request(tmp_path, flags=("portable", "refit", "weight_streaming")), lambda *_: None)
    assert library.flags() == {"VERSION_COMPATIBLE", "REFIT", "WEIGHT_STREAMING"}
    level = library.trt.HardwareCompatibilityLevel.AMPERE_PLUS
    assert ("hardware_compatibility_level", level) in library.calls


def test_timing_cache_is_read_and_written(library: Library, tmp_path: Path) -> None:
    cache = tmp_path / "folder" / "timings"
    cache.parent.mkdir()
    compile_plan(request(tmp_path, timing_cache=str(cache)), lambda *_: None)
    assert ("create_timing_cache", b"") in library.calls
    assert cache.read_bytes() == b"timings"
    compile_plan(request(tmp_path, timing_cache=str(cache)), lambda *_: None)
    assert ("create_timing_cache", b"timings") in library.calls
    assert ("set_timing_cache", library.cache, False) in library.calls
    assert list(cache.parent.iterdir()) == [cache]


def test_timing_cache_of_another_gpu(library: Library, tmp_path: Path) -> None:
    library.config = library.of(
        "IBuilderConfig",
        create_timing_cache=lambda _: library.cache,
        add_optimization_profile=lambda _: 0,
        set_timing_cache=False,
    )
    (tmp_path / "timings").write_bytes(b"other")
    with pytest.raises(EngineBuildError, match=r"timings: not a timing cache of this GPU and TensorRT version; name"):
        compile_plan(request(tmp_path, timing_cache=str(tmp_path / "timings")), lambda *_: None)
    assert (tmp_path / "timings").read_bytes() == b"other"


def test_refit_plan(library: Library, tmp_path: Path) -> None:
    result = refit_plan(refit_request(tmp_path), lambda *_: None)
    assert result.backend_version == full_tensorrt.VERSION
    assert (tmp_path / "new").read_bytes() == b"refitted plan"
    names = [call[0] for call in library.calls]
    order = ["engine_host_code_allowed", "deserialize_cuda_engine", "load_model_proto", "load_initializer"]
    order += ["refit_model_proto", "refit_cuda_engine", "serialize_with_config"]
    assert [names.index(name) for name in order] == sorted(names.index(name) for name in order)
    assert [call[1] for call in library.calls if call[0] == "load_initializer"] == ["w"]
    assert library.flags() == {"INCLUDE_REFIT"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"Runtime": {"deserialize_cuda_engine": None}}, "cannot load the plan: it did not say why"),
        ({"OnnxParserRefitter": {"load_initializer": False}}, "did not take the weights w"),
        ({"OnnxParserRefitter": {"refit_model_proto": False}}, "the weights do not fit the plan"),
        ({"Refitter": {"get_missing_weights": ["a", "b"]}}, "the graph has no weights for a, b of the plan"),
        ({"Refitter": {"refit_cuda_engine": False}}, "could not refit the plan"),
    ],
)
def test_refit_that_fails(library: Library, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    library.changes.update(changes)
    with pytest.raises(EngineBuildError, match=message):
        refit_plan(refit_request(tmp_path), lambda *_: None)
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("library")
def test_plan_of_another_version_is_not_loaded(library: Library, tmp_path: Path) -> None:
    other = replace(refit_request(tmp_path), backend_version="10.0.0")
    with pytest.raises(EngineBuildError, match=r"of TensorRT 10\.0\.0, 11\.4\.0\.106 is installed; build it again"):
        refit_plan(other, lambda *_: None)
    assert library.calls == []


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Full TensorRT is installed on a GPU of 9.0, and its process answers; gives the requests."""
    return full_tensorrt.pretend_installed(monkeypatch)


REAL_GPU_AT_HAND = engine_options.gpu_at_hand
FULL = EngineOptions("fp16", "trt", max_cache_length=40, refit=True, weight_streaming=True)


def copied(package: Path, out: Path) -> Path:
    return Path(shutil.copytree(package, out))


def test_build_of_full_tensorrt(worker: list[Any], tiny_package: Path, tmp_path: Path) -> None:
    package = copied(tiny_package, tmp_path / "package")
    options = replace(FULL, portable=True, timing_cache=tmp_path / "timings")
    engine = build(package, options, progress=False).engine
    assert (engine.name, engine.plan) == ("trt_fp16", "trt/model_fp16.trt.engine")
    assert (engine.backend_version, engine.compute_capabilities) == (full_tensorrt.VERSION, ("9.0",))
    assert engine.flags == ("portable", "refit", "weight_streaming")
    assert engine.kernels == {}
    assert worker[0].flags == engine.flags
    assert worker[0].timing_cache == str(tmp_path / "timings")


def test_refit_takes_the_weights_alone(
    worker: list[Any], tiny_package: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = copied(tiny_package, tmp_path / "first"), copied(tiny_package, tmp_path / "second")
    built = build(first, FULL, progress=False)
    report = refit(second, first, EngineOptions("fp16", "trt"), progress=False)
    assert report.engine == built.engine
    assert worker[1].refit_from == str(first / "trt" / "model_fp16.trt.engine")
    manifest = open_package(second).trt
    assert manifest is not None
    assert (second / "trt" / "model_fp16.trt.engine").read_bytes() == b"refitted"
    check_files(second, manifest.files)
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]


def test_refit_of_what_does_not_fit(
    worker: list[Any], tiny_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = copied(tiny_package, tmp_path / "first"), copied(tiny_package, tmp_path / "second")
    with pytest.raises(UsageError, match=r"refit from .*TensorRT for RTX has no such thing"):
        refit(second, first, EngineOptions("fp16"), progress=False)
    with pytest.raises(UsageError, match=r"no engine trt_fp16 to refit; run: olmo2-export build .*--refit"):
        refit(second, first, EngineOptions("fp16", "trt"), progress=False)
    with pytest.raises(UsageError, match="the engine stays as it is"):
        refit(second, first, EngineOptions("fp16", "trt", top_k=2), progress=False)
    build(first, replace(FULL, refit=False), progress=False)
    with pytest.raises(UsageError, match="trt_fp16 was built without refit; run"):
        refit(second, first, EngineOptions("fp16", "trt"), progress=False)
    build(first, FULL, progress=False)
    monkeypatch.setattr(engine_module, "gpu_at_hand", lambda _: "8.9")
    with pytest.raises(UsageError, match=r"for compute capability 9\.0, the GPU at hand is 8\.9"):
        refit(second, first, EngineOptions("fp16", "trt"), progress=False)
    monkeypatch.setattr(engine_module, "gpu_at_hand", lambda _: "9.0")
    static = engine_module.write_trt_variant

    def other_graph(package: Path, manifest: Any, folder: Path, options: Any) -> Any:
        return static(package, manifest, folder, replace(options, max_cache_length=41))

    monkeypatch.setattr(engine_module, "write_trt_variant", other_graph)
    with pytest.raises(UsageError, match=r"its graph is not that of .*first; refit takes checkpoints of one shape"):
        refit(second, first, EngineOptions("fp16", "trt"), progress=False)
    assert not (second / "trt").exists()
    assert len(worker) == 2


def test_refit_without_a_gpu(tiny_package: Path, tmp_path: Path, worker: list[Any], monkeypatch: Any) -> None:
    first = copied(tiny_package, tmp_path / "first")
    build(first, FULL, progress=False)
    monkeypatch.setattr(engine_module, "gpu_at_hand", REAL_GPU_AT_HAND)
    import runtimes.trt.cuda

    def no_gpu() -> SimpleNamespace:
        raise BackendError("CUDA finds no GPU")

    monkeypatch.setattr(runtimes.trt.cuda, "find_gpu", no_gpu)
    with pytest.raises(BackendError, match=r"no GPU to ask .*backend trt builds on the GPU itself"):
        refit(first, first, EngineOptions("fp16", "trt"), progress=False)
    assert len(worker) == 1
