"""Which whole sequences are computed together: those of like lengths, so that little is padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

PADDED_TOKENS = 512
"""tokens of a batch, padding included, at most: attention holds a number for each pair of a row's"""

PADDING, SHARE = 32, 0.25
"""tokens of padding in a batch, at most: the one, or the other of its tokens"""

_T = TypeVar("_T")


def batches(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Return the places of sequences, batch by batch, the shortest first; one that is longer than a batch alone.

    Args:
        lengths: tokens of each.
        most: sequences of a batch.
    """
    batch: list[int] = []
    held = 0
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        longest, total = lengths[place], held + lengths[place]
        padded = (len(batch) + 1) * longest
        if batch and (len(batch) == most or padded > PADDED_TOKENS or padded - total > max(PADDING, SHARE * total)):
            yield batch
            batch, total = [], longest
        batch.append(place)
        held = total
    if batch:
        yield batch


def in_order(places: Sequence[int], found: Sequence[_T]) -> list[_T]:
    """Return what was found of the sequences in the order that they were given in; `places` of all batches, joined."""
    return [item for _, item in sorted(zip(places, found, strict=True), key=lambda pair: pair[0])]
