"""Logits -> the next token id: greedy, or drawn after temperature, top-k, top-p and min-p, in that order. numpy only.

A server draws once per token and client, so a vocabulary of 100,000 is neither sorted nor computed in float64. A token
is drawn by rejection, which changes no probability (for top-p it is what FlashInfer's kernels do on GPUs,
https://flashinfer.ai/2025/03/10/sampling.html):

- float32 proposes a token, and its weight in float64 accepts it, nearly always;
- top-p keeps it where the tokens before it, more probable or as probable and of a lower id, have less than `top_p`
  together. Where they have more, none after it is kept either, and the next proposal is one of those before it.
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
_TOPS = 256  # columns, at least, whose largest logits bound the k-th largest of all from below
_COLUMNS = 256  # of weights, one of which is hit before one of its weights is
_FEW = 32  # of so many tokens one is picked out
_SINGLE = 1e-4  # relative error of a weight, and of a sum of them, in float32, several times over
_LOWEST = -80.0  # whose exponential is taken: of less it is subnormal, and takes several times as long
_FINITE = 1e38  # of a temperature beyond it -inf would have a weight, so that excluded tokens would be proposed

Floats: TypeAlias = npt.NDArray[np.floating[Any]]
Weights: TypeAlias = npt.NDArray[np.float32]


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
        ids = self._top(logits)
        return self._draw(logits) if ids is None else int(ids[self._draw(logits[ids])])

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
        order = np.argsort(ids)  # in which `__call__` has them
        order = order[logits[order] >= logits[self.top_k - 1]]
        return int(ids[order[self._draw(logits[order])]])

    def probabilities(self, logits: Floats) -> npt.NDArray[np.float64]:
        """Return the distribution that `__call__` draws from.

        Args:
            logits: float [vocab_size].

        Returns:
            float64 [vocab_size], which sums to 1.

        Raises:
            InputError, NumericError: as `__call__`.
        """
        largest = _largest(logits)
        if self.greedy:
            return np.asarray(np.arange(len(logits)) == logits.argmax(), np.float64)
        order = np.argsort(-logits, kind="stable")
        weights = self._weights(logits, largest)
        if 0 < self.top_k < len(logits):
            weights[logits < logits[order[self.top_k - 1]]] = 0
        if self.top_p < 1:
            sums = weights[order].cumsum()
            weights[order[int(sums.searchsorted(self.top_p * sums[-1])) + 1 :]] = 0
        weights[weights < self.min_p] = 0
        weights /= weights.sum()
        return weights

    def _weights(self, logits: Floats, largest: np.float64) -> npt.NDArray[np.float64]:
        weights: npt.NDArray[np.float64] = np.exp((np.asarray(logits, np.float64) - largest) / self.temperature)
        return weights

    def _top(self, logits: Floats) -> npt.NDArray[np.intp] | None:
        """Return the ids that top-k leaves, ascending, or few of which min-p leaves some; None: all."""
        largest = _largest(logits)
        if 0 < self.top_k < len(logits):
            kth = _kth_largest(logits, self.top_k)
            return np.flatnonzero(logits >= kth if kth > -np.inf else logits > kth)
        if self.min_p and self.top_p == 1:
            # A little lower, so that rounding leaves out none; the weights decide.
            lowest = largest + self.temperature * math.log(self.min_p)
            likely = logits >= lowest - 1e-6 * (abs(lowest) + abs(largest))
            return np.flatnonzero(likely) if _are_few(likely) else None
        return None

    def _draw(self, logits: Floats) -> int:
        """Draw one of the tokens that `_top` leaves; return its place among them."""
        largest = _largest(logits)
        logits = np.asarray(logits, np.promote_types(logits.dtype, np.float32))
        weights, others = self._proposals(logits, largest)
        ends = _ends(weights)
        share = self.top_p * float(ends[-1])
        if self.min_p:
            weights *= weights >= self.min_p * (1 - _SINGLE)
            ends = _ends(weights)
        while True:
            place, proposed = _proposal(weights, ends, self._random.random())
            weight = float(self._weights(logits[place], largest))
            if self._random.random() * proposed * (1 + _SINGLE) >= weight:
                continue
            likely = weight >= self.min_p
            if likely and self.top_p == 1:
                return place
            before = _before(logits, place)
            if likely and _are_few(before):  # of a text most draws end here
                mass = float(weights[: len(logits)][before].sum(dtype=np.float64))
                if mass < share * (1 - _SINGLE):
                    return place
            others[: len(logits)] = before
            others *= weights
            ends = _ends(others)
            mass = float(ends[-1])
            certain = abs(mass - share) > _SINGLE * share
            if likely and (mass < share if certain else self.probabilities(logits)[place] > 0):
                return place
            weights, others = others, weights

    def _proposals(self, logits: Floats, largest: np.float64) -> tuple[Weights, Weights]:
        """Return the weights in float32, the likeliest being 1, and a second array; zeros fill up the last row of each.

        Both are good until the next call: new memory each time would cost more than the sums.
        """
        count = len(logits)
        size = -(-count // _COLUMNS) * _COLUMNS
        if not self._scratch or len(self._scratch[0]) < size:
            self._scratch[:] = np.empty((2, size), np.float32)
        arrays = weights, others = self._scratch[0][:size], self._scratch[1][:size]
        weights[count:] = others[count:] = 0
        weights = weights[:count]
        with np.errstate(over="ignore"):  # logits may be further apart than float32 reaches
            np.subtract(logits, logits.dtype.type(largest), out=weights, casting="same_kind")
        lowest = np.float32(max(_LOWEST * float(self.temperature), -_FINITE))
        if not weights.min() >= lowest:
            np.maximum(weights, lowest, out=weights)
        if self.temperature != 1:
            weights *= np.float32(max(1 / float(self.temperature), 1 / _FINITE))
        np.exp(weights, out=weights)
        return arrays


def _kth_largest(logits: Floats, k: int) -> np.floating[Any]:
    """Return the k-th largest logit, k <= n, without a partition of all where that can be."""
    columns = max(_TOPS, 2 * k)
    rows = len(logits) // columns
    if rows > 1:
        tops = logits[: rows * columns].reshape(rows, columns).max(axis=0)
        # Each is a logit, so k of all are at least as large as the k-th largest of them.
        logits = logits[logits >= np.partition(tops, -k)[-k]]
    kth: np.floating[Any] = np.partition(logits, -k)[-k]
    return kth


def _are_few(tokens: npt.NDArray[np.bool_]) -> bool:
    """Tell whether to pick some tokens out of all takes less time than to compute with all."""
    return int(np.count_nonzero(tokens)) * _FEW <= len(tokens)


def _before(logits: Floats, place: int) -> npt.NDArray[np.bool_]:
    """Return which tokens come before the one at `place`: those more probable, or as probable and of a lower id."""
    before = np.empty(len(logits), np.bool_)
    np.greater_equal(logits[:place], logits[place], out=before[:place])
    np.greater(logits[place:], logits[place], out=before[place:])
    return before


def _ends(weights: Weights) -> npt.NDArray[np.float64]:
    """Return where each column ends if the weights are laid end to end, column by column."""
    ends: npt.NDArray[np.float64] = weights.reshape(-1, _COLUMNS).sum(axis=0).cumsum(dtype=np.float64)
    return ends


def _proposal(weights: Weights, ends: npt.NDArray[np.float64], uniform: float) -> tuple[int, float]:
    """Return the place of the weight that a number of [0, 1) hits, and the weight it was proposed with.

    The two differ by the rounding of the column's sum.
    """
    column, rest, room = _hit(ends, uniform)
    inner = weights[column::_COLUMNS].cumsum(dtype=np.float64)
    row, _, weight = _hit(inner, rest)
    return row * _COLUMNS + column, weight * room / float(inner[-1])


def _hit(ends: npt.NDArray[np.float64], uniform: float) -> tuple[int, float, float]:
    """Return which interval `uniform`, of [0, 1), of the last end falls in, how far into it, and how long it is."""
    at = min(uniform * float(ends[-1]), math.nextafter(ends[-1], 0))  # so that an end lies above it, in no empty one
    place = int(ends.searchsorted(at, side="right"))
    start = float(ends[place - 1]) if place else 0.0
    length = float(ends[place]) - start
    return place, (at - start) / length, length


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
