"""Speculation: guess the next tokens, check all guesses in one call of the model, keep those that are right.

A call with a few rows takes little longer than one with a single row, because both read all weights once. A `Drafter`
guesses (`PromptLookup` where the text repeats itself, `DraftModel` with a smaller model), the model's logits of every
guessed position come from one call, and at each position the sampler draws as it always does: as long as it draws
what was guessed, the next position is valid too.

That is the rejection rule of speculative sampling (Leviathan et al. 2023, arXiv:2211.17192) for a drafter that is sure
of its guess d: accept d with probability p(d), or else draw from p without d, renormalised. To draw x from p and
compare it with d does just that, so the text has the sampler's own distribution. And since the sampler is called once
for each token, as without speculation, a seed gives the same text too, up to the rounding of logits computed together.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from statistics import median
from typing import NamedTuple

from runtimes.runners.runner import HeldText, Logits, Runner
from runtimes.speculate.costs import DRAFT_LENGTHS, SAMPLES, STEP_COSTS, StepTimes
from runtimes.speculate.drafters import Drafter

_TOP_EVIDENCE = 8
_WORTH = 1.05  # a smaller gain is lost in what the estimates do not know
_FORGET = 0.95  # weight of an older observation of acceptance against the next newer one
_PRIOR_WEIGHT = 2.0  # observations
_PATIENCE = 8  # plain steps before another try, at least
_BUDGET = 0.01  # of the time, for such tries
_PROMISING = 0.6  # acceptance
_CHEAP = 0.01  # of a step: drafting that costs less goes on where its guesses are not checked, to see if they come true


class Guess(NamedTuple):
    """What the next step of the model is to check."""

    token_ids: list[int]
    """to be checked by the model; none: a plain step"""
    unchecked: int | None
    """in a plain step the guess that is only compared with what comes"""
    evidence: int


class Speculation:
    """Decides before each step how many guesses are worth checking, and counts how many were right.

    It takes the length that gives the most tokens per second: from how often guesses with as much evidence were right,
    from the times of the calls, and from the time that drafting takes.
    """

    def __init__(
        self,
        drafter: Drafter,
        *,
        costs: Mapping[int, float] = STEP_COSTS,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Take who guesses, the first estimate of the times (see `StepTimes`) and a clock in seconds."""
        self.drafter = drafter
        self.times = StepTimes(costs)
        self.clock = clock
        self.drafted = 0
        """guesses that the model checked"""
        self.accepted = 0
        """of these, the right ones that were given out"""
        self._right = [0.0] * (_TOP_EVIDENCE + 1)
        self._seen = [0.0] * (_TOP_EVIDENCE + 1)
        self._draft_seconds: deque[float] = deque(maxlen=SAMPLES)  # per token
        self._plain_steps = 0  # since guesses were last checked, of those that had any

    def guess(self, most: int, eos_token_ids: Collection[int] = ()) -> Guess:
        """Draft for the next step.

        Args:
            most: guesses at most.
            eos_token_ids: a draft ends before any of them, since what follows is not wanted.
        """
        evidence = self.drafter.evidence() if most > 0 else None
        if evidence is None or self.times.one_row is None:
            return Guess([], None, 0)
        length = self._length(evidence, most)
        if length == 0 and not self._cheap():
            return Guess([], None, evidence)
        began = self.clock()
        draft = self.drafter.propose(max(length, 1))
        self._draft_seconds.append((self.clock() - began) / max(len(draft), 1))
        draft = draft[: next((i for i, token_id in enumerate(draft) if token_id in eos_token_ids), len(draft))]
        self.drafted += len(draft) if length else 0
        return Guess(draft, None, evidence) if length else Guess([], draft[0] if draft else None, evidence)

    def observe(self, evidence: int, right: bool) -> None:
        """Learn whether a guess with so much evidence was right."""
        n = min(evidence, _TOP_EVIDENCE)
        self._right[n] = self._right[n] * _FORGET + right
        self._seen[n] = self._seen[n] * _FORGET + 1

    def acceptance(self) -> list[float]:
        """Return by evidence how many guesses are right; without observations more than with less evidence."""
        rates: list[float] = []
        for right, seen in zip(self._right, self._seen, strict=True):
            prior = rates[-1] + (1 - rates[-1]) * 0.2 if rates else self.drafter.acceptance
            rates.append((right + _PRIOR_WEIGHT * prior) / (seen + _PRIOR_WEIGHT))
        return rates

    def _length(self, evidence: int, most: int) -> int:
        rates = self.acceptance()
        drafting = median(self._draft_seconds) / (self.times.one_row or 1) if self._draft_seconds else 0.0
        best, best_rate = 0, _WORTH  # tokens per time of a plain step
        expected, reached, tried = 1.0, 1.0, 0
        for length in DRAFT_LENGTHS:
            # Longer by one entry of DRAFT_LENGTHS at a time, so that a model whose times grow fast is never far out.
            if length > most or tried > self.times.most:
                break
            for n in range(tried, length):
                reached *= rates[min(evidence + n, _TOP_EVIDENCE)]
                expected += reached
            tried = length
            rate = expected / (self.times.ratio(length + 1) + drafting * length)
            if rate > best_rate:
                best, best_rate = length, rate
        if best:
            self._plain_steps = 0
            return best
        return self._retry(rates[min(evidence, _TOP_EVIDENCE)], drafting, most)

    def _retry(self, rate: float, drafting: float, most: int) -> int:
        """After some plain steps try again: the estimates may be old, or longer drafts may pay where short do not."""
        self._plain_steps += 1
        length = DRAFT_LENGTHS[0]
        if rate >= _PROMISING:
            length = next((n for n in DRAFT_LENGTHS if self.times.most < n <= most), length)
        elif self._cheap():
            return 0
        hoped = sum(rate**i for i in range(length + 1))
        loss = self.times.ratio(length + 1) + drafting * length - hoped  # in plain steps
        if self._plain_steps < max(_PATIENCE, loss / _BUDGET):
            return 0
        self._plain_steps = 0
        return length

    def _cheap(self) -> bool:
        if not self._draft_seconds:
            return True
        return median(self._draft_seconds) < _CHEAP * (self.times.one_row or 0)


def speculate_tokens(
    runner: Runner,
    token_id: int,
    limit: int,
    *,
    sampler: Callable[[Logits], int],
    speculation: Speculation,
    eos_token_ids: Collection[int] = (),
    text: HeldText | None = None,
) -> Iterator[int]:
    """Yield the ids that follow `token_id`, of the same distribution as without speculation.

    When an id is given out, the cache may already hold ids that are about to be: closing the iterator drops these, so
    that then, as without speculation, the last id given out is in no cache.

    Args:
        runner: with one row; its cache holds all of the text but `token_id`.
        token_id: the last of the text.
        limit: so many ids are given out, and never more fed.
        sampler: picks each id; called once for every id, in the text's order.
        speculation: guesses, and counts.
        eos_token_ids: nothing after them is guessed.
        text: that the cache holds; None: what it holds now.

    Raises:
        UsageError: the cache holds another text by now.
        NumericError: the model, or the draft model, broke down.
    """
    if limit <= 0:
        return
    text = text or HeldText(runner)
    with text.step():
        held = runner.cached_tokens[0].tolist()
    speculation.drafter.begin([*held, token_id])
    while limit > 0:
        guess = speculation.guess(limit - 1, eos_token_ids)
        token_id, given = yield from _step(runner, text, token_id, guess, sampler, speculation)
        limit -= given


def _step(
    runner: Runner,
    text: HeldText,
    token_id: int,
    guess: Guess,
    sampler: Callable[[Logits], int],
    speculation: Speculation,
) -> Generator[int, None, tuple[int, int]]:
    """Check a guess with one call; return the last id given out and how many there were."""
    draft, clock = guess.token_ids, speculation.clock
    fed = [token_id, *draft]
    start = kept = text.length
    given = 0
    try:
        began = clock()
        with text.step():
            logits = runner.decode_block(fed)  # (1 + len(draft), V)
        seconds = clock() - began
        right = True
        while right:
            kept = start + given + 1
            token_id = sampler(logits[given])
            expected = draft[given] if given < len(draft) else guess.unchecked
            right = given < len(draft) and token_id == expected
            if expected is not None:
                speculation.observe(guess.evidence + given, token_id == expected)
            speculation.accepted += right
            if not right:
                began = clock()
                with text.step():
                    runner.truncate([kept])
                speculation.times.measured(len(fed), seconds + clock() - began)
            speculation.drafter.append(token_id)
            given += 1
            yield token_id
    finally:
        # Whoever let go of the iterator late may have given the cache another text; that stays, in whatever thread.
        if _fed_too_early(runner, start, kept, fed):
            with runner.exclusive:
                if _fed_too_early(runner, start, kept, fed):
                    runner.truncate([kept])
    return token_id, given


def _fed_too_early(runner: Runner, start: int, kept: int, fed: list[int]) -> bool:
    """Tell whether the cache ends with what was fed from `start` on, and holds more than the `kept` first tokens."""
    held = runner.cached_tokens
    return len(held) == 1 and len(held[0]) > kept and held[0][start:].tolist() == fed
