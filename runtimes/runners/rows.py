"""What the runners share whose KV cache is one buffer, written in place: which tokens each row holds, and slots.

A slot is a row, and a step computes the rows up to the highest that it needs. So that these are few, those that are not
parked have the lowest rows: the last one moves into the row that one leaves by being released or parked, where the
memory lets rows be copied; elsewhere it stays empty until a new sequence takes it.

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

from runtimes.errors import BrokenSlotsError, InputError, NumericError, UsageError
from runtimes.huge_pages import HugePages
from runtimes.manifest import ModelSpec, Variant
from runtimes.one_thread import OneThread, one_thread
from runtimes.runners.runner import (
    AdapterChoice,
    HiddenStates,
    Ids,
    Logits,
    TokenIds,
    check_finite,
    check_gives_hidden,
    check_lengths,
    check_positions,
    check_rows,
    check_token_ids,
    chosen_adapters,
    no_candidates,
)
from runtimes.runners.scores import score
from runtimes.runners.slots import (
    DEFAULT_SLOTS,
    admit,
    check_exact_append,
    check_slot_ids,
    check_slot_length,
    check_slots_left,
    check_step,
    find_slot,
    is_computed_again,
    piece_length,
)
from runtimes.runners.vectors import Vectors

_NOTHING: Ids = np.zeros(0, np.int64)


class RowRunner(ABC):
    """Two ways to use it. As `runner.Runner`: a batch is prefilled, decoded and reset as a whole. As `slots.Slots`, for
    a server. A call that changes the batch takes the rows of all slots over: these are admitted no more, so that
    whoever had them is refused.

    A subclass computes: `_extend`, `_hidden`, `_feed`, `_step`.
    """

    def __init__(
        self,
        variant: Variant,
        model: ModelSpec,
        max_slots: int = DEFAULT_SLOTS,
        *,
        exact: bool = False,
        pages: HugePages | None = None,
    ) -> None:
        self.variant = variant
        self.model = model
        self.top_k = variant.top_k
        self._logits = variant.name_of(variant.answer)
        self._candidates = (variant.name_of("candidate_ids"), variant.name_of("candidate_logits")) if self.top_k else ()
        self.max_cache_length = variant.kv_cache.max_cache_length
        self.max_slots = max_slots
        self.exact = exact
        self._vectors = Vectors(variant, model)
        self.exclusive = OneThread()
        self._tokens: list[Ids | None] = []  # per row; None: one that is free
        self._rows: dict[int, int] = {}  # slot -> row
        self._pending: dict[int, Ids] = {}  # slot -> what is to be computed
        self._prompted: dict[int, int] = {}  # slot -> first tokens that `extend` computed
        self._parked: set[int] = set()  # slots
        self._closed = False
        self._pages = pages
        self._adapters: dict[int, str] = {}  # row -> the adapter of what it holds, if any

    @property
    def cache_lengths(self) -> tuple[int, ...]:
        return tuple(len(row) for row in self.cached_tokens)

    @property
    def cached_tokens(self) -> tuple[Ids, ...]:
        """Per row of the batch; where there are slots, each stands where its number is."""
        if not self._rows:
            return tuple(_NOTHING if row is None else row for row in self._tokens)
        slots = {**{row: row for row in self._batch_rows()}, **self._rows}
        return tuple(self._row_tokens(slots[n]) if n in slots else _NOTHING for n in range(max(slots) + 1))

    @property
    def cached_adapters(self) -> tuple[str | None, ...]:
        """As `cached_tokens`."""
        if not self._rows:
            return tuple(map(self._adapters.get, range(len(self._tokens))))
        slots = {**{row: row for row in self._batch_rows()}, **self._rows}
        return tuple(self._adapters.get(slots[n]) if n in slots else None for n in range(max(slots) + 1))

    @property
    def slots(self) -> tuple[int, ...]:
        return tuple(sorted(self._rows))

    @one_thread
    def slot_tokens(self, slot: int) -> Ids:
        return self._row_tokens(self._row(slot))

    @one_thread
    def prefill(
        self, sequences: Sequence[TokenIds], *, all_positions: bool = False, adapter: AdapterChoice = None
    ) -> list[Logits]:
        if all_positions:
            check_positions(self.variant)
        rows, before = self._checked(sequences), self._adapters
        chosen = chosen_adapters(adapter, len(rows), self.cached_adapters, self.adapters)
        self._adapters = {row: name for row, name in enumerate(chosen) if name is not None}
        try:
            return self._prefilled(rows, all_positions)
        except BaseException:
            self._adapters = before
            raise

    @one_thread
    def prefill_embeds(
        self, sequences: Sequence[npt.NDArray[np.float32]], *, all_positions: bool = False
    ) -> list[Logits]:
        if all_positions:
            check_positions(self.variant)
        return self._prefilled(self._taken(sequences), all_positions)

    def _prefilled(self, rows: list[Ids], all_positions: bool) -> list[Logits]:
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
        ids, logits = self._computed(np.stack(rows), np.array(self.cache_lengths), self._candidates)
        self._check_candidates(ids, logits)
        self._hold(rows)
        return ids, logits

    @one_thread
    def prefill_hidden(self, sequences: Sequence[TokenIds]) -> list[HiddenStates]:
        check_gives_hidden(self.variant)
        return self._prefilled_hidden(self._checked(sequences))

    @one_thread
    def prefill_embeds_hidden(self, sequences: Sequence[npt.NDArray[np.float32]]) -> list[HiddenStates]:
        check_gives_hidden(self.variant)
        return self._prefilled_hidden(self._taken(sequences))

    def _prefilled_hidden(self, rows: list[Ids]) -> list[HiddenStates]:
        tokens = [np.concatenate(pair) for pair in zip(self._held(len(rows)), rows, strict=True)]
        numbers = self.variant.hidden_states
        found = self._hidden(rows, tokens, list(numbers.values()))
        lengths = [len(row) for row in tokens]
        for states in zip(*found, strict=True):
            self._check_finite(states, lengths, what="hidden states")
        self._take(tokens)
        return [dict(zip(numbers, states, strict=True)) for states in found]

    @one_thread
    def score(self, sequences: Sequence[TokenIds]) -> Logits:
        return score(self, sequences, self.max_slots)

    @one_thread
    def truncate(self, lengths: Sequence[int]) -> None:
        self._refuse_free_slots()
        kept = check_lengths(lengths, self.cache_lengths)
        self._take([row[:n] for row, n in zip(self.cached_tokens, kept, strict=True)])

    @one_thread
    def reset(self) -> None:
        self._take([])
        self._vectors.clear()

    @one_thread
    def begin(self, token_ids: TokenIds, adapter: str | None = None) -> int:
        ids = check_slot_ids(token_ids, 0, "the prompt", self)
        (chosen,) = chosen_adapters(adapter, 1, (), self.adapters)
        slot = self._new_slot(_NOTHING)
        if chosen is not None:
            self._adapters[self._rows[slot]] = chosen
        self._pending[slot] = ids
        return slot

    @one_thread
    def extend(self, slot: int, budget: int | None = None) -> Logits | None:
        row, number = self._row(slot), int(slot)
        pending = self._pending.get(number)
        if pending is None:
            raise InputError(f"slot {number}: its prompt is complete; step it, or append more")
        if budget is None:
            while (whole := self.extend(slot, self.max_cache_length)) is None:
                pass
            return whole
        logits = self._fed(number, row, pending, budget, all_positions=False)
        return None if number in self._pending else logits[0]

    @one_thread
    def extend_all(self, slot: int, budget: int) -> Logits:
        check_positions(self.variant)
        row, number = self._row(slot), int(slot)
        pending = self._pending.get(number)
        if pending is None:
            raise InputError(f"slot {number}: its prompt is complete; step it, or append more")
        return self._fed(number, row, pending, budget, all_positions=True)

    def _fed(self, slot: int, row: int, pending: Ids, budget: int, *, all_positions: bool) -> Logits:
        held, ids = self._row_tokens(row), pending[: piece_length(len(pending), budget, self.exact)]
        logits: Logits = self._feed(row, held, ids, all_positions)
        self._check_finite([logits], [len(held) + len(ids)], first_row=row, row_name=f"slot {slot}")
        self._tokens[row] = np.concatenate([held, ids])
        if self._prompted[slot] == len(held):
            self._prompted[slot] += len(ids)
        if len(ids) < len(pending):
            self._pending[slot] = pending[len(ids) :]
        else:
            del self._pending[slot]
        return logits

    @one_thread
    def admit(self, token_ids: TokenIds, adapter: str | None = None) -> tuple[int, Logits]:
        return admit(self, token_ids, adapter)

    @one_thread
    def step(self, token_ids: Mapping[int, int]) -> dict[int, Logits]:
        new = check_step(token_ids, self._pending, self)
        held = {slot: self.slot_tokens(slot) for slot in new}
        self._wake(list(new))
        count = max(self._rows[slot] for slot in new) + 1
        rows = [self._row_tokens(row) for row in range(count)]
        # A row that waits is computed too; what it writes lies behind its tokens, or repeats its last one.
        starts = np.array([min(len(row), self.max_cache_length - 1) for row in rows])
        ids = np.array([[row[-1] if len(row) else 0] for row in rows], np.int64)
        for slot, token in new.items():
            ids[self._rows[slot]] = token
        logits = self._append(ids, starts)
        found = {slot: logits[self._rows[slot]] for slot in new}
        broken = self._broken(found, held)
        for slot, token in new.items():
            if slot not in broken:
                self._tokens[self._rows[slot]] = np.concatenate([held[slot], token])
        if broken:
            self._undo([self._rows[slot] for slot in broken])
            good = {slot: values for slot, values in found.items() if slot not in broken}
            raise BrokenSlotsError("; ".join(broken.values()), tuple(broken), good)
        return found

    @one_thread
    def append(self, slot: int, token_ids: TokenIds) -> None:
        row, number = self._row(slot), int(slot)
        held, pending = len(self._row_tokens(row)), self._pending.get(number, _NOTHING)
        ids = check_slot_ids(token_ids, held + len(pending), f"slot {number}", self)
        if self.exact and not len(pending):
            check_exact_append(held, self._prompted[number], len(ids))
        self._wake([number])
        self._pending[number] = np.concatenate([pending, ids])

    @one_thread
    def copy_prefix(self, slot: int, length: int) -> int:
        row, number = self._row(slot), int(slot)
        ids = self._row_tokens(row)
        ids = ids[: check_slot_length(length, len(ids), least=1)]
        copy = self._new_slot(ids)
        row, target = self._rows[number], self._rows[copy]  # both may have moved
        if (adapter := self._adapters.get(row)) is not None:
            self._adapters[target] = adapter
        try:
            if is_computed_again(len(ids), self._prompted[number], self.exact):
                self._compute_again(target, ids, f"slot {copy}")
            else:
                self._copy(row, target, ids)
        except BaseException:
            self._free(copy)
            raise
        self._prompted[copy] = min(self._prompted[number], len(ids))
        return copy

    @one_thread
    def truncate_slot(self, slot: int, length: int) -> None:
        row, number = self._row(slot), int(slot)
        ids = self._row_tokens(row)
        kept = ids[: check_slot_length(length, len(ids))]
        if is_computed_again(len(kept), self._prompted[number], self.exact):
            self._compute_again(row, kept, f"slot {number}")
        self._tokens[row] = kept
        self._pending.pop(number, None)
        self._prompted[number] = min(self._prompted[number], len(kept))

    @one_thread
    def park(self, slot: int) -> None:
        self._row(slot)
        if int(slot) in self._pending:
            raise InputError(f"slot {int(slot)}: its prompt is not complete; extend it, or truncate it, first")
        self._parked.add(int(slot))
        self._settle()

    @one_thread
    def release(self, slot: int) -> None:
        self._row(slot)
        self._free(int(slot))
        self._settle()

    @one_thread
    def close(self) -> None:
        self._take([])
        self._closed = True
        if self._pages is not None:
            self._pages.close()

    @property
    def memory_note(self) -> str:
        return self._pages.note if self._pages is not None else ""

    def _stepped(self) -> None:
        """Take note that a graph has run: what is better done later may be begun."""
        if self._pages is not None:
            self._pages.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def decode_block(self, token_ids: TokenIds) -> Logits:
        """See `runner.Runner.decode_block`."""

    @abstractmethod
    def _extend(self, rows: list[Ids], tokens: list[Ids], all_positions: bool) -> list[Logits]:
        """Compute `rows`, the ends of `tokens`; return the logits of each row's last or of all, [n, V]."""

    @abstractmethod
    def _hidden(self, rows: list[Ids], tokens: list[Ids], wanted: Sequence[str]) -> list[list[Logits]]:
        """Compute `rows`, the ends of `tokens`; return per row the hidden states that are wanted, [n, hidden] each."""

    @abstractmethod
    def _reserve(self, rows: int) -> None:
        """Have memory for so many rows.

        Raises:
            InputError, ContextLengthError, ResourceError: there is not so much; says why.
        """

    @abstractmethod
    def _feed(self, row: int, held: Ids, ids: Ids, all_positions: bool = False) -> Logits:
        """Compute `ids` of one row behind the tokens that it holds; return the logits of the last or of all, [n, V]."""

    @abstractmethod
    def _step(self, ids: Ids, starts: Ids, wanted: Sequence[str]) -> list[npt.NDArray[Any]]:
        """Compute one token, [B, 1], of each of the first B rows at the positions `starts`.

        Returns the outputs that are wanted, each [B, ...], by name: the logits, or the candidates and their logits.
        """

    def _append(self, ids: Ids, starts: Ids) -> Logits:
        (logits,) = self._computed(ids, starts, (self._logits,))
        return logits

    def _computed(self, ids: Ids, starts: Ids, wanted: Sequence[str]) -> list[npt.NDArray[Any]]:
        """`_step`; exact: with one row more where their number is odd, which repeats its last token, or has 0."""
        count = len(ids)
        if self.exact and count % 2:
            self._reserve(count + 1)
            last = self._row_tokens(count)
            ids = np.concatenate([ids, [last[-1:] if len(last) else [0]]])
            starts = np.append(starts, min(len(last), self.max_cache_length - 1))
        return [array[:count] for array in self._step(ids, starts, wanted)]

    adapters: tuple[str, ...] = ()
    """LoRA adapters that a row may have, by name"""
    _copies_rows = False
    """whether `_copy` costs less than a few steps of a dead row"""

    @property
    def copies_prefixes(self) -> bool:
        return self._copies_rows

    def _copy(self, source: int, target: int, ids: Ids) -> None:  # noqa: ARG002  # where rows cannot be copied
        """Give a row the keys and values of another's first tokens: `ids`, at least one."""
        self._compute_again(target, ids, f"row {target}")

    def _compute_again(self, row: int, ids: Ids, row_name: str) -> None:
        self._check_finite([self._feed(row, _NOTHING, ids)], [len(ids)], first_row=row, row_name=row_name)

    def _give_back(self, row: int) -> None:  # noqa: B027  # most memory has no one to take it
        """Tell the system that what a row holds is not needed."""

    def _undo(self, rows: Sequence[int]) -> None:  # noqa: B027  # most graphs do not read what lies behind
        """Make what was written to some rows behind their tokens harmless."""

    def _row_tokens(self, row: int) -> Ids:
        """Return what a row holds; nothing where it is free or was never used."""
        ids = self._tokens[row] if row < len(self._tokens) else None
        return _NOTHING if ids is None else ids

    def _batch_rows(self) -> list[int]:
        """Return the rows that are no slots; they come first."""
        taken = set(self._rows.values())
        return [row for row, ids in enumerate(self._tokens) if ids is not None and row not in taken]

    def _row(self, slot: int) -> int:
        return find_slot(slot, self._rows)

    def _new_slot(self, ids: Ids) -> int:
        """Take the lowest free slot, and the lowest free row for it; only its tokens are set."""
        if self._closed:
            raise UsageError("the runner is closed; open another")
        row = self._free_row()
        check_slots_left(row, self)  # before there is memory for one more, which moves all others
        self._reserve(max(row + 1, len(self._tokens)))
        slot = next(n for n in range(len(self._batch_rows()), self.max_slots + 1) if n not in self._rows)
        front = len(self._batch_rows()) + len(self._rows) - len(self._parked)
        parked = next((n for n in self._parked if self._rows[n] == front), None)
        if self._copies_rows and parked is not None and front < row:
            self._move(parked, row)
            row = front
        self._tokens[row : row + 1] = [ids]
        self._rows[slot], self._prompted[slot] = row, 0
        return slot

    def _free_row(self) -> int:
        return next((n for n, held in enumerate(self._tokens) if held is None), len(self._tokens))

    def _wake(self, slots: Sequence[int]) -> None:
        if not self._parked.isdisjoint(slots):
            self._parked.difference_update(slots)
            self._settle()

    def _settle(self) -> None:
        """Give the lowest rows to the slots that are not parked, where the memory lets rows be copied."""
        if not self._copies_rows:
            return
        taken = {row: slot for slot, row in self._rows.items()}
        first = len(self._batch_rows())
        active = sorted(row for row, slot in taken.items() if slot not in self._parked)
        behind = [row for row in active if row >= first + len(active)]
        for target in (row for row in range(first, first + len(active)) if row not in active):
            if target in taken:  # one that is parked
                spare = self._free_row()
                if spare >= self.max_slots:
                    return
                self._move(taken[target], spare)
            self._move(taken[behind.pop()], target)

    def _move(self, slot: int, target: int) -> None:
        """Give a slot a row that is free."""
        row = self._rows[slot]
        ids = self._row_tokens(row)
        self._reserve(max(target + 1, len(self._tokens)))
        if len(ids):
            self._copy(row, target, ids)
        adapter = self._adapters.pop(row, None)
        if adapter is not None:
            self._adapters[target] = adapter
        self._tokens[target : target + 1] = [ids]
        self._rows[slot] = target
        self._drop_row(row)

    def _free(self, slot: int) -> None:
        row = self._rows.pop(slot)
        self._pending.pop(slot, None)
        self._parked.discard(slot)
        del self._prompted[slot]
        self._adapters.pop(row, None)
        self._drop_row(row)

    def _drop_row(self, row: int) -> None:
        self._tokens[row] = None
        while self._tokens and self._tokens[-1] is None:
            self._tokens.pop()
        self._give_back(row)

    def _broken(self, logits: Mapping[int, Logits], held: Mapping[int, Ids]) -> dict[int, str]:
        """Return what is wrong with the logits of a step, by slot."""
        broken: dict[int, str] = {}
        for slot, values in logits.items():
            try:
                check_finite([values[None]], [len(held[slot]) + 1], f"slot {slot}")
            except NumericError as error:
                broken[slot] = str(error)
        return broken

    def _check_finite(
        self,
        logits: Sequence[Logits],
        lengths: Sequence[int],
        first_row: int = 0,
        row_name: str | None = None,
        what: str = "logits",
    ) -> None:
        try:
            check_finite(logits, lengths, row_name, what)
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
        self._adapters = {row: name for row, name in self._adapters.items() if row < len(tokens)}
        self._rows.clear()
        self._pending.clear()
        self._prompted.clear()
        self._parked.clear()

    def _refuse_free_slots(self) -> None:
        moved = any(slot != row for slot, row in self._rows.items())
        if moved or self._pending or any(row is None for row in self._tokens):
            raise UsageError("some slots are free: use admit, step and release, or reset the runner first")

    def _checked(self, sequences: Sequence[TokenIds]) -> list[Ids]:
        self._refuse_free_slots()
        return check_rows(
            sequences,
            vocab_size=self.model.vocab_size,
            cache_lengths=self.cache_lengths,
            max_cache_length=self.max_cache_length,
        )

    def _taken(self, sequences: Sequence[npt.NDArray[np.float32]]) -> list[Ids]:
        self._refuse_free_slots()
        return self._vectors.take(sequences, self.cache_lengths, self.max_cache_length)

    def _held(self, rows: int) -> tuple[Ids, ...]:
        return self.cached_tokens or (_NOTHING,) * rows
