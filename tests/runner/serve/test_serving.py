"""The engine of a server, on a runner without a model and a clock that it moves: who is answered when, and how."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.serving import FakeClock, FakeSlots, fake_text

from runtimes.errors import BusyError, ContextLengthError, InputError
from runtimes.serve.engine import Engine
from runtimes.serve.requests import Event, Failed, Request, Scored, Started, Token
from runtimes.text.structured import Form

VOCAB, CONTEXT = 50, 64


def request(name: str, prompt: list[int], new: int = 5, **options: Any) -> Request:
    return Request(id=name, prompt_ids=tuple(prompt), max_new_tokens=new, **options)


def engine_on(runner: FakeSlots, **options: Any) -> Engine:
    return Engine(runner, clock=runner.clock, **options)


def run(engine: Engine, ticks: int = 1000) -> list[Event]:
    """Tick until there is nothing to do."""
    events: list[Event] = []
    for _ in range(ticks):
        if engine.idle:
            return events
        events += engine.tick().events
    raise AssertionError("it does not end")


def tokens_of(events: list[Event], name: str, choice: int = 0) -> list[int | None]:
    return [e.token_id for e in events if isinstance(e, Token) and (e.request, e.choice) == (name, choice)]


def started(events: list[Event]) -> list[str]:
    return [e.request for e in events if isinstance(e, Started)]


# What each gets


def test_a_request_gets_its_tokens_and_the_reason() -> None:
    engine = engine_on(FakeSlots())
    assert engine.idle
    engine.submit(request("a", [3, 1, 4], 6))
    assert not engine.idle
    events = run(engine)
    assert events[0] == Started("a", 0)
    assert tokens_of(events, "a") == fake_text([3, 1, 4], 6)
    assert [e.reason for e in events if isinstance(e, Token)] == [None] * 5 + ["length"]


def test_an_end_token_ends_it() -> None:
    wanted = fake_text([3, 1, 4], 6)
    engine = engine_on(FakeSlots())
    engine.submit(request("a", [3, 1, 4], 20, eos_token_ids=(wanted[2],)))
    events = run(engine)
    assert tokens_of(events, "a") == wanted[: wanted.index(wanted[2]) + 1]
    assert isinstance(events[-1], Token)
    assert events[-1].reason == "eos"


def test_no_token_may_be_asked_for() -> None:
    engine = engine_on(FakeSlots())
    engine.submit(request("a", [3, 1, 4], 0, choices=2))
    assert run(engine) == [Started("a", 0), Token("a", 0, None, None, "length"), Token("a", 1, None, None, "length")]


def test_choices_share_a_prompt_and_have_seeds_of_their_own() -> None:
    def sampled(choices: int, seed: int) -> list[list[int | None]]:
        runner = FakeSlots()
        engine = engine_on(runner)
        engine.submit(request("a", [3, 1, 4, 1, 5], 8, choices=choices, temperature=5.0, seed=seed))
        events = run(engine)
        assert runner.pieces == [5]  # the prompt is computed once
        return [tokens_of(events, "a", choice) for choice in range(choices)]

    three = sampled(3, 7)
    assert three == [*sampled(1, 7), *sampled(1, 8), *sampled(1, 9)]
    assert len({tuple(text) for text in three}) == 3


def test_log_probabilities_of_tokens_and_of_the_prompt() -> None:
    prompt = list(range(1, 20))
    engine = engine_on(FakeSlots())
    engine.submit(request("other", [7, 7], 30))
    engine.submit(request("a", prompt, 2, logprobs=3, prompt_logprobs=2))
    events = run(engine)
    noted = [e.logprobs for e in events if isinstance(e, Token) and e.request == "a"]
    assert [n.token_id for n in noted if n] == fake_text(prompt, 2)
    assert [len(n.top) for n in noted if n] == [3, 3]
    assert all(n.rank == 1 for n in noted if n)
    scored = [found for e in events if isinstance(e, Scored) for found in e.logprobs]
    assert [found.token_id for found in scored] == prompt[1:]
    assert {len(found.top) for found in scored} == {2}
    assert [found.top[0][0] for found in scored] == [fake_text(prompt[:n], 1)[0] for n in range(1, 19)]
    assert not any(isinstance(e, Scored) for e in events if e.request == "other")


def test_a_bias_and_a_penalty_reach_the_draw() -> None:
    engine = engine_on(FakeSlots())
    engine.submit(request("a", [3, 1], 3, logit_bias=((9, 100.0),)))
    engine.submit(request("b", [3, 1], 3, logit_bias=((9, 10.0), (8, 9.0)), presence_penalty=8.0))
    events = run(engine)
    assert tokens_of(events, "a") == [9, 9, 9]
    assert tokens_of(events, "b")[:2] == [9, 8]


# What is refused, and what fails alone


@pytest.mark.parametrize(
    ("options", "said", "kind"),
    [
        ({"prompt": [VOCAB]}, "vocabulary has 0 to 49", InputError),
        ({"prompt": []}, "at least one token id", InputError),
        ({"new": 62}, "make 65: the context holds 64", ContextLengthError),
        ({"choices": 5, "new": 1}, "5 choices, this server has 4 slots", InputError),
        ({"choices": 4, "new": 50}, "make 212: this server holds 200", ContextLengthError),
        ({"adapter": "third"}, "this runner has first, second", InputError),
        ({"temperature": -1.0}, "temperature -1.0", InputError),
        ({"logit_bias": ((50, 1.0),)}, "token id 50", InputError),
        ({"logprobs": 51}, "logprobs 51", InputError),
    ],
)
def test_what_could_never_be_answered_is_refused_at_once(options: dict[str, Any], said: str, kind: type) -> None:
    runner = FakeSlots()
    engine = engine_on(runner, kv_tokens=200)
    with pytest.raises(kind, match=said):
        engine.submit(request("a", options.pop("prompt", [3, 1, 4]), **options))
    assert engine.idle
    assert runner.slots == ()


def test_an_id_that_is_being_answered_is_refused_again() -> None:
    engine = engine_on(FakeSlots())
    engine.submit(request("a", [1]))
    with pytest.raises(InputError, match="request 'a'"):
        engine.submit(request("a", [2]))
    engine.tick()
    with pytest.raises(InputError, match="request 'a'"):
        engine.submit(request("a", [2]))
    run(engine)
    engine.submit(request("a", [2]))


def test_the_queue_is_bounded() -> None:
    engine = engine_on(FakeSlots(), queue=2)
    for name in "ab":
        engine.submit(request(name, [1]))
    with pytest.raises(BusyError, match="2 requests wait, at most 2 may"):
        engine.submit(request("c", [1]))
    engine.tick()
    engine.submit(request("c", [1]))
    assert started(run(engine)) == ["b", "c"]


def test_numbers_that_break_end_their_own_answer_alone() -> None:
    prompt, other = [3, 1, 4], [2, 7]
    wanted = fake_text(prompt, 6)
    runner = FakeSlots()
    runner.broken = {wanted[2]}
    assert not runner.broken & set(fake_text(other, 7))
    engine = engine_on(runner)
    engine.submit(request("broken", prompt, 6))
    engine.submit(request("whole", other, 8))
    events = run(engine)
    (failure,) = (e for e in events if isinstance(e, Failed))
    assert (failure.request, failure.kind) == ("broken", "numeric")
    assert "NaN or infinite" in failure.message
    assert tokens_of(events, "broken") == wanted[:3]
    assert tokens_of(events, "whole") == fake_text(other, 8)
    assert len(engine._kept.texts) == len(runner.slots)


def test_numbers_that_break_in_a_prompt_end_it_alone() -> None:
    runner = FakeSlots()
    runner.broken = {9}
    engine = engine_on(runner)
    engine.submit(request("broken", [1, 2, 9]))
    engine.submit(request("whole", [1, 2, 3]))
    events = run(engine)
    assert [e.request for e in events if isinstance(e, Failed)] == ["broken"]
    assert len(tokens_of(events, "whole")) == 5


def test_a_choice_that_breaks_takes_the_others_of_its_request_with_it() -> None:
    runner = FakeSlots()
    engine = engine_on(runner)
    engine.submit(request("a", [3, 1, 4, 1], 20, choices=3, temperature=50.0, seed=1))
    engine.submit(request("b", [2, 7], 4))
    events = engine.tick().events
    runner.broken = {int(t) for t in tokens_of(events, "a", 1) if t is not None}
    events += run(engine)
    assert [e.request for e in events if isinstance(e, Failed)] == ["a"]
    assert len(tokens_of(events, "b")) == 4


def test_a_form_that_nobody_can_enforce_fails_alone() -> None:
    engine = engine_on(FakeSlots())
    engine.submit(request("a", [1], form=Form("regex", "x")))
    engine.submit(request("b", [1]))
    events = run(engine)
    assert [(e.request, e.kind) for e in events if isinstance(e, Failed)] == [("a", "input")]
    assert len(tokens_of(events, "b")) == 5


# When


def test_a_long_prompt_enters_between_steps_in_pieces_that_last_two_of_them() -> None:
    clock = FakeClock()
    runner = FakeSlots(clock=clock, context=1024)
    engine = engine_on(runner)
    engine.submit(request("running", [1, 2], 60))
    run_until_answering(engine)
    for _ in range(20):
        engine.tick()
    runner.pieces.clear()
    engine.submit(request("long", [1] * 400, 1))
    times = []
    while not any(isinstance(e, Token) and e.request == "long" for e in engine.tick().events):
        times.append(clock.now)
    gaps = np.diff(times)
    assert gaps.max() <= 3 * 0.01 + 1e-9  # a step of 10 ms, and 20 tokens of 1 ms
    assert len(runner.pieces) >= 400 / 20
    assert min(runner.pieces[:-1]) >= 8


def run_until_answering(engine: Engine) -> None:
    while not any(isinstance(e, Token) for e in engine.tick().events):
        pass


def test_where_nobody_waits_pieces_are_as_long_as_a_cancellation_may_take() -> None:
    runner = FakeSlots(context=1024)
    engine = engine_on(runner)
    engine.submit(request("long", [1] * 300, 1))
    run(engine)
    assert runner.pieces == [128, 128, 44]


def test_a_time_for_prompts_may_be_given() -> None:
    runner = FakeSlots(context=1024)
    engine = engine_on(runner, prefill_seconds=0.05)
    engine.submit(request("running", [1, 2], 200))
    run_until_answering(engine)
    engine.submit(request("long", [1] * 600, 1))
    for _ in range(8):
        engine.tick()
    assert sum(runner.pieces[-2:]) >= 48


def test_requests_are_begun_in_the_order_in_which_they_came() -> None:
    """One that would fit does not pass one that waits for room."""
    engine = engine_on(FakeSlots(), kv_tokens=60)
    engine.submit(request("first", [1] * 10, 20))
    engine.submit(request("large", [2] * 10, 40))
    engine.submit(request("small", [3], 2))
    events = engine.tick().events
    assert started(events) == ["first"]
    tick = engine.tick()
    assert (tick.running, tick.waiting) == (1, 2)
    assert started(run(engine)) == ["large", "small"]


def test_what_is_accepted_never_holds_more_than_there_is() -> None:
    engine = engine_on(FakeSlots(max_slots=4), kv_tokens=70)
    for n in range(6):
        engine.submit(request(str(n), [n + 1] * 9, 11))
    seen = []
    while not engine.idle:
        tick = engine.tick()
        seen.append(tick.kv_tokens)
        assert tick.running <= 3
    assert max(seen) <= 70


def test_a_cancelled_request_is_gone_with_the_next_tick() -> None:
    runner = FakeSlots(context=512)
    engine = engine_on(runner, kept_rows=0)
    engine.submit(request("running", [1, 2], 40))
    engine.submit(request("other", [5], 3))
    run_until_answering(engine)
    engine.submit(request("entering", [1] * 300, 5))
    engine.submit(request("waiting", [4], 5))
    engine.tick()
    assert len(runner.slots) == 3
    for name in ("running", "entering", "waiting", "not there"):
        engine.cancel(name)
    assert len(runner.slots) <= 1
    events = run(engine)
    assert {e.request for e in events} <= {"other"}
    assert runner.slots == ()


def test_one_choice_may_be_cancelled() -> None:
    engine = engine_on(FakeSlots())
    engine.submit(request("a", [3, 1], 6, choices=2))
    events = engine.tick().events
    engine.cancel("a", 1)
    events += run(engine)
    assert len(tokens_of(events, "a", 0)) == 6
    assert len(tokens_of(events, "a", 1)) == 1


# What is kept


def test_the_next_turn_of_a_conversation_computes_what_is_new() -> None:
    runner = FakeSlots()
    engine = engine_on(runner)
    first = list(range(1, 13))
    engine.submit(request("a", first, 5))
    run(engine)
    runner.pieces.clear()
    second = [*first, *fake_text(first, 5), 8, 9]
    engine.submit(request("b", second, 4))
    events = run(engine)
    assert events[0] == Started("b", 16)  # the last token of the answer was never fed
    assert runner.pieces == [3]
    assert tokens_of(events, "b") == fake_text(second, 4)
    assert len(runner.slots) == 1  # the text was gone on with, not copied


def test_a_shared_beginning_is_copied_from_one_that_is_being_answered() -> None:
    runner = FakeSlots(max_slots=3)
    engine = engine_on(runner)
    system = list(range(1, 21))
    prompts = {name: [*system, n, n + 1] for n, name in enumerate("abc")}
    for name, prompt in prompts.items():
        engine.submit(request(name, prompt, 6))
    events = run(engine)
    assert [e.reused for e in events if isinstance(e, Started)] == [0, 20, 20]
    assert all(tokens_of(events, name) == fake_text(prompt, 6) for name, prompt in prompts.items())


def test_the_text_that_was_used_longest_ago_goes_first() -> None:
    runner = FakeSlots(max_slots=4)
    engine = engine_on(runner, kept_rows=2)
    texts = {name: [n] * 10 for n, name in enumerate("abc", 1)}
    for name in "ab":
        engine.submit(request(name, [*texts[name], 7], 2))
        run(engine)
    engine.submit(request("a again", [*texts["a"], 8], 2))  # of use
    assert run(engine)[0] == Started("a again", 10)
    engine.submit(request("c", [*texts["c"], 7], 2))
    run(engine)
    assert len(runner.slots) == 2
    engine.submit(request("b again", [*texts["b"], 9], 2))
    assert run(engine)[0] == Started("b again", 0)


def test_a_text_of_another_adapter_is_not_taken() -> None:
    engine = engine_on(FakeSlots())
    prompt = list(range(1, 15))
    for name, adapter in (("a", None), ("b", "first"), ("c", "first")):
        engine.submit(request(name, prompt, 2, adapter=adapter))
        events = run(engine)
        assert events[0] == Started(name, 13 if name == "c" else 0)


def test_an_exact_runner_reuses_what_a_prompt_computed_and_leaves_eight_tokens() -> None:
    runner = FakeSlots(exact=True)
    engine = engine_on(runner)
    first = list(range(1, 22))
    engine.submit(request("a", first, 9))
    run(engine)
    second = [*first, *fake_text(first, 9), 8, 9]
    engine.submit(request("b", second, 4))
    events = run(engine)
    assert events[0] == Started("b", 16)
    assert tokens_of(events, "b") == fake_text(second, 4)
    engine.submit(request("c", first, 1))
    assert run(engine)[0] == Started("c", 8)  # of 21 tokens the last 8 to 15 are computed


def test_kept_texts_do_not_make_steps_of_others_dearer() -> None:
    runner = FakeSlots(max_slots=4)
    engine = engine_on(runner)
    for n in range(1, 4):
        engine.submit(request(str(n), [n] * 12, 2 + n))
    run(engine)
    assert len(runner.slots) == 3
    runner.rows.clear()
    engine.submit(request("alone", [9] * 12, 8))
    run(engine)
    assert runner.rows == [1] * 7


def test_where_rows_cannot_be_copied_a_text_is_gone_on_with_or_left(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = FakeSlots()
    monkeypatch.setattr(runner, "_copies_rows", False)
    engine = engine_on(runner)
    first = list(range(1, 21))
    engine.submit(request("a", first, 5))
    run(engine)
    runner.pieces.clear()
    engine.submit(request("b", [*first[:15], 30, 31], 5))
    engine.submit(request("c", [*first[:15], 32, 33], 5))
    events = run(engine)
    assert [e.reused for e in events if isinstance(e, Started)] == [15, 0]
    assert (runner.pieces[0], sum(runner.pieces)) == (2, 2 + 17)  # nothing is computed for a copy
    assert tokens_of(events, "c") == fake_text([*first[:15], 32, 33], 5)


# Whatever comes


ARRIVALS = st.lists(
    st.tuples(
        st.integers(0, 3),  # ticks before it
        st.integers(0, 2),  # which beginning it shares
        st.integers(1, 30),  # tokens of the prompt behind it
        st.integers(0, 12),  # new tokens
        st.integers(1, 3),  # choices
        st.one_of(st.none(), st.integers(0, 9)),  # ticks until it is cancelled
    ),
    max_size=14,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    arrivals=ARRIVALS,
    max_slots=st.integers(3, 6),
    exact=st.booleans(),
    copies=st.booleans(),
    kept=st.integers(0, 6),
    kv=st.integers(150, 300),
)
def test_no_slot_is_lost_and_every_request_ends(
    arrivals: list[tuple[int, int, int, int, int, int | None]],
    max_slots: int,
    exact: bool,
    copies: bool,
    kept: int,
    kv: int,
) -> None:
    runner = FakeSlots(max_slots=max_slots, exact=exact, context=64)
    runner._copies_rows = copies
    engine = engine_on(runner, kept_rows=kept, kv_tokens=kv)
    beginnings = [[], [5] * 11, list(range(1, 18))]
    events: list[Event] = []
    sent: dict[str, Request] = {}
    gone: dict[int, list[str]] = {}
    now = 0

    def tick() -> None:
        nonlocal now
        for name in gone.pop(now, []):
            engine.cancel(name)
        found = engine.tick()
        assert found.kv_tokens <= kv
        assert found.running <= max_slots
        assert sorted(runner.slots) == sorted([*engine._kept.texts, *engine._answers, *prompt_slots(engine)])
        assert len(set(runner._rows.values())) == len(runner._rows)
        events.extend(found.events)
        now += 1

    for number, (wait, beginning, more, new, choices, cancelled) in enumerate(arrivals):
        for _ in range(wait):
            tick()
        name = str(number)
        prompt = [*beginnings[beginning], *((n * 7 + number) % VOCAB for n in range(more))]
        made = request(name, prompt, new, choices=choices)
        try:
            engine.submit(made)
        except ContextLengthError:  # three choices may be too many
            continue
        sent[name] = made
        if cancelled is not None:
            gone.setdefault(now + cancelled, []).append(name)
    dropped = {name for names in gone.values() for name in names}
    for _ in range(2000):
        if engine.idle:
            break
        tick()
    assert engine.idle
    assert sorted(runner.slots) == sorted(engine._kept.texts)
    assert not any(isinstance(e, Failed) for e in events)
    began = started(events)
    assert began == sorted(began, key=int)  # in the order in which they came
    ended = Counter(e.request for e in events if isinstance(e, Token) and e.reason is not None)
    for name, made in sent.items():
        wanted = fake_text(made.prompt_ids, made.max_new_tokens)
        for choice in range(made.choices):
            got = [t for t in tokens_of(events, name, choice) if t is not None]
            assert got == wanted[: len(got)]
        if name not in dropped and name not in cancelled_before(arrivals, name):
            assert ended[name] == made.choices


def prompt_slots(engine: Engine) -> list[int]:
    return [] if engine._prompt is None else [engine._prompt.slot]


def cancelled_before(arrivals: list[tuple[int, int, int, int, int, int | None]], name: str) -> set[str]:
    return {name} if arrivals[int(name)][-1] is not None else set()
