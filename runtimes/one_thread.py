"""A runner, or a drafter, serves one thread at a time: another that calls it meanwhile is refused, not given nonsense.

The lock is taken for one call, so that threads may take turns; `generation.generate` holds it while a text must
not be changed by others. Nobody waits: who meets a runner in use has given one runner to two threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from runtimes.errors import UsageError


class OneThread:
    """A context that one thread is in at a time; it may enter it again."""

    def __init__(self, name: str = "the runner") -> None:
        """Take what it is called in the error."""
        self._name = name
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise UsageError(
                f"{self._name} is in use by another thread and serves one at a time; open one for each thread, or put "
                "a lock around it"
            )

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class _Exclusive(Protocol):
    exclusive: OneThread


_S = TypeVar("_S", bound=_Exclusive)
_P = ParamSpec("_P")
_R = TypeVar("_R")


def one_thread(method: Callable[Concatenate[_S, _P], _R]) -> Callable[Concatenate[_S, _P], _R]:
    """Let a method refuse, with a UsageError, what another thread asks while it is in use."""

    @wraps(method)
    def guarded(self: _S, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        with self.exclusive:
            return method(self, *args, **kwargs)

    return guarded
