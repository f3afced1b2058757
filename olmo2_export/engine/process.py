"""The exporter's side of the process in which TensorRT works: start it, follow it, take its result or its error."""

from __future__ import annotations

import json
import logging
import os
import selectors
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

import runtimes.errors
from olmo2_export.engine.compiler import CompileRequest, CompileResult
from olmo2_export.engine.refitter import RefitRequest
from runtimes.errors import EngineBuildError, Olmo2ExportError, ResourceError

logger = logging.getLogger(__name__)

WORKER = "olmo2_export.engine.worker"
"""the module that is run in a process of its own"""
_KILLED = -9  # SIGKILL, which Windows does not have
_ENVIRONMENT = ("LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES")  # what TensorRT may need; the rest would move its memory


def run_worker(request: CompileRequest | RefitRequest, folder: Path, *, progress: bool) -> CompileResult:
    """Run the process; show its progress, log what it logs, raise what it raises.

    Args:
        request: what to do; its paths are relative to the folder.
        folder: in which the process runs.
        progress: show a bar on standard error.

    Raises:
        Olmo2ExportError: what the process raised.
        ResourceError: it was killed.
        EngineBuildError: it ended without a result.
    """
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stderr:
        stdin.write(json.dumps(asdict(request)).encode())
        stdin.seek(0)
        with subprocess.Popen(
            worker_command(), stdin=stdin, stdout=subprocess.PIPE, stderr=stderr, cwd=folder, env=worker_environment()
        ) as process:
            try:
                outcome = _follow(process, Path(request.plan).name, progress)
            except BaseException:  # an interrupt included
                process.kill()
                raise
        stderr.seek(0)
        printed = stderr.read().decode(errors="replace").strip()
    if printed:
        logger.debug("printed by TensorRT: %s", printed)
    if "result" in outcome:
        return CompileResult(**outcome["result"])
    if "error" in outcome:
        kind = getattr(runtimes.errors, outcome["error"])
        assert issubclass(kind, Olmo2ExportError)  # the compiler sends no others
        raise kind(outcome["text"])
    if process.returncode == _KILLED:
        raise ResourceError(
            "the TensorRT process was killed, as the system does when memory runs out; it needs about "
            "three times the plan"
        )
    last = printed.splitlines()[-1] if printed else "it printed nothing"
    raise EngineBuildError(f"the TensorRT process ended with code {process.returncode}: {last}")


def worker_command() -> list[str]:
    """Return the command; -P keeps the folder it runs in out of the places modules come from."""
    return [sys.executable, "-P", "-m", WORKER]


def worker_environment() -> dict[str, str]:
    """Return the process's environment: it finds this package, and nothing else decides where its memory lies."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    kept = {name: value for name, value in os.environ.items() if name in _ENVIRONMENT}
    return {**kept, "PYTHONPATH": path, "PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"}


def _follow(process: subprocess.Popen[bytes], name: str, progress: bool) -> dict[str, Any]:
    """Show progress until the process closes its output; return its last message, the result or the error."""
    outcome: dict[str, Any] = {}
    form = "{desc} {percentage:3.0f}%|{bar:20}| {elapsed}{postfix}"
    with tqdm(desc=f"building {name}", total=1.0, bar_format=form, leave=False, disable=not progress) as bar:
        for message in _messages(process):
            if message is None:
                bar.refresh()
            elif "phase" in message:
                bar.set_postfix_str(message["phase"], refresh=False)
                bar.update(message["fraction"] - bar.n)  # shows it ten times a second at most
            elif "log" in message:
                logger.log(message["log"], "%s", message["text"])
            else:
                outcome = message
    return outcome


def _messages(process: subprocess.Popen[bytes]) -> Iterator[dict[str, Any] | None]:
    """Yield the messages of the compiler as they come, and None after every half second without one."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        buffer = b""
        while True:
            if not selector.select(timeout=0.5):
                yield None
                continue
            chunk = os.read(process.stdout.fileno(), 65536)
            if not chunk:
                return
            *lines, buffer = (buffer + chunk).split(b"\n")
            for line in lines:
                yield json.loads(line)
