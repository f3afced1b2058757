"""Run something as a process of its own and say how long it took and how much memory it had."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from olmo2_export.peak_memory import MAXRSS_UNIT
from runtimes.errors import FailedError, UsageError

ROOT = Path(__file__).parents[2]
"""the folder of the packages, for the interpreters of the peers"""
_GRACE = 10.0  # seconds
_TICK = 0.05  # seconds


@dataclass(frozen=True)
class Finished:
    """A process that exited with 0."""

    stdout: str
    seconds: float
    peak_memory_mb: int
    """of the process, or of the largest it started; mapped files included"""

    @property
    def cost(self) -> dict[str, Any]:
        return {"seconds": round(self.seconds, 1), "peak_memory_mb": self.peak_memory_mb}


def check_system() -> None:
    """Refuse a system on which processes cannot be measured, before anything is measured.

    Raises:
        UsageError: it is not Linux or macOS.
    """
    if not hasattr(os, "wait4"):
        raise UsageError("bench: this system does not say how much memory a process had; run it on Linux or macOS")


def run(command: Sequence[str | Path], seconds: float | None = None) -> Finished:
    """Run a command to its end.

    Args:
        command: what to run.
        seconds: end it, and all that it started, after that; None: never.

    Raises:
        FailedError: it cannot be started, did not exit with 0, with the last line of what it said, or took longer.
    """
    words = [str(word) for word in command]
    with tempfile.TemporaryDirectory(prefix="olmo2-bench-") as folder:
        out, err = Path(folder, "stdout"), Path(folder, "stderr")
        flags = os.O_WRONLY | os.O_CREAT
        started = time.monotonic()
        try:
            child = os.posix_spawn(
                words[0],
                words,
                os.environ | {"PYTHONPATH": _python_path(words[0])},
                file_actions=[(os.POSIX_SPAWN_OPEN, 1, out, flags, 0o600), (os.POSIX_SPAWN_OPEN, 2, err, flags, 0o600)],
                setpgroup=0,
            )
        except OSError as error:
            raise FailedError(f"{words[0]} cannot be started: {error.strerror}") from error
        with contextlib.suppress(OSError):  # where memory runs out, the kernel shall take this process and no other
            Path(f"/proc/{child}/oom_score_adj").write_text("800")
        try:
            ended = os.wait4(child, 0 if seconds is None else os.WNOHANG)
            while ended[0] == 0:
                if seconds is not None and time.monotonic() - started > seconds:
                    raise FailedError(f"{' '.join(words[:4])}: ended after {seconds:.0f} seconds, as was asked for")
                time.sleep(_TICK)
                ended = os.wait4(child, os.WNOHANG)
        except BaseException:
            _end(child)
            raise
        _, status, usage = ended
        took = time.monotonic() - started
        code = os.waitstatus_to_exitcode(status)
        if code != 0:
            said = err.read_text(errors="replace").strip()
            logging.getLogger(__name__).debug("%s: %s", " ".join(words), said)
            raise FailedError(f"{' '.join(words[:4])}: {_ended(code)}: {' '.join(said.splitlines()[-1:]) or 'silent'}")
        return Finished(out.read_text(errors="replace"), took, round(usage.ru_maxrss * MAXRSS_UNIT / 1e6))


def _python_path(python: str) -> str:
    """Return where an interpreter finds us; our own keeps what it was told, a peer's does not have our libraries."""
    told = os.environ.get("PYTHONPATH", "") if python == sys.executable else ""
    return os.pathsep.join(filter(None, [str(ROOT), told]))


def _end(child: int) -> None:
    """End a process and all that it started; it has some seconds to clean up."""
    os.killpg(child, signal.SIGTERM)
    until = time.monotonic() + _GRACE
    while time.monotonic() < until:
        if os.waitpid(child, os.WNOHANG) != (0, 0):
            return
        time.sleep(_TICK)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)


def _ended(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    return f"ended by {name}{', most likely for want of memory' if name == 'SIGKILL' else ''}"


def stage(name: str, arguments: Sequence[str | Path]) -> dict[str, Any]:
    """Run one verb of `olmo2-export`, as a user runs it; return its name and its cost."""
    return {"stage": name, **run([sys.executable, "-m", "olmo2_export", name, *arguments]).cost}


def worker(
    python: str | Path, name: str, arguments: Sequence[str | Path], seconds: float | None = None
) -> dict[str, Any]:
    """Run a worker of `bench.workers` in an interpreter of its own; return the object of its last line.

    Raises:
        FailedError: as `run`, and if it printed no object.
    """
    finished = run([python, "-m", f"olmo2_export.bench.workers.{name}", *arguments], seconds)
    lines = finished.stdout.strip().splitlines()
    try:
        result: Any = json.loads(lines[-1]) if lines else None
    except ValueError:
        result = None
    if not isinstance(result, dict):
        raise FailedError(f"worker {name}: expected a JSON object, found {lines[-1:]}")
    return result
