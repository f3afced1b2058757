"""SIGINT and SIGTERM as an exception of our own, so that `finally` clauses run and the exit code is exact.

Python's KeyboardInterrupt will not do: once one has passed through an `exec`, as in an import or a dataclass, the
interpreter ends by killing itself with SIGINT, whatever main() returned.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

BROKEN_PIPE_EXIT = 141
"""what a shell reports where the reader of a pipe went away: 128 + SIGPIPE, which Windows does not have"""


class Interrupted(BaseException):
    """Somebody asked the process to stop; not an Exception, so that nothing takes it for an error."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number
        """what a shell reports for that signal: 130 or 143"""


def _say_nothing(_: object) -> None:
    pass


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise `Interrupted` in the body on SIGINT and SIGTERM; the previous handlers come back at the end.

    Only the main thread may use it, as with `signal.signal`. After a signal the process is about to end: what objects
    that were being made just then say in their finalisers, as a progress bar does, is not told.
    """
    received: list[int] = []

    def on_signal(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        sys.unraisablehook = _say_nothing
        raise Interrupted(number)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except BaseException as error:
        if received and not isinstance(error, Interrupted):  # a library on the way made something else of it
            raise Interrupted(received[0]) from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
