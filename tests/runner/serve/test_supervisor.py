"""The process with the engine: it is killed, and nobody waits for ever; it cannot start, and that is said."""

from __future__ import annotations

import asyncio
import os
import signal
from functools import partial

import pytest
from support.serving import fake_text, open_fake_engine

from runtimes.errors import UsageError
from runtimes.serve.desk import Feed
from runtimes.serve.requests import Event, Failed, Request, Started, Token
from runtimes.serve.supervisor import Supervisor

pytestmark = pytest.mark.alone  # it kills processes

QUICK = (0.01, 0.05)


async def all_of(feed: Feed) -> list[Event]:
    events = [await feed.get()]
    while not isinstance(events[-1], Failed) and not (isinstance(events[-1], Token) and events[-1].reason):
        events.append(await feed.get())
    return events


def test_a_killed_engine_costs_those_it_answered_and_the_queue_goes_to_the_next() -> None:
    restarts: list[int] = []

    async def scenario() -> None:
        supervisor = Supervisor(open_fake_engine, on_restart=lambda: restarts.append(1), backoff=QUICK)
        await supervisor.start()
        desk, first = supervisor.desk, supervisor.pid
        assert desk.capacity is not None
        assert desk.capacity.max_slots == 1
        running = desk.submit([Request("running", (3, 1), 400)])
        queued = desk.submit([Request("queued", (3, 1, 4), 5)])
        desk.submit([Request("gone", (1,), 5)])
        assert await running.get() == Started("running", 0)
        assert isinstance(await running.get(), Token)
        desk.cancel("gone")
        assert first is not None
        os.kill(first, signal.SIGKILL)
        async with asyncio.timeout(30):
            failed = (await all_of(running))[-1]
            answered = await all_of(queued)
        assert isinstance(failed, Failed)
        assert (failed.kind, "SIGKILL" in failed.message) == ("lost", True)
        assert [e.token_id for e in answered if isinstance(e, Token)] == fake_text([3, 1, 4], 5)
        assert supervisor.pid != first
        assert desk.open
        assert restarts == [1]
        again = desk.submit([Request("again", (2, 7), 300)])
        await again.get()
        desk.cancel("again")
        assert desk.outstanding == 0
        process = supervisor._process
        assert process is not None
        await supervisor.close()
        assert process.exitcode == 0

    asyncio.run(scenario())


def test_what_cannot_be_opened_is_said_at_the_first_start() -> None:
    async def scenario() -> None:
        supervisor = Supervisor(partial(open_fake_engine, refuse="no such package"), backoff=QUICK)
        with pytest.raises(UsageError, match="no such package"):
            await supervisor.start()
        await supervisor.close()

    asyncio.run(scenario())
