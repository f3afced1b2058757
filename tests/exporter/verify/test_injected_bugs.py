"""A parity test that cannot fail is a defect: each bug below, put into one layer or one number, must turn it red."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from support.bugs.edits import Bug
from support.bugs.portable import BUGS, TRT_BUGS
from support.rebuilt_packages import rebuilt, rebuilt_trt

from olmo2_export.measure.parity import GATES, ParityReport
from olmo2_export.verify.measure import Truth, ask_pytorch, measure_runner
from olmo2_export.weights.checkpoint import open_checkpoint
from runtimes import open_package, open_runner

CAPACITY = 96
"""tokens of the longest rows: more than those of the others; a bug that shows on 1024 shows on 96"""


def measure(package: Path, variant: str, truth: Truth) -> ParityReport:
    """Feed a float32 graph as it is stored; neither its weights nor quality are looked at."""
    with open_runner(package, variant=variant) as runner:
        return measure_runner(runner, truth, truth.own["fp32"], GATES["fp32"], truth.draws, variant, "fp32", "")


def ask(package: Path, model: str, capacity: int) -> Truth:
    """Ask PyTorch once; also for its draws, which every bug wants."""
    truth = ask_pytorch(package, open_checkpoint(model), ["fp32"], capacity)
    return replace(truth, draws=cache(truth.draws))


@pytest.fixture(scope="module", params=["tiny", "demo"])
def case(request: pytest.FixtureRequest) -> tuple[Path, Truth]:
    """A package, random or trained, and what PyTorch says of its model."""
    package: Path = request.getfixturevalue(f"{request.param}_package")
    model = "demo" if request.param == "demo" else str(request.getfixturevalue("tiny_checkpoint"))
    return package, ask(package, model, CAPACITY)


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


@pytest.fixture(scope="module")
def trt_case(trt_package: Callable[[str], Path], tiny_checkpoint: Path) -> tuple[Path, Truth]:
    """A package with a graph of fp32 for TensorRT, and what PyTorch says of its model."""
    package = trt_package("fp32")
    return package, ask(
        package, str(tiny_checkpoint), open_package(package).variant("trt_fp32").kv_cache.max_cache_length
    )


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
