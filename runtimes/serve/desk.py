"""Who waits for what: the requests of a server's clients, and what the engine says of each. It is of one event loop.

Whoever talks to the engine gives its messages to `take`, and says with `lost` that it has ended: what was begun has
failed then, what waits is given to the next engine by `ready`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

from runtimes.errors import NotReadyError
from runtimes.serve.engine import Tick
from runtimes.serve.requests import (
    Capacity,
    Event,
    Failed,
    Measured,
    Request,
    Started,
    Texts,
    Token,
    check_queue,
    check_request,
)


class Submit(NamedTuple):
    """To the engine: answer this."""

    request: Request | Texts


class Cancel(NamedTuple):
    """To the engine: give this up."""

    request: str
    choice: int | None


ToEngine: TypeAlias = Submit | Cancel | None
"""None: come to an end"""


Feed: TypeAlias = asyncio.Queue[Event]
"""what comes of some requests, in order"""


class _Entry:
    """A request that is not answered yet."""

    def __init__(self, request: Request | Texts, feed: Feed) -> None:
        self.request, self.feed = request, feed
        self.started = False
        self.left = request.parts
        """choices, or texts, that have not ended"""

    def put(self, event: Event) -> None:
        """Take note of an event, and pass it on."""
        if isinstance(event, Started):
            self.started = True
        elif isinstance(event, Failed):
            self.left = 0
        elif isinstance(event, Token) and event.reason is not None:
            self.left -= 1
        elif isinstance(event, Measured):
            self.left -= len(event.places)
        self.feed.put_nowait(event)


class Desk:
    """The requests that are not answered yet."""

    def __init__(
        self,
        send: Callable[[ToEngine], object],
        *,
        queue: int | None = None,
        on_tick: Callable[[Tick], object] = lambda _: None,
    ) -> None:
        """Begin without an engine.

        Args:
            send: brings a message to the engine.
            queue: requests that may wait; None: any number.
            on_tick: called with what the engine says of itself.
        """
        self._send = send
        self._queue = queue
        self._on_tick = on_tick
        self._entries: dict[str, _Entry] = {}
        self._open = False
        self.capacity: Capacity | None = None
        """of the engine; None until there was one"""

    @property
    def open(self) -> bool:
        """Whether there is an engine."""
        return self._open

    @property
    def outstanding(self) -> int:
        """Requests that are not answered yet."""
        return len(self._entries)

    @property
    def waiting(self) -> int:
        """Requests that are not begun yet."""
        return sum(not entry.started for entry in self._entries.values())

    def submit(self, requests: Sequence[Request | Texts]) -> Feed:
        """Hand in requests, all or none.

        Returns:
            What comes of them.

        Raises:
            BusyError, NotReadyError: too many wait, or there is no engine now.
            InputError, UsageError: as `check_request`.
        """
        if not self._open or self.capacity is None:
            raise NotReadyError("the model is being loaded; try again later")
        for request in requests:
            check_request(request, self.capacity)
        check_queue(self.waiting, self._queue, len(requests))
        feed: Feed = asyncio.Queue()
        for request in requests:
            self._entries[request.id] = _Entry(request, feed)
            self._send(Submit(request))
        return feed

    def cancel(self, request_id: str, choice: int | None = None) -> None:
        """Give up a request, or one of its choices, if it is not answered yet."""
        entry = self._entries.get(request_id)
        if entry is None:
            return
        if choice is not None:
            entry.left -= 1
        if choice is None or entry.left == 0:
            del self._entries[request_id]
        self._send(Cancel(request_id, choice))

    def ready(self, capacity: Capacity) -> None:
        """Begin with an engine; it gets what waits."""
        self.capacity, self._open = capacity, True
        for entry in self._entries.values():
            self._send(Submit(entry.request))

    def take(self, tick: Tick) -> None:
        """Pass on what the engine says."""
        for event in tick.events:
            entry = self._entries.get(event.request)
            if entry is None:  # it was cancelled meanwhile
                continue
            entry.put(event)
            if entry.left <= 0:
                del self._entries[event.request]
        self._on_tick(tick)

    def lost(self, message: str) -> None:
        """Go on without an engine: what was begun has failed, what waits goes on waiting."""
        self._open = False
        for name, entry in list(self._entries.items()):
            if entry.started:
                del self._entries[name]
                entry.put(Failed(name, message, "lost"))
