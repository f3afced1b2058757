"""Sequences of like lengths are computed together, and what is found of them comes back in their order."""

from __future__ import annotations

import pytest

from runtimes.runners.batches import PADDED_TOKENS, batches, in_order


@pytest.mark.parametrize(
    ("lengths", "most", "found"),
    [
        ([], 8, []),
        ([5], 8, [[0]]),
        ([9, 3, 5], 8, [[1, 2, 0]]),
        ([9, 3, 5], 2, [[1, 2], [0]]),
        ([5, 5, 5], 1, [[0], [1], [2]]),
        ([200, 3, 150, 4], 8, [[1, 3], [2, 0]]),  # 50 tokens of padding to 350
        ([200, 3, 119, 4], 8, [[1, 3], [2], [0]]),  # 81 to 319
        ([256, 256, 256], 8, [[0, 1], [2]]),
        ([9000, PADDED_TOKENS + 1, 1], 8, [[2], [1], [0]]),
    ],
)
def test_those_of_like_lengths_come_together(lengths: list[int], most: int, found: list[list[int]]) -> None:
    assert list(batches(lengths, most)) == found


def test_what_is_found_comes_back_in_the_order_given() -> None:
    lengths = [7, 2, 90, 2, 40]
    places = [place for batch in batches(lengths, 2) for place in batch]
    assert in_order(places, [lengths[place] for place in places]) == lengths
