"""The benchmark runs, and its last line is JSON with units in its keys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from olmo2_export import bench


def test_bench_of_a_small_shape(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--size", "demo", "--work", str(tmp_path), "--no-build"]) == 0
    lines = capfd.readouterr().out.strip().splitlines()
    result = json.loads(lines[-1])
    assert result["checkpoint_mb"] == 13
    (stage,) = result["stages"]
    assert stage["stage"] == "export"
    assert 0 < stage["seconds"] < 300
    assert 100 < stage["peak_memory_mb"] < 2500
    assert list(tmp_path.iterdir()) == []
