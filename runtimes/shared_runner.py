"""The runner of the graphs whose KV cache is one buffer, written in place; see `SharedRunner` for their tensors.

Two ways to use it. As a `Runner`: a batch is prefilled, decoded and reset as a whole. As slots, for a server: `admit`
a sequence while others wait, `step` any of those admitted, `release` one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from types import TracebackType
from typing import Any, Self

import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped]

from runtimes.errors import ContextLengthError, FailedError, InputError, UsageError
from runtimes.manifest import KVCacheSpec, ModelSpec, Variant
from runtimes.ort_session import one_line
from runtimes.runner import Ids, Logits, TokenIds, check_finite, check_lengths, check_rows, check_token_ids

PREFILL_CHUNK = 128
"""tokens of one sequence per call: seen as fast as 512, and the activations take a quarter of the memory"""
_BATCHED_LOGITS = 64  # rows of logits that a batched prefill may compute to get each sequence's last
_LENGTH_STEP = 256  # tokens; the buffer grows to a multiple of it, and by half at least
_ALIGNMENT = 64
_NOTHING: Ids = np.zeros(0, np.int64)


class SharedRunner:
    """The graph, or the two graphs, with a shared KV buffer; implements `runtimes.runner.Runner`.

    | tensor                          | shape                                                   | dtype          |
    |---------------------------------|---------------------------------------------------------|----------------|
    | input_ids                       | [batch_size, sequence_length]                           | int64          |
    | attention_mask                  | [batch_size, total_sequence_length]: 1 for a token      | int64          |
    | past_key_values.N.key, .value   | [batch_size, kv_heads, C, head_dim]                     | kv_cache.dtype |
    | num_logits_to_keep              | []: the last rows that get logits; 0, the default: all  | int64          |
    | -> logits                       | [batch_size, num_logits, vocab_size]                    | float32        |
    | -> present.N.key, .value        | the memory of past_key_values                           | kv_cache.dtype |

    Rows of different lengths are padded on the right; the mask's sums are the lengths. The buffer holds C tokens a row
    and grows in steps. A call writes only behind the tokens that a row holds, so one that fails has changed nothing.

    Where the variant has a prefill graph, it is used from `prefill.min_rows` tokens a step. The two graphs round
    differently; `decode` of few rows and `decode_block` use the first alone.
    """

    def __init__(
        self,
        decode: ort.InferenceSession,
        prefill: Future[ort.InferenceSession] | None,
        variant: Variant,
        model: ModelSpec,
    ) -> None:
        self.variant = variant
        self.model = model
        self.max_cache_length = variant.kv_cache.max_cache_length
        self._decode_session: ort.InferenceSession | None = decode
        self._prefill = prefill
        self._prefill_rows = variant.prefill.min_rows if variant.prefill else 0
        self._tokens: list[Ids | None] = []  # per row; None: a slot that is free
        self._buffer = _Buffer(variant.kv_cache)

    @property
    def cache_lengths(self) -> tuple[int, ...]:
        return tuple(len(row) for row in self.cached_tokens)

    @property
    def cached_tokens(self) -> tuple[Ids, ...]:
        return tuple(_NOTHING if row is None else row for row in self._tokens)

    def prefill(self, sequences: Sequence[TokenIds], *, all_positions: bool = False) -> list[Logits]:
        rows = self._checked(sequences)
        tokens = [np.concatenate(pair) for pair in zip(self._held(len(rows)), rows, strict=True)]
        self._buffer.reserve(len(tokens), max(map(len, tokens)), self.cache_lengths)
        if not any(self.cache_lengths) and len(rows) > 1 and _worth_batching(rows, all_positions):
            logits = self._batched(rows, all_positions)
        else:
            logits = [
                self._append(row, len(all_ids) - len(ids), ids, all_positions)
                for row, (ids, all_ids) in enumerate(zip(rows, tokens, strict=True))
            ]
        check_finite(logits, [len(row) for row in tokens])
        self._tokens = list(tokens)
        return logits

    def decode(self, token_ids: TokenIds) -> Logits:
        rows = self._checked(check_token_ids(token_ids, self.cache_lengths))
        lengths = self.cache_lengths
        self._buffer.reserve(len(rows), max(lengths) + 1, lengths)
        logits = self._call(0, len(rows), np.stack(rows), np.array(lengths) + 1, keep=1)[:, 0]  # (B, V)
        check_finite([row[None] for row in logits], [n + 1 for n in lengths])
        self._tokens = [np.concatenate(pair) for pair in zip(self.cached_tokens, rows, strict=True)]
        return logits

    def decode_block(self, token_ids: TokenIds) -> Logits:
        (ids,) = self._checked([token_ids])
        (held,) = self._held(1)
        self._buffer.reserve(1, len(held) + len(ids), self.cache_lengths)
        logits = self._append(0, len(held), ids, all_positions=True, exact=True)
        check_finite([logits], [len(held) + len(ids)])
        self._tokens = [np.concatenate([held, ids])]
        return logits

    def truncate(self, lengths: Sequence[int]) -> None:
        self._refuse_free_slots()
        kept = check_lengths(lengths, self.cache_lengths)
        self._tokens = [row[:n] for row, n in zip(self.cached_tokens, kept, strict=True)]

    def reset(self) -> None:
        self._tokens = []

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
        rows = 1 << (max(len(self._tokens), slot + 1) - 1).bit_length()  # 1, 2, 4, 8: not a copy for each that comes
        self._buffer.reserve(rows, max([len(ids), *self.cache_lengths]), self.cache_lengths)
        logits = self._append(slot, 0, ids, all_positions=False)
        check_finite([logits], [len(ids)])
        self._tokens[slot : slot + 1] = [ids]
        return slot, logits[0]

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
        if not isinstance(token_ids, Mapping) or any(type(slot) is not int for slot in token_ids):
            raise InputError("expected a mapping from slots, integers, to token ids")
        free = [slot for slot in token_ids if slot not in range(len(self._tokens)) or self._tokens[slot] is None]
        if free or not token_ids:
            raise InputError(f"slot {free[0] if free else '(none)'}: not admitted; admit a sequence first")
        held = self.cached_tokens
        slots = list(token_ids)
        given = check_rows(
            [[token_ids[slot]] for slot in slots],
            vocab_size=self.model.vocab_size,
            cache_lengths=tuple(len(held[slot]) for slot in slots),
            max_cache_length=self.max_cache_length,
        )
        rows = max(slots) + 1
        # A row that waits is computed too; what it writes lies behind its tokens, or repeats its last one.
        lengths = np.array([min(len(row) + 1, self.max_cache_length) for row in held[:rows]])
        ids = np.array([[row[-1] if len(row) else 0] for row in held[:rows]], np.int64)
        for slot, token in zip(slots, given, strict=True):
            ids[slot] = token
        self._buffer.reserve(len(held), int(lengths.max()), self.cache_lengths)
        logits = self._call(0, rows, ids, lengths, keep=1)[:, 0]
        check_finite([logits[slot][None] for slot in slots], [len(held[slot]) + 1 for slot in slots])
        for slot, token in zip(slots, given, strict=True):
            self._tokens[slot] = np.concatenate([held[slot], token])
        return {slot: logits[slot] for slot in slots}

    def release(self, slot: int) -> None:
        """Free a slot.

        Raises:
            InputError: it is free already.
        """
        if slot not in range(len(self._tokens)) or self._tokens[slot] is None:
            raise InputError(f"slot {slot}: not admitted")
        self._tokens[slot] = None
        while self._tokens and self._tokens[-1] is None:
            self._tokens.pop()

    def close(self) -> None:
        self._tokens = []
        self._buffer = _Buffer(self.variant.kv_cache)
        if self._prefill is not None:
            wait([self._prefill])  # a graph that is being loaded cannot be dropped
        self._decode_session = self._prefill = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

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

    def _append(self, row: int, past: int, ids: Ids, all_positions: bool, exact: bool = False) -> Logits:
        """Run the tokens of one row, in pieces; return the logits of the last one or of all, [n, V]."""
        pieces = []
        for start in range(0, len(ids), PREFILL_CHUNK):
            piece = ids[start : start + PREFILL_CHUNK]
            total = np.array([past + start + len(piece)])
            last = start + len(piece) == len(ids)
            logits = self._call(row, row + 1, piece[None], total, keep=0 if all_positions else 1, exact=exact)
            if all_positions or last:
                pieces.append(logits[0])
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _batched(self, rows: list[Ids], all_positions: bool) -> list[Logits]:
        """Run new rows in one call, padded on the right."""
        lengths = np.array([len(row) for row in rows])
        width = int(lengths.max())
        ids = np.zeros((len(rows), width), np.int64)
        for b, row in enumerate(rows):
            ids[b, : len(row)] = row
        keep = width if all_positions else width - int(lengths.min()) + 1
        logits = self._call(0, len(rows), ids, lengths, keep=keep)  # (B, keep, V): of the last positions
        ends = lengths - (width - keep)
        wanted = lengths if all_positions else np.ones_like(lengths)
        return [logits[b, end - n : end] for b, (end, n) in enumerate(zip(ends, wanted, strict=True))]

    def _call(self, start: int, stop: int, input_ids: Ids, lengths: Ids, *, keep: int, exact: bool = False) -> Logits:
        """Run the graph for some rows of the buffer.

        Args:
            start, stop: the rows.
            input_ids: int64 [B, S].
            lengths: tokens per row, these included, int [B].
            keep: rows of logits; 0 means all.
            exact: use the decode graph whatever the number of tokens.

        Returns:
            float32 [B, keep or S, V], an array of its own.
        """
        if self._decode_session is None:
            raise UsageError("the runner is closed; open another")
        session = self._decode_session
        if self._prefill is not None and not exact and input_ids.size >= self._prefill_rows:
            session = self._prefill.result()
        batch, width = input_ids.shape
        logits: Logits = np.empty((batch, keep or width, self.model.vocab_size), np.float32)
        inputs = {
            "input_ids": np.ascontiguousarray(input_ids),
            "attention_mask": (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64),
            "num_logits_to_keep": np.array(keep, np.int64),
        }
        binding = self._buffer.binding(session, start, stop)
        for name, array in inputs.items():  # read in place, so they must live until the run is over; here they do
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(logits))
        try:
            session.run_with_iobinding(binding)
        except RuntimeError as error:
            raise FailedError(f"onnxruntime failed in {self.variant.graph}: {one_line(error)}") from error
        return logits


class _Buffer:
    """Keys and values of some rows, one array [rows, kv_heads, length, head_dim] per layer and kind."""

    def __init__(self, spec: KVCacheSpec) -> None:
        self._spec = spec
        self._names = [f"{layer}.{kind}" for layer in range(spec.num_layers) for kind in ("key", "value")]
        self._rows = self._length = 0
        self._arrays: dict[str, np.ndarray] = {}
        self._bindings: dict[tuple[int, int, int], Any] = {}

    def reserve(self, rows: int, length: int, held: Sequence[int]) -> None:
        """Make room for so many rows and tokens per row, keeping the tokens that are held.

        Args:
            rows: at least so many.
            length: tokens per row, at least so many.
            held: tokens to keep, per row.

        Raises:
            ContextLengthError: memory for that many tokens is not to be had.
        """
        if rows <= self._rows and length <= self._length:
            return
        spec = self._spec
        if length > self._length:
            length = min(spec.max_cache_length, _round_up(max(length, self._length * 3 // 2), _LENGTH_STEP))
        length = max(length, self._length)
        shape = (rows, spec.num_key_value_heads, length, spec.stored_head_dim)
        used = max(held, default=0)
        self._bindings.clear()
        try:
            for name in self._names:  # one array after the other, so that only one is there twice
                array = _zeros(shape, np.dtype(spec.dtype))
                if used:
                    array[: len(held), :, :used] = self._arrays[name][: len(held), :, :used]
                self._arrays[name] = array
        except MemoryError as error:
            for name, array in self._arrays.items():  # those that have grown already
                if array.shape != (self._rows, *shape[1:2], self._length, *shape[3:]):
                    self._arrays[name] = array[: self._rows, :, : self._length].copy()
            size = len(self._names) * int(np.prod(shape)) * np.dtype(spec.dtype).itemsize
            raise ContextLengthError(
                f"a KV cache of {rows} rows of {length} tokens needs {size:,} bytes of memory; use less"
            ) from error
        self._rows, self._length = rows, length

    def binding(self, session: ort.InferenceSession, start: int, stop: int) -> Any:
        """Return the binding of rows start to stop as past and present; kept, as making it costs as much as a layer."""
        key = (id(session), start, stop)
        if key not in self._bindings:
            binding = session.io_binding()
            for name, array in self._arrays.items():
                value = ort.OrtValue.ortvalue_from_numpy(array[start:stop])
                binding.bind_ortvalue_input(f"past_key_values.{name}", value)
                binding.bind_ortvalue_output(f"present.{name}", value)
            self._bindings[key] = binding
        return self._bindings[key]


def _worth_batching(rows: list[Ids], all_positions: bool) -> bool:
    """Tell whether one padded call does not compute much more than one call per row."""
    lengths = [len(row) for row in rows]
    longest = max(lengths)
    logits = len(rows) * (longest if all_positions else longest - min(lengths) + 1)
    return logits <= _BATCHED_LOGITS and len(rows) * longest <= PREFILL_CHUNK


def _zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """Return zeros that begin at a cache line. Finite from the start: what is masked is multiplied, too."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.zeros(size + _ALIGNMENT, np.uint8)
    offset = -raw.ctypes.data % _ALIGNMENT
    return raw[offset : offset + size].view(dtype).reshape(shape)


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step
