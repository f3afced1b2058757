"""Feed a portable graph as other runtimes do: padded batches in whole calls, and the cache of one call to the next.

| case         | rows                        | what is fed                                                            |
|--------------|-----------------------------|------------------------------------------------------------------------|
| alone        | one                         | the whole row; a beginning, then token by token; three pieces          |
| left padded  | three, of different lengths | all in one call; beginnings in one call, then one token of each a call |
| right padded | the same                    | the same: what follows stands behind the padding                       |
| vectors, ... | each half of `beside.mixed` | tokens and vectors in one call, padded on the left and on the right    |

Hidden states are compared in each case, where the graph gives them. Embeddings are none of a graph: who pools these
has them. Scores of padded batches are asked by `measure.compare_padded`.

The mask says what is padding, and stays as it was: so does transformers' `generate`, and so do onnxruntime-genai and
transformers.js.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np

from olmo2_export.verify.beside import NOTHING, Beside, halves
from olmo2_export.verify.feeds import ModeResult, short_lengths
from olmo2_export.views.runners import Step
from runtimes.errors import FailedError

STEPS = 8
"""tokens, at most, that follow one by one"""
SIDES = ("left", "right")
_VECTOR = -1
"""the id of what is no token"""
_PER_TOKEN = 3
"""dimensions of logits; scores have two"""


@dataclass(frozen=True)
class _Found:
    """What a graph gives of each row."""

    answers: list[np.ndarray]
    """logits float32 [length, V], of a classifier scores [calls, labels]"""
    states: list[list[np.ndarray]]
    """per hidden state and row float32 [length, hidden]"""


def feed_portable(
    step: Step,
    sequences: Sequence[np.ndarray],
    capacity: int,
    beside: Beside = NOTHING,
    padding: int | None = None,
) -> Iterator[ModeResult]:
    """Run every case.

    Args:
        step: runs the graph once.
        sequences: int64 [length] each, of the lengths that `feeds.row_lengths` gives.
        capacity: tokens that the first of them has.
        beside: what is asked beside logits.
        padding: the id that padding has; None: any, where the mask alone tells.
    """
    rows = [ids[:n] for ids, n in zip(sequences, short_lengths(capacity), strict=True)]
    steps = min(STEPS, *(len(ids) - 1 for ids in rows))
    first, scored = rows[:1], bool(beside.padded)
    pieces = [[len(rows[0]) // 3], [len(rows[0]) // 2], [len(rows[0])]]
    cases = [
        ("alone", first, [[len(rows[0])]], True),
        ("alone", first, _one_by_one(first, steps), True),
        ("alone", first, pieces, True),
        *((f"{side} padded", rows, [list(map(len, rows))], side == "left") for side in SIDES),
        *((f"{side} padded", rows, _one_by_one(rows, steps), side == "left") for side in SIDES),
    ]
    for mode, batch, ends, left in cases if beside.hidden or not scored else ():
        lengths = tuple(map(len, batch))
        try:
            found = _fed(step, batch, ends, left, padding)
        except FailedError as error:
            yield ModeResult(mode, lengths, (), (), str(error))
            continue
        if not scored:
            yield ModeResult(mode, lengths, tuple(map(np.arange, lengths)), tuple(found.answers), "")
        for place, (number, states) in enumerate(zip(beside.hidden, found.states, strict=True)):
            at = beside.state(place)
            yield ModeResult(f"hidden state {number}, {mode}", lengths, (), tuple(states), "", beside=at)
    yield from _feed_vectors(step, beside, padding)


def _feed_vectors(step: Step, beside: Beside, padding: int | None) -> Iterator[ModeResult]:
    for (fed, start, rows), side in product(halves(beside), SIDES):
        if not rows or (beside.padded and padding is None and side == "right"):
            continue  # a classifier without an id of padding scores what stands last
        mode, answered = f"{fed}, {side} padded", beside.first_mixed + start
        ids = [np.concatenate([row.before, np.full(len(row.vectors), _VECTOR), row.behind]) for row in rows]
        vectors = [np.pad(row.vectors, ((len(row.before), len(row.behind)), (0, 0))) for row in rows]
        lengths = tuple(map(len, ids))
        try:
            found = _fed(step, ids, [list(lengths)], side == "left", padding, vectors)
        except FailedError as error:
            yield ModeResult(mode, lengths, (), (), str(error), beside=answered)
            continue
        answers = tuple(answer[-row.answered :] for answer, row in zip(found.answers, rows, strict=True))
        yield ModeResult(mode, lengths, (), answers, "", beside=answered)
        for place, (number, states) in enumerate(zip(beside.hidden, found.states, strict=True)):
            at = beside.mixed_state(place) + start
            yield ModeResult(f"hidden state {number}, {mode}", lengths, (), tuple(states), "", beside=at)


def _one_by_one(rows: Sequence[np.ndarray], steps: int) -> list[list[int]]:
    return [[len(ids) - left for ids in rows] for left in range(steps, -1, -1)]


def _fed(
    step: Step,
    rows: Sequence[np.ndarray],
    ends: Sequence[Sequence[int]],
    left: bool,
    padding: int | None,
    vectors: Sequence[np.ndarray] | None = None,
) -> _Found:
    """Feed rows; `ends`: per call where each row's tokens end; `vectors`, of one call: [length, hidden] each."""
    cache: dict[str, np.ndarray] = {}
    mask = np.zeros((len(rows), 0), np.int64)
    answers: list[list[np.ndarray]] = [[] for _ in rows]
    states: list[list[list[np.ndarray]]] = []
    for starts, stops in pairwise([[0] * len(rows), *ends]):
        parts = [ids[a:b] for ids, a, b in zip(rows, starts, stops, strict=True)]
        width = max(map(len, parts))
        places = [slice(at, at + len(part)) for part in parts for at in [width - len(part) if left else 0]]
        ids, seen = np.full((len(rows), width), padding or 0), np.zeros((len(rows), width), np.int64)
        for row, (place, part) in enumerate(zip(places, parts, strict=True)):
            ids[row, place], seen[row, place] = part, 1
        mask = np.concatenate([mask, seen], axis=1)
        given = None
        if vectors is not None:
            given = np.zeros((len(rows), width, vectors[0].shape[1]), np.float32)
            for row, (place, of_row) in enumerate(zip(places, vectors, strict=True)):
                given[row, place] = of_row
        answer, hidden, cache = step(ids, mask, cache, given)
        states = states or [[[] for _ in rows] for _ in hidden]
        for row, place in enumerate(places):
            answers[row].append(answer[row, place] if answer.ndim == _PER_TOKEN else answer[row][None])
            for pieces, state in zip(states, hidden, strict=True):
                pieces[row].append(state[row, place])
    return _Found(_joined(answers), [_joined(pieces) for pieces in states])


def _joined(rows: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
    return [np.concatenate(pieces) for pieces in rows]
