"""Speculation: the same tokens as without, what the cache holds when the reader stops, what it costs and gains."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import olmo2_export.demo
from runtimes import open_runner
from runtimes.errors import InputError, NumericError, UsageError
from runtimes.generation.generate import generate, generate_tokens
from runtimes.one_thread import OneThread
from runtimes.runners.runner import Runner, check_finite, check_lengths, check_rows
from runtimes.speculate.costs import STEP_COSTS, StepTimes
from runtimes.speculate.drafters import DraftModel, PromptLookup
from runtimes.speculate.speculation import Speculation, speculate_tokens
from runtimes.text.sampling import Sampler
from runtimes.text.tokenizer import Tokenizer

GREEDY = Sampler()
CONTEXT = 4096


class FakeRunner:
    """A runner whose logits are a function of the text so far, and whose calls take a time by their number of rows."""

    def __init__(
        self,
        logits_of: Callable[[list[int]], np.ndarray],
        vocab_size: int,
        cost: Callable[[int], float] = lambda _: 1.0,
        max_cache_length: int = CONTEXT,
    ) -> None:
        self.logits_of, self.cost, self.max_cache_length = logits_of, cost, max_cache_length
        self.model = SimpleNamespace(vocab_size=vocab_size)
        self.variant = SimpleNamespace(answer="logits")
        self.top_k = 0
        self.exclusive = OneThread()
        self.now = 0.0
        self.rows: list[int] = []
        self.held: list[int] | None = None

    @property
    def cached_tokens(self) -> tuple[np.ndarray, ...]:
        return () if self.held is None else (np.array(self.held, np.int64),)

    @property
    def cache_lengths(self) -> tuple[int, ...]:
        return tuple(map(len, self.cached_tokens))

    def reset(self) -> None:
        self.held = None

    def truncate(self, lengths: Sequence[int]) -> None:
        for length in check_lengths(lengths, self.cache_lengths):
            del self.held[length:]

    def prefill(self, sequences: Sequence[Sequence[int]], *, all_positions: bool = False) -> list[np.ndarray]:
        check_rows(
            sequences,
            vocab_size=self.model.vocab_size,
            cache_lengths=self.cache_lengths,
            max_cache_length=self.max_cache_length,
        )
        text = list(self.held or [])
        rows = []
        for token_id in sequences[0]:
            text.append(token_id)
            rows.append(self.logits_of(text))
        logits = np.stack(rows).astype(np.float32)
        check_finite([logits], [len(text)])
        self.held = text
        self.rows.append(len(rows))
        self.now += self.cost(len(rows))
        return [logits if all_positions else logits[-1:]]

    def decode(self, token_ids: Sequence[int]) -> np.ndarray:
        return self.prefill([token_ids])[0]

    def decode_block(self, token_ids: Sequence[int]) -> np.ndarray:
        return self.prefill([token_ids], all_positions=True)[0]


def scripted(script: Sequence[int], vocab_size: int = 100, **options: Any) -> FakeRunner:
    """A runner that greedily continues to the script, whatever it was fed."""

    def logits_of(text: list[int]) -> np.ndarray:
        logits = np.zeros(vocab_size)
        logits[script[len(text)]] = 1
        return logits

    return FakeRunner(logits_of, vocab_size, **options)


def chain(vocab_size: int, seed: int) -> FakeRunner:
    """A runner whose logits depend on the last two tokens."""
    table = np.random.default_rng(seed).normal(0, 1.5, (vocab_size, vocab_size, vocab_size))
    return FakeRunner(lambda text: table[text[-2] if len(text) > 1 else 0, text[-1]], vocab_size)


class Fixed:
    """A drafter that always proposes the tokens of a function of the text, with always the same evidence."""

    acceptance = 0.5

    def __init__(self, propose: Callable[[list[int], int], list[int]]) -> None:
        self._propose = propose

    def check(self, runner: Runner) -> None: ...

    def begin(self, token_ids: Sequence[int]) -> None:
        self.text = list(token_ids)

    def append(self, token_id: int) -> None:
        self.text.append(token_id)

    def evidence(self) -> int | None:
        return 0

    def propose(self, count: int) -> list[int]:
        return self._propose(self.text, count)


class Always(Speculation):
    """Checks drafts of one length, worth it or not."""

    def __init__(self, drafter: Any, length: int) -> None:
        super().__init__(drafter)
        self.times.measured(1, 1.0)
        self.length = length

    def _length(self, _: int, most: int) -> int:
        return min(self.length, most)


def always(
    runner: Any, prompt: Sequence[int], limit: int, sampler: Sampler, drafter: Any, length: int, eos: Sequence[int] = ()
) -> Iterator[int]:
    """`limit` new ids after a prompt, all but the first with drafts of one length."""
    first = sampler(runner.prefill([prompt])[0][-1])
    yield first
    yield from speculate_tokens(
        runner, first, limit - 1, sampler=sampler, speculation=Always(drafter, length), eos_token_ids=eos
    )


# The same distribution


def chi_square(counts: np.ndarray, expected: np.ndarray) -> tuple[float, int]:
    """The statistic over the cells with at least 5 expected, the others put together, and its degrees of freedom."""
    assert counts[expected == 0].sum() == 0
    big = expected >= 5
    found, wanted = counts[big], expected[big]
    rest = expected[~big].sum()
    if rest >= 1:
        found, wanted = np.append(found, counts[~big].sum()), np.append(wanted, rest)
    return float(((found - wanted) ** 2 / wanted).sum()), len(found) - 1


def joint(runner: FakeRunner, prompt: list[int], length: int, sampler: Sampler) -> np.ndarray:
    """The exact probability of every continuation: [V] * length."""
    vocab = runner.model.vocab_size
    result = np.zeros((vocab,) * length)
    for text in itertools.product(range(vocab), repeat=length):
        p = 1.0
        for i, token_id in enumerate(text):
            p *= sampler.probabilities(runner.logits_of([*prompt, *text[:i]]))[token_id] if p else 0
        result[text] = p
    return result


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.6},
        {"temperature": 1.4, "top_k": 3},
        {"temperature": 1.2, "top_p": 0.7},
        {"temperature": 2.0, "top_k": 4, "top_p": 0.8},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["likely", "unlikely", "mixed"])
def test_sampled_texts_have_the_samplers_distribution(options: dict[str, Any], kind: str) -> None:
    runner, prompt, length, runs = chain(5, seed=1), [2, 4], 3, 3000

    def propose(text: list[int], count: int) -> list[int]:
        draft: list[int] = []
        for i in range(count):
            order = np.argsort(runner.logits_of([*text, *draft]))
            rank = {"likely": -1, "unlikely": 1, "mixed": -1 - (i + text[-1]) % 3}[kind]
            draft.append(int(order[rank]))
        return draft

    sampler = Sampler(**options, seed=7)
    counts = np.zeros((5,) * length)
    for _ in range(runs):
        runner.reset()
        counts[tuple(always(runner, prompt, length, sampler, Fixed(propose), 2))] += 1
    statistic, freedom = chi_square(counts, runs * joint(runner, prompt, length, sampler))
    assert freedom >= 10
    # Wilson and Hilferty's approximation of the 99.9 % quantile.
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3


def test_the_chi_square_test_finds_a_wrong_rule() -> None:
    """Drawing again from all of p after a rejection, and accepting with p(d): d comes too often."""
    p, d, random = np.array([0.5, 0.3, 0.2]), 0, np.random.default_rng(0)
    counts = np.zeros(3)
    for _ in range(2000):
        counts[d if random.random() < p[d] else random.choice(3, p=p)] += 1
    assert chi_square(counts, 2000 * p)[0] > 100


@pytest.mark.parametrize("length", [1, 3, 15])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "top_k": 5, "seed": 3}, {"temperature": 2.0, "seed": 4}])
def test_a_seed_gives_the_text_it_gives_without(options: dict[str, Any], length: int) -> None:
    runner = chain(6, seed=2)
    expected = list(generate_tokens(runner, [1, 2], sampler=Sampler(**options), max_new_tokens=300))
    runner.reset()
    found = list(always(runner, [1, 2], 300, Sampler(**options), PromptLookup(2, 1), length))
    assert found == expected
    assert len(runner.rows) < 600
    runner.reset()
    assert found == list(
        generate_tokens(runner, [1, 2], sampler=Sampler(**options), max_new_tokens=300, speculate=PromptLookup())
    )


# What the cache holds


@pytest.mark.parametrize("stop", range(1, 20))
@pytest.mark.parametrize("length", [1, 2, 7])
def test_wherever_the_reader_stops_the_last_id_is_in_no_cache(stop: int, length: int) -> None:
    script = [1, 2, 3, 4, 5, 6] * 3 + [7, 8, 1, 2, 9] + [3, 4, 5, 6] * 4
    runner = scripted(script)
    ids = always(runner, script[:8], 19, GREEDY, PromptLookup(), length)
    found = list(itertools.islice(ids, stop))
    assert found == script[8 : 8 + stop]
    ids.close()
    assert runner.held == script[: 8 + stop - 1]
    assert [runner.decode(found[-1:])[0].argmax()] == script[8 + stop : 9 + stop]


def test_after_a_rejection_the_cache_is_right_before_the_iterator_is_closed() -> None:
    script = [1, 2, 3, 4, 5, 1, 2, 3, 9, 1, 2, 3, 9, 8]
    runner = scripted(script)
    ids = always(runner, script[:7], 7, GREEDY, PromptLookup(), 4)
    assert list(itertools.islice(ids, 2)) == [3, 9]  # and 4 was guessed
    assert runner.held == script[:8]


def test_an_iterator_let_go_late_leaves_another_text_alone() -> None:
    runner = scripted([1, 2, 3] * 10)
    ids = always(runner, [1, 2, 3, 1, 2, 3], 12, GREEDY, PromptLookup(), 5)
    assert list(itertools.islice(ids, 3)) == [1, 2, 3]
    runner.reset()
    runner.prefill([[5] * 20])
    ids.close()
    assert runner.held == [5] * 20
    runner.reset()
    ids.close()
    assert runner.held is None


@pytest.mark.parametrize("limit", range(0, 12))
def test_never_more_than_the_limit_and_the_context(limit: int) -> None:
    script = [1, 2, 3] * 10
    runner = scripted(script, max_cache_length=6 + limit)
    drafter = PromptLookup()
    assert list(always(runner, script[:6], limit, GREEDY, drafter, 15))[:limit] == script[6 : 6 + limit] or limit == 0
    assert len(runner.held) == 6 + max(limit - 1, 0)
    runner.reset()
    assert list(generate_tokens(runner, script[:6], sampler=GREEDY, speculate=drafter)) == script[6 : 6 + limit]


def test_nothing_is_guessed_after_an_end_of_text() -> None:
    script = [1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 5, 6]
    runner = scripted(script)
    ids = always(runner, script[:5], 9, GREEDY, PromptLookup(), 7, eos=[0])
    assert list(itertools.islice(ids, 3)) == [2, 3, 0]
    assert runner.held == script[:7]  # before the iterator is closed: 0 was drawn, never fed


def test_numeric_error_of_a_check_changes_nothing() -> None:
    script = [1, 2, 3, 4] * 4

    def logits_of(text: list[int]) -> np.ndarray:
        logits = np.zeros(9)
        logits[script[len(text)]] = np.nan if len(text) == 10 else 1
        return logits

    runner = FakeRunner(logits_of, 9)
    ids = always(runner, script[:8], 8, GREEDY, PromptLookup(), 4)
    assert next(ids) == 1
    with pytest.raises(NumericError, match="row 0, position 9"):
        next(ids)
    assert runner.held == script[:8]


# Who guesses


def lookup_by_hand(text: list[int], longest: int, shortest: int) -> int | None:
    """The definition: where the longest suffix n-gram was last seen before, the place of what followed."""
    for size in range(longest, shortest - 1, -1):
        for at in range(len(text) - size - 1, -1, -1):
            if text[at : at + size] == text[-size:]:
                return at + size
    return None


@pytest.mark.parametrize(("longest", "shortest"), [(3, 2), (1, 1), (4, 1)])
def test_lookup_finds_the_latest_place_of_the_longest_n_gram(longest: int, shortest: int) -> None:
    random = np.random.default_rng(0)
    text = random.integers(0, 4, 300).tolist()
    drafter = PromptLookup(longest, shortest)
    found = 0
    for end in range(1, len(text)):
        drafter.begin(text[:end])
        place = lookup_by_hand(text[:end], longest, shortest)
        if place is None:
            assert (drafter.evidence(), drafter.propose(3)) == (None, [])
        else:
            found += 1
            assert drafter.propose(end - place) == text[place:end]
    assert found > 100


def test_lookup_token_by_token_follows_its_match_and_needs_no_rescan() -> None:
    text = [1, 2, 3, 4, 5, 9, 2, 3, 4, 6, 1, 2, 3]
    drafter = PromptLookup()
    drafter.begin(text)
    assert (drafter.evidence(), drafter.propose(2)) == (3, [4, 5])  # 1 2 3 came once
    drafter.append(4)
    assert (drafter.evidence(), drafter.propose(2)) == (4, [5, 9])  # goes on, though 2 3 4 came later too
    drafter.append(7)
    assert (drafter.evidence(), drafter.propose(2)) == (None, [])
    for token_id in (2, 3, 4):
        drafter.append(token_id)
    assert (drafter.evidence(), drafter.propose(3)) == (3, [7, 2, 3])  # the latest 2 3 4


def test_lookup_goes_on_with_a_period() -> None:
    drafter = PromptLookup()
    drafter.begin([8, 1, 2, 3, 1, 2, 3])
    assert drafter.propose(8) == [1, 2, 3, 1, 2, 3, 1, 2]
    drafter.begin([5, 5, 5])
    assert drafter.propose(4) == [5, 5, 5, 5]


def test_lookup_keeps_its_table_for_the_next_turn_and_forgets_another_text() -> None:
    drafter = PromptLookup()
    drafter.begin([1, 2, 3])
    drafter.append(4)
    table = drafter._places
    drafter.begin([1, 2, 3, 4, 5, 1, 2])
    assert drafter._places is table
    assert drafter.propose(2) == [3, 4]
    drafter.begin([5, 1, 2])
    assert drafter._places is not table
    assert drafter.evidence() is None


@pytest.mark.parametrize(("longest", "shortest"), [(1, 2), (2, 0), (0, 0)])
def test_lookup_of_no_n_gram_is_refused(longest: int, shortest: int) -> None:
    with pytest.raises(InputError, match="n-grams"):
        PromptLookup(longest, shortest)


def test_draft_model_guesses_what_its_runner_would_generate_and_rolls_back() -> None:
    draft = chain(7, seed=5)
    drafter = DraftModel(draft)
    text = [1, 2, 3]
    drafter.begin(text)
    for taken, own in ((0, [4]), (2, [6]), (4, []), (1, [0, 0])):
        guessed = drafter.propose(4)
        draft2 = chain(7, seed=5)
        assert guessed == list(generate_tokens(draft2, text, sampler=GREEDY, max_new_tokens=4))
        for token_id in [*guessed[:taken], *own]:
            drafter.append(token_id)
            text.append(token_id)
    assert max(draft.rows) <= 4  # it never computed the text anew
    drafter.begin([*text, 1, 1])
    assert draft.held == [*text, 1]
    drafter.begin([1, 2, 0])
    assert draft.held == [1, 2]


def test_draft_model_with_a_shorter_context_stops_guessing() -> None:
    drafter = DraftModel(chain_of_length(10))
    drafter.begin([1] * 8)
    assert len(drafter.propose(9)) == 3
    for _ in range(3):
        drafter.append(1)
    assert (drafter.evidence(), drafter.propose(3)) == (None, [])
    drafter.begin([1] * 30)
    assert drafter.evidence() is None
    target = scripted([1] * 40)
    assert list(always(target, [1] * 5, 30, GREEDY, drafter, 4)) == [1] * 30


def chain_of_length(length: int) -> FakeRunner:
    runner = chain(7, seed=5)
    runner.max_cache_length = length
    return runner


def test_draft_model_of_another_vocabulary_is_refused_at_once() -> None:
    runner = chain(7, seed=0)
    with pytest.raises(UsageError, match="the draft model has 6 token ids, the model 7"):
        generate_tokens(runner, [1], sampler=GREEDY, speculate=DraftModel(chain(6, seed=0)))
    with pytest.raises(UsageError, match="same runner"):
        generate_tokens(runner, [1], sampler=GREEDY, speculate=DraftModel(runner))


def test_draft_model_that_breaks_down_is_an_error() -> None:
    def broken(text: list[int]) -> np.ndarray:
        return np.full(7, np.nan if len(text) > 5 else 0.0)

    runner = chain(7, seed=0)
    ids = always(runner, [1, 2], 50, GREEDY, DraftModel(FakeRunner(broken, 7)), 2)
    given: list[int] = []
    with pytest.raises(NumericError, match="row 0"):
        given.extend(ids)
    assert runner.held == [1, 2, *given[:-1]]
    assert 2 < len(runner.held) < 7


# How far ahead


def table_cost(rows: int) -> float:
    return float(np.interp(rows, list(STEP_COSTS), list(STEP_COSTS.values())))


def time_of(runner: FakeRunner, prompt: list[int], new: int, speculation: Speculation | None) -> float:
    """Simulated time of `new` tokens, the prefill excluded."""
    runner.reset()
    (first,) = generate_tokens(runner, prompt, sampler=GREEDY, max_new_tokens=1)
    began = runner.now
    if speculation is None:
        for _ in range(new):
            first = GREEDY(runner.decode([first])[0])
        return runner.now - began
    speculation.clock = lambda: runner.now
    assert len(list(speculate_tokens(runner, first, new, sampler=GREEDY, speculation=speculation))) == new
    return runner.now - began


def gain(runner: FakeRunner, prompt: list[int], new: int, drafter: Any) -> float:
    return time_of(runner, prompt, new, None) / time_of(runner, prompt, new, Speculation(drafter))


@pytest.mark.parametrize("vocab", [20, 60, 1000])
@pytest.mark.parametrize("new", [60, 1000])
def test_text_that_repeats_nothing_costs_nothing(vocab: int, new: int) -> None:
    script = np.random.default_rng(vocab).integers(0, vocab, 1600).tolist()
    runner = scripted(script, vocab, cost=table_cost)
    assert gain(runner, script[:500], new, PromptLookup()) > 0.995


def test_text_that_repeats_is_faster_than_twice() -> None:
    script = np.random.default_rng(0).integers(0, 1000, 300).tolist() * 3
    runner = scripted(script, 1000, cost=table_cost)
    assert gain(runner, script[:302], 500, PromptLookup()) > 2.0
    assert max(runner.rows[1:]) == 302  # the prefill of the other call
    assert sorted(set(runner.rows))[-2] == 16


def test_text_that_repeats_in_part_gains_in_part() -> None:
    random = np.random.default_rng(0)
    prompt = random.integers(0, 1000, 400).tolist()
    answer: list[int] = []
    for _ in range(20):
        at = int(random.integers(0, 360))
        answer += [*prompt[at : at + 20], *random.integers(0, 1000, 10).tolist()]
    runner = scripted(prompt + answer + [0] * 20, 1000, cost=table_cost)
    assert gain(runner, prompt, 590, PromptLookup()) > 1.25


@pytest.mark.parametrize("steep", [1.8, 1.0, 0.95])
def test_where_rows_cost_as_much_as_steps_it_stops(steep: float) -> None:
    script = list(range(10)) * 70
    runner = scripted(script, cost=lambda rows: rows**steep)
    assert gain(runner, script[:40], 600, PromptLookup()) > 0.97


def test_where_rows_cost_nothing_it_goes_as_far_as_it_can() -> None:
    script = list(range(10)) * 70
    runner = scripted(script, cost=lambda rows: 1 + 0.01 * rows)
    assert gain(runner, script[:40], 600, PromptLookup()) > 9


def test_short_drafts_that_do_not_pay_do_not_hide_long_ones_that_do() -> None:
    script = list(range(10)) * 210
    runner = scripted(script, cost=lambda rows: 1.0 if rows == 1 else 3.0)
    assert gain(runner, script[:40], 2000, PromptLookup()) > 1.8


def half_right(text: list[int], count: int, script: Sequence[int], rate: float) -> list[int]:
    start = len(text)
    wrong = np.random.default_rng(start).random(count) >= rate
    return [(script[start + i] + int(w)) % 100 for i, w in enumerate(wrong)]


@pytest.mark.parametrize(("rate", "least"), [(0.0, 0.97), (0.2, 0.97), (0.6, 1.05), (0.9, 1.4), (1.0, 2.0)])
def test_gain_follows_the_acceptance(rate: float, least: float) -> None:
    script = np.random.default_rng(1).integers(0, 100, 1200).tolist()
    runner = scripted(script, cost=table_cost)
    drafter = Fixed(lambda text, count: half_right(text, count, script, rate))
    assert gain(runner, script[:40], 1000, drafter) > least


def test_the_time_of_drafting_counts() -> None:
    script = np.random.default_rng(1).integers(0, 100, 1200).tolist()
    runner = scripted(script, cost=table_cost)

    def slow(text: list[int], count: int) -> list[int]:
        runner.now += 1.5 * count
        return half_right(text, count, script, 1.0)

    assert gain(runner, script[:40], 1000, Fixed(slow)) > 0.97


def test_times_of_rows_never_measured_follow_the_nearest_that_was() -> None:
    times = StepTimes({1: 1.0, 2: 1.5, 16: 8.5})
    assert times.one_row is None
    assert times.ratio(4) == 2.5
    times.measured(2, 9.0)  # means nothing yet
    assert times.most == 0
    times.measured(1, 0.010)
    assert times.one_row == 0.010
    times.measured(2, 0.011)
    assert times.most == 0
    for _ in range(3):
        times.measured(2, 0.011)
    assert times.most == 1
    assert times.ratio(2) == pytest.approx(1.1)
    assert times.ratio(16) == pytest.approx(1 + 7.5 * 0.2)
    times.measured(2, 5.0)  # an interruption
    assert times.ratio(2) == pytest.approx(1.1)


@pytest.mark.parametrize("at", range(7))
def test_interrupted_calls_do_not_stop_speculation(at: int) -> None:
    script = list(range(10)) * 120
    calls = itertools.count()
    runner = scripted(script, cost=lambda rows: table_cost(rows) * (8 if next(calls) % 7 == at else 1))
    assert gain(runner, script[:40], 1000, PromptLookup()) > 1.5


def test_counts_are_of_what_was_checked_and_given_out() -> None:
    script = [1, 2, 3, 1, 2, 3, 1, 2, 9, 4]
    runner = scripted(script)
    speculation = Always(PromptLookup(), 4)
    runner.prefill([script[:5]])
    assert list(speculate_tokens(runner, 3, 4, sampler=GREEDY, speculation=speculation)) == [1, 2, 9, 4]
    assert (speculation.drafted, speculation.accepted) == (3, 2)
    assert runner.rows == [5, 4, 1]


# On a model


@pytest.fixture(scope="module")
def tokenizer(demo_package: Path) -> Tokenizer:
    return Tokenizer.from_package(demo_package)


@pytest.fixture(scope="module")
def runner(demo_package: Path) -> Iterator[Runner]:
    with open_runner(demo_package, threads=1) as runner:
        yield runner


@pytest.fixture(scope="module")
def draft_runner(demo_package: Path) -> Iterator[Runner]:
    with open_runner(demo_package, threads=1) as runner:
        yield runner


def prompts(tokenizer: Tokenizer, count: int) -> list[list[int]]:
    text = (Path(olmo2_export.demo.__file__).parent / "heldout.txt").read_text()
    ids = tokenizer.encode(text[:40_000])
    lengths = np.random.default_rng(0).integers(5, 120, count)
    starts = np.random.default_rng(1).integers(0, len(ids) - 120, count)
    return [ids[a : a + n] for a, n in zip(starts.tolist(), lengths.tolist(), strict=True)]


@pytest.mark.parametrize("kind", ["lookup", "draft model"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_texts_are_those_without_speculation(
    runner: Runner, draft_runner: Runner, tokenizer: Tokenizer, kind: str, temperature: float
) -> None:
    drafter = PromptLookup() if kind == "lookup" else DraftModel(draft_runner)
    drafted = accepted = 0
    for prompt in prompts(tokenizer, 6):
        prompt = [*prompt, *prompt, *prompt[: len(prompt) // 2]]
        results = []
        for speculate in (None, drafter):
            runner.reset()
            sampler = Sampler(temperature, top_p=0.9, seed=11)
            results.append(generate(runner, tokenizer, prompt, sampler=sampler, max_new_tokens=40, speculate=speculate))
        plain, found = results
        assert found.token_ids == plain.token_ids
        assert (plain.drafted, plain.accepted) == (0, 0)
        assert runner.cached_tokens[0].tolist() == [*prompt, *found.token_ids[:-1]]
        drafted, accepted = drafted + found.drafted, accepted + found.accepted
    assert accepted <= drafted
    assert temperature or accepted > 0


def test_stop_string_in_mid_draft_leaves_the_text_for_the_next_turn(runner: Runner, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("one two three four five six seven\n" * 4 + "one two")
    runner.reset()
    result = generate(
        runner, tokenizer, prompt, sampler=GREEDY, max_new_tokens=60, stop=["five"], speculate=PromptLookup()
    )
    assert runner.cached_tokens[0].tolist() == [*prompt, *result.token_ids[:-1]]
