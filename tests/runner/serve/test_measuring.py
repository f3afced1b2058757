"""Whole texts on an engine with a fake runner: batches across requests, beside answers, cancelled, broken."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.serving import FakeSlots, fake_state, fake_text

from runtimes.errors import ContextLengthError, InputError, Olmo2ExportError, UsageError
from runtimes.serve.desk import Desk
from runtimes.serve.engine import Engine
from runtimes.serve.requests import Event, Failed, Measured, Request, Started, Texts, Token


def vectors(name: str, *sequences: list[int], **options: Any) -> Texts:
    return Texts(name, tuple(map(tuple, sequences)), "vectors", **options)


def run(engine: Engine) -> list[Event]:
    events: list[Event] = []
    while not engine.idle:
        events += engine.tick().events
    return events


def found(events: list[Event], name: str) -> dict[int, list[float]]:
    return {
        place: row.tolist()
        for event in events
        if isinstance(event, Measured) and event.request == name
        for place, row in zip(event.places, event.values, strict=True)
    }


def test_texts_of_several_requests_share_a_batch_and_each_gets_its_own() -> None:
    runner = FakeSlots(hidden_states=(2, 4))
    engine = Engine(runner)
    engine.submit(vectors("a", [5, 6], [9]))
    engine.submit(vectors("b", [11]))
    events = run(engine)
    assert events[:2] == [Started("a", 0), Started("b", 0)]
    mean = np.mean([fake_state(5), fake_state(6)], axis=0)
    assert found(events, "a") == {0: (5 * mean).tolist(), 1: [5 * x for x in fake_state(9)]}
    assert found(events, "b") == {0: [5 * x for x in fake_state(11)]}
    assert runner.batches == [3]


def test_what_is_wanted_otherwise_is_another_batch() -> None:
    runner = FakeSlots(hidden_states=(2, 4))
    engine = Engine(runner)
    engine.submit(vectors("a", [5, 6]))
    engine.submit(vectors("b", [5, 6], pooling="last", hidden_state=2, normalize=True))
    events = run(engine)
    assert runner.batches == [1, 1]
    last = np.array(fake_state(6))
    np.testing.assert_allclose(found(events, "b")[0], last / np.linalg.norm(last), rtol=1e-6)


def test_an_exact_runner_and_a_classifier_without_padding_compute_texts_alone() -> None:
    for options in ({"hidden_states": (2,), "exact": True}, {"labels": ("good",), "pad_token_id": None}):
        runner = FakeSlots(**options)  # type: ignore[arg-type]
        engine = Engine(runner)
        engine.submit(Texts("a", ((5,), (6,)), "scores" if runner.model.labels else "vectors"))
        run(engine)
        assert runner.batches == [1, 1]


def test_a_classifier_scores_and_answers_nothing_else() -> None:
    engine = Engine(FakeSlots(labels=("bad", "good")))
    engine.submit(Texts("a", ((5, 6), (9,)), "scores"))
    assert found(run(engine), "a") == {0: fake_state(6)[:2], 1: fake_state(9)[:2]}
    with pytest.raises(UsageError, match="a classifier: it scores texts"):
        engine.submit(Request("b", (5,), 3))


def test_they_wait_for_answers_and_those_that_follow_wait_for_them() -> None:
    runner = FakeSlots(hidden_states=(2,), vocab_size=50)
    engine = Engine(runner)
    engine.submit(Request("before", (3, 1), 5))
    engine.submit(vectors("texts", [5, 6], [7]))
    engine.submit(Request("behind", (3, 1), 5))
    events = run(engine)
    order = [(type(e).__name__, e.request) for e in events if isinstance(e, Started | Measured)]
    assert order == [("Started", "before"), ("Started", "texts"), ("Measured", "texts"), ("Started", "behind")]
    for name in ("before", "behind"):
        assert [e.token_id for e in events if isinstance(e, Token) and e.request == name] == fake_text([3, 1], 5)
    assert runner.slots == () or len(runner.slots) == 1  # what is kept of the last


def test_a_cancelled_one_is_gone_and_others_get_theirs() -> None:
    runner = FakeSlots(hidden_states=(2,), max_slots=2)
    engine = Engine(runner)
    engine.submit(vectors("gone", *[[5]] * 9))
    engine.submit(vectors("stays", [6]))
    assert engine.tick().running == 2
    engine.cancel("gone")
    events = run(engine)
    assert found(events, "gone") == {}
    assert list(found(events, "stays")) == [0]
    assert engine.idle


def test_numbers_that_break_cost_their_own_request_alone() -> None:
    runner = FakeSlots(hidden_states=(2,))
    runner.broken = {6}
    engine = Engine(runner)
    engine.submit(vectors("broken", [5], [6]))
    engine.submit(vectors("whole", [7], [8]))
    events = run(engine)
    failed = [e for e in events if isinstance(e, Failed)]
    assert [(e.request, e.kind) for e in failed] == [("broken", "numeric")]
    assert sorted(found(events, "whole")) == [0, 1]


@pytest.mark.parametrize(
    ("options", "request_", "said", "kind"),
    [
        ({}, vectors("a", [1]), "export it with --hidden-states last", UsageError),
        ({"hidden_states": (2,)}, vectors("a", [1], hidden_state=3), "hidden state 3: this model gives 2", InputError),
        ({"hidden_states": (2,)}, vectors("a", [1], pooling="max"), "pooling 'max'", InputError),
        ({"hidden_states": (2,)}, vectors("a", [1], [50]), "text 1", InputError),
        ({"hidden_states": (2,)}, vectors("a", [1] * 65), "65", ContextLengthError),
        ({"hidden_states": (2,)}, Texts("a", ((1,),), "scores"), "no classifier", UsageError),
    ],
)
def test_what_could_never_be_measured_is_refused_at_once(
    options: dict[str, Any], request_: Texts, said: str, kind: type[Olmo2ExportError]
) -> None:
    engine = Engine(FakeSlots(**options))
    with pytest.raises(kind, match=said):
        engine.submit(request_)
    assert engine.idle


def test_a_desk_forgets_a_request_when_all_of_its_texts_are_measured() -> None:
    engine = Engine(FakeSlots(hidden_states=(2,), max_slots=1))
    desk = Desk(lambda message: engine.submit(message.request))  # type: ignore[union-attr]
    desk.ready(engine.capacity)
    feed = desk.submit([vectors("a", [1], [2])])
    for outstanding in (1, 0):
        desk.take(engine.tick())
        assert desk.outstanding == outstanding
    assert feed.qsize() == 3
