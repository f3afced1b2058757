"""Vectors that stand in the place of tokens: a runner knows each by a negative id, and keeps it as long as a row may
have to be computed again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from runtimes.errors import ContextLengthError, InputError, UsageError
from runtimes.manifest import ModelSpec, Variant
from runtimes.runners.runner import Ids, is_sequence

Embeddings = npt.NDArray[np.float32]


class Vectors:
    """The vectors that a runner was given."""

    def __init__(self, variant: Variant, model: ModelSpec) -> None:
        self.name = next((spec.name for spec in variant.inputs if spec.role == "embeddings"), None)
        """of the graph's input; None: it takes none"""
        self._variant, self._size = variant.name, model.hidden_size
        self._parts: list[Embeddings] = []
        self._count = 0

    def take(self, sequences: Sequence[Embeddings], cache_lengths: tuple[int, ...], max_cache_length: int) -> list[Ids]:
        """Keep vectors, and return the ids that stand for them.

        Args:
            sequences: per row [n, hidden_size], of any float dtype.
            cache_lengths: tokens in the cache per row; () when it is empty.
            max_cache_length: tokens that a row can hold.

        Raises:
            UsageError: the graph takes none.
            InputError: no row, another number of rows than the cache has, or a row that is no such array or not finite.
            ContextLengthError: more than `max_cache_length` in a row.
        """
        if self.name is None:
            raise UsageError(
                f"variant {self._variant}: its graph takes no vectors; export the package with --inputs-embeds"
            )
        if not is_sequence(sequences) or len(sequences) == 0:
            raise InputError("expected at least one row of vectors, found none")
        if cache_lengths and len(sequences) != len(cache_lengths):
            raise InputError(
                f"{len(sequences)} rows, but the cache holds {len(cache_lengths)}; give one per row, or reset() first"
            )
        rows = [self._checked(row, index) for index, row in enumerate(sequences)]
        for index, row in enumerate(rows):
            used = cache_lengths[index] if cache_lengths else 0
            if used + len(row) > max_cache_length:
                raise ContextLengthError(
                    f"row {index}: {used} tokens in the cache and {len(row)} vectors make {used + len(row)}, "
                    f"at most {max_cache_length} fit"
                )
        found = []
        for row in rows:
            found.append(-1 - np.arange(self._count, self._count + len(row), dtype=np.int64))
            self._parts.append(row)
            self._count += len(row)
        return found

    def of(self, input_ids: Ids) -> Embeddings | None:
        """Return what the graph takes beside ids, [B, S, hidden_size]: zeros for tokens; None: all are tokens."""
        given = input_ids < 0
        if not given.any():
            return None
        if len(self._parts) > 1:
            self._parts = [np.concatenate(self._parts)]
        found: Embeddings = np.zeros((*input_ids.shape, self._size), np.float32)
        found[given] = self._parts[0][-1 - input_ids[given]]
        return found

    def clear(self) -> None:
        """Forget all; no row holds any."""
        self._parts.clear()
        self._count = 0

    def _checked(self, row: Embeddings, index: int) -> Embeddings:
        if not isinstance(row, np.ndarray) or row.ndim != 2 or row.dtype.kind != "f":
            found = f"{row.ndim}-d {row.dtype}" if isinstance(row, np.ndarray) else type(row).__name__
            raise InputError(f"row {index}: expected a 2-d array of floats, found {found}")
        if len(row) == 0 or row.shape[1] != self._size:
            raise InputError(f"row {index}: vectors of shape {row.shape}, expected [1 or more, {self._size}]")
        vectors = np.ascontiguousarray(row, np.float32)
        if not np.isfinite(vectors).all():
            raise InputError(f"row {index}: vectors that are not finite")
        return vectors
