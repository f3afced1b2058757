"""The runner of the static-cache graphs, on whatever computes them: onnxruntime, or an engine of a TensorRT.

| tensor                          | shape                                                   | dtype          |
|---------------------------------|---------------------------------------------------------|----------------|
| input_ids                       | [batch_size, sequence_length]                           | int64          |
| write_indices                   | [batch_size]: the position of each row's first token    | int64          |
| logit_index                     | [batch_size, 1]: the position here that gets logits     | int64          |
| inputs_embeds, if exported      | [batch_size, sequence_length, hidden]: of negative ids  | float32        |
| past_key_values.N.key, .value   | [batch_size, kv_heads, C, head_dim]                     | kv_cache.dtype |
| -> logits                       | [batch_size, vocab_size]                                | float32        |
| -> score, of a classifier       | [batch_size, labels]; then none of the next two         | float32        |
| -> hidden_states.N, if exported | [batch_size, sequence_length, hidden]                   | float32        |
| -> top_ids                      | [batch_size, top_k]: the likeliest, best first          | int64          |
| -> top_logits                   | [batch_size, top_k]: their logits                       | float32        |
| -> present.N.key, .value        | the memory of past_key_values                           | kv_cache.dtype |
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from runtimes.huge_pages import HugePages
from runtimes.manifest import ModelSpec, Variant
from runtimes.one_thread import one_thread
from runtimes.runners.rows import RowRunner
from runtimes.runners.runner import Ids, Logits, TokenIds, check_positions
from runtimes.runners.slots import DEFAULT_SLOTS, piece_length


class StaticSession(Protocol):
    """A static-cache graph, loaded, with the memory of its KV cache: zeros at first, then written in place."""

    prefill_chunk: int
    """tokens per row that one call takes at most"""

    def reserve(self, rows: int) -> None:
        """Have memory for so many rows, keeping what they hold.

        Raises:
            InputError: more than it was made for.
            ResourceError: there is not so much memory.
        """
        ...

    def run(
        self,
        first_row: int,
        input_ids: Ids,
        write_indices: Ids,
        logit_index: Ids,
        wanted: Sequence[str],
        vectors: npt.NDArray[np.float32] | None = None,
    ) -> list[npt.NDArray[Any]]:
        """Compute B rows of the cache, in place.

        Args:
            first_row: where they begin.
            input_ids: int64 [B, S].
            write_indices: int64 [B].
            logit_index: int64 [B].
            wanted: names of outputs, none of the KV cache; what is not wanted stays where it was computed.
            vectors: float32 [B, S, hidden], in the place of negative ids; None: there are none.

        Returns:
            What is wanted, in that order, each an array of its own.

        Raises:
            UsageError: the session is closed.
            FailedError: it could not be computed.
        """
        ...

    def clear(self, row: int, start: int) -> None:
        """Set a row's keys and values to zero from one position on."""
        ...

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copy the first tokens of a row to another."""
        ...

    def close(self) -> None:
        """Free everything. Closing twice is harmless."""
        ...


@dataclass(frozen=True)
class _Chunk:
    """One call for B rows, of S tokens each."""

    ids: Ids
    """[B, S]"""
    starts: Ids
    """[B]: the slot of each row's first token here"""
    first: Ids
    """[B]: the token here that is each row's first new one"""
    counts: Ids
    """[B]: new tokens; 0 where a row waits"""
    ending: npt.NDArray[np.bool_]
    """[B]: the row's last token is here"""


class StaticRunner(RowRunner):
    """Implements `runtimes.runners.runner.Runner`, and slots, with a static-cache graph.

    Prompts are computed in pieces of `prefill_chunk` tokens. Rows of different lengths are padded on the right; what is
    written after a row's last token, and what `truncate` drops, is overwritten by its next. Padding must not pass C:
    where it would, the row starts earlier and computes tokens that the cache holds already once more, to the same
    values.

    The graph gives the logits of one position per row, so `all_positions` calls it once for each position; that is
    meant for verification, not for speed.
    """

    _copies_rows = True

    def __init__(
        self,
        session: StaticSession,
        variant: Variant,
        model: ModelSpec,
        max_slots: int = DEFAULT_SLOTS,
        *,
        exact: bool = False,
        pages: HugePages | None = None,
    ) -> None:
        super().__init__(variant, model, max_slots, exact=exact, pages=pages)
        self._session = session

    @one_thread
    def decode_block(self, token_ids: TokenIds) -> Logits:
        check_positions(self.variant)
        (ids,) = self._checked([token_ids])
        (held,) = self._held(1)
        self._session.reserve(1)
        steps = [self._append(ids[None, n : n + 1], np.array([len(held) + n])) for n in range(len(ids))]
        logits: Logits = np.concatenate(steps)  # (n, V)
        self._check_finite([logits], [len(held) + len(ids)])
        self._take([np.concatenate([held, ids])])
        return logits

    @one_thread
    def close(self) -> None:
        super().close()
        self._session.close()

    def _extend(self, rows: list[Ids], tokens: list[Ids], all_positions: bool) -> list[Logits]:
        self._session.reserve(len(rows))
        return self._prefill(0, [len(t) - len(r) for t, r in zip(tokens, rows, strict=True)], tokens, all_positions)

    def _hidden(self, rows: list[Ids], tokens: list[Ids], wanted: Sequence[str]) -> list[list[Logits]]:
        self._session.reserve(len(rows))
        pieces: list[list[list[Logits]]] = [[[] for _ in wanted] for _ in rows]
        for chunk in self._chunks([len(t) - len(r) for t, r in zip(tokens, rows, strict=True)], tokens):
            index = np.clip(chunk.first + chunk.counts - 1, 0, chunk.ids.shape[1] - 1)
            for place, states in enumerate(self._run(0, chunk.ids, chunk.starts, index, wanted)):
                for b in np.flatnonzero(chunk.counts).tolist():
                    pieces[b][place].append(states[b, chunk.first[b] : chunk.first[b] + chunk.counts[b]])
        return [[np.concatenate(parts) for parts in row] for row in pieces]

    def _reserve(self, rows: int) -> None:
        self._session.reserve(rows)

    def _feed(self, row: int, held: Ids, ids: Ids, all_positions: bool = False) -> Logits:
        self._session.reserve(row + 1)
        return self._prefill(row, [len(held)], [np.concatenate([held, ids])], all_positions)[0]

    def _copy(self, source: int, target: int, ids: Ids) -> None:
        self._session.copy_row(source, target, len(ids))

    def _step(self, ids: Ids, starts: Ids, wanted: Sequence[str]) -> list[npt.NDArray[Any]]:
        return self._run(0, ids, starts, np.zeros_like(starts), wanted)

    def _run(self, first_row: int, ids: Ids, starts: Ids, index: Ids, wanted: Sequence[str]) -> list[npt.NDArray[Any]]:
        found = self._session.run(first_row, ids, starts, index, wanted, self._vectors.of(ids))
        self._stepped()
        return found

    def _undo(self, rows: Sequence[int]) -> None:
        # Positions that are not seen yet are read and weighted with 0, and 0 times NaN is NaN.
        for row in rows:
            self._session.clear(row, len(self._row_tokens(row)))

    def _prefill(self, first_row: int, held: list[int], tokens: list[Ids], all_positions: bool) -> list[Logits]:
        """Compute rows from where they are held to their ends, chunk by chunk, all rows at once."""
        pieces: list[list[Logits]] = [[] for _ in tokens]
        for chunk in self._chunks(held, tokens):
            width, counts = chunk.ids.shape[1], chunk.counts
            for n in range(0 if all_positions else width - 1, width):
                use = counts > n if all_positions else chunk.ending
                index = np.minimum(chunk.first + np.clip(counts - 1, 0, n), width - 1)  # (B,)
                wanted = (self._logits,) if use.any() else ()
                for logits in self._run(first_row, chunk.ids, chunk.starts, index, wanted):
                    for b in np.flatnonzero(use).tolist():
                        pieces[b].append(logits[b][None])
        return [np.concatenate(row) for row in pieces]

    def _chunks(self, held: list[int], tokens: list[Ids]) -> Iterator[_Chunk]:
        done, ends = np.array(held), np.array([len(row) for row in tokens])
        while (done < ends).any():
            width = piece_length(int((ends - done).max()), self._session.prefill_chunk, self.exact)
            # A row that is at its end waits, as in `step`.
            starts = np.minimum(done, self.max_cache_length - width)  # (B,)
            counts = np.minimum(ends - done, width)
            ids = np.zeros((len(tokens), width), np.int64)
            for b, row in enumerate(tokens):
                window = row[starts[b] : done[b] + counts[b]]
                ids[b, : len(window)] = window
            yield _Chunk(ids, starts, done - starts, counts, (counts > 0) & (done + counts == ends))
            done = done + counts
