"""Two threads that really overlap on one runner: what one alone gets, or one line; and never for both the line."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from runtimes import open_runner
from runtimes.errors import InputError, UsageError
from runtimes.generation.generate import generate, generate_tokens
from runtimes.ort.concat import ConcatRunner
from runtimes.ort.device import DeviceRunner
from runtimes.ort.shared import SharedRunner
from runtimes.runners.rows import RowRunner
from runtimes.runners.runner import Ids, Logits, Runner
from runtimes.runners.static import StaticRunner
from runtimes.speculate.drafters import Drafter, DraftModel, PromptLookup
from runtimes.text.sampling import Sampler
from runtimes.text.tokenizer import Tokenizer

pytestmark = pytest.mark.alone  # threads that meet by chance do so on more than one CPU

GREEDY = Sampler()
PROMPTS = ("And it came to pass, that it came", "In the beginning God created")
OPTIONS: dict[str, Any] = {"sampler": GREEDY, "max_new_tokens": 12, "eos_token_ids": ()}
IN_USE = "the runner is in use by another thread"
CHANGED = "cache was changed by somebody else"
VOCAB, WAIT = 50, 30.0


class FakeRunner(RowRunner):
    """A buffer written in place, whose logits tell the text that is in it, and a call that can be held up halfway."""

    def __init__(self) -> None:
        spec = SimpleNamespace(max_cache_length=64)
        variant = SimpleNamespace(top_k=0, kv_cache=spec, name_of=str, answer="logits", inputs=(), name="fake")
        super().__init__(variant, SimpleNamespace(vocab_size=VOCAB, hidden_size=0))  # type: ignore[arg-type]
        self.buffer = np.zeros((4, 64), np.int64)
        self.inside, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

    def decode_block(self, token_ids: Any) -> Logits:
        return self.prefill([token_ids], all_positions=True)[0]

    def _compute(self, row: int, start: int, ids: Ids) -> Logits:
        logits = np.zeros((len(ids), VOCAB), np.float32)
        for n, token_id in enumerate(ids):
            self.buffer[row, start + n] = token_id
            self.inside.set()
            assert self.go_on.wait(WAIT)
            logits[n, fake_next(self.buffer[row, : start + n + 1].tolist())] = 1
        return logits

    def _extend(self, rows: list[Ids], tokens: list[Ids], all_positions: bool) -> list[Logits]:
        found = [self._compute(b, len(t) - len(r), r) for b, (t, r) in enumerate(zip(tokens, rows, strict=True))]
        return found if all_positions else [logits[-1:] for logits in found]

    def _hidden(self, rows: list[Ids], tokens: list[Ids], wanted: Sequence[str]) -> list[list[Logits]]:  # noqa: ARG002
        raise AssertionError("it gives none")

    def _reserve(self, rows: int) -> None:
        assert rows <= len(self.buffer)

    def _feed(self, row: int, held: Ids, ids: Ids, all_positions: bool = False) -> Logits:
        logits = self._compute(row, len(held), ids)
        return logits if all_positions else logits[-1:]

    def _step(self, ids: Ids, starts: Ids, wanted: Sequence[str]) -> list[Any]:  # noqa: ARG002
        return [np.concatenate([self._compute(b, int(start), ids[b]) for b, start in enumerate(starts)])]


def fake_next(text: Sequence[int]) -> int:
    return sum((n + 1) * token for n, token in enumerate(text)) % VOCAB


def fake_text(prompt: Sequence[int], count: int) -> list[int]:
    text = list(prompt)
    for _ in range(count):
        text.append(fake_next(text))
    return text[len(prompt) :]


def elsewhere(call: Callable[[], Any]) -> Any:
    """What a call gives, or raises, in another thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result(WAIT)


def at_once(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """What calls give that start together, a thread each; the UsageError for one that raises it."""
    start = threading.Barrier(len(calls))

    def work(call: Callable[[], Any]) -> Any:
        start.wait(WAIT)
        try:
            return call()
        except UsageError as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(WAIT) for future in [pool.submit(work, call) for call in calls]]


def check_outcomes(found: Sequence[Any], alone: Sequence[Any], said: str) -> None:
    """Each got what it gets alone, or the line; at least one the former."""
    for outcome, expected in zip(found, alone, strict=True):
        if isinstance(outcome, UsageError):
            assert said in str(outcome)
        else:
            assert outcome == expected
    assert any(not isinstance(outcome, UsageError) for outcome in found)


@pytest.fixture(scope="module")
def tokenizer(demo_package: Path) -> Tokenizer:
    return Tokenizer.from_package(demo_package)


@pytest.fixture(scope="module", params=["fp32", "q4"])
def runner(request: pytest.FixtureRequest, demo_two_package: Path) -> Iterator[Runner]:
    """A graph whose cache is handed on, and one whose cache is a buffer."""
    with open_runner(demo_two_package, variant=request.param, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def alone(runner: Runner, tokenizer: Tokenizer) -> list[str]:
    """The texts that one thread gets."""
    texts = []
    for prompt in PROMPTS:
        runner.reset()
        texts.append(generate(runner, tokenizer, prompt, **OPTIONS).text)
    return texts


@pytest.mark.parametrize("kind", [ConcatRunner, SharedRunner, DeviceRunner, StaticRunner])
def test_no_public_call_of_a_runner_goes_unguarded(kind: type) -> None:
    calls = {n: f for n, f in inspect.getmembers(kind, inspect.isfunction) if not n.startswith("_")}
    assert {"prefill", "decode", "decode_top", "decode_block", "truncate", "reset", "close"} <= set(calls)
    assert [name for name, call in calls.items() if not hasattr(call, "__wrapped__")] == []


@pytest.mark.parametrize(
    "call",
    [
        lambda runner: runner.prefill([[9]]),
        lambda runner: runner.decode([9]),
        lambda runner: runner.decode_block([9, 9]),
        lambda runner: runner.truncate([0]),
        lambda runner: runner.reset(),
        lambda runner: runner.admit([9]),
        lambda runner: runner.step({0: 9}),
        lambda runner: runner.release(0),
        lambda runner: runner.begin([9]),
        lambda runner: runner.extend(0, 1),
        lambda runner: runner.append(0, [9]),
        lambda runner: runner.copy_prefix(0, 1),
        lambda runner: runner.truncate_slot(0, 1),
        lambda runner: runner.slot_tokens(0),
        lambda runner: runner.close(),
    ],
    ids=[
        "prefill",
        "decode",
        "decode_block",
        "truncate",
        "reset",
        "admit",
        "step",
        "release",
        "begin",
        "extend",
        "append",
        "copy_prefix",
        "truncate_slot",
        "slot_tokens",
        "close",
    ],
)
def test_a_call_in_the_middle_of_anothers_is_refused_and_spoils_nothing(call: Callable[[FakeRunner], object]) -> None:
    runner = FakeRunner()
    runner.prefill([[3, 4]])
    runner.inside.clear()
    runner.go_on.clear()
    with ThreadPoolExecutor(1) as pool:
        decoded = pool.submit(lambda: runner.decode([5]))
        try:
            assert runner.inside.wait(WAIT)
            with pytest.raises(UsageError, match=IN_USE):
                call(runner)
        finally:
            runner.go_on.set()
        assert decoded.result(WAIT)[0].argmax() == fake_next([3, 4, 5])
    assert runner.cached_tokens[0].tolist() == [3, 4, 5]


@pytest.mark.parametrize("speculate", [None, PromptLookup], ids=["plain", "lookup"])
def test_two_generations_at_once_on_one_runner(
    runner: Runner, tokenizer: Tokenizer, alone: list[str], speculate: Callable[[], Drafter] | None
) -> None:
    def text(prompt: str) -> str:
        drafter = None if speculate is None else speculate()
        return generate(runner, tokenizer, prompt, **OPTIONS, speculate=drafter).text

    for _ in range(5):
        found = at_once([lambda p=prompt: text(p) for prompt in PROMPTS])  # type: ignore[misc]
        check_outcomes(found, alone, IN_USE)


def test_of_two_generations_that_surely_overlap_one_is_refused(
    runner: Runner, tokenizer: Tokenizer, alone: list[str]
) -> None:
    done = threading.Event()  # the first to be over; the other is in the middle then

    def text(prompt: str) -> str:
        try:
            return generate(runner, tokenizer, prompt, **OPTIONS, on_text=lambda _: done.wait(WAIT)).text
        finally:
            done.set()

    found = at_once([lambda p=prompt: text(p) for prompt in PROMPTS])  # type: ignore[misc]
    check_outcomes(found, alone, IN_USE)
    assert sum(isinstance(outcome, UsageError) for outcome in found) == 1


@pytest.mark.parametrize("speculate", [None, PromptLookup], ids=["plain", "lookup"])
def test_two_iterators_at_once_on_one_runner(
    runner: Runner, tokenizer: Tokenizer, speculate: Callable[[], Drafter] | None
) -> None:
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    expected = []
    for prompt in prompts:
        runner.reset()
        expected.append(list(generate_tokens(runner, prompt, sampler=GREEDY, max_new_tokens=12)))
    for _ in range(5):
        runner.reset()
        given: list[list[int]] = [[], []]
        iterators = [
            generate_tokens(
                runner, prompt, sampler=GREEDY, max_new_tokens=12, speculate=speculate() if speculate else None
            )
            for prompt in prompts
        ]
        found = at_once([lambda g=g, ids=ids: g.extend(ids) for g, ids in zip(given, iterators, strict=True)])  # type: ignore[misc]
        for outcome, ids, right in zip(found, given, expected, strict=True):
            assert ids == right[: len(ids)]
            assert len(ids) == 12 or IN_USE in str(outcome) or CHANGED in str(outcome)
        assert sum(len(ids) == 12 for ids in given) <= 1  # one text at most is in the cache


def test_a_text_that_comes_before_an_iterators_first_id_is_not_continued() -> None:
    runner = FakeRunner()
    first = generate_tokens(runner, [5, 6], sampler=GREEDY, max_new_tokens=4)
    second = generate_tokens(runner, [7, 8], sampler=GREEDY, max_new_tokens=4)
    found = [elsewhere(lambda: next(first))]
    with pytest.raises(UsageError, match=rf"{CHANGED} \(tokens: 2, expected the 0 of the text"):
        elsewhere(lambda: next(second))
    assert [*found, *first] == fake_text([5, 6], 4)


def test_an_iterator_appends_to_what_was_held_when_it_was_made() -> None:
    runner = FakeRunner()
    runner.prefill([[1, 2]])
    ids = generate_tokens(runner, [3], sampler=GREEDY, max_new_tokens=4)
    assert list(ids) == fake_text([1, 2, 3], 4)


def test_a_slot_is_not_stepped_after_another_threads_text_has_its_row(
    tokenizer: Tokenizer, demo_two_package: Path
) -> None:
    with open_runner(demo_two_package, variant="q4", threads=1) as runner:
        expected = generate(runner, tokenizer, PROMPTS[0], **OPTIONS).text
        runner.reset()
        slot, _ = runner.admit([1, 2])  # type: ignore[attr-defined]
        assert elsewhere(lambda: generate(runner, tokenizer, PROMPTS[0], **OPTIONS)).text == expected
        before = runner.cached_tokens[0].tolist()
        with pytest.raises(InputError, match="slot 0: not admitted; admit a sequence first"):
            runner.step({slot: 3})  # type: ignore[attr-defined]
        with pytest.raises(InputError, match="slot 0: not admitted"):
            runner.release(slot)  # type: ignore[attr-defined]
        assert runner.cached_tokens[0].tolist() == before


@pytest.mark.parametrize(
    "take",
    [
        lambda runner: runner.prefill([[3]]),
        lambda runner: runner.decode([3]),
        lambda runner: runner.decode_block([3]),
        lambda runner: runner.truncate([1]),
    ],
    ids=["prefill", "decode", "decode_block", "truncate"],
)
def test_a_call_for_the_batch_takes_the_rows_of_slots(take: Callable[[FakeRunner], object]) -> None:
    runner = FakeRunner()
    slot, _ = runner.admit([1, 2])
    elsewhere(lambda: take(runner))
    held = runner.cached_tokens[0].tolist()
    with pytest.raises(InputError, match="slot 0: not admitted"):
        runner.step({slot: 4})
    assert runner.cached_tokens[0].tolist() == held
    runner.reset()
    assert runner.admit([1])[0] == 0
    assert runner.step({0: 2})[0].argmax() == fake_next([1, 2])


class SwappedOnEntry:
    """An `exclusive` in front of which another thread gives the runner a text of its own."""

    def __init__(self, swap: Callable[[], object]) -> None:
        self.swap = swap

    def __enter__(self) -> None:
        self.swap()

    def __exit__(self, *_: object) -> None: ...


def test_closing_a_speculation_drops_nothing_of_a_text_that_came_just_before() -> None:
    runner = FakeRunner()
    text, other = [1, *fake_text([1], 40)], [9] * 60
    ids = generate_tokens(runner, [1], sampler=GREEDY, max_new_tokens=40, speculate=Knows(text))
    given = [next(ids)]
    while len(runner.cached_tokens[0]) <= len(given):  # until it has guesses to drop
        given.append(next(ids))
    assert given == text[1 : len(given) + 1]

    def swap() -> None:
        runner.exclusive = exclusive
        runner.reset()
        runner.prefill([other])

    exclusive, runner.exclusive = runner.exclusive, SwappedOnEntry(swap)  # type: ignore[assignment]
    ids.close()
    assert runner.cached_tokens[0].tolist() == other


class Knows:
    """A drafter that is always right."""

    acceptance = 1.0

    def __init__(self, text: Sequence[int]) -> None:
        self.text, self.at = list(text), 0

    def check(self, runner: Runner) -> None: ...

    def begin(self, token_ids: Sequence[int]) -> None:
        self.at = len(token_ids)

    def append(self, token_id: int) -> None:  # noqa: ARG002
        self.at += 1

    def evidence(self) -> int | None:
        return 8

    def propose(self, count: int) -> list[int]:
        return self.text[self.at : self.at + count]


@pytest.mark.parametrize("kind", ["lookup", "model"])
def test_a_drafter_that_two_threads_share_spoils_no_text(
    demo_two_package: Path, tokenizer: Tokenizer, kind: str
) -> None:
    with (
        open_runner(demo_two_package, variant="fp32", threads=1) as first,
        open_runner(demo_two_package, variant="fp32", threads=1) as second,
        open_runner(demo_two_package, variant="q4", threads=1) as small,
    ):
        alone = [generate(first, tokenizer, prompt, **OPTIONS).text for prompt in PROMPTS]
        for _ in range(3):
            drafter = PromptLookup() if kind == "lookup" else DraftModel(small)

            def text(runner: Runner, prompt: str, drafter: Drafter = drafter) -> str:
                return generate(runner, tokenizer, prompt, **OPTIONS, speculate=drafter).text

            pairs = zip((first, second), PROMPTS, strict=True)
            found = at_once([lambda r=r, p=p: text(r, p) for r, p in pairs])  # type: ignore[misc]
            check_outcomes(found, alone, "the drafter is in use by another thread")
        with drafter.exclusive:
            for call in (lambda: drafter.begin([1]), lambda: drafter.append(1), lambda: drafter.propose(1)):
                with pytest.raises(UsageError, match="the drafter is in use by another thread"):
                    elsewhere(call)


def test_a_drafter_that_two_texts_use_in_turns_spoils_neither(demo_package: Path, tokenizer: Tokenizer) -> None:
    with open_runner(demo_package, threads=1) as first, open_runner(demo_package, threads=1) as second:
        runners, prompts = (first, second), [tokenizer.encode(prompt) for prompt in PROMPTS]
        drafter, alone, found = PromptLookup(), [], [[], []]  # type: ignore[var-annotated]
        for prompt in prompts:
            first.reset()
            alone.append(list(generate_tokens(first, prompt, sampler=GREEDY, max_new_tokens=12)))
        first.reset()
        iterators = [
            generate_tokens(runner, prompt, sampler=GREEDY, max_new_tokens=12, speculate=drafter)
            for runner, prompt in zip(runners, prompts, strict=True)
        ]
        for _ in range(12):
            for ids, given in zip(iterators, found, strict=True):
                given.append(elsewhere(lambda ids=ids: next(ids)))  # type: ignore[misc]
        assert found == alone
