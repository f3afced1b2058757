"""Rules that change logits before a `Sampler` draws from them, some by the tokens of the text so far. numpy only.

They are applied in the order in which they are given: penalties and biases first, what only excludes tokens last.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from runtimes.errors import InputError
from runtimes.integers import as_integer

_MOST = 1e30  # of a number that logits are changed by: float32 holds it, and the sum of as many as a text has tokens


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.floating) and not isinstance(value, bool)


class LogitRule(Protocol):
    """Changes the logits of one text; a text has objects of its own."""

    def begin(self, prompt_ids: Sequence[int]) -> None:
        """Forget the text and take another one's prompt."""
        ...

    def apply(self, logits: npt.NDArray[np.floating[Any]]) -> None:
        """Change the logits, float [vocab_size], of the next token in place; -inf excludes a token."""
        ...

    def push(self, token_id: int) -> None:
        """Take a token that was generated."""
        ...


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
            if not _is_number(value) or not abs(value) <= _MOST:
                raise InputError(f"{name} penalty {value!r}: expected a number from -{_MOST:g} to {_MOST:g}")
        if not self.repetition >= 1 / _MOST:
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


@dataclass(frozen=True)
class LogitBias:
    """Adds a number to the logits of some tokens, at every step.

    Source: `logit_bias` of OpenAI's API; transformers' SequenceBiasLogitsProcessor for sequences of one token.

    Raises:
        InputError: a token is not in the vocabulary, or its bias is NaN or too large for float32.
    """

    bias: Mapping[int, float]
    """token id -> what is added; -inf excludes it"""
    vocab_size: int
    _ids: npt.NDArray[np.int64] = field(init=False, repr=False, compare=False)
    _values: npt.NDArray[np.float32] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        ids = [as_integer(token_id) for token_id in self.bias]
        for given, token_id in zip(self.bias, ids, strict=True):
            if token_id is None or not 0 <= token_id < self.vocab_size:
                raise InputError(
                    f"logit bias: token id {given!r}, the vocabulary has 0 to {self.vocab_size - 1}; give integers"
                )
        for token_id, value in self.bias.items():
            if not _is_number(value) or not (abs(value) <= _MOST or value == -math.inf):
                raise InputError(
                    f"logit bias of token {token_id}: {value!r}; expected a number up to {_MOST:g}, or -inf"
                )
        object.__setattr__(self, "_ids", np.array(ids, np.int64))
        object.__setattr__(self, "_values", np.array(list(self.bias.values()), np.float32))

    def begin(self, prompt_ids: Sequence[int]) -> None:
        """Do nothing: a bias does not depend on the text."""

    def apply(self, logits: npt.NDArray[np.floating[Any]]) -> None:
        """Add to the logits, float [vocab_size], in place."""
        logits[self._ids] += self._values

    def push(self, token_id: int) -> None:
        """Do nothing: a bias does not depend on the text."""
