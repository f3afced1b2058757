"""Who waits for what: the requests of a server's clients, and what the engine says of each. It is of one event loop.

Whoever talks to the engine gives its messages to `take`, and says with `lost` that it has ended: what was begun has
failed then, what waits is given to the next engine by `ready`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

from runtimes.errors import BusyError
from runtimes.serve.engine import Tick
from runtimes.serve.requests import (
    Capacity,
    Event,
    Failed,
    Request,
    Started,
    Token,
    check_queue,
    check_request,
)


class Submit(NamedTuple):
    """To the engine: answer this."""

    request: Request


class Cancel(NamedTuple):
    """To the engine: give this up."""

    request: str
    choice: int | None


ToEngine: TypeAlias = Submit | Cancel | None
"""None: come to an end"""


class Feed:
    """What comes of one request, in order."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.started = False
        self.left = request.choices
        """choices that have not ended"""
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    async def next(self) -> Event:
        """Return the next event; wait for it."""
        return await self._events.get()

    def put(self, event: Event) -> None:
        """Take note of an event."""
        if isinstance(event, Started):
            self.started = True
        elif isinstance(event, Failed):
            self.left = 0
        elif isinstance(event, Token) and event.reason is not None:
            self.left -= 1
        self._events.put_nowait(event)


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
        self._feeds: dict[str, Feed] = {}
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
        return len(self._feeds)

    @property
    def waiting(self) -> int:
        """Requests that are not begun yet."""
        return sum(not feed.started for feed in self._feeds.values())

    def submit(self, requests: Sequence[Request]) -> list[Feed]:
        """Hand in requests, all or none.

        Raises:
            BusyError: too many wait, or there is no engine now.
            InputError: as `check_request`.
        """
        if not self._open or self.capacity is None:
            raise BusyError("the model is being loaded; try again later")
        for request in requests:
            check_request(request, self.capacity)
        check_queue(self.waiting, self._queue, len(requests))
        feeds = [Feed(request) for request in requests]
        for feed in feeds:
            self._feeds[feed.request.id] = feed
            self._send(Submit(feed.request))
        return feeds

    def cancel(self, request_id: str, choice: int | None = None) -> None:
        """Give up a request, or one of its choices, if it is not answered yet."""
        feed = self._feeds.get(request_id)
        if feed is None:
            return
        if choice is not None:
            feed.left -= 1
        if choice is None or feed.left == 0:
            del self._feeds[request_id]
        self._send(Cancel(request_id, choice))

    def ready(self, capacity: Capacity) -> None:
        """Begin with an engine; it gets what waits."""
        self.capacity, self._open = capacity, True
        for feed in self._feeds.values():
            self._send(Submit(feed.request))

    def take(self, tick: Tick) -> None:
        """Pass on what the engine says."""
        for event in tick.events:
            feed = self._feeds.get(event.request)
            if feed is None:  # it was cancelled meanwhile
                continue
            feed.put(event)
            if feed.left <= 0:
                del self._feeds[event.request]
        self._on_tick(tick)

    def lost(self, message: str) -> None:
        """Go on without an engine: what was begun has failed, what waits goes on waiting."""
        self._open = False
        for name, feed in list(self._feeds.items()):
            if feed.started:
                del self._feeds[name]
                feed.put(Failed(name, message, "lost"))
