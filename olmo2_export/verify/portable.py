"""Feed a portable graph as other runtimes do: padded batches in whole calls, and the cache of one call to the next.

| case         | rows                        | what is fed                                                            |
|--------------|-----------------------------|-------------------------------------------------------------------------|
| alone        | one                         | the whole row; a beginning, then token by token; three pieces          |
| left padded  | three, of different lengths | all in one call; beginnings in one call, then one token of each a call |
| right padded | the same                    | the same: what follows stands behind the padding                       |

The mask says what is padding, and stays as it was: so does transformers' `generate`, and so do onnxruntime-genai and
transformers.js.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from olmo2_export.verify.feeds import ModeResult, short_lengths
from olmo2_export.views.runners import Step
from runtimes.errors import FailedError

STEPS = 8
"""tokens, at most, that follow one by one"""


def feed_portable(step: Step, sequences: Sequence[np.ndarray], capacity: int) -> Iterator[ModeResult]:
    """Run every case.

    Args:
        step: runs the graph once.
        sequences: int64 [length] each, of the lengths that `feeds.row_lengths` gives.
        capacity: tokens that the first of them has.
    """
    rows = [ids[:n] for ids, n in zip(sequences, short_lengths(capacity), strict=True)]
    steps = min(STEPS, *(len(ids) - 1 for ids in rows))
    first = rows[:1]
    pieces = [[len(rows[0]) // 3], [len(rows[0]) // 2], [len(rows[0])]]
    for mode, batch, ends, left in (
        ("alone", first, [[len(rows[0])]], True),
        ("alone", first, _one_by_one(first, steps), True),
        ("alone", first, pieces, True),
        *((f"{side} padded", rows, [list(map(len, rows))], side == "left") for side in ("left", "right")),
        *((f"{side} padded", rows, _one_by_one(rows, steps), side == "left") for side in ("left", "right")),
    ):
        lengths = tuple(map(len, batch))
        try:
            answers = _fed(step, batch, ends, left)
        except FailedError as error:
            yield ModeResult(mode, lengths, (), (), str(error))
            continue
        yield ModeResult(mode, lengths, tuple(map(np.arange, lengths)), tuple(answers), "")


def _one_by_one(rows: Sequence[np.ndarray], steps: int) -> list[list[int]]:
    return [[len(ids) - left for ids in rows] for left in range(steps, -1, -1)]


def _fed(step: Step, rows: Sequence[np.ndarray], ends: Sequence[Sequence[int]], left: bool) -> list[np.ndarray]:
    """Return the logits of each row, float32 [length, V]; `ends`: per call where each row's tokens end."""
    cache: dict[str, np.ndarray] = {}
    mask = np.zeros((len(rows), 0), np.int64)
    found: list[list[np.ndarray]] = [[] for _ in rows]
    for starts, stops in pairwise([[0] * len(rows), *ends]):
        parts = [ids[a:b] for ids, a, b in zip(rows, starts, stops, strict=True)]
        width = max(map(len, parts))
        begins = [width - len(part) if left else 0 for part in parts]
        ids, seen = (np.zeros((len(rows), width), np.int64) for _ in range(2))
        for row, (at, part) in enumerate(zip(begins, parts, strict=True)):
            ids[row, at : at + len(part)], seen[row, at : at + len(part)] = part, 1
        mask = np.concatenate([mask, seen], axis=1)
        logits, cache = step(ids, mask, cache)
        for pieces, of_row, at, part in zip(found, logits, begins, parts, strict=True):
            pieces.append(of_row[at : at + len(part)])
    return [np.concatenate(pieces) for pieces in found]
