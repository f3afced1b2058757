"""The ways in which padding comes to a classifier, and which token transformers scores then.

| case                | rows                                                    | scored                               |
|---------------------|-------------------------------------------------------|-------------------------------------|
| alone               | one, without padding                                  | the last token                      |
| right padded        | three of different lengths, the mask hides the padding | each one's last token               |
| left padded         | the same                                              | the same                            |
| trailing padding id | the last tokens are the id of padding, and seen       | the last that is none               |
| padding alone       | one of them nothing but the id of padding, and seen   | of that one the first               |

Each comes to the runner's `score`, without what the mask hides; a graph whose pooling is inside gets the batches as
they are, too. A model without an id of padding has the first case alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from olmo2_export.config import ModelConfig
from olmo2_export.verify.feeds import ModeResult
from runtimes import Runner
from runtimes.errors import FailedError
from runtimes.runners.scores import scored_token

_LENGTHS = (13, 7, 4)
_BEHIND = 3  # tokens of padding that are seen


@dataclass(frozen=True)
class Padded:
    """A batch with padding."""

    name: str
    ids: np.ndarray
    """int64 [B, S]"""
    mask: np.ndarray
    """int64 [B, S]: 0 hides padding"""
    left: bool = False
    """padding stands on the left"""

    @property
    def rows(self) -> list[np.ndarray]:
        """Each row without what the mask hides."""
        return [ids[seen == 1] for ids, seen in zip(self.ids, self.mask, strict=True)]

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(map(len, self.rows))

    def scored_rows(self, pad: int | None) -> list[np.ndarray]:
        """Return each row up to the token that is scored."""
        return [row[: scored_token(row, pad) + 1] for row in self.rows]


def padded_batches(config: ModelConfig, sequences: Sequence[np.ndarray]) -> tuple[Padded, ...]:
    """Return the batches of a classifier, cut from sequences that hold no padding; () of a language model."""
    pad = config.pad_token_id
    if not config.labels:
        return ()
    width = min(max(_LENGTHS), *map(len, sequences))  # of a small cache
    rows = [ids[: min(n, width)] for ids, n in zip(sequences, _LENGTHS, strict=True)]
    whole = Padded("alone", rows[0][None], np.ones((1, len(rows[0])), np.int64))
    if pad is None or not 0 <= pad < config.vocab_size:
        return (whole,)
    padding = [np.full(width - len(row), pad, np.int64) for row in rows]
    seen = [(np.arange(width) < len(row)).astype(np.int64) for row in rows]
    right = np.stack([np.concatenate(pair) for pair in zip(rows, padding, strict=True)])
    left = np.stack([np.concatenate(pair) for pair in zip(padding, rows, strict=True)])
    mask = np.stack(seen)
    trailing = np.stack([ids[:width] for ids in sequences])
    trailing[0, -_BEHIND:] = pad
    trailing[1, -1] = pad
    alone = np.stack([sequences[0][:width], np.full(width, pad, np.int64)])
    return (
        whole,
        Padded("right padded", right, mask),
        Padded("left padded", left, np.ascontiguousarray(mask[:, ::-1]), left=True),
        Padded("trailing padding id", trailing, np.ones_like(trailing)),
        Padded("padding alone", alone, np.ones_like(alone)),
    )


def scored_mode(batch: Padded) -> str:
    """Return what the report calls a batch that a runner scores."""
    return f"score, {batch.name}"


def score_padded(runner: Runner, batches: Sequence[Padded]) -> Iterator[ModeResult]:
    """Give the rows of each batch to a runner's `score`."""
    for number, batch in enumerate(batches):
        mode = scored_mode(batch)
        try:
            scores = runner.score(batch.rows)
        except FailedError as error:
            yield ModeResult(mode, batch.lengths, (), (), str(error), beside=number)
            continue
        yield ModeResult(mode, batch.lengths, (), (scores,), "", beside=number)
