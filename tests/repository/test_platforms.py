"""Systems without fcntl, resource, SIGPIPE, fork or /proc, as Windows, and with bytes in ru_maxrss, as macOS."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import namedtuple
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from olmo2_export import peak_memory
from olmo2_export.bench import machine, processes
from olmo2_export.bench.workers import common
from olmo2_export.verbs.words import megabytes
from runtimes.errors import UsageError

ROOT = Path(__file__).parents[2]

# What POSIX alone has is taken away. torch and the standard library ask for the platform's name before they use such
# things, so that theirs stay: what they look for is imported before, and SIGKILL, getuid and WNOHANG are left.
# Several commands may run, as a process that imports torch costs seconds. A zero byte ends what each wrote.
WINDOWS = """
import json, os, shutil, signal, sys

class NotOnWindows:
    def find_spec(self, name, path=None, target=None):
        if name in ("fcntl", "resource", "pwd", "grp", "termios"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotOnWindows())
for name in ("SIGPIPE", "SIGHUP", "SIGQUIT", "SIGALRM", "SIGUSR1"):
    delattr(signal, name)
for name in "sched_getaffinity sched_setaffinity fork geteuid wait4 killpg posix_spawn getloadavg".split():
    if hasattr(os, name):
        delattr(os, name)
for program, *words in json.loads(sys.argv[1]):
    if program == "run":
        from runtimes.cli import main
    else:
        from olmo2_export.cli import main
    try:
        code = main(words)
    except SystemExit as end:
        code = end.code or 0
    sys.stdout.write(f"\\0{code}\\0")
    sys.stderr.write("\\0")
"""


@dataclass(frozen=True)
class Done:
    """What a command left."""

    returncode: int
    stdout: str
    stderr: str


def on_windows(*commands: Sequence[str | Path]) -> list[Done]:
    """Run commands one after the other, in one process that is new."""
    words = json.dumps([list(map(str, command)) for command in commands])
    python = [sys.executable, "-W", "ignore::UserWarning", "-c", WINDOWS, words]
    process = subprocess.run(python, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert process.returncode == 0, process.stderr
    outs, errors = process.stdout.split("\0"), process.stderr.split("\0")
    assert (outs.pop(), errors.pop()) == ("", "")
    return [Done(int(code), out, err) for out, code, err in zip(outs[::2], outs[1::2], errors, strict=True)]


@pytest.mark.parametrize("words", [("export", "--help"), ("export", "export", "--help"), ("run", "--help")])
def test_help_is_there(words: tuple[str, ...]) -> None:
    (done,) = on_windows(words)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: olmo2-")


ERRORS: list[tuple[tuple[str, ...], str]] = [
    (("inspect", "nowhere"), "nowhere: no such folder"),
    (("export", "nowhere", "--out", "x"), "nowhere: no such folder"),
    (("export",), "the following arguments are required"),
    (("bench", "nowhere"), "run it on Linux or macOS"),
]


@pytest.fixture(scope="module")
def refused() -> dict[tuple[str, ...], Done]:
    commands = [words for words, _ in ERRORS]
    return dict(zip(commands, on_windows(*(("export", *words) for words in commands)), strict=True))


@pytest.mark.parametrize(("words", "said"), ERRORS)
def test_an_error_is_one_line(words: tuple[str, ...], said: str, refused: dict[tuple[str, ...], Done]) -> None:
    done = refused[words]
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_package_is_inspected_and_run(demo_package: Path) -> None:
    generate = ["run", "generate", demo_package, "--prompt", "In the beginning", "--max-new-tokens", "3"]
    inspected, generated = on_windows(["export", "inspect", demo_package], generate)
    assert (inspected.returncode, inspected.stderr) == (0, "")
    assert "variant fp32" in inspected.stdout
    assert (generated.returncode, generated.stderr) == (0, "")


def test_a_package_is_exported_and_replaced(tiny_checkpoint: Path, tmp_path: Path) -> None:
    command = ["export", "export", tiny_checkpoint, "--out", tmp_path / "out"]
    for done in on_windows(command, [*command, "--force"]):
        assert done.returncode == 0, done.stderr
        assert "peak memory unknown" in done.stdout
        assert "WARNING: a file system" not in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("platform", "expected"), [("linux", 5_120_000), ("darwin", 5_000)])
def test_peak_memory_is_in_bytes(platform: str, expected: int) -> None:
    """ru_maxrss counts kilobytes on Linux, bytes on macOS."""
    code = (
        f"import sys, resource, collections; sys.platform = {platform!r}\n"
        "resource.getrusage = lambda _: collections.namedtuple('usage', 'ru_maxrss')(5000)\n"
        "from olmo2_export.peak_memory import peak_bytes; print(peak_bytes())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert int(done.stdout) == expected


@pytest.mark.alone
def test_peak_memory_is_what_this_process_had() -> None:
    held = bytearray(1 << 26)
    peak = peak_memory.peak_bytes()
    assert peak is not None
    assert len(held) < peak < 1 << 40


def test_peak_memory_that_nobody_counts_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak_memory, "resource", None)
    assert peak_memory.peak_bytes() is None
    assert megabytes(None) == "unknown"
    assert megabytes(1_234_567) == "1.2 MB"


def test_a_process_is_measured_in_the_unit_of_its_system(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "ru_maxrss")  # as os.wait4's
    monkeypatch.setattr(processes.os, "posix_spawn", lambda *_, **__: 1 << 30)
    monkeypatch.setattr(processes.Path, "read_text", lambda *_, **__: "")
    monkeypatch.setattr(processes.os, "wait4", lambda child, _: (child, 0, usage(70_000_000)))
    monkeypatch.setattr(processes, "MAXRSS_UNIT", 1)
    assert processes.run(["true"]).peak_memory_mb == 70


def test_bench_asks_for_a_system_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    processes.check_system()
    monkeypatch.delattr(processes.os, "wait4")
    with pytest.raises(UsageError, match="run it on Linux or macOS"):
        processes.check_system()


def test_a_machine_without_proc_has_a_name_and_a_peak(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "none")
    monkeypatch.setattr(machine.platform, "processor", lambda: "arm")
    assert machine.processor() == "arm"
    assert machine.multiplies_bfloat16() is False
    monkeypatch.setattr(common, "_STATUS", tmp_path / "none")
    monkeypatch.setattr(common, "peak_bytes", lambda: 5_000_000)
    assert json.dumps(common.resident()) == '{"resident_mb": 5.0, "peak_resident_mb": 5.0}'
