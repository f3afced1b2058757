"""Rules that change logits by the tokens of the text so far, before a `Sampler` draws from them. numpy only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from runtimes.errors import InputError


@dataclass(frozen=True)
class Penalties:
    """Makes tokens less likely that the text has already; belongs to one text, whose tokens it counts.

    A step costs what the text has of different tokens, not what the vocabulary has.

    Source: `repetition` Keskar et al. 2019, arXiv:1909.05858, as transformers' RepetitionPenaltyLogitsProcessor;
    `presence` and `frequency` as the parameters of OpenAI's API.

    Raises:
        InputError: an option is out of its range.
    """

    repetition: float = 1.0
    """divides positive logits of the prompt's and the text's tokens and multiplies negative ones; 1: off"""
    presence: float = 0.0
    """taken off the logit of each generated token; 0: off"""
    frequency: float = 0.0
    """taken off the logit of each generated token, times how often it was generated; 0: off"""
    _places: dict[int, int] = field(init=False, repr=False, compare=False, default_factory=dict)
    _table: list[npt.NDArray[np.int64]] = field(init=False, repr=False, compare=False, default_factory=list)

    def __post_init__(self) -> None:
        for name, value in (
            ("repetition", self.repetition),
            ("presence", self.presence),
            ("frequency", self.frequency),
        ):
            if isinstance(value, bool) or not isinstance(value, (int, float, np.floating)) or not math.isfinite(value):
                raise InputError(f"{name} penalty {value!r}: expected a finite number")
        if self.repetition <= 0:
            raise InputError(f"repetition penalty {self.repetition!r}: expected a number above 0 (1: off)")
        self.begin(())

    def begin(self, prompt_ids: Sequence[int]) -> None:
        """Forget the text and take another one's prompt."""
        ids = list(dict.fromkeys(int(i) for i in prompt_ids))
        self._places.clear()
        self._places.update(zip(ids, range(len(ids)), strict=True))
        table = np.zeros((2, max(64, 2 * len(ids))), np.int64)  # ids, and how often they were generated
        table[0, : len(ids)] = ids
        self._table[:] = [table]

    def push(self, token_id: int) -> None:
        """Take a token that was generated."""
        (table,) = self._table
        place = self._places.setdefault(token_id, len(self._places))
        if place == table.shape[1]:
            self._table[0] = table = np.concatenate([table, np.zeros_like(table)], axis=1)
        table[0, place] = token_id
        table[1, place] += 1

    def apply(self, logits: npt.NDArray[np.floating[Any]]) -> None:
        """Change the logits of the text's tokens, in place.

        Args:
            logits: float [vocab_size].
        """
        ids, counts = self._table[0][:, : len(self._places)]
        values = logits[ids]
        if self.repetition != 1:
            values = np.where(values < 0, values * self.repetition, values / self.repetition)
        if self.presence or self.frequency:
            values = values - self.presence * (counts > 0) - self.frequency * counts
        logits[ids] = values
