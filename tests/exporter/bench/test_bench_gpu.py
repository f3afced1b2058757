"""`bench gpu` measures packages that are there, and ends in time with what it has measured."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from olmo2_export.bench import contenders, gpu, processes, turns
from olmo2_export.bench.checkpoint import SIZES
from olmo2_export.bench.cli import main
from olmo2_export.bench.contenders import Contender
from olmo2_export.bench.processes import run
from olmo2_export.bench.turns import take_turns
from runtimes.errors import FailedError

DEVICE = {"device": "cpu", "copied_bytes_per_second": 2e10, "bf16_flops_per_second": 1e10}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Nothing is measured in earnest; the arguments of whoever was asked are here."""
    asked: list[tuple[str, ...]] = []

    def sample(self: Contender, task: dict[str, Any], _seconds: float | None = None) -> dict[str, float]:
        asked.append((task["kind"], self.key, *self.arguments))
        return {"tokens_per_second": 12.5}

    monkeypatch.setattr(Contender, "sample", sample)
    monkeypatch.setattr(gpu, "device_limits", lambda *_: DEVICE)
    return asked


def test_a_package_that_is_there_is_measured_and_nothing_is_made(
    demo_package: Path,
    tmp_path: Path,
    measured: list[tuple[str, ...]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--package", str(demo_package), "--reference", str(contenders.DEMO), "--with", "ort:fp32"]
    command = ["gpu", "--size", "demo", "--device", "cpu", "--rounds", "2", *flags, "--only", "decode_128"]
    out = tmp_path / "bench.json"
    assert main([*command, "--work", str(tmp_path), "--out", str(out)]) == 0
    assert sorted(tmp_path.iterdir()) == [out]
    ours = ("decode", "ours", str(demo_package), "fp32", "--backend", "ort", "--device", "cpu")
    assert measured == [ours, ("decode", "static_cache", str(contenders.DEMO), "cpu")] * 2
    said = capsys.readouterr()
    result = json.loads(said.out.splitlines()[-1])
    assert result == json.loads(out.read_text())
    assert result["samples"]["decode_128"]["ours"] == [{"tokens_per_second": 12.5}] * 2
    assert (result["failures"], result["left_out"]) == ([], [])
    assert "decode_128 of ours, ort:fp32: 12.5 tokens_per_second\n" in said.err


def test_the_baseline_is_measured_beside_the_first_variant(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of two packages the one that has the variant is taken; a run that is cut off has both sides of its claims."""
    a, b = tmp_path / "a", tmp_path / "b"
    packages: list[Any] = [SimpleNamespace(folder=folder) for folder in (a, b)]
    monkeypatch.setattr(gpu, "_has", lambda given, variant: (given.folder, variant) in {(a, "q4f16"), (b, "bf16")})
    workshop = contenders.Workshop(tmp_path, "demo", contenders.DEMO)
    found = gpu.contenders(workshop, ["ort:bf16", "ort:q4f16"], "cpu", baseline=True, packages=packages)
    assert [contender.key for contender in found] == ["ours", "static_cache", "ort_q4f16"]
    assert [contender.arguments[0] for contender in found] == [str(b), str(contenders.DEMO), str(a)]
    assert gpu.TASKS == ("decode_128", "decode_2048", "prefill_2048", "streams_8")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rounds", "0"], "--rounds 0: expected at least 1"),
        (["--steps", "0"], "--steps 0: expected at least 1"),
        (["--minutes", "0"], "--minutes 0: expected more than 0; without it all is measured"),
        (["--minutes", "nan"], "--minutes nan: expected more than 0"),
        (["--with", "bf16"], "contender 'bf16': expected ort:VARIANT, trt_rtx:PRECISION or trt:PRECISION"),
        (["--package", "{tmp}"], "{tmp}: not a package"),
        (["--reference", "{tmp}"], "{tmp}: no config.json with a shape"),
        (["--size", "1B", "--package", "{demo}"], "{demo}: its shape is demo, expected 1B; give --size"),
        (["--package", "{demo}", "--with", "ort:q3"], "--package {demo}: it has none of ort:q3; name a variant of it"),
        (["--package", "{demo}", "--with", "trt:fp16"], "--package {demo}: it has none of trt:fp16"),
        (
            ["--package", "{demo}", "--with", "ort:fp32", "--with", "ort:q3"],
            "--with ort:q3: in none of the packages; leave --package out to have them made",
        ),
        (
            ["--package", "{demo}", "--with", "ort:fp32", "--no-baseline", "--reference", "{demo}"],
            "--reference {demo}: nothing uses it, with --package and --no-baseline",
        ),
        (
            ["--package", "{demo}", "--with", "ort:fp32", "--no-baseline", "--keep", "{tmp}/kept"],
            "--keep {tmp}/kept: nothing is made, with --package and --no-baseline",
        ),
        (
            ["--package", "{demo}", "--with", "ort:fp32", "--reference", "{demo}", "--keep", "{tmp}/kept"],
            "--keep {tmp}/kept: nothing is made, with --package and --reference",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_made(
    flags: list[str],
    message: str,
    demo_package: Path,
    tmp_path: Path,
    measured: list[tuple[str, ...]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"tmp": tmp_path, "demo": demo_package}
    command = ["gpu", "--size", "demo", "--work", str(tmp_path), *(flag.format(**places) for flag in flags)]
    assert main(command) != 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bench: error: ")
    assert message.format(**places) in line
    assert measured == []
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_an_unknown_shape_says_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = {**SIZES["demo"], "hidden_size": 96}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    assert main(["gpu", "--size", "demo", "--reference", str(tmp_path)]) == 2
    assert f"its shape is {shape}, expected demo" in capsys.readouterr().err


def test_minutes_that_are_over_leave_what_was_measured(
    demo_package: Path,
    measured: list[tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each sample takes 50 seconds here: in two minutes there are two whole ones, and the third is ended."""
    clock, asked = [100.0], Contender.sample

    def sample(self: Contender, task: dict[str, Any], seconds: float | None = None) -> dict[str, Any]:
        assert seconds == 220.0 - clock[0]
        clock[0] += min(50.0, seconds)
        if seconds < 50.0:
            raise FailedError("ended after 20 seconds")
        return asked(self, task, seconds)

    monkeypatch.setattr(Contender, "sample", sample)
    monkeypatch.setattr(turns.time, "monotonic", lambda: clock[0])
    flags = ["--package", str(demo_package), "--reference", str(contenders.DEMO), "--with", "ort:fp32"]
    assert main(["gpu", "--size", "demo", "--rounds", "1", "--minutes", "2", *flags]) == 0
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert [kind for kind, *_ in measured] == ["decode", "decode"]
    assert result["failures"] == []
    assert result["left_out"] == [
        f"{task} of {name}: 1 of 1 samples"
        for task in gpu.TASKS[1:]
        for name in (result["contenders"]["ours"], result["contenders"]["static_cache"])
    ]
    verdicts = {(claim["what"], claim["against"]): claim["verdict"] for claim in result["claims"]}
    assert verdicts["decode, 128-token context", "static_cache"] == "missed by 50%"
    assert verdicts["decode, 2048-token context", "static_cache"] == "not measured"
    assert "NOT MEASURED, as 2 minutes were over: decode_2048 of ours, ort:fp32: 1 of 1 samples; " in out


def test_a_contender_that_fails_in_time_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def sample(_self: Contender, _task: dict[str, Any], _seconds: float) -> dict[str, Any]:
        raise FailedError("it broke")

    monkeypatch.setattr(Contender, "sample", sample)
    one = [Contender("a", "A", Path("x"), "x", (), ("t",), {})]
    assert take_turns(one, {"t": {}}, 1, deadline=time.monotonic() + 60)[1] == ["A, t: it broke"]
    assert take_turns(one, {"t": {}}, 1, deadline=time.monotonic() - 1) == ({"t": {"a": [{}]}}, [])


@pytest.mark.alone
def test_a_process_that_takes_too_long_is_ended_with_its_children(tmp_path: Path) -> None:
    note = tmp_path / "child"
    code = f"import subprocess; subprocess.run(['sh', '-c', 'echo $$ > {note}; exec sleep 60'])"
    started = time.monotonic()
    with pytest.raises(FailedError, match="ended after 2 seconds, as was asked for"):
        run([sys.executable, "-c", code], 2.0)
    assert time.monotonic() - started < 15
    child = Path("/proc", note.read_text().strip(), "cmdline")
    until = time.monotonic() + 5
    while child.exists() and child.read_bytes() and time.monotonic() < until:  # empty: ended, not yet waited for
        time.sleep(0.05)
    assert not child.exists() or child.read_bytes() == b""


def test_a_process_in_time_is_none_the_worse() -> None:
    assert run([sys.executable, "-c", "print(7)"], 60.0).stdout == "7\n"


@pytest.mark.parametrize(("told", "wanted"), [("/a:/b", ["/a", "/b"]), ("", [])])
def test_our_own_workers_find_what_this_process_finds(
    told: str, wanted: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Libraries in a folder of PYTHONPATH were there for the benchmark and not for its workers."""
    monkeypatch.setenv("PYTHONPATH", told)
    show = ["-c", "import os; print(os.environ['PYTHONPATH'])"]
    assert run([sys.executable, *show]).stdout.strip().split(":") == [str(processes.ROOT), *wanted]
    peer = tmp_path / "python"
    peer.symlink_to(sys.executable)
    assert run([peer, *show]).stdout.strip() == str(processes.ROOT)
