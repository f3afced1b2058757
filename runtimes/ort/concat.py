"""The runner of the portable graph on onnxruntime.

Its KV cache stays in onnxruntime's memory: the present values of one call are bound as the past of the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import onnxruntime as ort  # type: ignore[import-untyped]

from runtimes.errors import BrokenSlotsError, FailedError, InputError, NumericError, UsageError
from runtimes.huge_pages import HugePages
from runtimes.manifest import KVCacheSpec, ModelSpec, Variant
from runtimes.one_thread import OneThread, one_thread
from runtimes.ort.adapters import Adapters
from runtimes.ort.session import one_line
from runtimes.ort.versions import check_padded_rows, takes_padded_rows
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

PREFILL_CHUNK = 512
"""tokens of a row per call of a concat graph"""

Values: TypeAlias = dict[str, Any]
"""name of a past_key_values input -> its OrtValue"""

_NOTHING: Ids = np.zeros(0, np.int64)


@dataclass(frozen=True)
class ConcatCache:
    """The cache between two calls of the graph; never changed, each call makes the next one."""

    tokens: tuple[Ids, ...]
    """per row, the ids of the tokens in it"""
    values: Values
    mask: Ids
    """[B, P]: 1 where the position holds a token, 0 where padding was put or a token was dropped"""
    adapters: tuple[str | None, ...]
    """per row, the LoRA adapter that it was made with"""

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(len(row) for row in self.tokens)


@dataclass(frozen=True)
class _Slot:
    """A sequence that came by itself; never changed, each call makes the next one."""

    cache: ConcatCache
    """of one row"""
    pending: Ids
    """of its prompt, what is to be computed"""
    prompted: int
    """first tokens of the cache that were computed as a prompt"""

    @property
    def tokens(self) -> Ids:
        return self.cache.tokens[0]


class ConcatRunner:
    """The portable graph: present = past + new tokens; implements `runtimes.runners.slots.Slots`.

    | tensor                          | shape                                                   | dtype          |
    |---------------------------------|---------------------------------------------------------|----------------|
    | input_ids, position_ids         | [batch_size, sequence_length]                           | int64          |
    | attention_mask                  | [batch_size, total_sequence_length]                     | int64          |
    | past_key_values.N.key, .value   | [batch_size, kv_heads, past_sequence_length, head_dim]  | kv_cache.dtype |
    | num_logits_to_keep              | []: the last rows that get logits; 0, the default: all  | int64          |
    | -> logits                       | [batch_size, num_logits, vocab_size]                    | float32        |
    | -> score, of a classifier       | [batch_size, labels]; then no num_logits_to_keep        | float32        |
    | -> hidden_states.N, if exported | [batch_size, sequence_length, hidden]                   | float32        |
    | -> present.N.key, .value        | [batch_size, kv_heads, total_sequence_length, head_dim] | kv_cache.dtype |

    Rows of different lengths are padded on the left, call by call, so that the last position is every row's last
    token. The mask hides the padding for good, also in the middle of the cache, and position_ids skip it. `truncate`
    hides what it drops, and copies what is left where positions at the end are hidden in every row.

    Prompts are computed in pieces of `prefill_chunk` tokens, since the attention weights of a call take heads x
    sequence_length x total_sequence_length numbers; where all positions are asked for, in one.

    A new cache is computed and the old one left untouched, so that a call that fails changes nothing.

    Every slot has a cache of its own and a step computes them one by one: its logits are those of a runner that it has
    for itself, but many slots are no faster than one. There are slots or a batch, not both: `reset` is between them.
    """

    prefill_chunk = PREFILL_CHUNK
    copies_prefixes = True

    def __init__(
        self,
        session: ort.InferenceSession,
        variant: Variant,
        model: ModelSpec,
        max_slots: int = DEFAULT_SLOTS,
        *,
        exact: bool = False,
        adapters: Adapters | None = None,
        pages: HugePages | None = None,
    ) -> None:
        self.variant = variant
        self.model = model
        self._lora = adapters
        self._pages = pages
        self.adapters = adapters.names if adapters is not None else ()
        self.max_slots = max_slots
        self.exact = exact
        self.max_cache_length = variant.kv_cache.max_cache_length
        self.top_k = 0
        self.exclusive = OneThread()
        self._session: ort.InferenceSession | None = session
        self._logits = variant.name_of(variant.answer)
        self._counts = any(spec.role == "logit_count" for spec in variant.inputs)  # a classifier has one answer a row
        self._pasts = list(variant.caches)
        self._presents = list(variant.caches.values())
        self._vectors = Vectors(variant, model)
        self._cache: ConcatCache | None = None
        self._slots: dict[int, _Slot] = {}

    @property
    def cache_lengths(self) -> tuple[int, ...]:
        return tuple(map(len, self.cached_tokens))

    @property
    def cached_tokens(self) -> tuple[Ids, ...]:
        """Per row of the batch; where there are slots, each stands where its number is."""
        if self._slots:
            return tuple(self._slots[n].tokens if n in self._slots else _NOTHING for n in range(max(self._slots) + 1))
        return () if self._cache is None else self._cache.tokens

    @property
    def cached_adapters(self) -> tuple[str | None, ...]:
        """As `cached_tokens`."""
        if self._slots:
            caches = {slot: state.cache.adapters[0] for slot, state in self._slots.items()}
            return tuple(map(caches.get, range(max(caches) + 1)))
        return () if self._cache is None else self._cache.adapters

    @one_thread
    def prefill(
        self, sequences: Sequence[TokenIds], *, all_positions: bool = False, adapter: AdapterChoice = None
    ) -> list[Logits]:
        self._refuse_slots()
        if all_positions:
            check_positions(self.variant)
        rows, cache = self._checked(sequences)
        chosen = chosen_adapters(adapter, len(rows), self.cached_adapters, self.adapters)
        return self._prefilled(rows, replace(cache, adapters=chosen), all_positions)

    @one_thread
    def prefill_embeds(
        self, sequences: Sequence[npt.NDArray[np.float32]], *, all_positions: bool = False
    ) -> list[Logits]:
        self._refuse_slots()
        if all_positions:
            check_positions(self.variant)
        return self._prefilled(*self._taken(sequences), all_positions)

    def _prefilled(self, rows: list[Ids], cache: ConcatCache, all_positions: bool) -> list[Logits]:
        logits, extended = self._extend(cache, rows, all_positions)
        check_finite(logits, extended.lengths)
        self._cache = extended
        return logits

    @one_thread
    def prefill_hidden(self, sequences: Sequence[TokenIds]) -> list[HiddenStates]:
        self._refuse_slots()
        check_gives_hidden(self.variant)
        return self._prefilled_hidden(*self._checked(sequences))

    @one_thread
    def prefill_embeds_hidden(self, sequences: Sequence[npt.NDArray[np.float32]]) -> list[HiddenStates]:
        self._refuse_slots()
        check_gives_hidden(self.variant)
        return self._prefilled_hidden(*self._taken(sequences))

    def _prefilled_hidden(self, rows: list[Ids], cache: ConcatCache) -> list[HiddenStates]:
        numbers = self.variant.hidden_states
        pieces, extended = self._computed(cache, rows, list(numbers.values()))
        whole = [np.concatenate(arrays, axis=1) for arrays in zip(*pieces, strict=True)]  # (B, S, hidden) each
        found = [[array[b, -len(row) :] for array in whole] for b, row in enumerate(rows)]
        for states in zip(*found, strict=True):
            check_finite(states, extended.lengths, what="hidden states")
        self._cache = extended
        return [dict(zip(numbers, states, strict=True)) for states in found]

    @one_thread
    def decode(self, token_ids: TokenIds) -> Logits:
        return np.concatenate(self.prefill(check_token_ids(token_ids, self.cache_lengths)))

    @one_thread
    def decode_top(self, token_ids: TokenIds) -> tuple[Ids, Logits]:  # noqa: ARG002
        raise no_candidates(self.variant)

    @one_thread
    def decode_block(self, token_ids: TokenIds) -> Logits:
        if not self.exact:
            return self.prefill([token_ids], all_positions=True)[0]
        self._refuse_slots()
        (ids,), cache = self._checked([token_ids])
        steps = []  # as `decode` would, to the bit
        for n in range(len(ids)):
            (logits,), cache = self._extend(cache, [ids[n : n + 1]], all_positions=False)
            steps.append(logits)
        block: Logits = np.concatenate(steps)  # (n, V)
        check_finite([block], cache.lengths)
        self._cache = cache
        return block

    @one_thread
    def score(self, sequences: Sequence[TokenIds]) -> Logits:
        together = not self.exact and takes_padded_rows(ort.__version__)
        return score(self, sequences, self.max_slots if together else 1)

    @one_thread
    def truncate(self, lengths: Sequence[int]) -> None:
        self._refuse_slots()
        kept = check_lengths(lengths, self.cache_lengths)
        if self._cache is not None and kept != self._cache.lengths:
            self._cache = self._shortened(self._cache, kept)

    @one_thread
    def reset(self) -> None:
        self._cache = None
        self._slots.clear()
        self._vectors.clear()

    @property
    def slots(self) -> tuple[int, ...]:
        return tuple(sorted(self._slots))

    @one_thread
    def slot_tokens(self, slot: int) -> Ids:
        return self._slot(slot).tokens

    @one_thread
    def begin(self, token_ids: TokenIds, adapter: str | None = None) -> int:
        ids = check_slot_ids(token_ids, 0, "the prompt", self)
        chosen = chosen_adapters(adapter, 1, (), self.adapters)
        return self._new_slot(_Slot(replace(self._empty_cache(1), adapters=chosen), ids, prompted=0))

    @one_thread
    def extend(self, slot: int, budget: int | None = None) -> Logits | None:
        self._slot(slot)
        if budget is None:
            while (last := self.extend(slot, self.max_cache_length)) is None:
                pass
            return last
        logits = self._fed(int(slot), budget, all_positions=False)
        return None if len(self._slots[int(slot)].pending) else logits[0]

    @one_thread
    def extend_all(self, slot: int, budget: int) -> Logits:
        check_positions(self.variant)
        self._slot(slot)
        return self._fed(int(slot), budget, all_positions=True)

    def _fed(self, slot: int, budget: int, *, all_positions: bool) -> Logits:
        state = self._slots[slot]
        if not len(state.pending):
            raise InputError(f"slot {slot}: its prompt is complete; step it, or append more")
        ids = state.pending[: piece_length(len(state.pending), budget, self.exact)]
        (logits,), cache = self._extend(state.cache, [ids], all_positions=all_positions, cut=True)
        check_finite([logits], cache.lengths, f"slot {slot}")
        prompted = state.prompted + len(ids) if state.prompted == len(state.tokens) else state.prompted
        self._slots[slot] = _Slot(cache, state.pending[len(ids) :], prompted)
        return logits

    @one_thread
    def admit(self, token_ids: TokenIds, adapter: str | None = None) -> tuple[int, Logits]:
        return admit(self, token_ids, adapter)

    @one_thread
    def step(self, token_ids: Mapping[int, int]) -> dict[int, Logits]:
        new = check_step(token_ids, {n for n, state in self._slots.items() if len(state.pending)}, self)
        found: dict[int, Logits] = {}
        stepped: dict[int, _Slot] = {}
        broken: dict[int, str] = {}
        for slot, ids in new.items():
            state = self._slots[slot]
            (logits,), cache = self._extend(state.cache, [ids], all_positions=False)
            try:
                check_finite([logits], cache.lengths, f"slot {slot}")
            except NumericError as error:
                broken[slot] = str(error)
            else:
                found[slot], stepped[slot] = logits[0], replace(state, cache=cache)
        self._slots.update(stepped)
        if broken:
            raise BrokenSlotsError("; ".join(broken.values()), tuple(broken), found)
        return found

    @one_thread
    def append(self, slot: int, token_ids: TokenIds) -> None:
        state, number = self._slot(slot), int(slot)
        held = len(state.tokens)
        ids = check_slot_ids(token_ids, held + len(state.pending), f"slot {number}", self)
        if self.exact and not len(state.pending):
            check_exact_append(held, state.prompted, len(ids))
        self._slots[number] = replace(state, pending=np.concatenate([state.pending, ids]))

    @one_thread
    def copy_prefix(self, slot: int, length: int) -> int:
        state = self._slot(slot)
        return self._new_slot(self._first(state, check_slot_length(length, len(state.tokens), least=1)))

    @one_thread
    def truncate_slot(self, slot: int, length: int) -> None:
        state = self._slot(slot)
        self._slots[int(slot)] = self._first(state, check_slot_length(length, len(state.tokens)))

    @one_thread
    def park(self, slot: int) -> None:
        if len(self._slot(slot).pending):
            raise InputError(f"slot {int(slot)}: its prompt is not complete; extend it, or truncate it, first")

    @one_thread
    def release(self, slot: int) -> None:
        self._slot(slot)
        del self._slots[int(slot)]

    @one_thread
    def close(self) -> None:
        if self._pages is not None:
            self._pages.close()
        self._cache = self._session = None
        self._slots.clear()

    @property
    def memory_note(self) -> str:
        return self._pages.note if self._pages is not None else ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _slot(self, slot: int) -> _Slot:
        return find_slot(slot, self._slots)

    def _new_slot(self, state: _Slot) -> int:
        if self._session is None:
            raise UsageError("the runner is closed; open another")
        if self._cache is not None:
            raise UsageError("the runner holds a batch; reset it first, or open another for slots")
        check_slots_left(len(self._slots), self)
        slot = next(n for n in range(self.max_slots) if n not in self._slots)
        self._slots[slot] = state
        return slot

    def _first(self, state: _Slot, length: int) -> _Slot:
        """Return a slot with the first tokens of another; the values are shared, as nothing changes them."""
        if is_computed_again(length, state.prompted, self.exact):
            empty = replace(self._empty_cache(1), adapters=state.cache.adapters)
            logits, cache = self._extend(empty, [state.tokens[:length]], all_positions=False)
            check_finite(logits, cache.lengths)
        else:
            cache = state.cache if length == len(state.tokens) else self._shortened(state.cache, (length,))
        return _Slot(cache, _NOTHING, min(state.prompted, length))

    def _refuse_slots(self) -> None:
        if self._slots:
            raise UsageError("the runner has slots; release them, or reset it first")

    def _checked(self, sequences: Sequence[TokenIds]) -> tuple[list[Ids], ConcatCache]:
        """Return the rows of a batch to append, and the cache that they are appended to."""
        rows = check_rows(
            sequences,
            vocab_size=self.model.vocab_size,
            cache_lengths=self.cache_lengths,
            max_cache_length=self.max_cache_length,
        )
        return rows, self._empty_cache(len(rows)) if self._cache is None else self._cache

    def _taken(self, sequences: Sequence[npt.NDArray[np.float32]]) -> tuple[list[Ids], ConcatCache]:
        """As `_checked`, of vectors."""
        rows = self._vectors.take(sequences, self.cache_lengths, self.max_cache_length)
        return rows, self._empty_cache(len(rows)) if self._cache is None else self._cache

    def _empty_cache(self, batch_size: int) -> ConcatCache:
        return ConcatCache(
            tokens=(_NOTHING,) * batch_size,
            values=dict.fromkeys(self._pasts, _zeros(self.variant.kv_cache, batch_size, length=0)),
            mask=np.zeros((batch_size, 0), np.int64),
            adapters=(None,) * batch_size,
        )

    def _extend(
        self, cache: ConcatCache, rows: list[Ids], all_positions: bool, cut: bool = False
    ) -> tuple[list[Logits], ConcatCache]:
        """Return the logits of `rows` appended to `cache`, and the cache that holds them.

        `cut`: they are a piece, cut as an exact runner cuts prompts.
        """
        pieces, extended = self._computed(cache, rows, [self._logits], all_positions=all_positions, cut=cut)
        answer = pieces[-1][0]
        logits = answer if self._counts else answer[:, None]  # (B, S or 1, V)
        wanted = [len(row) if all_positions else 1 for row in rows]
        return [logits[b, -n:] for b, n in enumerate(wanted)], extended

    def _computed(
        self,
        cache: ConcatCache,
        rows: list[Ids],
        wanted: Sequence[str],
        *,
        all_positions: bool = False,
        cut: bool = False,
    ) -> tuple[list[list[npt.NDArray[np.float32]]], ConcatCache]:
        """Compute `rows` behind `cache`; return per piece the outputs that are wanted, and the new cache."""
        width = max(len(row) for row in rows)
        if any(len(row) < width for row in rows):
            check_padded_rows(self.variant, ort.__version__)
        ids, positions, mask = (np.zeros((len(rows), width), np.int64) for _ in range(3))
        for b, (row, length) in enumerate(zip(rows, cache.lengths, strict=True)):
            ids[b, width - len(row) :] = row
            positions[b, width - len(row) :] = np.arange(length, length + len(row))
            mask[b, width - len(row) :] = 1
        past, values = cache.mask.shape[1], cache.values
        mask = np.concatenate([cache.mask, mask], axis=1)  # (B, P + S)
        found = []
        stop = 0
        while stop < width:
            start = stop
            stop += piece_length(width - start, width if all_positions else self.prefill_chunk, self.exact and not cut)
            feeds: dict[str, npt.NDArray[Any]] = {
                "input_ids": np.ascontiguousarray(ids[:, start:stop]),
                "attention_mask": np.ascontiguousarray(mask[:, : past + stop]),
                "position_ids": np.ascontiguousarray(positions[:, start:stop]),
            }
            if self._counts:
                feeds["num_logits_to_keep"] = np.array(0 if all_positions else 1, np.int64)
            vectors = self._vectors.of(feeds["input_ids"])
            if vectors is not None and self._vectors.name is not None:
                feeds[self._vectors.name] = vectors
            arrays, values = self._call(feeds, values, wanted, cache.adapters)
            found.append(arrays)
        return found, ConcatCache(_joined(cache.tokens, rows), values, mask, cache.adapters)

    def _shortened(self, cache: ConcatCache, lengths: tuple[int, ...]) -> ConcatCache:
        """Return the cache with only the first tokens of each row; `lengths` was checked."""
        kept = np.array(lengths, np.int64)[:, None]
        mask = np.where(cache.mask.cumsum(axis=1) <= kept, cache.mask, 0)  # (B, P)
        width = int(np.flatnonzero(mask.any(axis=0)).max(initial=-1)) + 1  # all after are hidden in every row
        values = cache.values if width == mask.shape[1] else _first_positions(cache.values, width)
        return ConcatCache(_cut(cache.tokens, lengths), values, mask[:, :width], cache.adapters)

    def _call(
        self,
        feeds: Mapping[str, npt.NDArray[Any]],
        past: Values,
        wanted: Sequence[str],
        adapters: tuple[str | None, ...],
    ) -> tuple[list[npt.NDArray[np.float32]], Values]:
        """Run the graph once for each adapter; return what is wanted, copied out, and the past of the next call.

        The past is copied only where rows have several adapters.
        """
        names = list(dict.fromkeys(adapters))
        if len(names) == 1:
            return self._call_one(feeds, past, wanted, names[0])
        rows = [[row for row, name in enumerate(adapters) if name == chosen] for chosen in names]
        parts = []
        for chosen, some in zip(names, rows, strict=True):
            taken = {name: array[some] if len(array.shape) > 1 else array for name, array in feeds.items()}
            held = {name: _picked(value, some) for name, value in past.items()}
            parts.append(self._call_one(taken, held, wanted, chosen))
        back = np.argsort(np.concatenate(rows))
        found = [np.concatenate(arrays)[back] for arrays in zip(*(arrays for arrays, _ in parts), strict=True)]
        values = {name: np.concatenate([part[name].numpy() for _, part in parts])[back] for name in self._pasts}
        return found, {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in values.items()}

    def _call_one(
        self, feeds: Mapping[str, npt.NDArray[Any]], past: Values, wanted: Sequence[str], adapter: str | None
    ) -> tuple[list[npt.NDArray[np.float32]], Values]:
        """Run the graph once; return what is wanted, copied out, and the past of the next call, not copied."""
        if self._session is None:
            raise UsageError("the runner is closed; open another")
        binding = self._session.io_binding()
        for name, array in feeds.items():  # read in place, so `feeds` must live until the run is over; here it does
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        lora = self._lora.values(adapter) if self._lora is not None else {}
        for name, value in (*past.items(), *lora.items()):
            binding.bind_ortvalue_input(name, value)
        for name in (*wanted, *self._presents):
            binding.bind_output(name)
        try:
            self._session.run_with_iobinding(binding)
        except RuntimeError as error:
            raise FailedError(f"onnxruntime failed in {self.variant.graph}: {one_line(error)}") from error
        if self._pages is not None:
            self._pages.start()
        outputs = binding.get_outputs()
        found = [value.numpy() for value in outputs[: len(wanted)]]
        return found, dict(zip(self._pasts, outputs[len(wanted) :], strict=True))


def _zeros(spec: KVCacheSpec, batch_size: int, length: int) -> ort.OrtValue:
    """Return an empty past of `length` positions; it serves as all of them, since nothing is written to inputs."""
    shape = (batch_size, spec.num_key_value_heads, length, spec.head_dim)
    return ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.dtype(spec.dtype)))


def _picked(value: Any, rows: Sequence[int]) -> Any:
    """Return some rows of a past."""
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value.numpy()[list(rows)]))


def _first_positions(values: Values, width: int) -> Values:
    return {
        name: ort.OrtValue.ortvalue_from_numpy(value.numpy()[:, :, :width].copy()) for name, value in values.items()
    }


def _joined(tokens: Sequence[Ids], rows: Sequence[Ids]) -> tuple[Ids, ...]:
    return tuple(np.concatenate([old, new]) for old, new in zip(tokens, rows, strict=True))


def _cut(tokens: Sequence[Ids], lengths: Sequence[int]) -> tuple[Ids, ...]:
    return tuple(row[:length] for row, length in zip(tokens, lengths, strict=True))
