"""The desk: which requests are taken, what each client hears, and what becomes of them when an engine ends."""

from __future__ import annotations

from typing import Any

import pytest

from runtimes.errors import BusyError, InputError, NotReadyError
from runtimes.serve.desk import Cancel, Desk, Feed, Submit
from runtimes.serve.engine import Tick
from runtimes.serve.requests import Capacity, Event, Failed, Request, Started, Token

CAPACITY = Capacity(vocab_size=50, max_cache_length=64, max_slots=2, kv_tokens=128)


def request(name: str, **options: Any) -> Request:
    return Request(id=name, prompt_ids=(1, 2), max_new_tokens=4, **options)


def tick(*events: Event) -> Tick:
    return Tick(list(events), running=0, waiting=0, kv_tokens=0, stepped=0, prompted=0, idle=True)


def heard(feed: Feed) -> list[Event]:
    found = []
    while not feed.empty():
        found.append(feed.get_nowait())
    return found


@pytest.fixture
def sent() -> list[Any]:
    return []


@pytest.fixture
def desk(sent: list[Any]) -> Desk:
    desk = Desk(sent.append, queue=2)
    desk.ready(CAPACITY)
    return desk


def test_each_hears_what_is_his_until_his_end(desk: Desk, sent: list[Any]) -> None:
    a, b = desk.submit([request("a")]), desk.submit([request("b", choices=2)])
    assert sent == [Submit(request("a")), Submit(request("b", choices=2))]
    events = [Started("a", 0), Token("a", 0, 7, None, "eos"), Started("b", 2), Token("b", 1, 8, None, "length")]
    desk.take(tick(*events))
    assert (heard(a), heard(b)) == (events[:2], events[2:])
    assert (desk.outstanding, desk.waiting) == (1, 0)
    desk.take(tick(Token("b", 0, 9, None, "length"), Token("a", 0, 1, None, None)))
    assert (heard(a), heard(b)) == ([], [Token("b", 0, 9, None, "length")])
    assert desk.outstanding == 0


def test_no_more_wait_than_may_and_of_several_all_or_none(desk: Desk, sent: list[Any]) -> None:
    desk.submit([request("a")])
    with pytest.raises(BusyError, match="1 requests wait, at most 2 may"):
        desk.submit([request("b"), request("c")])
    assert len(sent) == 1
    desk.take(tick(Started("a", 0)))
    desk.submit([request("b"), request("c")])
    with pytest.raises(InputError, match="choices"):
        desk.submit([request("d", choices=3)])


def test_a_cancelled_one_is_forgotten_and_the_engine_told(desk: Desk, sent: list[Any]) -> None:
    both = desk.submit([request("a"), request("b", choices=2)])
    desk.cancel("a")
    desk.cancel("a")
    desk.cancel("b", 1)
    assert desk.outstanding == 1
    desk.cancel("b", 0)
    assert desk.outstanding == 0
    assert sent[2:] == [Cancel("a", None), Cancel("b", 1), Cancel("b", 0)]
    desk.take(tick(Token("a", 0, 1, None, None)))
    assert heard(both) == []


def test_when_an_engine_ends_what_was_begun_has_failed_and_what_waits_goes_to_the_next(
    desk: Desk, sent: list[Any]
) -> None:
    a, b = desk.submit([request("a")]), desk.submit([request("b")])
    desk.take(tick(Started("a", 0)))
    desk.lost("it ended")
    assert not desk.open
    assert heard(a) == [Started("a", 0), Failed("a", "it ended", "lost")]
    with pytest.raises(NotReadyError, match="is being loaded"):
        desk.submit([request("c")])
    sent.clear()
    desk.ready(CAPACITY)
    assert sent == [Submit(request("b"))]
    desk.take(tick(Started("b", 0)))
    assert heard(b) == [Started("b", 0)]
