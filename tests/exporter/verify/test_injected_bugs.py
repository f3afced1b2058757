"""A parity test that cannot fail is a defect: each bug below, put into one layer or one number, must turn it red."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.bugs.edits import Bug
from support.bugs.portable import BUGS, TRT_BUGS
from support.rebuilt_packages import rebuilt, rebuilt_trt

from olmo2_export.engine.build import build
from olmo2_export.engine.options import EngineOptions
from olmo2_export.measure.parity import GATES, ParityReport
from olmo2_export.verify.measure import Truth, ask_pytorch, measure_runner
from olmo2_export.weights.checkpoint import open_checkpoint
from runtimes import open_runner


def measure(package: Path, variant: str, truth: Truth) -> ParityReport:
    """Feed a float32 graph as it is stored; neither its weights nor quality are looked at."""
    with open_runner(package, variant=variant) as runner:
        return measure_runner(runner, truth, truth.own["fp32"], GATES["fp32"], truth.draws, variant, "fp32", "")


@pytest.fixture(scope="module", params=["tiny", "demo"])
def case(request: pytest.FixtureRequest) -> tuple[Path, Truth]:
    """A package, random or trained, and what PyTorch says of its model."""
    package: Path = request.getfixturevalue(f"{request.param}_package")
    model = "demo" if request.param == "demo" else str(request.getfixturevalue("tiny_checkpoint"))
    return package, ask_pytorch(package, open_checkpoint(model), ["fp32"])


def test_a_rebuilt_package_without_a_bug_passes(case: tuple[Path, Truth], tmp_path: Path) -> None:
    package, truth = case
    report = measure(rebuilt(package, tmp_path / "copy", lambda _: None), "fp32", truth)
    assert report.passed
    assert all(0 < c.error_ratio < 4 for c in report.cases)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_bug_turns_parity_red(case: tuple[Path, Truth], tmp_path: Path, bug: Bug) -> None:
    package, truth = case
    report = measure(rebuilt(package, tmp_path / "copy", bug), "fp32", truth)
    assert not report.passed, [(c.mode, c.error_ratio, c.nmse) for c in report.cases]


# The same for the graph that TensorRT compiles. What it has of its own: scaled queries, lengths instead of a mask, a
# cache that is written in place, and logits of one chosen row.


TRT_CAPACITY = 64


@pytest.fixture(scope="module")
def trt_case(tiny_package: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Truth]:
    """A package with an engine of fp32, and what PyTorch says of its model."""
    package = Path(shutil.copytree(tiny_package, tmp_path_factory.mktemp("trt") / "tiny"))
    build(package, EngineOptions("fp32", compute_capabilities=["8.9"], max_cache_length=TRT_CAPACITY), progress=False)
    return package, ask_pytorch(package, open_checkpoint(str(tiny_checkpoint)), ["fp32"], TRT_CAPACITY)


def test_a_rebuilt_trt_graph_without_a_bug_passes(trt_case: tuple[Path, Truth], tmp_path: Path) -> None:
    package, truth = trt_case
    report = measure(rebuilt_trt(package, tmp_path / "copy", lambda _: None), "trt_fp32", truth)
    assert report.passed
    assert all(0 < c.error_ratio < 4 for c in report.cases)


@pytest.mark.parametrize("bug", TRT_BUGS, ids=lambda bug: bug.__name__)
def test_bug_in_the_trt_graph_turns_parity_red(trt_case: tuple[Path, Truth], tmp_path: Path, bug: Bug) -> None:
    package, truth = trt_case
    report = measure(rebuilt_trt(package, tmp_path / "copy", bug), "trt_fp32", truth)
    assert not report.passed, [(c.mode, c.error_ratio, c.nmse) for c in report.cases]
