"""tests/gpu without a GPU: the checklist has every row, and no row does anything but say why it is skipped."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests" / "gpu"))

from checklist import CHECKLIST, read, recorded, rows, updated  # noqa: E402  # of tests/gpu
from slim_wheel import MAGIC, slim, slim_wheel  # noqa: E402

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


FAKE_CONFTEST = """
from pathlib import Path
import pytest
from rows import RowsFile

def pytest_configure(config):
    config.pluginmanager.register(RowsFile(Path(__file__).with_name("rows.jsonl"), 2, {"gpu": "NVIDIA X"}))
"""
FAKE_ROWS = """
import os, signal, time
import pytest

def test_quick(record_property): record_property("figure", "7 | 8")
def test_skipped(): pytest.skip("no GPU")
def test_failing(): assert 1 >= 2
def test_hanging(): time.sleep(60)
def test_dying(): os.kill(os.getpid(), signal.SIGKILL)
@pytest.mark.parametrize("variant", ["bf16"])
def test_last(variant): pass
"""


def test_rows_go_on_in_another_process_after_one_that_failed_hung_or_died(tmp_path: Path) -> None:
    """A process ends with its first failure; the same command then goes on with the next row."""
    for name in ("rows.py", "checklist.py"):
        shutil.copy(ROOT / "tests" / "gpu" / name, tmp_path)
    (tmp_path / "conftest.py").write_text(FAKE_CONFTEST)
    (tmp_path / "gpu_fake.py").write_text(FAKE_ROWS)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "gpu_fake.py"]
    codes = [subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode for _ in range(5)]
    assert codes == [1, 124, -9, 0, 5]  # 5: nothing is left
    assert read(tmp_path / "rows.jsonl")["gpu"] == "NVIDIA X"
    found = {row["row"]: row for row in recorded(tmp_path / "rows.jsonl")}
    assert {name: (row["outcome"], row["figure"] or row["why"]) for name, row in found.items()} == {
        "quick": ("passed", "7 | 8"),
        "skipped": ("skipped", "no GPU"),
        "failing": ("failed", found["failing"]["why"]),
        "hanging": ("failed", "took longer than 2 s"),
        "dying": ("failed", "it ended its process"),
        "last[bf16]": ("passed", ""),
    }


BENCH: dict[str, Any] = {
    "size": "1B",
    "device": "NVIDIA X",
    "failures": [],
    "left_out": [],
    "claims": [
        {"what": "decode", "against": "wall", "median_ratio": 0.71, "verdict": "met"},
        {"what": "prefill", "against": "wall", "median_ratio": None, "verdict": "not measured"},
    ],
}


@pytest.mark.parametrize(
    ("change", "outcome", "figure"),
    [
        ({}, "passed", "decode 0.71 x wall (met)"),
        ({"failures": ["A, t: it broke"]}, "failed", "decode 0.71 x wall (met); A, t: it broke"),
        ({"left_out": ["t of A: 1 of 1 samples"]}, "failed", "decode 0.71 x wall (met); no t of A: 1 of 1 samples"),
        ({"claims": [BENCH["claims"][0] | {"verdict": "missed by 2%"}]}, "failed", "decode 0.71 x wall (missed by 2%)"),
    ],
)
def test_a_benchmark_is_recorded_as_its_row(change: dict[str, Any], outcome: str, figure: str, tmp_path: Path) -> None:
    path = tmp_path / "bench.txt"
    path.write_text(f"a table\n{json.dumps(BENCH | change)}\n")
    found = rows(updated(CHECKLIST.read_text(), read(path), "2026-01-02"))
    assert found["bench_cuda"][3:] == [f"NVIDIA X, 2026-01-02: {outcome}", figure]


@pytest.mark.parametrize("change", [{"size": "demo"}, {"device": "cpu"}])
def test_a_rehearsed_benchmark_is_not_recorded(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "bench.txt"
    path.write_text(json.dumps(BENCH | change))
    with pytest.raises(ValueError, match="not the result of a GPU"):
        updated(CHECKLIST.read_text(), read(path), "2026-01-02")
    path.write_text("2 passed\n")
    with pytest.raises(ValueError, match="no line of JSON with rows"):
        read(path)


def entry(arch: int, code: bytes) -> bytes:
    """Return an entry of a fat binary: 64 bytes of header, with the generation at 28, and machine code."""
    head = struct.pack("<HHIQ", 2, 1, 64, len(code)).ljust(28, b"\1") + struct.pack("<I", arch)
    return head.ljust(64, b"\2") + code


def fatbin(*entries: bytes) -> bytes:
    body = b"".join(entries)
    return MAGIC + struct.pack("<HHQ", 1, 16, len(body)) + body


LIBRARY = (
    b"ELF" + fatbin(entry(80, b"a" * 40), entry(90, b"b" * 24)) + MAGIC + b"text" * 8 + fatbin(entry(80, b"c" * 9))
)


def test_a_slimmed_library_keeps_one_generation() -> None:
    data = bytearray(LIBRARY)
    assert slim(data, 90) == {80: 49, 90: 24}
    assert bytes(data) == LIBRARY.replace(b"a" * 40, bytes(40)).replace(b"c" * 9, bytes(9))
    whole = bytearray(b"no code" + MAGIC)
    assert slim(whole, 90) == {}
    assert whole == b"no code" + MAGIC


@pytest.mark.parametrize("skip", [16, 4097, 100])
def test_a_library_of_another_layout_is_left_whole(skip: int) -> None:
    broken = bytearray(fatbin(entry(80, b"a" * 8)))
    struct.pack_into("<I", broken, 16 + 4, skip)
    before = bytes(broken)
    with pytest.raises(ValueError, match="an entry at 16 is not as expected; leave this wheel whole"):
        slim(broken, 90)
    assert broken == before


def test_a_slimmed_wheel_has_the_same_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wheel = tmp_path / "x-1-cp312-cp312-linux_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("x/lib.so", LIBRARY)
        archive.writestr("x/plain.so.1", b"ELF")
        archive.writestr("x/__init__.py", "a" * 40)
    slimmed = slim_wheel(wheel, tmp_path / "slim", 90)
    assert slimmed == tmp_path / "slim" / wheel.name
    with zipfile.ZipFile(slimmed) as archive:
        assert archive.namelist() == ["x/lib.so", "x/plain.so.1", "x/__init__.py"]
        assert archive.read("x/lib.so") == LIBRARY.replace(b"a" * 40, bytes(40)).replace(b"c" * 9, bytes(9))
        assert archive.read("x/__init__.py") == b"a" * 40
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_LZMA}
    assert "x/lib.so: kept 24 of 73 bytes of machine code" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"x/lib.so has no code for 100: \[80, 90\]"):
        slim_wheel(wheel, tmp_path / "other", 100)


def test_the_script_says_its_steps_and_refuses_others(tmp_path: Path) -> None:
    script = str(ROOT / "tests" / "gpu" / "bare_machine.sh")
    said = subprocess.run([script], capture_output=True, text=True, check=False)
    assert said.returncode == 2
    for step in ("prepare", "rehearse", "first", "second", "third"):
        assert f"tests/gpu/bare_machine.sh {step}" in said.stdout
    environment = os.environ | {"KEEP": str(tmp_path), "OUT": str(tmp_path), "PYTHON": sys.executable}
    said = subprocess.run([script, "third", "tpu"], capture_output=True, text=True, check=False, env=environment)
    assert (said.returncode, said.stderr) == (2, "third: expected cuda or cpu, found tpu\n")
    (tmp_path / "models.log").write_text("tracing\n")
    said = subprocess.run([script, "third", "cpu"], capture_output=True, text=True, check=False, env=environment)
    assert (said.returncode, said.stdout.splitlines()) == (
        1,
        ["third: no package of fp16 yet", "third: no package of q4f16 yet", "tracing"],
    )
