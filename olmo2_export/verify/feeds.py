"""The ways in which sequences are fed to a runner: modes x rows x lengths.

| mode         | what is fed                                                                                     |
|--------------|-------------------------------------------------------------------------------------------------|
| prefill      | the whole sequence in one call                                                                  |
| decode       | a beginning, then token by token to the end; of one token: that one, behind an emptied row      |
| chunked      | three pieces, of other sizes in every row                                                       |
| prefix reuse | a beginning and wrong tokens behind it; `truncate` to the beginning; the right tokens           |

| length       | of the first row; logits are compared                                                           |
|--------------|-------------------------------------------------------------------------------------------------|
| 1            | at all positions                                                                                |
| 61           | at all positions (less where the cache holds less, and still odd)                               |
| capacity - 1 | where a call ends, and at each decoded token                                                    |
| capacity     | the same: the last position of the cache is written and read                                    |

A classifier scores a row's last token alone: it is compared where a call ends, at each length. How it takes padding is
in `padded.py`.

A batch has one row, or three of different lengths. Long rows are filled once per batch, but for prefill: the modes
differ in how their last tokens come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from runtimes.errors import FailedError
from runtimes.runners.runner import Logits, Runner

LENGTHS = (61, 37, 13)
"""tokens of the rows of a batch, where the first is neither one token nor the capacity; odd, and all different"""
MIN_CAPACITY = 16
"""tokens: below it the cases are not different from each other"""
MODES = ("prefill", "decode", "chunked", "prefix reuse")
_TAIL = 9
"""tokens of a row of capacity - 1 that come after what is filled once"""


@dataclass(frozen=True)
class ModeResult:
    """One case: what came out of a runner for a batch."""

    mode: str
    """out of MODES"""
    lengths: tuple[int, ...]
    """tokens per row"""
    positions: tuple[np.ndarray, ...]
    """per row int64 [n]: the positions that have logits here"""
    logits: tuple[Logits, ...]
    """per row float32 [n, vocab_size]; () where there is an error"""
    error: str
    """why there are none: not finite, or the graph did not run; else empty"""
    first: int = 0
    """the sequence that the first row is of"""
    beside: int | None = None
    """the first of the answers of `beside` that the rows are; None: they are logits, and positions say which"""


Pieces = list[tuple[np.ndarray, Logits]]
"""of one row: positions int64 [n], logits float32 [n, vocab_size]"""


def row_lengths(capacity: int) -> tuple[int, ...]:
    """Return the tokens of the three sequences that all cases are cut from; the first fills the cache.

    Args:
        capacity: tokens a row holds, at least MIN_CAPACITY.
    """
    return capacity, *short_lengths(capacity)[1:]


def short_lengths(capacity: int) -> tuple[int, ...]:
    """Return the lengths of the three rows of a short batch, odd and within the capacity."""
    return tuple(min(n, capacity - 1 - capacity % 2 - 2 * row) for row, n in enumerate(LENGTHS))


def compared_positions(capacity: int) -> list[np.ndarray]:
    """Return per sequence of `row_lengths` the positions, int64, at which any case compares logits."""
    short = short_lengths(capacity)
    first = {*range(short[0]), *range(capacity - _TAIL - 2, capacity)}
    return [np.array(sorted(first), np.int64), *(np.arange(n, dtype=np.int64) for n in short[1:])]


def feed_all(runner: Runner, sequences: Sequence[np.ndarray], capacity: int) -> Iterator[ModeResult]:
    """Run every case on an open runner.

    Args:
        runner: of any graph, with a cache of at least that capacity.
        sequences: int64 [length] each, of the lengths that `row_lengths` gives.
        capacity: tokens a row holds.

    Yields:
        32 cases: of each batch the modes x lengths.
    """
    short = short_lengths(capacity)
    for rows in (1, len(sequences)):
        for first in (1, short[0]):
            batch = [sequences[row][:n] for row, n in enumerate((first, *short[1:])) if row < rows]
            for mode in MODES:
                yield _case(mode, batch, _SHORT[mode], runner)
        for length in (capacity - 1, capacity):
            batch = [sequences[0][:length], *sequences[1:rows]]
            yield _case("prefill", batch, _long_prefill, runner)
        yield from _long_cases(runner, sequences[:rows], capacity)
    runner.reset()


def _case(
    mode: str, batch: list[np.ndarray], feed: Callable[[Runner, list[np.ndarray]], list[Pieces]], runner: Runner
) -> ModeResult:
    runner.reset()
    return _result(mode, batch, partial(feed, runner, batch))


def _result(mode: str, batch: list[np.ndarray], feed: Callable[[], list[Pieces]]) -> ModeResult:
    lengths = tuple(len(ids) for ids in batch)
    try:
        rows = feed()
    except FailedError as error:
        return ModeResult(mode, lengths, (), (), str(error))
    positions = tuple(np.concatenate([p for p, _ in pieces]) for pieces in rows)
    return ModeResult(mode, lengths, positions, tuple(np.concatenate([x for _, x in pieces]) for pieces in rows), "")


def _prefill(runner: Runner, batch: list[np.ndarray]) -> list[Pieces]:
    return _call(runner, batch, [0] * len(batch), [len(ids) for ids in batch])


def _decode(runner: Runner, batch: list[np.ndarray]) -> list[Pieces]:
    steps = max(1, min(len(ids) for ids in batch) - 1)
    beginnings = [len(ids) - steps for ids in batch]
    if min(beginnings) > 0:
        rows = _call(runner, batch, [0] * len(batch), beginnings)
    else:  # a row of one token: it is decoded where another was
        pieces = [ids[: max(n, 1)] for ids, n in zip(batch, beginnings, strict=True)]
        logits = runner.prefill(pieces, all_positions=_answers_all(runner))
        runner.truncate(beginnings)
        rows = [[(np.arange(n - len(x), n), x)] if n else [] for n, x in zip(beginnings, logits, strict=True)]
    return _step(runner, batch, beginnings, steps, rows)


def _chunked(runner: Runner, batch: list[np.ndarray]) -> list[Pieces]:
    ends = []
    for row, ids in enumerate(batch):
        first, second = len(ids) // (3 + row), len(ids) // 2 + row
        ends.append([first, second, len(ids)] if min(len(ids) for ids in batch) > 1 else [len(ids)])
    rows: list[Pieces] = [[] for _ in batch]
    starts = [0] * len(batch)
    for stops in zip(*ends, strict=True):
        for pieces, more in zip(rows, _call(runner, batch, starts, stops), strict=True):
            pieces += more
        starts = list(stops)
    return rows


def _prefix_reuse(runner: Runner, batch: list[np.ndarray]) -> list[Pieces]:
    beginnings = [len(ids) // 2 for ids in batch]
    wrong = [np.concatenate([ids[:n], ids[n:][::-1]]) for ids, n in zip(batch, beginnings, strict=True)]
    logits = runner.prefill(wrong, all_positions=_answers_all(runner))
    runner.truncate(beginnings)
    rest = _call(runner, batch, beginnings, [len(ids) for ids in batch])
    if not _answers_all(runner):
        return rest
    return [
        [(np.arange(n), x[:n]), *pieces] if n else pieces for n, x, pieces in zip(beginnings, logits, rest, strict=True)
    ]


_SHORT = {"prefill": _prefill, "decode": _decode, "chunked": _chunked, "prefix reuse": _prefix_reuse}


def _long_prefill(runner: Runner, batch: list[np.ndarray]) -> list[Pieces]:
    logits = runner.prefill(batch)
    return [[(np.array([len(ids) - 1]), x)] for ids, x in zip(batch, logits, strict=True)]


def _long_cases(runner: Runner, sequences: Sequence[np.ndarray], capacity: int) -> Iterator[ModeResult]:
    """Fill the rows up to their last tokens once, and feed these in each way."""
    filled = [len(ids) - _TAIL - 1 for ids in sequences]
    runner.reset()
    try:
        beginnings = runner.prefill([ids[:n] for ids, n in zip(sequences, filled, strict=True)])
        failed = ""
    except FailedError as error:
        failed = str(error)
    for length in (capacity - 1, capacity):
        batch = [ids[: len(ids) - (capacity - length)] for ids in sequences]
        for mode, feed in _LONG.items():
            if failed:
                yield ModeResult(mode, tuple(len(ids) for ids in batch), (), (), failed)
                continue
            start: list[Pieces] = [[(np.array([n - 1]), x)] for n, x in zip(filled, beginnings, strict=True)]
            runner.truncate(filled)
            yield _result(mode, batch, partial(feed, runner, batch, filled, start))


def _long_decode(runner: Runner, batch: list[np.ndarray], filled: list[int], rows: list[Pieces]) -> list[Pieces]:
    return _step(runner, batch, filled, len(batch[0]) - filled[0], rows)


def _long_chunked(runner: Runner, batch: list[np.ndarray], filled: list[int], rows: list[Pieces]) -> list[Pieces]:
    middle = [n + 2 + row for row, n in enumerate(filled)]
    for starts, stops in ((filled, middle), (middle, [len(ids) for ids in batch])):
        for pieces, more in zip(rows, _call(runner, batch, starts, stops, all_positions=False), strict=True):
            pieces += more
    return rows


def _long_prefix_reuse(runner: Runner, batch: list[np.ndarray], filled: list[int], rows: list[Pieces]) -> list[Pieces]:
    runner.prefill([ids[n:][::-1] for ids, n in zip(batch, filled, strict=True)])
    runner.truncate(filled)
    rest = _call(runner, batch, filled, [len(ids) for ids in batch], all_positions=False)
    return [[*pieces, *more] for pieces, more in zip(rows, rest, strict=True)]


_LONG = {"decode": _long_decode, "chunked": _long_chunked, "prefix reuse": _long_prefix_reuse}


def _call(
    runner: Runner, batch: list[np.ndarray], starts: Sequence[int], stops: Sequence[int], all_positions: bool = True
) -> list[Pieces]:
    """Prefill a piece of every row; give all its positions, or its last."""
    pieces = [ids[a:b] for ids, a, b in zip(batch, starts, stops, strict=True)]
    logits = runner.prefill(pieces, all_positions=all_positions and _answers_all(runner))
    return [[(np.arange(b - len(x), b), x)] for b, x in zip(stops, logits, strict=True)]


def _answers_all(runner: Runner) -> bool:
    """Tell whether a runner can be asked of every token; a classifier cannot."""
    return runner.variant.answer == "logits"


def _step(
    runner: Runner, batch: list[np.ndarray], starts: Sequence[int], steps: int, rows: list[Pieces]
) -> list[Pieces]:
    """Decode so many tokens of every row; add them to what is known of the rows."""
    for step in range(steps):
        positions = [start + step for start in starts]
        logits = runner.decode([int(ids[n]) for ids, n in zip(batch, positions, strict=True)])  # (B, V)
        for pieces, n, row in zip(rows, positions, logits, strict=True):
            pieces.append((np.array([n]), row[None]))
    return rows
