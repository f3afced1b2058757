"""Sampling: exact distributions, agreement with transformers' warpers, and every option out of range."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import numpy as np
import pytest

from runtimes.errors import InputError, NumericError
from runtimes.text.sampling import Sampler

VOCAB = 131
LOGITS = np.array([2.0, -1.0, 3.5, 0.25, 3.0, -np.inf, 1.0], np.float32)


def softmax(scores: dict[int, float]) -> dict[int, float]:
    weights = {token: math.exp(score) for token, score in scores.items()}
    return {token: weight / sum(weights.values()) for token, weight in weights.items()}


def by_hand(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> list[float]:
    """The definition, one token at a time."""
    scores = {i: float(x) / temperature for i, x in enumerate(logits) if x > -np.inf}
    if top_k:
        scores = dict(sorted(scores.items(), key=lambda pair: -pair[1])[:top_k])
    kept: dict[int, float] = {}
    total = 0.0
    for token, p in sorted(softmax(scores).items(), key=lambda pair: -pair[1]):
        if total < top_p:
            kept[token] = scores[token]
        total += p
    final = softmax(kept)
    return [final.get(i, 0.0) for i in range(len(logits))]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 2, 3, 500])
@pytest.mark.parametrize("top_p", [0.05, 0.6, 0.9, 1.0])
def test_distribution_equals_the_definition(temperature: float, top_k: int, top_p: float) -> None:
    found = Sampler(temperature, top_k, top_p, seed=0).probabilities(LOGITS)
    np.testing.assert_allclose(found, by_hand(LOGITS, temperature, top_k, top_p), atol=1e-15)
    assert found.sum() == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.9])
@pytest.mark.parametrize("top_k", [0, 5, 40])
@pytest.mark.parametrize("top_p", [0.3, 0.95, 1.0])
def test_survivors_equal_those_of_transformers(temperature: float, top_k: int, top_p: float) -> None:
    torch = pytest.importorskip("torch")
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    random = np.random.default_rng(1)
    for _ in range(20):
        logits = random.normal(0, 3, VOCAB).astype(np.float32)
        scores = TemperatureLogitsWarper(temperature)(None, torch.from_numpy(logits)[None])
        if top_k:
            scores = TopKLogitsWarper(top_k)(None, scores)
        if top_p < 1:
            scores = TopPLogitsWarper(top_p)(None, scores)
        found = Sampler(temperature, top_k, top_p, seed=0).probabilities(logits)
        np.testing.assert_array_equal(found > 0, (scores[0] > -math.inf).numpy())
        # float32 against float64
        np.testing.assert_allclose(found, torch.softmax(scores[0], -1).numpy(), atol=2e-6)


def slowly(logits: np.ndarray, options: dict[str, float]) -> np.ndarray:
    """The distribution in float64, with every step over the whole vocabulary and nothing left out early."""
    temperature, top_k, top_p, min_p = (options.get(n, 0) for n in ("temperature", "top_k", "top_p", "min_p"))
    kept = logits > -np.inf
    if 0 < top_k < np.count_nonzero(kept):
        kept &= logits >= np.sort(logits)[-int(top_k)]
    scores = (logits.astype(np.float64) - np.float64(logits.max())) / temperature
    weights = np.where(kept, np.exp(scores), 0.0)
    if top_p:
        order = np.argsort(-logits, kind="stable")  # which differ where their weights round to the same
        shares = (weights[order] / weights.sum()).cumsum()
        weights[order[int(shares.searchsorted(top_p)) + 1 :]] = 0
    weights[weights < min_p] = 0
    return np.asarray(weights / weights.sum())


OPTIONS: list[dict[str, float]] = [
    {"temperature": 1.0},
    {"temperature": 0.6},
    {"temperature": 0.8, "top_k": 40},
    {"temperature": 1.0, "top_k": 127},
    {"temperature": 1.0, "top_k": 129},
    {"temperature": 1.5, "top_k": 3000},
    {"temperature": 1.0, "top_k": 100_352},
    {"temperature": 0.8, "top_p": 0.95},
    {"temperature": 1.0, "top_p": 0.3},
    {"temperature": 3.0, "top_p": 0.999},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.9},
    {"temperature": 0.8, "min_p": 0.05},
    {"temperature": 2.0, "min_p": 1.0},
    {"temperature": 1.3, "top_p": 0.9, "min_p": 0.1},
    {"temperature": 0.7, "top_k": 60, "top_p": 0.95, "min_p": 0.02},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_short_cuts_change_no_candidate_and_no_probability(options: dict[str, float]) -> None:
    """At a real vocabulary: peaked, flat and tied logits, and some that are excluded."""
    random = np.random.default_rng(4)
    peaked = random.normal(0, 2, 100_352).astype(np.float32)
    peaked[random.integers(0, 100_352, 25)] += random.exponential(7, 25).astype(np.float32)
    tied = np.round(peaked * 8) / np.float32(8)
    excluded = np.where(random.random(100_352) < 0.999, -np.inf, peaked).astype(np.float32)
    for logits in (peaked, tied, excluded, peaked * np.float32(0.05)):
        sampler = Sampler(seed=9, **options)  # type: ignore[arg-type]
        expected = slowly(logits, options)
        found = sampler.probabilities(logits)
        np.testing.assert_array_equal(found > 0, expected > 0)
        np.testing.assert_allclose(found, expected, rtol=1e-12)
        assert all(expected[sampler(logits)] > 0 for _ in range(20))


@pytest.mark.parametrize("min_p", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("temperature", [0.7, 1.9])
def test_min_p_keeps_what_transformers_keeps(temperature: float, min_p: float) -> None:
    torch = pytest.importorskip("torch")
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper

    random = np.random.default_rng(2)
    for _ in range(20):
        logits = random.normal(0, 3, VOCAB).astype(np.float32)
        scores = TemperatureLogitsWarper(temperature)(None, torch.from_numpy(logits)[None])
        scores = MinPLogitsWarper(min_p)(None, scores)
        found = Sampler(temperature, seed=0, min_p=min_p).probabilities(logits)
        np.testing.assert_array_equal(found > 0, (scores[0] > -math.inf).numpy())
        np.testing.assert_allclose(found, torch.softmax(scores[0], -1).numpy(), atol=2e-6)


class Numbers:
    """A generator that gives what it is told: numbers that propose, and between them those that accept."""

    def __init__(self, proposing: Iterable[float], accepting: Iterable[float]) -> None:
        self.turns = itertools.cycle([iter(proposing), iter(accepting)])

    def random(self) -> float:
        return next(next(self.turns))


def drawn(sampler: Sampler, logits: np.ndarray, proposing: Iterable[float], accepting: Iterable[float]) -> int:
    object.__setattr__(sampler, "_random", Numbers(proposing, accepting))
    return sampler(logits)


def test_a_draw_at_the_end_of_the_range_is_a_token_that_can_be_drawn() -> None:
    logits = np.full(5000, -1e5, np.float32)  # whose weights are 0
    logits[:3] = (0.1, 0.2, 0.3)
    assert drawn(Sampler(temperature=1.0), logits, [math.nextafter(1.0, 0.0)], [0.5]) == 2


def enumerated(sampler: Sampler, logits: np.ndarray, steps: int) -> np.ndarray:
    """The probability of each token, exact: a draw for each of the first `steps` numbers that propose, where it needs
    another one for each of that, and so on.

    A set of tokens whose weights are whole numbers is proposed exactly if these sum to a divisor of `steps`.
    """
    result = np.zeros(len(logits))
    open_paths: list[tuple[float, ...]] = [()]
    while open_paths:
        path = open_paths.pop()
        for number in (np.arange(steps) + 0.5) / steps:
            try:
                token = drawn(sampler, logits, [*path, number], itertools.repeat(0.5))
            except StopIteration:
                open_paths.append((*path, number))
            else:
                result[token] += steps ** -(len(path) + 1.0)
    return result


@pytest.mark.parametrize(
    ("weights", "options", "steps"),
    [
        ([4, 2, 1, 1], {}, 8),
        ([2, 1, 0, 1], {"top_p": 0.7}, 12),  # of the two equal ones the lower id is kept
        ([1, 2, 1, 0], {"top_p": 0.5}, 12),  # met exactly
        ([1, 1, 1, 1], {"top_p": 0.6}, 12),  # all equal
        ([2, 4, 1], {"top_p": 0.5}, 42),  # up to two proposals that are not kept
        ([1, 1e30, 1], {"top_p": 0.99}, 2),
        ([0, 3, 0, 0], {"top_p": 0.9}, 3),
        ([4, 1, 2, 1], {"min_p": 0.4}, 6),
        ([4, 2, 1, 1], {"top_p": 0.8, "min_p": 0.4}, 6),  # top-p takes its share before min-p leaves some out
        ([1, 4, 2, 1, 1], {"top_k": 3, "top_p": 0.8}, 72),  # top-k keeps all that equal the third
    ],
    ids=str,
)
def test_draws_have_exactly_the_probabilities(weights: list[float], options: dict[str, float], steps: int) -> None:
    with np.errstate(divide="ignore"):
        logits = np.log(np.array(weights)).astype(np.float32)
    sampler = Sampler(1.0, seed=0, **options)  # type: ignore[arg-type]
    expected = sampler.probabilities(logits)
    np.testing.assert_allclose(expected, slowly(logits, {"temperature": 1.0, **options}), rtol=1e-12)
    # What is left of the paths that are cut short by the sum of doubles.
    np.testing.assert_allclose(enumerated(sampler, logits, steps), expected, atol=1e-6)


def test_a_proposal_is_taken_as_often_as_float64_says() -> None:
    logits = np.array([0.0, 1.0, -7.3], np.float32)
    sampler = Sampler(1.0)
    assert drawn(sampler, logits, [0.01], [1 - 2e-4]) == 0
    assert drawn(sampler, logits, [0.01, 0.9], [1 - 1e-5, 0]) == 1


def test_min_p_ends_where_float32_cannot_tell_which_tokens_it_keeps() -> None:
    logits = np.linspace(0, 1e-6, 4000)
    assert {Sampler(1.0, min_p=1.0, seed=seed)(logits) for seed in range(20)} == {3999}


def test_a_token_at_minus_infinity_is_not_taken_where_it_is_proposed() -> None:
    """At this temperature its weight in float32 is that of exp(-80): it is proposed by a number as small as that."""
    logits = np.array([-np.inf, 0.0, 0.0], np.float32)
    assert drawn(Sampler(1e30), logits, [0.0, 0.9], [0.0, 0.0]) == 2


@pytest.mark.parametrize("temperature", [1e-5, 1.0, 1e30, 1e300])
def test_the_range_of_float32_and_of_the_temperature_end_no_draw(temperature: float) -> None:
    logits = np.array([-3e38, 3e38, -np.inf, 3e38, *[-np.inf] * 2000], np.float32)
    sampler = Sampler(temperature, top_p=0.99, seed=0)
    assert {sampler(logits) for _ in range(40)} - {0} == {1, 3}


CHANCES: list[dict[str, float]] = [
    {"temperature": 0.8, "top_k": 4, "top_p": 0.97},
    {"temperature": 2.5},
    {"temperature": 1.0, "top_p": 0.6},
    {"temperature": 3.0, "top_p": 0.9, "min_p": 0.3},
]


@pytest.mark.parametrize("options", CHANCES, ids=str)
@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 4.0])
def test_draws_follow_the_distribution(options: dict[str, float], spread: float) -> None:
    """Chi-square over twenty groups of tokens, of several rows of columns of weights; every third id has a twin."""
    logits = (np.random.default_rng(3).normal(0, 1, 600) * spread).astype(np.float32)
    logits[::3] = logits[1::3]
    logits[::7] = -np.inf
    sampler = Sampler(seed=7, **options)  # type: ignore[arg-type]
    draws = 1500
    p = sampler.probabilities(logits)
    counts = np.bincount([sampler(logits) for _ in range(draws)], minlength=len(logits))
    assert not counts[p == 0].any()
    groups = np.minimum((p.cumsum() - p) * 20, 19).astype(int)
    found, expected = np.bincount(groups, counts, 20), draws * np.bincount(groups, p, 20)
    found, expected = found[expected > 0], expected[expected > 0]
    freedom = max(len(expected) - 1, 1)
    assert ((found - expected) ** 2 / expected).sum() < freedom + 4 * math.sqrt(2 * freedom)  # the seed is fixed


def test_same_seed_draws_the_same_tokens() -> None:
    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(temperature=1.0, seed=seed)
        return [sampler(LOGITS) for _ in range(30)]

    assert draw(11) == draw(11)
    assert draw(11) != draw(12)
    assert draw(None) != draw(None)


@pytest.mark.parametrize(
    "sampler",
    [Sampler(), Sampler(temperature=1.3, top_k=1, seed=0), Sampler(temperature=1e-300), Sampler(temperature=1e-7)],
)
def test_greedy_takes_the_lowest_id_of_a_tie(sampler: Sampler) -> None:
    logits = np.array([1.0, 4.0, 4.0, -np.inf], np.float32)
    assert [sampler(logits) for _ in range(10)] == [1] * 10
    assert sampler.probabilities(logits).tolist() == [0.0, 1.0, 0.0, 0.0]


def test_small_temperature_does_not_give_nan() -> None:
    logits = np.array([-3e38, 3e38, 0.0], np.float32)
    assert Sampler(temperature=2e-6, seed=0).probabilities(logits).tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("top_p", [1e-300, 1e-17, 1e-9])
def test_tiny_top_p_keeps_one_token_of_a_flat_distribution(top_p: float) -> None:
    found = Sampler(temperature=1.0, top_p=top_p, seed=0).probabilities(np.zeros(VOCAB, np.float32))
    assert found.tolist() == [1.0] + [0.0] * (VOCAB - 1)


def test_top_p_of_a_large_flat_vocabulary_keeps_its_share() -> None:
    found = Sampler(temperature=1.0, top_p=0.5, seed=0).probabilities(np.zeros(100_352, np.float32))
    assert np.count_nonzero(found) == pytest.approx(50_176, abs=1)


@pytest.mark.parametrize("spread", [0.0, 1e-300, 1e-3, 0.5, 30.0])
@pytest.mark.parametrize("top_p", [1e-9, 0.5, 0.95, 0.999])
def test_top_p_of_more_logits_than_are_sorted_keeps_the_same(spread: float, top_p: float) -> None:
    logits = np.random.default_rng(5).normal(0, 1, 20_000) * spread
    logits[::7] = -np.inf
    found = Sampler(temperature=1.0, top_p=top_p, seed=0).probabilities(logits)
    expected = slowly(logits, {"temperature": 1.0, "top_p": top_p})
    # Sums in another order may take one more or less, where that is met all but exactly.
    assert abs(np.count_nonzero(found) - np.count_nonzero(expected)) <= 1
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-9)
    assert not found[::7].any()


def test_top_p_that_is_met_exactly_keeps_no_more() -> None:
    found = Sampler(temperature=1.0, top_p=0.5, seed=0).probabilities(np.zeros(4, np.float32))
    assert found.tolist() == [0.5, 0.5, 0.0, 0.0]


def test_top_k_keeps_all_that_equal_the_kth() -> None:
    logits = np.array([1.0, 2.0, 1.0, 0.0], np.float32)
    assert np.flatnonzero(Sampler(temperature=1.0, top_k=2, seed=0).probabilities(logits)).tolist() == [0, 1, 2]


def test_a_token_at_minus_infinity_is_never_drawn() -> None:
    logits = np.array([-np.inf, 0.0, -np.inf], np.float32)
    sampler = Sampler(temperature=5.0, seed=0)
    assert {sampler(logits) for _ in range(50)} == {1}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_logits_give_no_token(value: float, temperature: float) -> None:
    logits = LOGITS.copy()
    logits[3] = value
    with pytest.raises(NumericError, match=f"the largest is {value}"):
        Sampler(temperature, seed=0)(logits)
    with pytest.raises(NumericError):
        Sampler(temperature, seed=0).probabilities(logits)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_all_minus_infinity_gives_no_token(temperature: float) -> None:
    with pytest.raises(NumericError, match="all are -inf"):
        Sampler(temperature, seed=0)(np.full(5, -np.inf, np.float32))


@pytest.mark.parametrize("shape", [(0,), (1, 7)])
def test_logits_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"expected \[vocab_size\]"):
        Sampler()(np.zeros(shape, np.float32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature -0.1"),
        ({"temperature": math.nan}, "temperature nan"),
        ({"temperature": math.inf}, "temperature inf"),
        ({"temperature": "1"}, "temperature '1'"),
        ({"temperature": True}, "temperature True"),
        ({"top_k": -1}, "top_k -1"),
        ({"top_k": 2.0}, "top_k 2.0"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_p": 1.01}, "top_p 1.01"),
        ({"top_p": math.nan}, "top_p nan"),
        ({"min_p": -0.1}, "min_p -0.1"),
        ({"min_p": 1.5}, "min_p 1.5"),
        ({"min_p": math.nan}, "min_p nan"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 1.5}, "seed 1.5"),
        ({"seed": False}, "seed False"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Sampler(**options)


def test_numpy_numbers_are_options_too() -> None:
    sampler = Sampler(np.float32(0.5), np.int64(3), np.float64(0.9), np.uint8(4))
    assert sampler(LOGITS) in (0, 2, 4)


def test_options_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Sampler().temperature = 1.0


def largest(logits: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """What a graph picks: the likeliest ids, the lower first among equals, and their logits."""
    ids = np.argsort(-logits, kind="stable")[:count]
    return ids, logits[ids]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7, "top_k": 1},
        {"temperature": 0.7, "top_k": 2},
        {"temperature": 1.3, "top_k": 5},
        {"temperature": 1.3, "top_k": 7, "top_p": 0.8},
        {"temperature": 2.0, "top_k": 3, "top_p": 0.05},
        {"temperature": 1.3, "top_k": 7, "top_p": 0.9, "min_p": 0.2},
    ],
)
@pytest.mark.parametrize("step", [0.0, 0.125], ids=["float32", "ties"])
def test_candidates_give_the_tokens_that_all_logits_give(options: dict[str, float], step: float) -> None:
    """Logits of a bfloat16 head have steps of 0.125 between 16 and 32, so that ties are common."""
    random = np.random.default_rng(1)
    undecided = 0
    for seed in range(300):
        whole, few = Sampler(seed=seed, **options), Sampler(seed=seed, **options)  # type: ignore[arg-type]
        for _ in range(3):
            logits = random.normal(0, 2, VOCAB).astype(np.float32)
            logits = np.round(logits / step).astype(np.float32) * np.float32(step) if step else logits
            chosen = few.choose(*largest(logits, 8))
            if chosen is None:
                undecided += 1
                assert largest(logits, 8)[1][int(options["top_k"]) - 1] == largest(logits, 8)[1][-1]
                chosen = few(logits)
            assert chosen == whole(logits)
    assert undecided < 500
    assert step or undecided == 0


def test_candidates_that_are_needed() -> None:
    assert Sampler().candidates == Sampler(0.7, top_k=1).candidates == 1
    assert Sampler(0.7, top_k=5).candidates == 6
    assert Sampler(0.7).candidates == Sampler(0.7, top_p=0.9).candidates == 0


def test_tie_with_the_last_candidate_is_undecided_and_draws_nothing() -> None:
    sampler = Sampler(1.0, top_k=2, seed=3)
    ids = np.array([4, 2, 7])
    assert sampler.choose(ids, np.array([3.0, 1.0, 1.0], np.float32)) is None
    again = Sampler(1.0, top_k=2, seed=3)
    decided = np.array([3.0, 2.5, 1.0], np.float32)
    assert [sampler.choose(ids, decided) for _ in range(9)] == [again.choose(ids, decided) for _ in range(9)]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_k": 2}])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_candidates_that_are_no_numbers_give_no_token(options: dict[str, float], value: float) -> None:
    with pytest.raises(NumericError):
        Sampler(**options).choose(np.array([4, 2, 7]), np.full(3, value, np.float32))  # type: ignore[arg-type]
