"""Whether an engine is refitted or built: decided by what the target can do, with full TensorRT's fake."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import full_tensorrt

from olmo2_export.engine import build as engine_module
from olmo2_export.engine import options as engine_options
from olmo2_export.engine.build import build
from olmo2_export.engine.compiler import CompileRequest
from olmo2_export.engine.options import EngineOptions
from olmo2_export.engine.refitter import RefitRequest
from olmo2_export.engine.renew import as_built, renew, why_never_refitted
from runtimes.errors import EngineBuildError
from runtimes.package import open_package
from runtimes.sealed import check_files

FP16 = EngineOptions("fp16", "trt", max_cache_length=40)


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What TensorRT's process was asked for."""
    return full_tensorrt.pretend_installed(monkeypatch)


@pytest.fixture
def packages(tiny_package: Path, tmp_path: Path) -> list[Path]:
    """Three of one model."""
    return [Path(shutil.copytree(tiny_package, tmp_path / name)) for name in ("a", "b", "c")]


def plan(package: Path, name: str = "fp16.trt") -> bytes:
    return (package / "trt" / f"model_{name}.engine").read_bytes()


def test_the_first_is_built_and_the_others_are_refitted(
    worker: list[Any], packages: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    a, b, c = packages
    made = [renew(a, None, FP16, progress=False), renew(b, a, FP16, progress=False), renew(c, b, FP16, progress=False)]
    assert [one.refitted for one in made] == [False, True, True]
    assert [type(asked) for asked in worker] == [CompileRequest, RefitRequest, RefitRequest]
    assert worker[0].flags == ("refit",)
    assert [asked.refit_from for asked in worker[1:]] == [str(p / "trt" / "model_fp16.trt.engine") for p in (a, b)]
    assert [plan(package) for package in packages] == [b"plan", b"refitted", b"refitted"]
    assert made[2].report.engine == made[0].report.engine
    manifest = open_package(c).trt
    assert manifest is not None
    check_files(c, manifest.files)
    assert not caplog.records


@pytest.mark.parametrize(
    ("precision", "backend", "why"),
    [
        ("bf16", "trt", None),
        ("fp32", "trt", None),
        ("int4", "trt", None),
        ("int8", "trt", "int8 rounds inputs with scales that follow from the weights and are part of the graph"),
        ("fp8", "trt", "fp8 rounds inputs with scales that follow from the weights and are part of the graph"),
        ("bf16", "trt_rtx", "TensorRT for RTX cannot replace the weights of an engine"),
    ],
)
def test_what_can_be_refitted_at_all(precision: Any, backend: Any, why: str | None) -> None:
    assert why_never_refitted(EngineOptions(precision, backend)) == why
    assert as_built(EngineOptions(precision, backend)).refit is (why is None)


@pytest.mark.parametrize(("precision", "backend"), [("int8", "trt"), ("fp16", "trt_rtx")])
def test_what_cannot_be_refitted_is_built_each_time_and_not_for_refitting(
    worker: list[Any], packages: list[Path], caplog: pytest.LogCaptureFixture, precision: Any, backend: Any
) -> None:
    a, b, _ = packages
    gpu = "current" if backend == "trt" else "8.9"  # TensorRT for RTX does not compile for 9.0
    options = replace(FP16, precision=precision, backend=backend, compute_capabilities=[gpu])
    assert not renew(a, None, options, progress=False).refitted
    assert not renew(b, a, options, progress=False).refitted
    assert [type(asked) for asked in worker] == [CompileRequest, CompileRequest]
    assert [asked.flags for asked in worker] == [(), ()]
    assert "is built, not refitted" not in caplog.text


def test_an_engine_of_another_kind_is_not_taken(
    worker: list[Any], packages: list[Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, _ = packages
    build(a, FP16, progress=False)  # without refit
    for options, gpu, why in (
        (FP16, "9.0", "the engine of {} has flags () (wanted: ('refit',))"),
        (replace(FP16, precision="bf16"), "9.0", "{} has no engine trt_bf16"),
        (replace(FP16, max_cache_length=41), "9.0", "max_cache_length 40 (wanted: 41)"),
        (replace(FP16, max_batch_size=2), "9.0", "max_batch_size 4 (wanted: 2)"),
        (replace(FP16, top_k=3), "9.0", "top_k 1 (wanted: 3)"),
        (FP16, "8.9", "compute_capabilities ('9.0',) (wanted: ('8.9',))"),
    ):
        for module in (engine_options, engine_module):
            monkeypatch.setattr(module, "gpu_at_hand", lambda _, gpu=gpu: gpu)
        caplog.clear()
        assert not renew(b, a, options, progress=False).refitted
        assert f"{b}: its engine is built, not refitted: " in caplog.text
        assert why.format(a) in caplog.text
    assert {type(asked) for asked in worker} == {CompileRequest}


def test_a_refit_that_fails_becomes_a_build(
    worker: list[Any], packages: list[Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, _ = packages
    renew(a, None, FP16, progress=False)
    real = engine_module.run_worker

    def failing(asked: Any, folder: Path, *, progress: bool) -> Any:
        if isinstance(asked, RefitRequest):
            raise EngineBuildError("the plan is of TensorRT 10.0.0, 11.4.0 is installed; build it again")
        return real(asked, folder, progress=progress)

    monkeypatch.setattr(engine_module, "run_worker", failing)
    assert not renew(b, a, FP16, progress=False).refitted
    assert "built, not refitted: the plan is of TensorRT 10.0.0, 11.4.0 is installed" in caplog.text
    assert plan(b) == b"plan"
    assert len(worker) == 2


def test_a_damaged_source_is_said_and_built_instead(
    worker: list[Any], packages: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    a, b, _ = packages
    renew(a, None, FP16, progress=False)
    manifest = a / "trt" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b"fp16", b"fp61", 1))
    assert not renew(b, a, FP16, progress=False).refitted
    assert "is built, not refitted" in caplog.text
    assert [type(asked) for asked in worker] == [CompileRequest, CompileRequest]
