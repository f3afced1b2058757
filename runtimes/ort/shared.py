"""The runner of the graphs whose KV cache is one buffer, written in place; see `SharedRunner` for their tensors."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, wait
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime as ort  # type: ignore[import-untyped]

from runtimes.errors import ContextLengthError, FailedError, UsageError
from runtimes.manifest import KVCacheSpec, ModelSpec, Variant
from runtimes.one_thread import one_thread
from runtimes.ort.session import one_line
from runtimes.runners.rows import RowRunner
from runtimes.runners.runner import Ids, Logits, TokenIds

PREFILL_CHUNK = 128
"""tokens of one sequence per call: seen as fast as 512, and the activations take a quarter of the memory"""
_BATCHED_LOGITS = 64
_LENGTH_STEP = 256  # tokens; the buffer grows to a multiple of it, with room for as many more, and by half at least
_ALIGNMENT = 64


class KVBuffer(Protocol):
    """Keys and values of some rows, in host or device memory."""

    def reserve(self, rows: int, length: int, held: Sequence[int]) -> None:
        """Make room for so many rows and tokens per row, keeping the tokens that are held; see `_Buffer`."""
        ...

    def binding(self, session: ort.InferenceSession, start: int, stop: int, outputs: Sequence[str]) -> Any:
        """Return the binding of rows start to stop as past and present, for runs with these outputs; it may be kept."""
        ...

    def close(self) -> None:
        """Free the memory."""
        ...


class SharedRunner(RowRunner):
    """The graph, or the two graphs, with a shared KV buffer; implements `runtimes.runners.runner.Runner`.

    | tensor                          | shape                                                   | dtype          |
    |---------------------------------|---------------------------------------------------------|----------------|
    | input_ids                       | [batch_size, sequence_length]                           | int64          |
    | attention_mask                  | [batch_size, total_sequence_length]: 1 for a token      | int64          |
    | past_key_values.N.key, .value   | [batch_size, kv_heads, C, head_dim]                     | kv_cache.dtype |
    | num_logits_to_keep              | []: the last rows that get logits; 0, the default: all  | int64          |
    | -> logits                       | [batch_size, num_logits, vocab_size]                    | float32        |
    | -> top_ids, if it picks any     | [batch_size, num_logits, top_k]: the likeliest          | int64          |
    | -> top_logits                   | [batch_size, num_logits, top_k]: their logits           | float32        |
    | -> present.N.key, .value        | the memory of past_key_values                           | kv_cache.dtype |

    Rows of different lengths are padded on the right; the mask's sums are the lengths. The buffer holds C tokens a row
    and grows in steps.

    Where the variant has a prefill graph, it is used from `prefill.min_rows` tokens a step. The two graphs round
    differently; `decode` of few rows and `decode_block` use the first alone.
    """

    prefill_chunk = PREFILL_CHUNK
    batched_logits = _BATCHED_LOGITS
    """rows of logits that a batched prefill may compute to get each sequence's last"""

    def __init__(
        self,
        decode: ort.InferenceSession,
        prefill: Future[ort.InferenceSession] | None,
        variant: Variant,
        model: ModelSpec,
        buffer: KVBuffer | None = None,
    ) -> None:
        super().__init__(variant, model)
        self._run_options: ort.RunOptions | None = None
        self._decode_session: ort.InferenceSession | None = decode
        self._prefill = prefill
        self._prefill_rows = variant.prefill.min_rows if variant.prefill else 0
        self._buffer: KVBuffer = buffer or _Buffer(variant.kv_cache)

    @one_thread
    def decode_block(self, token_ids: TokenIds) -> Logits:
        (ids,) = self._checked([token_ids])
        (held,) = self._held(1)
        self._buffer.reserve(1, len(held) + len(ids), self.cache_lengths)
        logits = self._compute(0, len(held), ids, all_positions=True, exact=True)
        self._check_finite([logits], [len(held) + len(ids)])
        self._take([np.concatenate([held, ids])])
        return logits

    @one_thread
    def close(self) -> None:
        super().close()
        self._buffer.close()
        if self._prefill is not None:
            wait([self._prefill])  # a graph that is being loaded cannot be dropped
        self._decode_session = self._prefill = None

    def _extend(self, rows: list[Ids], tokens: list[Ids], all_positions: bool) -> list[Logits]:
        self._buffer.reserve(len(tokens), max(map(len, tokens)), self.cache_lengths)
        if not any(self.cache_lengths) and len(rows) > 1 and self._worth_batching(rows, all_positions):
            return self._batched(rows, all_positions)
        return [
            self._compute(row, len(all_ids) - len(ids), ids, all_positions)
            for row, (ids, all_ids) in enumerate(zip(rows, tokens, strict=True))
        ]

    def _fill(self, slot: int, ids: Ids) -> Logits:
        rows = 1 << (max(len(self._tokens), slot + 1) - 1).bit_length()  # 1, 2, 4, 8: not a copy for each that comes
        self._buffer.reserve(rows, max([len(ids), *self.cache_lengths]), self.cache_lengths)
        return self._compute(slot, 0, ids, all_positions=False)

    def _step(self, ids: Ids, starts: Ids, wanted: Sequence[str]) -> list[npt.NDArray[Any]]:
        held = max(len(ids), len(self._tokens))
        self._buffer.reserve(held, int(starts.max()) + 1, self.cache_lengths)
        return [array[:, 0] for array in self._run(0, len(ids), ids, starts + 1, keep=1, wanted=wanted)]

    def _worth_batching(self, rows: list[Ids], all_positions: bool) -> bool:
        """Tell whether one padded call does not compute much more than one call per row."""
        lengths = [len(row) for row in rows]
        longest = max(lengths)
        logits = len(rows) * (longest if all_positions else longest - min(lengths) + 1)
        return logits <= self.batched_logits and len(rows) * longest <= self.prefill_chunk

    def _compute(self, row: int, past: int, ids: Ids, all_positions: bool, exact: bool = False) -> Logits:
        """Run the tokens of one row, in pieces; return the logits of the last one or of all, [n, V]."""
        pieces = []
        for start in range(0, len(ids), self.prefill_chunk):
            piece = ids[start : start + self.prefill_chunk]
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
        """Run the graph for its logits, [B, keep or S, V]; see `_run`."""
        (logits,) = self._run(start, stop, input_ids, lengths, keep=keep, exact=exact)
        return logits

    def _run(
        self,
        start: int,
        stop: int,
        input_ids: Ids,
        lengths: Ids,
        *,
        keep: int,
        exact: bool = False,
        wanted: Sequence[str] | None = None,
    ) -> list[npt.NDArray[Any]]:
        """Run the graph for some rows of the buffer.

        Args:
            start, stop: the rows.
            input_ids: int64 [B, S].
            lengths: tokens per row, these included, int [B].
            keep: rows of logits; 0 means all.
            exact: use the decode graph whatever the number of tokens.
            wanted: outputs; None: the logits.

        Returns:
            Each output, [B, keep or S, ...], an array of its own.
        """
        if self._decode_session is None:
            raise UsageError("the runner is closed; open another")
        session = self._decode_session
        if self._prefill is not None and not exact and input_ids.size >= self._prefill_rows:
            session = self._prefill.result()
        wanted = (self._logits,) if wanted is None else wanted
        outputs = self._outputs(len(input_ids), keep or input_ids.shape[1], wanted)
        inputs = {
            "input_ids": np.ascontiguousarray(input_ids),
            "attention_mask": attention_mask(lengths, int(lengths.max())),
            "num_logits_to_keep": np.array(keep, np.int64),
        }
        binding = self._buffer.binding(session, start, stop, wanted)
        for name, array in inputs.items():  # read in place, so they must live until the run is over; here they do
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        for name, array in outputs.items():
            binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(array))
        self._run_bound(session, binding, self._run_options)
        return list(outputs.values())

    def _outputs(self, batch: int, count: int, wanted: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
        specs = self.variant.results
        return {name: np.empty((batch, count, int(specs[name].shape[-1])), specs[name].dtype) for name in wanted}

    def _run_bound(self, session: ort.InferenceSession, binding: Any, options: ort.RunOptions | None) -> None:
        try:
            session.run_with_iobinding(binding, options)
        except RuntimeError as error:
            raise FailedError(f"onnxruntime failed in {self.variant.graph}: {one_line(error)}") from error


class _Buffer:
    """Keys and values of some rows, one array [rows, kv_heads, length, head_dim] per layer and kind."""

    def __init__(self, spec: KVCacheSpec) -> None:
        self._spec = spec
        self._names = [f"{layer}.{kind}" for layer in range(spec.num_layers) for kind in ("key", "value")]
        self._rows = self._length = 0
        self._arrays: dict[str, np.ndarray] = {}
        self._bindings: dict[tuple[int, int, int, tuple[str, ...]], Any] = {}

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
        if length > self._length:  # room that nobody writes is no memory yet; so a prompt's next tokens fit, too
            wanted = max(length + _LENGTH_STEP, self._length * 3 // 2)
            length = min(spec.max_cache_length, _round_up(wanted, _LENGTH_STEP))
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

    def binding(self, session: ort.InferenceSession, start: int, stop: int, outputs: Sequence[str]) -> Any:
        """Return the binding of rows start to stop as past and present; kept, as making it costs as much as a layer."""
        key = (id(session), start, stop, tuple(outputs))
        if key not in self._bindings:
            binding = session.io_binding()
            for name, array in self._arrays.items():
                value = ort.OrtValue.ortvalue_from_numpy(array[start:stop])
                binding.bind_ortvalue_input(f"past_key_values.{name}", value)
                binding.bind_ortvalue_output(f"present.{name}", value)
            self._bindings[key] = binding
        return self._bindings[key]

    def close(self) -> None:
        self._rows = self._length = 0
        self._arrays.clear()
        self._bindings.clear()


def attention_mask(lengths: Ids, width: int) -> Ids:
    """Return int64 [B, width]: 1 for the first `lengths` slots of each row."""
    return (np.arange(width) < lengths[:, None]).astype(np.int64)


def _zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """Return zeros that begin at a cache line. Finite from the start: what is masked is multiplied, too."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.zeros(size + _ALIGNMENT, np.uint8)
    offset = -raw.ctypes.data % _ALIGNMENT
    return raw[offset : offset + size].view(dtype).reshape(shape)


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step
