"""Run something as a process of its own and say how long it took and how much memory it had."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtimes.errors import FailedError

ROOT = Path(__file__).parents[2]
"""the folder of the packages, for the interpreters of the peers"""


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


def run(command: Sequence[str | Path]) -> Finished:
    """Run a command to its end.

    Raises:
        FailedError: it did not exit with 0; with the last of what it said.
    """
    words = [str(word) for word in command]
    with tempfile.TemporaryDirectory(prefix="olmo2-bench-") as folder:
        out, err = Path(folder, "stdout"), Path(folder, "stderr")
        flags = os.O_WRONLY | os.O_CREAT
        started = time.monotonic()
        child = os.posix_spawn(
            words[0],
            words,
            os.environ | {"PYTHONPATH": str(ROOT)},
            file_actions=[(os.POSIX_SPAWN_OPEN, 1, out, flags, 0o600), (os.POSIX_SPAWN_OPEN, 2, err, flags, 0o600)],
        )
        with contextlib.suppress(OSError):  # where memory runs out, the kernel shall take this process and no other
            Path(f"/proc/{child}/oom_score_adj").write_text("800")
        _, status, usage = os.wait4(child, 0)
        seconds = time.monotonic() - started
        code = os.waitstatus_to_exitcode(status)
        if code != 0:
            said = "\n".join(err.read_text(errors="replace").splitlines()[-8:])
            raise FailedError(f"{' '.join(words)}: {_ended(code)}; it said\n{said}")
        return Finished(out.read_text(errors="replace"), seconds, round(usage.ru_maxrss * 1024 / 1e6))


def _ended(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    return f"ended by {name}{', most likely for want of memory' if name == 'SIGKILL' else ''}"


def stage(name: str, arguments: Sequence[str | Path]) -> dict[str, Any]:
    """Run one verb of `olmo2-export`, as a user runs it; return its name and its cost."""
    return {"stage": name, **run([sys.executable, "-m", "olmo2_export", name, *arguments]).cost}


def worker(python: str | Path, name: str, arguments: Sequence[str | Path]) -> dict[str, Any]:
    """Run a worker of `bench.workers` in an interpreter of its own; return the object of its last line.

    Raises:
        FailedError: as `run`, and if it printed no object.
    """
    finished = run([python, "-m", f"olmo2_export.bench.workers.{name}", *arguments])
    lines = finished.stdout.strip().splitlines()
    result: Any = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else None
    if not isinstance(result, dict):
        raise FailedError(f"worker {name} {' '.join(map(str, arguments))}: expected a JSON object, found {lines[-1:]}")
    return result
