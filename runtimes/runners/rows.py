"""What the runners share whose KV cache is one buffer, written in place: which tokens each row holds, and slots.

A call writes only behind the tokens that a row holds, or the same keys and values once more, so that one that fails has
changed nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from runtimes.errors import InputError, NumericError, UsageError
from runtimes.integers import as_integer
from runtimes.manifest import ModelSpec, Variant
from runtimes.one_thread import OneThread, one_thread
from runtimes.runners.runner import (
    Ids,
    Logits,
    TokenIds,
    check_finite,
    check_lengths,
    check_rows,
    check_token_ids,
    no_candidates,
)

_NOTHING: Ids = np.zeros(0, np.int64)


class RowRunner(ABC):
    """Two ways to use it. As `runner.Runner`: a batch is prefilled, decoded and reset as a whole. As slots,
    for a server: `admit` a sequence while others wait, `step` any of those admitted, `release` one. A call that changes
    the batch takes the rows of all slots over: these are admitted no more, so that whoever had them is refused.

    A subclass computes: `_extend`, `_fill`, `_step`.
    """

    def __init__(self, variant: Variant, model: ModelSpec) -> None:
        self.variant = variant
        self.model = model
        self.top_k = variant.top_k
        self._logits = variant.name_of("logits")
        self._candidates = (variant.name_of("candidate_ids"), variant.name_of("candidate_logits")) if self.top_k else ()
        self.max_cache_length = variant.kv_cache.max_cache_length
        self.exclusive = OneThread()
        self._tokens: list[Ids | None] = []  # per row; None: a slot that is free
        self._admitted: set[int] = set()  # the rows that are slots

    @property
    def cache_lengths(self) -> tuple[int, ...]:
        return tuple(len(row) for row in self.cached_tokens)

    @property
    def cached_tokens(self) -> tuple[Ids, ...]:
        return tuple(_NOTHING if row is None else row for row in self._tokens)

    @one_thread
    def prefill(self, sequences: Sequence[TokenIds], *, all_positions: bool = False) -> list[Logits]:
        rows = self._checked(sequences)
        tokens = [np.concatenate(pair) for pair in zip(self._held(len(rows)), rows, strict=True)]
        logits = self._extend(rows, tokens, all_positions)
        self._check_finite(logits, [len(row) for row in tokens])
        self._take(tokens)
        return logits

    @one_thread
    def decode(self, token_ids: TokenIds) -> Logits:
        rows = self._checked(check_token_ids(token_ids, self.cache_lengths))
        logits = self._append(np.stack(rows), np.array(self.cache_lengths))
        self._check_finite([row[None] for row in logits], [n + 1 for n in self.cache_lengths])
        self._hold(rows)
        return logits

    @one_thread
    def decode_top(self, token_ids: TokenIds) -> tuple[Ids, Logits]:
        if not self.top_k:
            raise no_candidates(self.variant)
        rows = self._checked(check_token_ids(token_ids, self.cache_lengths))
        ids, logits = self._step(np.stack(rows), np.array(self.cache_lengths), self._candidates)
        self._check_candidates(ids, logits)
        self._hold(rows)
        return ids, logits

    @one_thread
    def truncate(self, lengths: Sequence[int]) -> None:
        self._refuse_free_slots()
        kept = check_lengths(lengths, self.cache_lengths)
        self._take([row[:n] for row, n in zip(self.cached_tokens, kept, strict=True)])

    @one_thread
    def reset(self) -> None:
        self._take([])

    @one_thread
    def admit(self, token_ids: TokenIds) -> tuple[int, Logits]:
        """Prefill a new sequence into a free slot while the others wait.

        Args:
            token_ids: of the prompt, at least one.

        Returns:
            The slot, and the logits of the next token, float32 [vocab_size].

        Raises:
            InputError, ContextLengthError, NumericError: as `prefill`; no slot is taken.
        """
        (ids,) = check_rows(
            [token_ids],
            vocab_size=self.model.vocab_size,
            cache_lengths=(),
            max_cache_length=self.max_cache_length,
        )
        slot = next((n for n, row in enumerate(self._tokens) if row is None), len(self._tokens))
        logits = self._fill(slot, ids)
        self._check_finite([logits], [len(ids)], first_row=slot)
        self._tokens[slot : slot + 1] = [ids]
        self._admitted.add(slot)
        return slot, logits[0]

    @one_thread
    def step(self, token_ids: Mapping[int, int]) -> dict[int, Logits]:
        """Append one token to some of the slots, all in one call of the graph; the others wait.

        Args:
            token_ids: slot -> id.

        Returns:
            slot -> logits of the next token, float32 [vocab_size].

        Raises:
            InputError: no slot, one that is free, or an id that is not in the vocabulary.
            ContextLengthError, NumericError: as `decode`.
        """
        if not isinstance(token_ids, Mapping):
            raise InputError(f"expected a mapping from slots, integers, to token ids, found {type(token_ids).__name__}")
        slots = [slot for slot in map(as_integer, token_ids) if slot is not None]
        if len(set(slots)) < len(token_ids):
            raise InputError("expected a mapping from slots, integers, each once, to token ids")
        free = [slot for slot in slots if slot not in self._admitted]
        if free or not slots:
            raise InputError(f"slot {free[0] if free else '(none)'}: not admitted; admit a sequence first")
        held = self.cached_tokens
        given = check_rows(
            [[token] for token in token_ids.values()],
            vocab_size=self.model.vocab_size,
            cache_lengths=tuple(len(held[slot]) for slot in slots),
            max_cache_length=self.max_cache_length,
        )
        rows = held[: max(slots) + 1]
        # A row that waits is computed too; what it writes lies behind its tokens, or repeats its last one.
        starts = np.array([min(len(row), self.max_cache_length - 1) for row in rows])
        ids = np.array([[row[-1] if len(row) else 0] for row in rows], np.int64)
        for slot, token in zip(slots, given, strict=True):
            ids[slot] = token
        logits = self._append(ids, starts)
        self._check_finite([logits[slot][None] for slot in slots], [len(held[slot]) + 1 for slot in slots])
        for slot, token in zip(slots, given, strict=True):
            self._tokens[slot] = np.concatenate([held[slot], token])
        return {slot: logits[slot] for slot in slots}

    @one_thread
    def release(self, slot: int) -> None:
        """Free a slot.

        Raises:
            InputError: it is free already.
        """
        row = as_integer(slot)
        if row is None or row not in self._admitted:
            raise InputError(f"slot {slot!r}: not admitted")
        self._admitted.remove(row)
        self._tokens[row] = None
        while self._tokens and self._tokens[-1] is None:
            self._tokens.pop()

    @one_thread
    def close(self) -> None:
        self._take([])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def _extend(self, rows: list[Ids], tokens: list[Ids], all_positions: bool) -> list[Logits]:
        """Compute `rows`, the ends of `tokens`; return the logits of each row's last or of all, [n, V]."""

    @abstractmethod
    def _fill(self, slot: int, ids: Ids) -> Logits:
        """Compute a row of its own from its first token on; return the logits of its last, [1, V]."""

    @abstractmethod
    def _step(self, ids: Ids, starts: Ids, wanted: Sequence[str]) -> list[npt.NDArray[Any]]:
        """Compute one token, [B, 1], of each of the first B rows at the positions `starts`.

        Returns the outputs that are wanted, each [B, ...], by name: the logits, or the candidates and their logits.
        """

    def _append(self, ids: Ids, starts: Ids) -> Logits:
        (logits,) = self._step(ids, starts, (self._logits,))
        return logits

    def _undo(self, rows: Sequence[int]) -> None:  # noqa: B027  # most graphs do not read what lies behind
        """Make what was written to some rows behind their tokens harmless."""

    def _check_finite(self, logits: Sequence[Logits], lengths: Sequence[int], first_row: int = 0) -> None:
        try:
            check_finite(logits, lengths)
        except NumericError:
            self._undo(range(first_row, max(first_row + len(logits), len(self._tokens))))
            raise

    def _check_candidates(self, ids: Ids, logits: Logits) -> None:
        """Refuse candidates that are none: of logits that are NaN the graph picks anything."""
        self._check_finite([row[None] for row in logits], [n + 1 for n in self.cache_lengths])
        if ((ids < 0) | (ids >= self.model.vocab_size)).any():
            raise NumericError(
                f"variant {self.variant.name}: picked token ids from {ids.min()} to {ids.max()}, the vocabulary has 0 "
                f"to {self.model.vocab_size - 1}; the graph or its engine is broken: run olmo2-export verify on it"
            )

    def _hold(self, rows: Sequence[Ids]) -> None:
        self._take([np.concatenate(pair) for pair in zip(self.cached_tokens, rows, strict=True)])

    def _take(self, tokens: Sequence[Ids]) -> None:
        """Hold a batch of these rows; none of them is a slot."""
        self._tokens = list(tokens)
        self._admitted.clear()

    def _refuse_free_slots(self) -> None:
        if any(row is None for row in self._tokens):
            raise UsageError("some slots are free: use admit, step and release, or reset the runner first")

    def _checked(self, sequences: Sequence[TokenIds]) -> list[Ids]:
        self._refuse_free_slots()
        return check_rows(
            sequences,
            vocab_size=self.model.vocab_size,
            cache_lengths=self.cache_lengths,
            max_cache_length=self.max_cache_length,
        )

    def _held(self, rows: int) -> tuple[Ids, ...]:
        return self.cached_tokens or (_NOTHING,) * rows
