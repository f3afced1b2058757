"""The process in which TensorRT compiles, or refits, one plan.

    python -P -m olmo2_export.engine.worker < REQUEST.json

Why a process of its own: TensorRT numbers things in the order of their addresses, so that two plans of one graph are
byte-identical only if memory is laid out in the same way, which has to be arranged before a process starts; what
TensorRT allocates, more than twice the plan, is given back whole; and a build can be killed at any time.

What it works on has names relative to the folder it runs in, and its request comes through a pipe: the length of a
path, or of an environment, would shift what is allocated after it.

Standard output carries one JSON message a line: {"phase": name, "fraction": 0.5}, {"log": level, "text": text}, and
last either {"result": CompileResult} or {"error": class name of `runtimes.errors`, "text": text}.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, TextIO

from olmo2_export.engine.builder import OnProgress
from olmo2_export.engine.compiler import CompileRequest, CompileResult, compile_plan
from olmo2_export.engine.refitter import RefitRequest, refit_plan
from runtimes.errors import Olmo2ExportError
from runtimes.manifest import ProfileRange

logger = logging.getLogger(__name__)

_ADDR_NO_RANDOMIZE = 0x0040000  # of personality(2)
_PR_SET_PDEATHSIG = 1  # of prctl(2)


def main() -> int:
    """Do what the request says; return the exit code. See the top of this file for what is read and printed."""
    reproducible = _be_reproducible()
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's handler would wait for the end of the build
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not mix with the messages
    logging.basicConfig(level=logging.DEBUG, handlers=[_ChannelHandler(channel)])
    if not reproducible:
        logger.info(
            "this system does not let a process arrange its memory: two plans of one graph can differ in some bytes"
        )

    def send(message: dict[str, object]) -> None:
        channel.write(json.dumps(message) + "\n")

    try:
        request = read_request(sys.stdin.read())
        with ThreadPoolExecutor(max_workers=1) as pool:  # a thread allocates from a heap of its own, untouched so far
            result = pool.submit(_work, request, lambda name, done: send({"phase": name, "fraction": done})).result()
    except Olmo2ExportError as error:
        send({"error": type(error).__name__, "text": str(error)})
        return error.exit_code
    except OSError as error:
        send({"error": "ResourceError", "text": f"{error.filename or 'plan'}: {error.strerror or error}"})
        return 1
    send({"result": asdict(result)})
    return 0


def read_request(text: str) -> CompileRequest | RefitRequest:
    """Read a request that was written as the JSON of `asdict`."""
    document = json.loads(text)
    return _compile_request(document) if "profiles" in document else RefitRequest(**document)


def _compile_request(document: Mapping[str, Any]) -> CompileRequest:
    profiles = {
        name: tuple(ProfileRange(r["name"], tuple(r["min"]), tuple(r["opt"]), tuple(r["max"])) for r in ranges)
        for name, ranges in document["profiles"].items()
    }
    tuples = {name: tuple(document[name]) for name in ("compute_capabilities", "flags")}
    return CompileRequest(**{**document, **tuples, "profiles": profiles})


def _work(request: CompileRequest | RefitRequest, on_progress: OnProgress) -> CompileResult:
    if isinstance(request, RefitRequest):
        return refit_plan(request, on_progress)
    return compile_plan(request, on_progress)


class _ChannelHandler(logging.Handler):
    """Sends log records to the parent process."""

    def __init__(self, channel: TextIO) -> None:
        super().__init__()
        self.channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        self.channel.write(json.dumps({"log": record.levelno, "text": record.getMessage()}) + "\n")


def _be_reproducible() -> bool:
    """Make this process allocate memory in the same way each time; tell whether the system let it.

    Addresses are not randomised, for which the process starts again, and TensorRT's threads take turns on one CPU
    without interrupting each other, which costs little: its work is serial but for the generation of kernels.
    Beside other processes two plans of one graph have differed in some bytes, seen twice; why is not known.
    """
    if sys.platform != "linux":
        return False
    cpus = sorted(os.sched_getaffinity(0))
    try:
        os.sched_setaffinity(0, {cpus[os.getpid() % len(cpus)]})
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    except PermissionError:
        return False
    libc = ctypes.CDLL(None)
    current = libc.personality(0xFFFFFFFF)  # reads it
    if current != -1 and current & _ADDR_NO_RANDOMIZE:
        return True
    if current != -1 and libc.personality(current | _ADDR_NO_RANDOMIZE) != -1:
        os.execv(sys.executable, sys.orig_argv)
    return False


def _die_with_parent() -> None:
    """Have the system kill this process if the one that waits for its plan is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
