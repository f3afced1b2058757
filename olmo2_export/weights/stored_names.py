"""The checkpoint's names of the tensors that are quantised."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from olmo2_export.architecture import EMBED, LOGITS, SCORE, head, operations, quantizable
from olmo2_export.config import ModelConfig
from olmo2_export.weights.source import WeightSource
from runtimes.errors import CheckpointError, NumericError

EMBEDDING, HEAD, SCORED = f"{EMBED}.weight", f"{LOGITS}.weight", f"{SCORE}.weight"
"""a classifier has SCORED in the place of HEAD; `head_weight` says which"""


def head_weight(config: ModelConfig) -> str:
    """Return the name of the weight of the last linear."""
    return f"{head(config)[0]}.weight"


def stored_head(config: ModelConfig) -> str:
    """Return the name under which that weight is stored: a tied head is the embedding."""
    return EMBEDDING if config.tie_word_embeddings else head_weight(config)


def linear_names(config: ModelConfig) -> list[str]:
    """Return the names of the layers' weights, in the order in which the model runs them."""
    return [name for name in weight_shapes(config) if name not in (EMBEDDING, HEAD)]


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Return name -> [N, K] of everything that can be quantised: embedding, the layers' weights, head."""
    rows = quantizable(operations(config))
    return {row.weight: (row.shape[0], row.shape[1]) for row in rows if row.weight is not None}


def stored_weight(checkpoint: WeightSource, config: ModelConfig, name: str) -> Tensor:
    """Read one weight as it is stored; a tied head is the embedding."""
    return checkpoint.tensor(EMBEDDING if name == HEAD and config.tie_word_embeddings else name)


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Put the tensor's name before what is wrong with it."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from error
    except NumericError as error:
        raise NumericError(f"{name}: {error}") from error
