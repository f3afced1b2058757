"""The chooser of TensorRT: loading, versions, runtime configuration; and that the fake has the real classes' names."""

from __future__ import annotations

import inspect
import logging
import mmap
import re
from pathlib import Path
from typing import Any

import pytest
import tensorrt_rtx_bindings as real  # type: ignore[import-untyped]
from support import fake_gpu, full_tensorrt
from support.fake_gpu import FakeCudaEngine, FakeCudart, Plan, fake_tensorrt
from support.static_model import VERSION, engine, variant, write_package

from runtimes.errors import BackendError, FailedError
from runtimes.trt import nvidia
from runtimes.trt.nvidia import captures_itself, check_version, create_context, create_runtime_cache, load_engine

CLASSES = {
    "ICudaEngine": fake_gpu.FakeCudaEngine,
    "IExecutionContext": fake_gpu.FakeExecutionContext,
    "IRuntimeConfig": fake_gpu.FakeRuntimeConfig,
    "IRuntimeCache": fake_gpu.FakeRuntimeCache,
    "Runtime": fake_tensorrt("trt_rtx", VERSION, {}, FakeCudart()).module.Runtime,
}
METHODS = [
    (name, attribute) for name, fake in CLASSES.items() for attribute in vars(fake) if not attribute.startswith("_")
]


def overloads(function: Any) -> list[list[str]]:
    """The parameters of a method of the bindings, which are only in its docstring."""
    signatures = re.findall(rf"^(?:\d+\. )?{function.__name__}\(self: [^,)]+(.*)\) -> ", function.__doc__, re.MULTILINE)
    return [re.findall(r", (\w+): ", parameters) for parameters in signatures]


@pytest.mark.parametrize(("name", "attribute"), METHODS)
def test_fake_has_the_names_and_parameters_of_the_real_class(name: str, attribute: str) -> None:
    found, expected = vars(CLASSES[name])[attribute], getattr(getattr(real, name), attribute)
    if isinstance(expected, property):
        assert not inspect.isfunction(found)
        assert not isinstance(found, property) or found.fset is None or expected.fset is not None
    else:
        assert list(inspect.signature(found).parameters)[1:] in overloads(expected)


def test_the_check_of_the_fake_can_fail() -> None:
    assert ["runtime_config"] in overloads(real.ICudaEngine.create_execution_context)
    assert overloads(real.IExecutionContext.set_tensor_address) == [["name", "memory"]]
    config = fake_gpu.FakeRuntimeConfig(None, "trt_rtx")  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        config.cuda_graphs_strategy = 1  # type: ignore[attr-defined]


def test_real_plan_gets_as_far_as_the_driver(tmp_path: Path) -> None:
    """The real library takes a mapped file and gives None without a GPU, or for what is no plan."""
    (tmp_path / "plan").write_bytes(b"no plan" * 99)
    tensorrt = nvidia.load_tensorrt("trt_rtx")
    with (
        (tmp_path / "plan").open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        pytest.raises(BackendError, match=r"trt_rtx 1\.7\.\d+\.\d+ cannot load the engine: .+; build it") as caught,
    ):
        load_engine(tensorrt, content, portable=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("installed", "built", "portable", "runs"),
    [
        ("1.7.1.116", "1.7.1.116", False, True),
        ("1.7.1.117", "1.7.1.116", False, False),
        ("11.4.0.1", "11.4.0.1", True, True),
        ("11.10.0.1", "11.4.0.1", True, True),
        ("11.4.0.1", "11.10.0.1", True, False),
        ("12.0.0.1", "11.4.0.1", True, False),
        ("11.10.0.1", "11.4.0.1", False, False),
    ],
)
def test_versions(installed: str, built: str, portable: bool, runs: bool) -> None:
    tensorrt = fake_tensorrt("trt", installed, {}, FakeCudart())
    if runs:
        check_version(tensorrt, built, portable=portable)
        return
    later = " or a later 11" if portable and built.startswith("11") else ""
    with pytest.raises(
        BackendError, match=rf"built with trt {re.escape(built)}, {re.escape(installed)} is installed: install "
        rf"{re.escape(built)}{later}, or build it again"
    ):  # fmt: skip
        check_version(tensorrt, built, portable=portable)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    package = write_package(tmp_path / "package")
    entry = variant()
    return Plan(engine("trt_rtx", entry), entry, package / entry.graph)


def loaded(plan: Plan, backend: Any) -> tuple[nvidia.TensorRT, FakeCudaEngine]:
    tensorrt = fake_tensorrt(backend, VERSION, {b"plan": plan}, FakeCudart())
    return tensorrt, load_engine(tensorrt, b"plan", portable=False)[1]


@pytest.mark.parametrize("portable", [True, False])
def test_only_portable_plans_may_bring_host_code(plan: Plan, portable: bool) -> None:
    tensorrt = fake_tensorrt("trt", VERSION, {b"plan": plan}, FakeCudart())
    runtime, _ = load_engine(tensorrt, b"plan", portable=portable)
    assert runtime.engine_host_code_allowed is portable


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_contexts_of_tensorrt_for_rtx(plan: Plan, cuda_graph: bool) -> None:
    tensorrt, loaded_engine = loaded(plan, "trt_rtx")
    cache = create_runtime_cache(tensorrt, loaded_engine, None)
    context = create_context(tensorrt, loaded_engine, cache, cuda_graph=cuda_graph)
    strategy = real.CudaGraphStrategy
    expected = strategy.WHOLE_GRAPH_CAPTURE if cuda_graph else strategy.DISABLED
    assert context._config.cuda_graph_strategy == expected
    assert context._config._strategy == real.ExecutionContextAllocationStrategy.USER_MANAGED
    assert context._config._cache is cache
    assert captures_itself(tensorrt)


def test_contexts_of_full_tensorrt_need_nothing_that_only_the_other_has(plan: Plan) -> None:
    tensorrt, loaded_engine = loaded(plan, "trt")
    assert create_runtime_cache(tensorrt, loaded_engine, b"kernels") is None
    context = create_context(tensorrt, loaded_engine, None, cuda_graph=True)
    assert context._config._strategy == real.ExecutionContextAllocationStrategy.USER_MANAGED
    assert not captures_itself(tensorrt)


def test_context_that_cannot_be_made_is_an_error(plan: Plan) -> None:
    plan.contexts = False
    tensorrt, loaded_engine = loaded(plan, "trt")
    with pytest.raises(FailedError, match="makes no execution context: no memory for a context"):
        create_context(tensorrt, loaded_engine, None, cuda_graph=True)


@pytest.mark.parametrize(("content", "said"), [(b"kernels of a GPU", False), (b"foreign", True), (None, False)])
def test_kernels_of_another_gpu_are_compiled_again(
    plan: Plan, content: bytes | None, said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    tensorrt, loaded_engine = loaded(plan, "trt_rtx")
    with caplog.at_level(logging.INFO, logger="runtimes"):
        create_runtime_cache(tensorrt, loaded_engine, content)
    assert plan.caches == ([] if content is None else [content])
    assert ("of another GPU, driver or version" in caplog.text) is said


@pytest.mark.parametrize("portable", [True, False])
def test_lean_runtime_serves_portable_plans_alone(portable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the other library stands for the lean one, and one that is not installed for full TensorRT."""
    monkeypatch.setattr(nvidia, "_loaded", {})
    monkeypatch.setattr(nvidia, "_MODULES", {"trt": "no_such_module"})
    monkeypatch.setattr(nvidia, "_LEAN", "tensorrt_rtx_bindings")
    if portable:
        assert nvidia.load_tensorrt("trt", portable=True).module is real
    else:
        with pytest.raises(BackendError, match="no_such_module cannot be imported"):
            nvidia.load_tensorrt("trt")


@pytest.mark.parametrize(("backend", "pip"), [("trt", "https://pypi.nvidia.com"), ("trt_rtx", "tensorrt-rtx")])
def test_missing_library_names_the_pip_line(backend: Any, pip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia, "_loaded", {})
    monkeypatch.setattr(nvidia, "_MODULES", {backend: "no_such_module"})
    with pytest.raises(BackendError, match=rf"backend {backend}: no_such_module cannot be imported .*{pip}"):
        nvidia.load_tensorrt(backend)


ONLY_FOR_RTX = {
    ("IRuntimeConfig", "cuda_graph_strategy"),
    ("IRuntimeConfig", "create_runtime_cache"),
    ("IRuntimeConfig", "set_runtime_cache"),
}


@pytest.mark.parametrize(("name", "attribute"), [m for m in METHODS if m[0] != "IRuntimeCache"])
def test_fake_has_the_names_and_parameters_of_full_tensorrt(name: str, attribute: str) -> None:
    """So that what runs here with backend trt calls nothing that only TensorRT for RTX has."""
    found, members = vars(CLASSES[name])[attribute], full_tensorrt.API["classes"][name]
    if (name, attribute) in ONLY_FOR_RTX:
        assert attribute not in members
    elif inspect.isfunction(found):
        assert list(inspect.signature(found).parameters)[1:] in members[attribute]
    else:
        assert isinstance(members[attribute], str)
