"""A process that renders Jinja templates, kept alive, and ended when one takes too long.

A start takes some 0.12 s, mostly for jinja2's import, and 22 MB; a rendering then about 1 ms.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from runtimes.chat import jinja_child
from runtimes.errors import BackendError, InputError, PackageError

_CHILD = Path(jinja_child.__file__)
_START_SECONDS = 30.0  # of an interpreter and one import, on a machine that does much else
_WAIT = 40.0 if hasattr(signal, "setitimer") else 1.0
"""by the clock, times the seconds of a CPU that a rendering may take: others want the CPU too"""
_MOST_INPUT = 8 << 20  # bytes
_LONGEST_REPLY = 6 * jinja_child.OUTPUT + 4096  # bytes; a character is at most \uXXXX
_KEPT = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "SYSTEMROOT", "TZ")
"""of the environment; keys and tokens are no business of a template's"""
_OUT_OF_TIME = getattr(signal, "SIGPROF", 0)
"""the signal that ends the process when a rendering takes too long"""


class TemplateError(PackageError):
    """A chat template that does not work; `kind` says why."""

    def __init__(self, kind: str, message: str, line: int | None = None) -> None:
        place = "chat template" if line is None else f"chat template, line {line}"
        super().__init__(f"{place}: {message}; take the template of the model's authors, and export again")
        self.kind = kind
        """syntax, sandbox, template, time, memory, output, or end: the process ended"""


class Renderer:
    """Renders templates in a process of its own, which is started when it is first needed.

    Several threads may use one; they take turns.
    """

    def __init__(self, *, seconds: float = 1.5) -> None:
        """Start nothing yet.

        Args:
            seconds: of a CPU that one rendering may take; by the clock forty times as many, or on Windows as many.
        """
        self._seconds = seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._found: dict[tuple[str, ...], list[str]] = {}

    def render(self, template: str, variables: Mapping[str, Any]) -> str:
        """Render a template.

        Args:
            template: its source.
            variables: what it may name; values that JSON can hold.

        Raises:
            InputError: the template refuses what it is given, with `raise_exception`; or variables are no JSON.
            TemplateError: it does not work, or takes too much time, memory or output.
            BackendError: jinja2 is not installed, or older than 3.1.6.
        """
        text: str = self._ask({"template": template, "variables": variables})["text"]
        return text

    def words_in(self, template: str, words: Sequence[str]) -> list[str]:
        """Return the words that stand in a template's own text, be it in the string constants of its expressions.

        Raises:
            TemplateError, BackendError: as `render`.
        """
        asked = (template, *words)
        if asked not in self._found:
            self._found[asked] = self._ask({"template": template, "words": list(words)})["found"]
        return self._found[asked]

    def close(self) -> None:
        """End the process; the next call starts another one."""
        with self._lock:
            self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        data = _encoded({"seconds": self._seconds, **request})
        with self._lock:
            try:
                process = self._process or self._started()
                self._process = process
                reply = _exchange(process, data, self._seconds, _WAIT * self._seconds)
            except BaseException:  # an interruption too: what it answers next would be the answer to this
                self._end()
                raise
        if "error" in reply:
            raise _failure(reply)
        return reply

    def _started(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-P", str(_CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in _KEPT if name in os.environ},
            start_new_session=True,  # Ctrl-C in the terminal is not for it
        )
        self._process = process
        hello = _exchange(process, b"", _START_SECONDS, _START_SECONDS)
        version = hello.get("jinja2")
        if version is None:
            raise BackendError("chat templates need jinja2, which is not installed; pip install 'olmo2-export[chat]'")
        if _numbers(version) < jinja_child.OLDEST:
            raise BackendError(
                f"jinja2 {version}: templates can leave its sandbox, expected 3.1.6 or later; "
                "pip install 'olmo2-export[chat]'"
            )
        return process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    _close(pipe)


def _encoded(request: Mapping[str, Any]) -> bytes:
    try:
        data = json.dumps(request, allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"messages or tools hold what JSON cannot ({error}); give strings, numbers, lists") from error
    if len(data) > _MOST_INPUT:
        raise InputError(f"messages and tools of {len(data)} bytes, at most {_MOST_INPUT} are rendered; shorten them")
    return data


def _exchange(process: subprocess.Popen[bytes], data: bytes, seconds: float, wait: float) -> dict[str, Any]:
    """Write a request and read a reply; the process is killed after a wait, which ends the reading.

    Args:
        process: which ends itself after so many `seconds` of a CPU.
        data: the request.
        seconds: for the error.
        wait: seconds by the clock.
    """
    assert process.stdin is not None
    assert process.stdout is not None
    late = threading.Event()

    def end() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(wait, end)
    timer.start()
    try:
        process.stdin.write(data)
        process.stdin.flush()
        line = process.stdout.readline(_LONGEST_REPLY)
    except BrokenPipeError:
        line = b""
    finally:
        timer.cancel()
    complete = line.endswith(b"\n")
    if not complete:
        process.kill()  # where it has not ended by itself
    if late.is_set() or (not complete and process.wait() == -_OUT_OF_TIME):
        raise TemplateError("time", f"it takes longer than {seconds:g} s")
    if not complete:
        raise TemplateError("end", "its process ended without an answer")
    reply = json.loads(line)
    return reply if isinstance(reply, dict) else {}


def _failure(reply: Mapping[str, Any]) -> InputError | TemplateError:
    kind, message, line = reply["error"], reply["message"], reply["line"]
    if kind == "refused":
        return InputError(f"the chat template refuses the messages: {message}")
    return TemplateError(kind, message, line)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())


def _close(pipe: Any) -> None:
    try:
        pipe.close()
    except BrokenPipeError:  # what was not written yet
        return
