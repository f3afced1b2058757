"""Logits -> the next token id: greedy, or drawn after temperature, top-k, top-p and min-p, in that order. numpy only.

A server draws once per token and client, so a vocabulary of 100,000 is not sorted and not copied: what top-k or min-p
leave out never becomes float64, and where all tokens count, one array is used again and again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from runtimes.errors import InputError, NumericError
from runtimes.integers import as_integer

# Below it the softmax of logits that float32 can tell apart has all its weight on the largest.
_GREEDY_BELOW = 1e-6
_COLUMNS = 256  # whose largest logits bound the k-th largest of all from below
_BLOCK = 1024  # weights that are summed first when one of many is drawn
_SINGLE = 1e-5  # relative error of a sum of weights in float32, several times over
_FLOORS = (0.05, 0.002, 1e-4)  # weights, the largest being 1; most of a text's nuclei lie above the first

Floats: TypeAlias = npt.NDArray[np.floating[Any]]
Weights: TypeAlias = npt.NDArray[np.float64]


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
    min_p: float = 0.0
    """of what top-k and top-p leave, keep tokens at least so probable as this share of the likeliest; 0 keeps all"""
    _random: np.random.Generator = field(init=False, repr=False, compare=False)
    _scratch: list[Weights] = field(init=False, repr=False, compare=False, default_factory=list)

    def __post_init__(self) -> None:
        if not _is_real(self.temperature) or not math.isfinite(self.temperature) or self.temperature < 0:
            raise InputError(f"temperature {self.temperature!r}: expected a finite number of at least 0 (0: greedy)")
        top_k = as_integer(self.top_k)
        if top_k is None or top_k < 0:
            raise InputError(f"top_k {self.top_k!r}: expected an integer of at least 0 (0: off)")
        if not _is_real(self.top_p) or not 0 < self.top_p <= 1:
            raise InputError(f"top_p {self.top_p!r}: expected a number above 0 and up to 1 (1: off)")
        if not _is_real(self.min_p) or not 0 <= self.min_p <= 1:
            raise InputError(f"min_p {self.min_p!r}: expected a number from 0 to 1 (0: off)")
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

    def __call__(self, logits: Floats) -> int:
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
        ids, weights = self._survivors(logits)
        place = _drawn(weights, self._random.random())
        return place if ids is None else int(ids[place])

    def choose(self, ids: npt.NDArray[np.int64], logits: Floats) -> int | None:
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
        place = _drawn(weights, self._random.random())
        return int(ids[order[place if survivors is None else survivors[place]]])

    def probabilities(self, logits: Floats) -> npt.NDArray[np.float64]:
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
            result[slice(None) if ids is None else ids] = weights / weights.sum()
        return result

    def _survivors(self, logits: Floats) -> tuple[npt.NDArray[np.intp] | None, Weights]:
        """Return the ids that can be drawn, None for all, and their weights: the likeliest has 1.

        The weights are good until the next call.
        """
        largest = _largest(logits)
        if self.top_p < 1 and not self.top_k and (found := self._nucleus_of_all(logits, largest)) is not None:
            nucleus, weights = found
            likely = weights >= self.min_p
            return nucleus[likely], weights[likely]
        ids = self._above(logits, largest)
        kept = logits if ids is None else logits[ids]
        weights = self._floats(len(kept))
        weights[:] = kept  # by itself: numpy is slower where a step has two dtypes
        weights -= largest
        if self.temperature != 1:
            weights *= 1 / self.temperature
        np.exp(weights, out=weights)  # the largest is 1, so it cannot overflow
        if self.top_p < 1:
            places = _nucleus(weights, self.top_p)
            ids, weights = places if ids is None else ids[places], weights[places]
        if self.min_p:
            likely = weights >= self.min_p
            ids, weights = np.flatnonzero(likely) if ids is None else ids[likely], weights[likely]
        return ids, weights

    def _above(self, logits: Floats, largest: np.float64) -> npt.NDArray[np.intp] | None:
        """Return the ids that top-k leaves, or min-p where top-p does not need the others; None: all."""
        if 0 < self.top_k < len(logits):
            kth = _kth_largest(logits, self.top_k)
            return np.flatnonzero(logits >= kth if kth > -np.inf else logits > kth)
        if self.min_p and self.top_p == 1:
            # A little lower, so that rounding leaves out none; the weights decide.
            lowest = largest + self.temperature * math.log(self.min_p)
            return np.flatnonzero(logits >= lowest - 1e-6 * (abs(lowest) + abs(largest)))
        return None

    def _nucleus_of_all(self, logits: Floats, largest: np.float64) -> tuple[npt.NDArray[np.intp], Weights] | None:
        """Return the ids and weights that top-p leaves of all, in half the time: only those are computed in float64.

        None where float32 cannot tell how many these are, or there are too many to be worth it.
        """
        if logits.dtype != np.float32:
            return None
        weights = self._floats(len(logits)).view(np.float32)[: len(logits)]
        np.subtract(logits, np.float32(largest), out=weights)
        weights *= np.float32(1 / self.temperature)
        np.exp(weights, out=weights)
        share = self.top_p * float(_block_sums(weights).sum(dtype=np.float64))
        for floor in _FLOORS:
            ids = np.flatnonzero(weights >= np.float32(floor))
            exact = np.exp((logits[ids] - largest) / self.temperature)
            if exact.sum() > share * (1 + _SINGLE):
                order = np.argsort(-exact, kind="stable")
                sums = exact[order].cumsum()
                first, last = (int(sums.searchsorted(share * (1 + error))) for error in (-_SINGLE, _SINGLE))
                return (ids[order[: last + 1]], exact[order[: last + 1]]) if first == last else None
        return None

    def _floats(self, count: int) -> Weights:
        """Return an array to compute weights in: the same one each time, since new memory costs more than the sums."""
        if not self._scratch or len(self._scratch[0]) < count:
            self._scratch[:] = [np.empty(count, np.float64)]
        return self._scratch[0][:count]


def _kth_largest(logits: Floats, k: int) -> np.floating[Any]:
    """Return the k-th largest logit, k <= n, without a partition of all where k is small."""
    rows = len(logits) // _COLUMNS
    if rows > 1 and k <= _COLUMNS // 2:
        tops = logits[: rows * _COLUMNS].reshape(rows, _COLUMNS).max(axis=0)
        # Each is a logit, so k of all are at least as large as the k-th largest of them.
        logits = logits[logits >= np.partition(tops, -k)[-k]]
    kth: np.floating[Any] = np.partition(logits, -k)[-k]
    return kth


def _nucleus(weights: Weights, top_p: float) -> npt.NDArray[np.intp]:
    """Return the places of the fewest, largest weights whose share is at least `top_p`; the lower place first."""
    total = _block_sums(weights).sum()
    # Weights below the last of these sum to less than 1 - top_p; with fewer the sort is short.
    for floor in (*_FLOORS, (1 - top_p) / len(weights) * total):
        above = weights >= floor
        large = weights[above]
        if large.sum() > top_p * total * (1 + 1e-9):  # then the cut is among these
            break
    likely = np.flatnonzero(above)
    order = np.argsort(-large, kind="stable")
    shares = (large[order] / total).cumsum()
    return likely[order[: int(shares.searchsorted(top_p)) + 1]]


def _drawn(weights: Weights, uniform: float) -> int:
    """Return the place of the weight in which `uniform`, of [0, 1), of their sum falls."""
    sums = _block_sums(weights).cumsum()
    at = min(uniform * sums[-1], np.nextafter(sums[-1], 0))  # so that there is a sum above it, and no weight of 0 there
    block = int(sums.searchsorted(at, side="right"))
    inner = weights[block * _BLOCK : (block + 1) * _BLOCK].cumsum()
    at = min(at - (sums[block - 1] if block else 0.0), np.nextafter(inner[-1], 0))
    return block * _BLOCK + int(inner.searchsorted(at, side="right"))


def _block_sums(weights: npt.NDArray[Any]) -> npt.NDArray[Any]:
    sums: npt.NDArray[Any] = np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK))
    return sums


def _is_real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _check(logits: Floats) -> Floats:
    _largest(logits)
    return logits


def _largest(logits: Floats) -> np.float64:
    """Return the largest logit.

    Raises:
        InputError: logits is not of one dimension, or empty.
        NumericError: a logit is NaN or +inf, or all are -inf.
    """
    if logits.ndim != 1 or len(logits) == 0:
        raise InputError(f"logits: expected [vocab_size], found {list(logits.shape)}")
    largest = np.float64(logits.max())  # NaN if there is one
    if not np.isfinite(largest):
        reason = "all are -inf" if largest == -np.inf else f"the largest is {largest}"
        raise NumericError(f"logits: {reason}, so there is nothing to sample from")
    return largest
