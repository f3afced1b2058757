"""How likely the model found a token, and what it found likelier: log probabilities for those who read them.

They are the model's own, log softmax of its logits: before temperature, penalties, biases and masks, as vLLM gives them
by default. numpy only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from runtimes.errors import InputError
from runtimes.integers import as_integer


@dataclass(frozen=True)
class TokenLogprobs:
    """The log probability of a token, and those of the likeliest ones in its place."""

    token_id: int
    logprob: float
    """natural logarithm; -inf where the model excludes it"""
    rank: int
    """how many tokens are at least as likely, itself among them: 1 for the likeliest"""
    top: tuple[tuple[int, float], ...]
    """(token id, log probability), the likeliest first and the lower id first among equals"""


def token_logprobs(logits: npt.NDArray[np.floating[Any]], token_id: int, top: int) -> TokenLogprobs:
    """Return the log probability of a token, and the likeliest tokens.

    Args:
        logits: float [vocab_size], none NaN or +inf.
        token_id: which is in the vocabulary.
        top: how many of the likeliest; all there are if the vocabulary has fewer.
    """
    largest = logits.max()
    with np.errstate(over="ignore"):  # what is so far below is as good as -inf
        shifted = logits - largest
    # Beside the largest, 1: the sum of 100,000 float32 in float64 is off by less than what the logits are.
    log_sum = float(np.log(np.exp(shifted).sum(dtype=np.float64)))
    likeliest = _likeliest(logits, min(top, len(logits)))
    return TokenLogprobs(
        token_id=token_id,
        logprob=float(shifted[token_id]) - log_sum,
        rank=int((logits >= logits[token_id]).sum()),
        top=tuple((int(i), float(shifted[i]) - log_sum) for i in likeliest),
    )


def check_top(name: str, top: int | None, vocab_size: int) -> int | None:
    """Check how many alternatives are asked for; None: no log probabilities.

    Raises:
        InputError: no integer from 0 to vocab_size; it begins with `name`.
    """
    count = as_integer(top)
    if top is not None and (count is None or not 0 <= count <= vocab_size):
        raise InputError(f"{name} {top!r}: expected an integer from 0 to {vocab_size}, the alternatives of a token")
    return count


def _likeliest(logits: npt.NDArray[np.floating[Any]], count: int) -> npt.NDArray[np.intp]:
    """Return the ids of the largest logits, the largest first and the lower id first among equals."""
    if count == 0:
        return np.empty(0, np.intp)
    least = np.partition(logits, -count)[-count]
    ids = np.flatnonzero(logits >= least)
    return ids[np.argsort(-logits[ids], kind="stable")][:count]
