"""What verify asks for beside logits: scores of padded batches, hidden states, sentence embeddings; and of vectors.

| asked         | of                                     | case                      | PyTorch's answer          |
|---------------|----------------------------------------|---------------------------|---------------------------|
| scores        | each of `padded`, of a classifier      | score, NAME               | its own choice of a token |
| hidden states | the short rows, for each number        | hidden state N            | `output_hidden_states`    |
|               |                                        | hidden state N, in pieces | the same                  |
| embeddings    | the same rows, each number and pooling | embedding N, POOLING      | a batch padded on the     |
|               |                                        |                           | right, pooled by its mask |
| vectors       | random ones, where the graph takes any | vectors                   | logits of `inputs_embeds` |
|               | the same, tokens before and behind     | vectors among tokens      | the same                  |
| both          | hidden states of both, each number     | hidden state N, vectors   | `output_hidden_states` of |
|               |                                        | ..., vectors among tokens | `inputs_embeds`           |
|               | embeddings of both, each pooling       | embedding N, POOLING, ... | these, pooled             |

All answers stand in one list, in that order, behind the logits of each sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from olmo2_export.config import ModelConfig
from olmo2_export.truth.layered import LayeredReference, Row
from olmo2_export.truth.reference import Reference
from olmo2_export.verify.feeds import ModeResult, short_lengths
from olmo2_export.verify.padded import Padded, padded_batches, score_padded
from runtimes import Runner
from runtimes.errors import FailedError
from runtimes.runners.embeddings import POOLINGS, embed, pooled
from runtimes.runners.runner import HiddenStates


@dataclass(frozen=True)
class Mixed:
    """A row of vectors, with tokens around them."""

    before: np.ndarray
    """int64 [n]"""
    vectors: np.ndarray
    """float32 [n, hidden]"""
    behind: np.ndarray
    """int64 [n]"""

    @property
    def parts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.before, self.vectors, self.behind

    @property
    def answered(self) -> int:
        """Positions from the first vector on."""
        return len(self.vectors) + len(self.behind)


@dataclass(frozen=True)
class Beside:
    """The questions."""

    padded: tuple[Padded, ...] = ()
    hidden: tuple[int, ...] = ()
    """numbers of hidden states"""
    rows: tuple[np.ndarray, ...] = ()
    """int64 [n] each: whose hidden states are compared"""
    mixed: tuple[Mixed, ...] = ()
    """as many without tokens as with, the former first"""

    @property
    def first_mixed(self) -> int:
        """Where the answers to `mixed` begin: logits, then hidden states, then embeddings."""
        return self.embedding(len(self.hidden), 0)

    @property
    def first_state(self) -> int:
        """Where the answers begin that are vectors."""
        return len(self.padded)

    def state(self, place: int) -> int:
        """Return where the hidden states of the rows begin; `place` is that of the number in `hidden`."""
        return self.first_state + place * len(self.rows)

    def embedding(self, place: int, pooling: int) -> int:
        """Return where an embedding stands, [rows, hidden]."""
        return self.state(len(self.hidden)) + place * len(POOLINGS) + pooling

    def mixed_state(self, place: int) -> int:
        """Return where the hidden states of `mixed` begin."""
        return self.first_mixed + (1 + place) * len(self.mixed)

    def mixed_embedding(self, half: int, place: int, pooling: int) -> int:
        """Return where an embedding of a half of `mixed` stands, [rows, hidden]."""
        return self.mixed_state(len(self.hidden)) + (half * len(self.hidden) + place) * len(POOLINGS) + pooling

    def has_logits(self, answer: int) -> bool:
        """Tell whether an answer is logits of `mixed`."""
        return self.first_mixed <= answer < self.mixed_state(0)


NOTHING = Beside()
HALVES = 2
"""of `mixed`"""
_SEED, _SIZE = 1, 0.02


def questions(config: ModelConfig, sequences: Sequence[np.ndarray], capacity: int) -> Beside:
    """Return what is asked of a package; all rows are cut from its sequences."""
    rows = [ids[:n] for ids, n in zip(sequences, short_lengths(capacity), strict=True)]
    return Beside(
        padded_batches(config, sequences),
        config.hidden_states,
        tuple(rows) if config.hidden_states else (),
        tuple(_mixed(config, rows)) if config.inputs_embeds else (),
    )


def _mixed(config: ModelConfig, rows: Sequence[np.ndarray]) -> Iterator[Mixed]:
    """Cut tokens from rows, and draw vectors of the size that embeddings have in trained models."""
    generator, nothing = np.random.default_rng(_SEED), np.zeros(0, np.int64)
    for before, behind in ((0, 0), (5, 2)):
        for row, ids in enumerate(rows):
            vectors = generator.normal(0, _SIZE, (7 - 2 * row, config.hidden_size)).astype(np.float32)
            yield Mixed(ids[:before], vectors, ids[before : before + behind] if behind else nothing)


def ask_reference(
    reference: Reference, sequences: Sequence[np.ndarray], positions: Sequence[np.ndarray], beside: Beside
) -> list[np.ndarray]:
    """Return PyTorch's answers: logits per sequence, [n, V], and behind them those to `beside`."""
    states = reference.hidden_states(beside.rows, beside.hidden) if beside.hidden else []
    of_mixed = [reference.mixed_states(*row.parts, beside.hidden) for row in beside.mixed] if beside.hidden else []
    pooled = reference.embeddings(beside.rows, beside.hidden, POOLINGS) if beside.hidden else []
    return [
        *reference.logits(sequences, positions),
        *(reference.scores(batch.ids, batch.mask) for batch in beside.padded),
        *(row for of_number in states for row in of_number),
        *pooled,
        *(reference.mixed(*row.parts) for row in beside.mixed),
        *pooled_states(list(zip(*of_mixed, strict=True)), HALVES),
    ]


def ask_by_layer(
    reference: LayeredReference,
    config: ModelConfig,
    sequences: Sequence[np.ndarray],
    positions: Sequence[np.ndarray],
    beside: Beside,
) -> list[np.ndarray]:
    """As `ask_reference`, in one pass over the layers; here, not by transformers, is chosen what is scored."""
    scored = [row for batch in beside.padded for row in batch.scored_rows(config.pad_token_id)]
    mixed = [row.parts for row in beside.mixed]
    asked: list[Row] = [*sequences, *scored, *beside.rows, *mixed]
    where = [*positions, *(np.array([len(row) - 1]) for row in scored), *(np.array([0]) for _ in beside.rows)]
    where += [len(row.before) + np.arange(row.answered) for row in beside.mixed]
    found, states = reference.logits_and_states(asked, where, beside.hidden)
    rest, first = iter(found[len(sequences) :]), len(sequences) + len(scored)
    return [
        *found[: len(sequences)],
        *(np.concatenate([next(rest) for _ in batch.ids]) for batch in beside.padded),
        *pooled_states([of_number[first : first + len(beside.rows)] for of_number in states]),
        *found[len(found) - len(mixed) :],
        *pooled_states([of_number[len(asked) - len(mixed) :] for of_number in states], HALVES),
    ]


def pooled_states(states: Sequence[Sequence[np.ndarray]], batches: int = 1) -> list[np.ndarray]:
    """Return hidden states, per number and row [n, hidden], and behind them their embeddings, in the order above.

    Args:
        states: per number and row.
        batches: of the rows; each has embeddings of its own.
    """
    found = [row for of_number in states for row in of_number]
    size = len(states[0]) // batches if states else 0
    if not size:
        return found
    for start in range(0, size * batches, size):
        for of_number in states:
            rows = of_number[start : start + size]
            found += [np.stack([_exactly_pooled(row, pooling) for row in rows]) for pooling in POOLINGS]
    return found


def _exactly_pooled(states: np.ndarray, pooling: str) -> np.ndarray:
    """As `embeddings.pooled`, in the dtype of the states."""
    vector: np.ndarray = states[-1] if pooling == "last" else states.mean(axis=0)
    return vector


def feed_beside(runner: Runner, beside: Beside) -> Iterator[ModeResult]:
    """Run every case on an open runner."""
    yield from score_padded(runner, beside.padded)
    if beside.hidden:
        yield from _feed_hidden(runner, beside)
    if beside.mixed:
        yield from _feed_mixed(runner, beside)
    if beside.mixed and beside.hidden:
        yield from _feed_mixed_hidden(runner, beside)


def halves(beside: Beside) -> Iterator[tuple[str, int, Sequence[Mixed]]]:
    """Return what the report calls each half of `mixed`, its first row's place, and its rows."""
    half = len(beside.mixed) // HALVES
    for mode, start in (("vectors", 0), ("vectors among tokens", half)):
        yield mode, start, beside.mixed[start : start + half]


def _feed_mixed(runner: Runner, beside: Beside) -> Iterator[ModeResult]:
    for mode, start, rows in halves(beside):
        at, lengths = beside.first_mixed + start, _lengths(rows)
        runner.reset()
        try:
            found = _answers(runner, rows)
        except FailedError as error:
            yield ModeResult(mode, lengths, (), (), str(error), beside=at)
            continue
        yield ModeResult(mode, lengths, (), found, "", beside=at)
    runner.reset()


def _lengths(rows: Sequence[Mixed]) -> tuple[int, ...]:
    return tuple(sum(map(len, row.parts)) for row in rows)


def _feed_mixed_hidden(runner: Runner, beside: Beside) -> Iterator[ModeResult]:
    for half, (mode, start, rows) in enumerate(halves(beside)):
        lengths = _lengths(rows)
        runner.reset()
        try:
            states = _mixed_states(runner, rows)
        except FailedError as error:
            at = beside.mixed_state(0) + start
            yield ModeResult(f"hidden states, {mode}", lengths, (), (), str(error), beside=at)
            continue
        for place, number in enumerate(beside.hidden):
            found = tuple(row[number] for row in states)
            at = beside.mixed_state(place) + start
            yield ModeResult(f"hidden state {number}, {mode}", lengths, (), found, "", beside=at)
            for index, pooling in enumerate(POOLINGS):
                vectors = np.stack([pooled(row, pooling) for row in found])
                at = beside.mixed_embedding(half, place, index)
                yield ModeResult(f"embedding {number}, {pooling}, {mode}", lengths, (), (vectors,), "", beside=at)
    runner.reset()


def _mixed_states(runner: Runner, rows: Sequence[Mixed]) -> list[HiddenStates]:
    """Return the hidden states of all tokens and vectors."""
    before, vectors, behind = ([row.parts[n] for row in rows] for n in range(3))
    parts = [runner.prefill_hidden(before)] if any(map(len, before)) else []
    parts.append(runner.prefill_embeds_hidden(vectors))
    if any(map(len, behind)):
        parts.append(runner.prefill_hidden(behind))
    return [{n: np.concatenate([part[n] for part in row]) for n in row[0]} for row in zip(*parts, strict=True)]


def _answers(runner: Runner, rows: Sequence[Mixed]) -> tuple[np.ndarray, ...]:
    """Return the logits from the first vector on; of a classifier those of the last position."""
    everything = runner.variant.answer == "logits"
    if any(len(row.before) for row in rows):
        runner.prefill([row.before for row in rows])
    found = runner.prefill_embeds([row.vectors for row in rows], all_positions=everything)
    if not any(len(row.behind) for row in rows):
        return tuple(found)
    rest = runner.prefill([row.behind for row in rows], all_positions=everything)
    if not everything:
        return tuple(rest)
    return tuple(np.concatenate(pair) for pair in zip(found, rest, strict=True))


def _feed_hidden(runner: Runner, beside: Beside) -> Iterator[ModeResult]:
    lengths = tuple(map(len, beside.rows))
    for suffix, cut in (("", 0), (", in pieces", 3)):
        runner.reset()
        try:
            states = _states(runner, beside.rows, cut)
        except FailedError as error:
            yield ModeResult(f"hidden states{suffix}", lengths, (), (), str(error), beside=beside.first_state)
            continue
        for place, number in enumerate(beside.hidden):
            found = tuple(row[number] for row in states)
            yield ModeResult(f"hidden state {number}{suffix}", lengths, (), found, "", beside=beside.state(place))
    runner.reset()
    for place, number in enumerate(beside.hidden):
        for index, pooling in enumerate(POOLINGS):
            mode, at = f"embedding {number}, {pooling}", beside.embedding(place, index)
            try:
                found = (embed(runner, beside.rows, pooling=pooling, hidden_state=number),)
            except FailedError as error:
                yield ModeResult(mode, lengths, (), (), str(error), beside=at)
                continue
            yield ModeResult(mode, lengths, (), found, "", beside=at)


def _states(runner: Runner, rows: Sequence[np.ndarray], cut: int) -> list[HiddenStates]:
    """Return the hidden states of all tokens; `cut`: a part of each row, one in so many, comes first, by itself."""
    if not cut:
        return list(runner.prefill_hidden(rows))
    firsts = [max(1, len(row) // (cut + n)) for n, row in enumerate(rows)]
    if any(first == len(row) for first, row in zip(firsts, rows, strict=True)):
        return list(runner.prefill_hidden(rows))
    parts = [
        runner.prefill_hidden([row[:first] for first, row in zip(firsts, rows, strict=True)]),
        runner.prefill_hidden([row[first:] for first, row in zip(firsts, rows, strict=True)]),
    ]
    return [{n: np.concatenate([one[n], other[n]]) for n in one} for one, other in zip(*parts, strict=True)]
