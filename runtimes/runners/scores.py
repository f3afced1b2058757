"""Scores of whole sequences by a classifier: which token is scored, and the sequences a few at a time.

A classifier scores the last token that is no padding: the largest i with ids[i] != pad_token_id, 0 where all are
padding, the last where it has no such id. Later tokens change nothing, as each sees only those before it; so they are
not computed, and the token that is scored is the last one of its call.

Source: transformers, modeling_layers.py, GenericForSequenceClassification.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from runtimes.errors import UsageError
from runtimes.manifest import ModelSpec, Variant
from runtimes.runners.batches import batches, in_order
from runtimes.runners.runner import Ids, Logits, TokenIds, check_rows


class Scoring(Protocol):
    """What is asked of a runner here; see `runtimes.runners.runner.Runner`."""

    variant: Variant
    model: ModelSpec
    max_cache_length: int

    def prefill(self, sequences: Sequence[TokenIds], *, all_positions: bool = False) -> list[Logits]: ...
    def reset(self) -> None: ...


def scored_token(ids: Ids, pad_token_id: int | None) -> int:
    """Return the index of the token that is scored.

    Args:
        ids: int64 [n], at least one.
        pad_token_id: the id of padding; None: the model has none.
    """
    if pad_token_id is None:
        return len(ids) - 1
    return int(np.flatnonzero(ids != pad_token_id).max(initial=0))


def score(runner: Scoring, sequences: Sequence[TokenIds], rows: int) -> Logits:
    """Score sequences, `rows` at a time; see `Runner.score`."""
    if runner.variant.answer != "score":
        raise UsageError(
            f"variant {runner.variant.name}: a language model, which gives logits and no scores; use prefill"
        )
    checked = check_rows(
        sequences,
        vocab_size=runner.model.vocab_size,
        cache_lengths=(),
        max_cache_length=runner.max_cache_length,
    )
    pad = runner.model.pad_token_id
    if pad is None and len(checked) > 1:
        raise UsageError(
            f"{len(checked)} sequences, but the model's pad_token_id is null, where transformers scores one at a time; "
            "give one"
        )
    needed = [ids[: scored_token(ids, pad) + 1] for ids in checked]
    # One of padding alone comes by itself: what stands before it in a row that is padded on the left is scored.
    texts = [place for place, ids in enumerate(needed) if ids[-1] != pad]
    groups = [[place] for place, ids in enumerate(needed) if ids[-1] == pad]
    groups += [[texts[n] for n in batch] for batch in batches([len(needed[place]) for place in texts], rows)]
    found: list[Logits] = []
    places: list[int] = []
    try:
        for group in groups:
            runner.reset()
            found += runner.prefill([needed[place] for place in group])
            places += group
    finally:
        runner.reset()
    scores: Logits = np.concatenate(in_order(places, found))
    return scores


def check_logits(variant: Variant) -> None:
    """Refuse a classifier where logits are needed.

    Raises:
        UsageError: it is one.
    """
    if variant.answer == "score":
        raise UsageError(
            f"variant {variant.name}: a classifier, which gives scores and no logits of tokens; use olmo2-run score, "
            "or runner.score"
        )
