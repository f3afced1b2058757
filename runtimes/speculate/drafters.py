"""Who guesses how a text goes on: an earlier place of the text itself, or a smaller model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from runtimes.errors import InputError, UsageError
from runtimes.one_thread import OneThread, one_thread
from runtimes.runners.runner import Runner, common_prefix
from runtimes.runners.scores import check_logits


class Drafter(Protocol):
    """Guesses how a text goes on. It serves one text at a time: two spoil each other's guesses, not their ids."""

    acceptance: float
    """share of guesses that are right without evidence, before any was seen"""

    def check(self, runner: Runner) -> None:
        """Refuse a model whose tokens it cannot guess.

        Raises:
            UsageError: naming what does not fit.
        """
        ...

    def begin(self, token_ids: Sequence[int]) -> None:
        """Take a text of at least one token; what it knows of another text that begins it may be kept."""
        ...

    def append(self, token_id: int) -> None:
        """Take the text's next token."""
        ...

    def evidence(self) -> int | None:
        """Return how many of the last tokens it would have guessed; None if it has no guess now."""
        ...

    def propose(self, count: int) -> list[int]:
        """Return up to `count` tokens that may come next."""
        ...


class PromptLookup:
    """Guesses that what followed the last few tokens earlier in the text will follow them again.

    A hash table has the latest place of every n-gram, so that a token costs the same in a text of any length. A match
    that went on is followed before another is looked up; then the longest n-gram counts, and its latest place.

    Source: Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding.
    """

    acceptance = 0.0

    def __init__(self, longest: int = 3, shortest: int = 2) -> None:
        """Take the lengths of the n-grams.

        Raises:
            InputError: not 1 <= shortest <= longest.
        """
        if not 1 <= shortest <= longest:
            raise InputError(f"n-grams of {shortest} to {longest} tokens: expected 1 <= shortest <= longest")
        self._sizes = range(longest, shortest - 1, -1)
        self.exclusive = OneThread("the drafter")
        self._forget()

    def _forget(self) -> None:
        self._ids: list[int] = []
        self._places: dict[tuple[int, ...], int] = {}  # n-gram -> where the token after it is, the latest
        self._match = 0  # where the next token is expected, if _matched
        self._matched = 0  # tokens before it that are the last ones of the text; 0: no match

    def check(self, runner: Runner) -> None:
        """Any model will do."""

    @one_thread
    def begin(self, token_ids: Sequence[int]) -> None:
        ids = list(token_ids)
        if ids[: len(self._ids)] != self._ids:
            self._forget()
        for token_id in ids[len(self._ids) :]:
            self._index(token_id)
        self._matched = 0
        self._look_up()

    @one_thread
    def append(self, token_id: int) -> None:
        follows = self._matched and self._ids[self._match] == token_id
        self._index(token_id)
        self._match, self._matched = (self._match + 1, self._matched + 1) if follows else (0, 0)
        if self._matched <= self._sizes[0]:
            self._look_up()

    def evidence(self) -> int | None:
        return self._matched or None

    @one_thread
    def propose(self, count: int) -> list[int]:
        if not self._matched:
            return []
        draft = self._ids[self._match : self._match + count]
        period = len(self._ids) - self._match
        while len(draft) < count:  # a match that reaches the end goes on with its own guesses
            draft.append(draft[len(draft) - period])
        return draft

    def _index(self, token_id: int) -> None:
        """Add a token: only now do the n-grams before it have one that follows."""
        ids = self._ids
        for size in self._sizes:
            if size <= len(ids):
                self._places[tuple(ids[-size:])] = len(ids)
        ids.append(token_id)

    def _look_up(self) -> None:
        for size in self._sizes:
            place = self._places.get(tuple(self._ids[-size:]))
            if place is not None:
                self._match, self._matched = place, size
                return
        self._matched = 0


class DraftModel:
    """Guesses what another, smaller model of the same vocabulary finds most probable.

    Its cache follows the text: what it guessed wrong is truncated away.
    """

    acceptance = 0.7

    def __init__(self, runner: Runner) -> None:
        """Take the smaller model; whoever opened the runner closes it."""
        self._runner = runner
        self.exclusive = OneThread("the drafter")
        self._ids: list[int] = []
        self._sure = 0  # so many tokens of the cache are known to be those of the text

    def check(self, runner: Runner) -> None:
        """Refuse a model of another vocabulary, a classifier, and the drafting runner itself.

        Raises:
            UsageError: any of these.
        """
        check_logits(self._runner.variant)
        found, expected = self._runner.model.vocab_size, runner.model.vocab_size
        if self._runner is runner:
            raise UsageError("the draft model is the same runner as the model; open it a second time")
        if found != expected:
            raise UsageError(
                f"the draft model has {found} token ids, the model {expected}; draft with one of its family"
            )

    @one_thread
    def begin(self, token_ids: Sequence[int]) -> None:
        self._ids = list(token_ids)
        self._sure = 0
        self._match_cache()
        rest = self._ids[self._sure : -1]
        if rest and self.evidence() is not None:
            self._runner.prefill([rest])
            self._sure = len(self._ids) - 1

    @one_thread
    def append(self, token_id: int) -> None:
        self._ids.append(token_id)

    def evidence(self) -> int | None:
        return 0 if len(self._ids) <= self._runner.max_cache_length else None

    @one_thread
    def propose(self, count: int) -> list[int]:
        count = min(count, self._runner.max_cache_length - len(self._ids) + 1)
        if count < 1:
            return []
        self._match_cache()
        draft = [int(self._runner.prefill([self._ids[self._sure :]])[0][-1].argmax())]
        self._sure = len(self._ids)
        while len(draft) < count:
            draft.append(int(self._runner.decode(draft[-1:])[0].argmax()))
        return draft

    def _match_cache(self) -> None:
        """Drop from the cache what is not the text; the text's last token is always left to feed."""
        held = self._runner.cached_tokens
        if len(held) != 1:
            self._runner.reset()
            self._sure = 0
            return
        self._sure = min(self._sure, len(held[0]))
        self._sure += common_prefix(held[0][self._sure :], self._ids[self._sure : -1])
        self._runner.truncate([self._sure])
