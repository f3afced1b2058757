"""Logits -> the next token id: greedy, or drawn after temperature, top-k and top-p. numpy only."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt

from runtimes.errors import InputError, NumericError
from runtimes.integers import as_integer

# Below it the softmax of logits that float32 can tell apart has all its weight on the largest.
_GREEDY_BELOW = 1e-6


@dataclass(frozen=True)
class Sampler:
    """Draws token ids; two samplers with the same options and seed draw the same ones.

    Raises:
        InputError: an option is out of its range.
    """

    temperature: float = 0.0
    """divides the logits; 0 means greedy"""
    top_k: int = 0
    """keep the k largest logits, and those equal to the k-th; 0 keeps all"""
    top_p: float = 1.0
    """keep the fewest, most probable tokens whose probabilities sum to at least this; 1 keeps all"""
    seed: int | None = None
    """of the random generator; None takes one from the operating system"""
    _random: np.random.Generator = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not _is_real(self.temperature) or not math.isfinite(self.temperature) or self.temperature < 0:
            raise InputError(f"temperature {self.temperature!r}: expected a finite number of at least 0 (0: greedy)")
        top_k = as_integer(self.top_k)
        if top_k is None or top_k < 0:
            raise InputError(f"top_k {self.top_k!r}: expected an integer of at least 0 (0: off)")
        if not _is_real(self.top_p) or not 0 < self.top_p <= 1:
            raise InputError(f"top_p {self.top_p!r}: expected a number above 0 and up to 1 (1: off)")
        seed = as_integer(self.seed)
        if self.seed is not None and (seed is None or seed < 0):
            raise InputError(f"seed {self.seed!r}: expected an integer of at least 0")
        object.__setattr__(self, "top_k", top_k)
        object.__setattr__(self, "_random", np.random.default_rng(seed))

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always taken."""
        return self.temperature < _GREEDY_BELOW or self.top_k == 1

    @property
    def candidates(self) -> int:
        """How many of the largest logits `choose` needs to draw what `__call__` would draw of all; 0: all of them."""
        return 1 if self.greedy else self.top_k + 1 if self.top_k else 0

    def __call__(self, logits: npt.NDArray[np.floating[Any]]) -> int:
        """Draw one token.

        Args:
            logits: float [vocab_size]; -inf excludes a token.

        Returns:
            The token id. Greedy takes the lowest id among equal logits.

        Raises:
            InputError: logits is not of one dimension, or empty.
            NumericError: a logit is NaN or +inf, or all are -inf.
        """
        if self.greedy:
            return int(_check(logits).argmax())
        return self._draw(*self._survivors(logits))

    def choose(self, ids: npt.NDArray[np.int64], logits: npt.NDArray[np.floating[Any]]) -> int | None:
        """Draw one token when only the largest logits are known, as `__call__` would with the same seed.

        Args:
            ids: int64 [n] of n >= `candidates` tokens, the likeliest first and the lower id first among equals.
            logits: float [n], theirs.

        Returns:
            The token id; None, and nothing was drawn, where the k-th largest logit equals the last one that is known:
            others may equal it too.

        Raises:
            InputError, NumericError: as `__call__`.
        """
        if self.greedy:
            _check(logits)
            return int(ids[0])
        if not logits[-1] < logits[self.top_k - 1]:
            _check(logits)
            return None
        order = np.argsort(ids)  # in which the survivors of all logits come
        survivors, weights = self._survivors(logits[order])
        return self._draw(ids[order][survivors], weights)

    def probabilities(self, logits: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float64]:
        """Return the distribution that `__call__` draws from.

        Args:
            logits: float [vocab_size].

        Returns:
            float64 [vocab_size], which sums to 1.

        Raises:
            InputError, NumericError: as `__call__`.
        """
        result = np.zeros(len(logits), np.float64)
        if self.greedy:
            result[_check(logits).argmax()] = 1.0
        else:
            ids, weights = self._survivors(logits)
            result[ids] = weights / weights.sum()
        return result

    def _draw(self, ids: npt.NDArray[np.integer[Any]], weights: npt.NDArray[np.float64]) -> int:
        cumulative = weights.cumsum()
        drawn = cumulative.searchsorted(self._random.random() * cumulative[-1], side="right")
        return int(ids[min(int(drawn), len(ids) - 1)])

    def _survivors(self, logits: npt.NDArray[np.floating[Any]]) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]:
        """Return the ids that can be drawn and their weights, which need not sum to 1."""
        scores = _check(logits).astype(np.float64)
        scores = (scores - scores.max()) / self.temperature  # the largest is 0, so exp cannot overflow
        ids = np.flatnonzero(scores > -np.inf)
        if 0 < self.top_k < len(ids):
            kth_largest = np.partition(scores, -self.top_k)[-self.top_k]
            ids = ids[scores[ids] >= kth_largest]
        weights = np.exp(scores[ids])
        if self.top_p < 1:
            weights /= weights.sum()
            # Tokens below this share sum to less than 1 - top_p: leaving them out first makes the sort short.
            likely = np.flatnonzero(weights >= (1 - self.top_p) / len(weights))
            order = likely[np.argsort(-weights[likely], kind="stable")]
            count = int(weights[order].cumsum().searchsorted(self.top_p)) + 1
            ids, weights = ids[order[:count]], weights[order[:count]]
        return ids, weights


def _is_real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _check(logits: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.floating[Any]]:
    if logits.ndim != 1 or len(logits) == 0:
        raise InputError(f"logits: expected [vocab_size], found {list(logits.shape)}")
    largest = logits.max()  # NaN if there is one
    if not np.isfinite(largest):
        reason = "all are -inf" if largest == -np.inf else f"the largest is {largest}"
        raise NumericError(f"logits: {reason}, so there is nothing to sample from")
    return logits
