"""Sentence embeddings: one vector of a whole text, pooled from the hidden states of its tokens.

| pooling | vector                            |
|---------|-----------------------------------|
| mean    | the mean over all tokens          |
| last    | that of the last token            |

Every token sees those before it alone, so that the last one has seen the whole text. Padding is no token: texts are
given without.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from runtimes.errors import UsageError
from runtimes.runners.batches import batches, in_order
from runtimes.runners.runner import Runner, TokenIds, check_gives_hidden, check_rows

Pooling: TypeAlias = Literal["mean", "last"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)
Vectors: TypeAlias = npt.NDArray[np.float32]

_ROWS = 8
"""texts at once"""


def pooled(states: Vectors, pooling: Pooling) -> Vectors:
    """Pool the hidden states of one text: float32 [n, hidden] -> [hidden]."""
    vector: Vectors = states[-1] if pooling == "last" else states.mean(axis=0, dtype=np.float64).astype(np.float32)
    return vector


def embed(
    runner: Runner,
    sequences: Sequence[TokenIds],
    *,
    pooling: Pooling = "mean",
    hidden_state: int | None = None,
    normalize: bool = False,
    batch_size: int = _ROWS,
) -> Vectors:
    """Embed whole texts, each as if it were alone; the cache is empty before and after.

    Args:
        runner: of a package that gives hidden states.
        sequences: token ids of each text; their lengths may differ.
        pooling: how the tokens' vectors become one.
        hidden_state: its number; None: the last that the graph gives.
        normalize: divide each vector by its length.
        batch_size: texts at once, at most; those of like lengths.

    Returns:
        float32 [B, hidden_size].

    Raises:
        UsageError: the graph does not give that hidden state, or another thread is using the runner.
        InputError, ContextLengthError, NumericError: as `Runner.prefill`.
    """
    check_gives_hidden(runner.variant)
    numbers = runner.variant.hidden_states
    number = max(numbers) if hidden_state is None else hidden_state
    if number not in numbers:
        known = ", ".join(map(str, numbers))
        raise UsageError(
            f"hidden state {number}: variant {runner.variant.name} gives {known}; export it with --hidden-states"
        )
    if pooling not in POOLINGS:
        raise UsageError(f"pooling {pooling!r}: expected {' or '.join(POOLINGS)}")
    rows = check_rows(
        sequences,
        vocab_size=runner.model.vocab_size,
        cache_lengths=(),
        max_cache_length=runner.max_cache_length,
    )
    found: list[Vectors] = []
    places: list[int] = []
    with runner.exclusive:
        try:
            for batch in batches(list(map(len, rows)), batch_size):
                runner.reset()
                states = runner.prefill_hidden([rows[place] for place in batch])
                found += [pooled(row[number], pooling) for row in states]
                places += batch
        finally:
            runner.reset()
    vectors: Vectors = np.stack(in_order(places, found))
    return normalized(vectors) if normalize else vectors


def normalized(vectors: Vectors) -> Vectors:
    """Divide each vector by its length; one of zeros stays what it is."""
    lengths = np.sqrt(np.square(vectors, dtype=np.float64).sum(axis=-1, keepdims=True))
    unit: Vectors = (vectors / np.maximum(lengths, np.finfo(np.float32).tiny)).astype(np.float32)
    return unit
