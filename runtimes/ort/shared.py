"""The runner of the graphs whose KV cache is one buffer, written in place; see `SharedRunner` for their tensors."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, wait
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime as ort  # type: ignore[import-untyped]

from runtimes.errors import FailedError, UsageError
from runtimes.huge_pages import HugePages
from runtimes.manifest import ModelSpec, Variant
from runtimes.one_thread import one_thread
from runtimes.ort.adapters import Adapters
from runtimes.ort.mapped_buffer import MappedBuffer
from runtimes.ort.session import one_line
from runtimes.runners.rows import RowRunner
from runtimes.runners.runner import Ids, Logits, TokenIds, check_positions
from runtimes.runners.slots import DEFAULT_SLOTS, piece_length

PREFILL_CHUNK = 128
"""tokens of one sequence per call: seen as fast as 512, and the activations take a quarter of the memory"""
_BATCHED_LOGITS = 64
_NOTHING: Ids = np.zeros(0, np.int64)
KEPT = 256
"""tokens before those that a window needs that are kept, so that a text may be cut back by so many"""
FORGOTTEN = 256
"""tokens at least that are forgotten at once"""


class KVBuffer(Protocol):
    """Keys and values of some rows, in host or device memory."""

    def reserve(self, rows: int, held: Sequence[int]) -> None:
        """Have room for so many rows of the whole context, keeping the tokens that each row holds.

        Raises:
            InputError, ContextLengthError: there is none; says why.
        """
        ...

    def binding(self, session: ort.InferenceSession, start: int, stop: int, outputs: Sequence[str]) -> Any:
        """Return the binding of rows start to stop as past and present, for runs with these outputs; it may be kept."""
        ...

    def close(self) -> None:
        """Free the memory."""
        ...


class SharedRunner(RowRunner):
    """The graph, or the two graphs, with a shared KV buffer; implements `runtimes.runners.slots.Slots`.

    | tensor                          | shape                                                   | dtype          |
    |---------------------------------|---------------------------------------------------------|----------------|
    | input_ids                       | [batch_size, sequence_length]                           | int64          |
    | attention_mask                  | [batch_size, total_sequence_length]: 1 for a token      | int64          |
    | past_key_values.N.key, .value   | [batch_size, kv_heads, C, head_dim]                     | kv_cache.dtype |
    | num_logits_to_keep              | []: the last rows that get logits; 0, the default: all  | int64          |
    | -> logits                       | [batch_size, num_logits, vocab_size]                    | float32        |
    | -> score, of a classifier       | [batch_size, labels]; then no num_logits_to_keep        | float32        |
    | -> hidden_states.N, if exported | [batch_size, sequence_length, hidden]                   | float32        |
    | -> top_ids, if it picks any     | [batch_size, num_logits, top_k]: the likeliest          | int64          |
    | -> top_logits                   | [batch_size, num_logits, top_k]: their logits           | float32        |
    | -> present.N.key, .value        | the memory of past_key_values                           | kv_cache.dtype |

    Rows of different lengths are padded on the right; the mask's sums are the lengths. The buffer holds C tokens a row.

    Where the variant has a prefill graph, it is used from `prefill.min_rows` tokens a step. The two graphs round
    differently; `decode` of few rows and `decode_block` use the first alone.

    Layers with a window keep their last tokens alone, `KEPT` more than the window and up to `FORGOTTEN` until they are
    given back; where a text is cut back further, what is left of it is computed again. An exact runner keeps all.

    Where the graph takes LoRA adapters, each row has one or none; see `runtimes.ort.adapters`. An exact runner has
    none: it would have to compute each of them with an even number of rows.

    An exact runner uses the prefill graph for prompts alone, row by row, and computes the rows of a step in pairs: the
    kernels of quantised weights take two rows at a time, and a last one that is left over has other bits.
    """

    prefill_chunk = PREFILL_CHUNK
    _copies_rows = True
    batched_logits = _BATCHED_LOGITS
    """rows of logits that a batched prefill may compute to get each sequence's last"""

    def __init__(
        self,
        decode: ort.InferenceSession,
        prefill: Future[ort.InferenceSession] | None,
        variant: Variant,
        model: ModelSpec,
        max_slots: int = DEFAULT_SLOTS,
        *,
        exact: bool = False,
        buffer: KVBuffer | None = None,
        adapters: Adapters | None = None,
        pages: HugePages | None = None,
    ) -> None:
        super().__init__(variant, model, max_slots, exact=exact, pages=pages)
        self._lora = adapters
        self.adapters = adapters.names if adapters is not None and not exact else ()
        self._counts = any(spec.role == "logit_count" for spec in variant.inputs)  # a classifier has one answer a row
        self._padding = model.pad_token_id or 0  # a classifier looks for the last token that is none
        self._run_options: ort.RunOptions | None = None
        self._decode_session: ort.InferenceSession | None = decode
        self._prefill = prefill
        self._prefill_rows = variant.prefill.min_rows if variant.prefill else 0
        self._buffer: KVBuffer = buffer or MappedBuffer(variant.kv_cache, max_slots + max_slots % 2)
        self._window = max(variant.kv_cache.windows, default=0)

    @one_thread
    def decode_block(self, token_ids: TokenIds) -> Logits:
        check_positions(self.variant)
        (ids,) = self._checked([token_ids])
        (held,) = self._held(1)
        self._reserve(1)
        self._remember(0, held)
        if self.exact:  # as `decode` would, to the bit
            steps = [self._append(ids[None, n : n + 1], np.array([len(held) + n])) for n in range(len(ids))]
            logits: Logits = np.concatenate(steps)
        else:
            logits = self._compute(0, len(held), ids, all_positions=True, decoding=True)
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
        self._reserve(len(tokens))
        if len(rows) > 1 and self._counts and self._are_new() and self._worth_batching(rows, all_positions):
            return self._batched(0, rows, all_positions)
        found: list[Logits] = []
        for start, stop in self._parts(rows, padded=not self._counts and self.model.pad_token_id is not None):
            if stop - start > 1:
                found += self._batched(start, rows[start:stop], all_positions, decoding=self._decodes(rows[start]))
                continue
            ids, all_ids = rows[start], tokens[start]
            past = len(all_ids) - len(ids)
            self._remember(start, all_ids[:past])
            found.append(self._compute(start, past, ids, all_positions))
        return found

    def _hidden(self, rows: list[Ids], tokens: list[Ids], wanted: Sequence[str]) -> list[list[Logits]]:
        self._reserve(len(tokens))
        found: list[list[Logits]] = []
        for start, stop in self._parts(rows, padded=True):
            if stop - start > 1:
                found += self._hidden_of_new(start, rows[start:stop], wanted)
            else:
                found.append(self._hidden_of(start, rows[start], tokens[start], wanted))
        return found

    def _hidden_of(self, row: int, ids: Ids, all_ids: Ids, wanted: Sequence[str]) -> list[Logits]:
        past, start = len(all_ids) - len(ids), 0
        self._remember(row, all_ids[:past])
        pieces = []
        while start < len(ids):
            count = piece_length(len(ids) - start, self.prefill_chunk, self.exact)
            total = np.array([past + start + count])
            pieces.append(self._run(row, row + 1, ids[None, start : start + count], total, keep=1, wanted=wanted))
            start += count
            self._forget(row, past + start)
        return [np.concatenate(arrays, axis=1)[0] for arrays in zip(*pieces, strict=True)]

    def _hidden_of_new(self, start: int, rows: list[Ids], wanted: Sequence[str]) -> list[list[Logits]]:
        ids, lengths = self._padded(start, rows)
        arrays = self._run(
            start, start + len(rows), ids, lengths, keep=1, decoding=self._decodes(rows[0]), wanted=wanted
        )
        return [[array[b, : len(row)] for array in arrays] for b, row in enumerate(rows)]

    def _reserve(self, rows: int) -> None:
        held = [0 if row is None else len(row) for row in self._tokens]
        self._buffer.reserve(rows, held)

    def _feed(self, row: int, held: Ids, ids: Ids, all_positions: bool = False) -> Logits:
        self._remember(row, held)
        return self._compute(row, len(held), ids, all_positions=all_positions, cut=True)

    def _copy(self, source: int, target: int, ids: Ids) -> None:
        if isinstance(self._buffer, MappedBuffer):
            self._buffer.copy_row(source, target, len(ids))
        else:
            super()._copy(source, target, ids)

    def _give_back(self, row: int) -> None:
        if isinstance(self._buffer, MappedBuffer):
            self._buffer.give_back(row)

    def _step(self, ids: Ids, starts: Ids, wanted: Sequence[str]) -> list[npt.NDArray[Any]]:
        self._reserve(max(len(ids), len(self._tokens)))
        for row, start in enumerate(starts):
            self._remember(row, self._row_tokens(row)[:start])
        found = self._run(0, len(ids), ids, starts + 1, keep=1, decoding=self.exact, wanted=wanted)
        for row, start in enumerate(starts):
            self._forget(row, int(start) + 1)
        return [array if array.ndim == 2 else array[:, 0] for array in found]

    def _forgetful(self) -> MappedBuffer | None:
        """Return the buffer whose layers with a window give back what no later token sees; None: they keep all."""
        return self._buffer if self._window and not self.exact and isinstance(self._buffer, MappedBuffer) else None

    def _remember(self, row: int, held: Ids) -> None:
        """Make sure that a row has the keys and values that the token behind `held` sees in layers with a window."""
        buffer = self._forgetful()
        if buffer is None:
            return
        if not len(held):
            buffer.rewrite(row)
        elif buffer.forgotten(row) > max(0, len(held) + 1 - self._window):
            buffer.rewrite(row)
            self._compute(row, 0, held, all_positions=False)

    def _forget(self, row: int, length: int) -> None:
        """Give back what no token behind the first `length` sees in layers with a window, but for `KEPT` more."""
        buffer = self._forgetful()
        unseen = length + 1 - self._window - KEPT
        if buffer is not None and unseen >= buffer.forgotten(row) + FORGOTTEN:
            buffer.forget(row, unseen)

    def _are_new(self) -> bool:
        """Tell whether rows may be computed together: they are new, and need not have the bits that each has alone."""
        return not self.exact and not any(self.cache_lengths)

    def _decodes(self, ids: Ids) -> bool:
        """Tell whether the decode graph computes tokens that come alone."""
        return len(ids) < self._prefill_rows

    def _worth_batching(self, rows: list[Ids], all_positions: bool) -> bool:
        """Tell whether one padded call does not compute much more than one call per row."""
        lengths = [len(row) for row in rows]
        longest = max(lengths)
        logits = len(rows) * (longest if all_positions else longest - min(lengths) + 1)
        return logits <= self.batched_logits and len(rows) * longest <= self.prefill_chunk

    def _parts(self, rows: list[Ids], *, padded: bool) -> list[tuple[int, int]]:
        """Cut a batch, which gives no logits, where it does not fit a call: each part on the graph of a row alone."""
        if not padded or not self._are_new():
            return [(row, row + 1) for row in range(len(rows))]
        found, start = [], 0
        for row, ids in enumerate(rows[1:], 1):
            longest = max(map(len, rows[start : row + 1]))
            whole = (row + 1 - start) * longest <= self.prefill_chunk
            if not whole or self._decodes(ids) != self._decodes(rows[start]):
                found.append((start, row))
                start = row
        return [*found, (start, len(rows))]

    def _compute(
        self, row: int, past: int, ids: Ids, all_positions: bool, decoding: bool = False, cut: bool = False
    ) -> Logits:
        """Run the tokens of one row, in pieces; return the logits of the last one or of all, [n, V].

        `decoding`: see `_run`. `cut`: they are a piece, cut as an exact runner cuts prompts.
        """
        pieces = []
        start = 0
        while start < len(ids):
            count = piece_length(len(ids) - start, self.prefill_chunk, self.exact and not cut)
            piece = ids[start : start + count]
            total = np.array([past + start + count])
            last = start + count == len(ids)
            logits = self._call(row, row + 1, piece[None], total, keep=0 if all_positions else 1, decoding=decoding)
            if all_positions or last:
                pieces.append(logits[0])
            start += count
            self._forget(row, past + start)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _batched(self, start: int, rows: list[Ids], all_positions: bool, *, decoding: bool = False) -> list[Logits]:
        """Run new rows in one call, padded on the right."""
        ids, lengths = self._padded(start, rows)
        width = ids.shape[1]
        keep = width if all_positions else width - int(lengths.min()) + 1
        logits = self._call(start, start + len(rows), ids, lengths, keep=keep, decoding=decoding)  # (B, keep, V)
        if not self._counts:
            return list(logits)
        ends = lengths - (width - keep)
        wanted = lengths if all_positions else np.ones_like(lengths)
        return [logits[b, end - n : end] for b, (end, n) in enumerate(zip(ends, wanted, strict=True))]

    def _padded(self, start: int, rows: list[Ids]) -> tuple[Ids, Ids]:
        """Return new rows side by side, [B, S], and their lengths; a classifier goes by the id of padding."""
        for number in range(len(rows)):
            self._remember(start + number, _NOTHING)
        lengths = np.array([len(row) for row in rows])
        ids = np.full((len(rows), int(lengths.max())), self._padding, np.int64)
        for b, row in enumerate(rows):
            ids[b, : len(row)] = row
        return ids, lengths

    def _call(
        self, start: int, stop: int, input_ids: Ids, lengths: Ids, *, keep: int, decoding: bool = False
    ) -> Logits:
        """Run the graph for its logits, [B, keep or S, V], or scores, [B, 1, labels]; see `_run`."""
        (logits,) = self._run(start, stop, input_ids, lengths, keep=keep, decoding=decoding)
        return logits if self._counts else logits[:, None]

    def _run(
        self,
        start: int,
        stop: int,
        input_ids: Ids,
        lengths: Ids,
        *,
        keep: int,
        decoding: bool = False,
        wanted: Sequence[str] | None = None,
    ) -> list[npt.NDArray[Any]]:
        """Run the graph for some rows of the buffer.

        Args:
            start, stop: the rows.
            input_ids: int64 [B, S].
            lengths: tokens per row, these included, int [B].
            keep: rows of logits; 0 means all.
            decoding: use the decode graph whatever the number of tokens.
            wanted: outputs; None: the logits.

        Rows that have one LoRA adapter and stand side by side are run together, the others after each other: a run
        writes the keys and values of all its rows.

        Returns:
            Each output, [B, keep or S, ...], a score [B, labels], hidden states [B, S, hidden], an array of its own.
        """
        width, parts = int(lengths.max()), self._by_adapter(start, stop)
        if len(parts) == 1:
            return self._run_rows(start, stop, input_ids, lengths, width, keep=keep, decoding=decoding, wanted=wanted)
        found = []
        for first, last in parts:
            of_part = slice(first - start, last - start)
            ids, held = input_ids[of_part], lengths[of_part]
            found.append(self._run_rows(first, last, ids, held, width, keep=keep, decoding=decoding, wanted=wanted))
        return [np.concatenate(arrays) for arrays in zip(*found, strict=True)]

    def _by_adapter(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Return the rows start to stop in parts that have one adapter each."""
        names = [self._adapters.get(row) for row in range(start, stop)]
        ends = [row for row in range(1, len(names)) if names[row] != names[row - 1]]
        return [(start + first, start + last) for first, last in pairwise([0, *ends, len(names)])]

    def _run_rows(
        self,
        start: int,
        stop: int,
        input_ids: Ids,
        lengths: Ids,
        width: int,
        *,
        keep: int,
        decoding: bool,
        wanted: Sequence[str] | None,
    ) -> list[npt.NDArray[Any]]:
        """As `_run`, for rows that have one adapter; `width`: tokens that the mask is wide."""
        if self._decode_session is None:
            raise UsageError("the runner is closed; open another")
        session = self._decode_session
        if self._prefill is not None and not decoding and input_ids.size >= self._prefill_rows:
            session = self._prefill.result()
        wanted = (self._logits,) if wanted is None else wanted
        batch, tokens = input_ids.shape
        outputs = self._outputs(batch, tokens, keep or tokens, wanted)
        inputs: dict[str, npt.NDArray[Any]] = {
            "input_ids": np.ascontiguousarray(input_ids),
            "attention_mask": attention_mask(lengths, width),
        }
        if self._counts:
            inputs["num_logits_to_keep"] = np.array(keep, np.int64)
        if self._vectors.name is not None:  # always bound: a binding is kept, and what it was given once
            inputs[self._vectors.name] = self._embeds(input_ids)
        binding = self._buffer.binding(session, start, stop, wanted)
        for name, array in inputs.items():  # read in place, so they must live until the run is over; here they do
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        if self.adapters and self._lora is not None:  # always, likewise
            self._lora.bind(binding, self._adapters.get(start))
        for name, array in outputs.items():
            binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(array))
        self._run_bound(session, binding, self._run_options)
        self._stepped()
        return list(outputs.values())

    def _embeds(self, input_ids: Ids) -> npt.NDArray[np.float32]:
        found = self._vectors.of(input_ids)
        return np.zeros((1, 1, self.model.hidden_size), np.float32) if found is None else found

    def _outputs(self, batch: int, tokens: int, count: int, wanted: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
        sizes = {"batch_size": batch, "sequence_length": tokens, "num_logits": count}
        specs = {name: self.variant.results[name] for name in wanted}
        shapes = {name: [sizes[d] if isinstance(d, str) else d for d in spec.shape] for name, spec in specs.items()}
        return {name: np.empty(shapes[name], spec.dtype) for name, spec in specs.items()}

    def _run_bound(self, session: ort.InferenceSession, binding: Any, options: ort.RunOptions | None) -> None:
        try:
            session.run_with_iobinding(binding, options)
        except RuntimeError as error:
            raise FailedError(f"onnxruntime failed in {self.variant.graph}: {one_line(error)}") from error


def attention_mask(lengths: Ids, width: int) -> Ids:
    """Return int64 [B, width]: 1 for the first `lengths` positions of each row."""
    return (np.arange(width) < lengths[:, None]).astype(np.int64)
