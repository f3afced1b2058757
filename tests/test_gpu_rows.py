"""tests/gpu without a GPU: the checklist has every row, and no row does anything but say why it is skipped."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests" / "gpu"))

from checklist import CHECKLIST, rows, updated  # noqa: E402  # of tests/gpu

NOT_THERE = {
    "engine_runtime_cache[trt]",
    "engine_flag[trt_rtx-portable]",
    "engine_refit[trt_rtx]",
    "engine_timing_cache[trt_rtx]",
}
"""rows of something that one of the two TensorRTs has not"""
RESULT: dict[str, Any] = {
    "gpu": "NVIDIA X",
    "rehearsal": False,
    "rows": [
        {"row": "cuda_greedy[bf16]", "outcome": "passed", "figure": "4 of 5 | equal", "why": ""},
        {"row": "cuda_greedy[fp16]", "outcome": "skipped", "figure": "", "why": "no GPU"},
        {"row": "cuda_slots[bf16]", "outcome": "failed", "figure": "", "why": "assert 1 >= 2"},
    ],
}


@pytest.fixture(scope="module")
def run() -> dict[str, Any]:
    """What the command prints here, as its last JSON line says it."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU: run make gpu-test")
    files = sorted(str(path) for path in (ROOT / "tests" / "gpu").glob("gpu_*.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-o", "filterwarnings=default", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith('{"gpu"')]
    result: dict[str, Any] = json.loads(line)
    return result


def test_every_row_is_skipped_with_a_reason(run: dict[str, Any]) -> None:
    assert run["gpu"] == "none"
    assert {row["outcome"] for row in run["rows"]} == {"skipped"}
    assert {row["why"] for row in run["rows"]} == {"no NVIDIA GPU that PyTorch can use"}


def test_the_checklist_has_every_row(run: dict[str, Any]) -> None:
    assert set(rows(CHECKLIST.read_text())) == {row["row"] for row in run["rows"]} - NOT_THERE


def test_a_run_is_recorded() -> None:
    before = CHECKLIST.read_text()
    after = updated(before, RESULT, "2026-01-02")
    found = rows(after)
    assert found["cuda_greedy[bf16]"][3:] == ["NVIDIA X, 2026-01-02: passed", "4 of 5 / equal"]
    assert found["cuda_slots[bf16]"][3:] == ["NVIDIA X, 2026-01-02: failed", "assert 1 >= 2"]
    assert found["cuda_greedy[fp16]"] == rows(before)["cuda_greedy[fp16]"]
    changed = [a for a, b in zip(before.splitlines(), after.splitlines(), strict=True) if a != b]
    assert len(changed) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rehearsal": True}, "not the result of a GPU"),
        ({"gpu": "none"}, "not the result of a GPU"),
        ({"rows": [{"row": "another", "outcome": "passed", "figure": "", "why": ""}]}, "row another"),
    ],
)
def test_what_proves_nothing_is_not_recorded(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        updated(CHECKLIST.read_text(), RESULT | change, "2026-01-02")
