"""How sure a mean over the tokens of a text is. Arrays in, numbers out.

Tokens beside each other are not independent: a hard sentence is hard for many tokens in a row, and an error computed as
if they were is too small. So the unit is a block of `BLOCK` scored tokens in a row, longer than a sentence. The mean
over tokens is the ratio of two sums over blocks, the values' and the tokens'; its standard error is that of a ratio:

    mean = sum(s_b) / sum(n_b)      SE = sqrt(B / (B - 1) * sum((s_b - mean * n_b)^2)) / sum(n_b)

Source: Cochran, Sampling Techniques, 3rd edition, section 6.4. The standard error of the perplexity exp(mean) follows
by the delta method: SE * exp(mean).

Two models on the same tokens are compared pairwise: blocks are drawn with replacement, the same for both, and the
interval is that of the ratio of the perplexities over the draws (scipy's paired bootstrap, percentiles).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import bootstrap  # type: ignore[import-untyped]  # scipy has no annotations

BLOCK = 256
"""tokens"""
LEAST = 16
"""blocks: of a text that is too short for so many of `BLOCK`, blocks are shorter"""
RESAMPLES = 9999
CONFIDENCE = 0.95
_SEED = 0
_NUMBERS = 1 << 20  # of resampled blocks in memory at a time
_MOST_LOSS = 700.0  # nats: beyond it a perplexity is no number

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Mean:
    """A mean over tokens and its standard error."""

    value: float
    se: float | None
    """over blocks; None where there is one block only, which says nothing about the spread"""


@dataclass(frozen=True)
class Change:
    """By how much one perplexity is larger than another, as a share of it, on the same tokens."""

    value: float
    se: float | None
    """of the bootstrap; None: fewer than two blocks"""
    low: float | None
    """of the 95 % interval"""
    high: float | None


def mean(values: Values, block: int | None = None) -> Mean:
    """Return the mean of values of successive tokens, float64 [n], n >= 1."""
    sums, counts = _blocks(values, block)
    total = float(counts.sum())
    value = float(values.mean())
    number = len(sums)
    if number < 2:
        return Mean(value, None)
    spread = float(np.square(sums - value * counts).sum()) * number / (number - 1)
    return Mean(value, math.sqrt(spread) / total)


def perplexity(losses: Values, block: int | None = None) -> Mean:
    """Return the perplexity of losses in nats, float64 [n]; at most exp(700)."""
    loss = mean(losses, block)
    value = math.exp(min(loss.value, _MOST_LOSS))
    return Mean(value, None if loss.se is None else value * loss.se)


def perplexity_change(losses: Values, reference: Values, block: int | None = None) -> Change:
    """Return by how much the perplexity is above that of the reference, float64 [n] both, token by token."""
    value = math.expm1(min(float((losses - reference).mean()), _MOST_LOSS))
    differences, counts = _blocks(losses - reference, block)
    if len(counts) < 2 or not differences.any():
        unsure = None if len(counts) < 2 else 0.0
        return Change(value, unsure, *((None, None) if unsure is None else (value, value)))

    def change(d: Any, n: Any, axis: int) -> Any:
        return np.expm1((d.sum(axis=axis) / n.sum(axis=axis)).clip(max=_MOST_LOSS))

    result = bootstrap(
        (differences, counts),
        change,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, _NUMBERS // len(counts)),
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(_SEED),
    )
    interval = result.confidence_interval
    return Change(value, float(result.standard_error), float(interval.low), float(interval.high))


def _blocks(values: Values, block: int | None) -> tuple[Values, Values]:
    """Return the sums over runs of `block` values and their lengths, float64 [B] both; the last may be shorter."""
    size = max(1, min(BLOCK, len(values) // LEAST)) if block is None else block
    starts = np.arange(0, len(values), size)
    return np.add.reduceat(values, starts), np.diff([*starts, len(values)]).astype(np.float64)
