"""Runners on onnxruntime, one per form of KV cache; see `ConcatRunner` and `StaticRunner` for their graphs.

The KV cache stays in onnxruntime's memory: the present values of one call are bound as the past of the next, under the
name `.replace("present.", "past_key_values.")`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeAlias, TypeVar

import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped]

from runtimes.errors import BackendError, FailedError, PackageError, UsageError
from runtimes.manifest import KVCacheSpec, ModelSpec, Variant
from runtimes.ort_session import PROVIDER, one_line, open_session
from runtimes.runner import Ids, Logits, TokenIds, check_finite, check_lengths, check_rows, check_token_ids
from runtimes.shared_runner import SharedRunner

CACHE_DTYPES = {
    "concat": ("float32", "float16"),
    "static": ("float32", "float16"),
    "shared": ("float32", "int8", "uint8"),
}
"""form of the KV cache -> its dtypes that run here"""

FileCheck: TypeAlias = Callable[[Sequence[str]], None]
"""gets paths in the package; raises IntegrityError"""

Values: TypeAlias = dict[str, Any]
"""name of a past_key_values input -> its OrtValue"""

_NOTHING: Ids = np.zeros(0, np.int64)


@dataclass(frozen=True)
class OrtCache:
    """The cache between two calls of a graph; never changed, each call makes the next one."""

    tokens: tuple[Ids, ...]
    """per row, the ids of the tokens in it"""
    values: Values

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(len(row) for row in self.tokens)


@dataclass(frozen=True)
class ConcatCache(OrtCache):
    """The cache between two calls of a `concat` graph."""

    mask: Ids
    """[B, slots]: 1 where the slot holds a token, 0 where padding was put or a token was dropped"""


Cache = TypeVar("Cache", bound=OrtCache)


class OrtRunner(ABC, Generic[Cache]):
    """What both forms share; implements `runtimes.runner.Runner`.

    A subclass computes a new cache and leaves the old one untouched, so that a call that fails changes nothing.
    """

    def __init__(self, session: ort.InferenceSession, variant: Variant, model: ModelSpec) -> None:
        self.variant = variant
        self.model = model
        self.max_cache_length = variant.kv_cache.max_cache_length
        self._session: ort.InferenceSession | None = session
        self._outputs = [output.name for output in session.get_outputs()]
        self._cache: Cache | None = None

    @property
    def cache_lengths(self) -> tuple[int, ...]:
        return () if self._cache is None else self._cache.lengths

    @property
    def cached_tokens(self) -> tuple[Ids, ...]:
        return () if self._cache is None else self._cache.tokens

    def prefill(self, sequences: Sequence[TokenIds], *, all_positions: bool = False) -> list[Logits]:
        rows = check_rows(
            sequences,
            vocab_size=self.model.vocab_size,
            cache_lengths=self.cache_lengths,
            max_cache_length=self.max_cache_length,
        )
        cache = self._empty_cache(len(rows)) if self._cache is None else self._cache
        logits, extended = self._extend(cache, rows, all_positions)
        check_finite(logits, extended.lengths)
        self._cache = extended
        return logits

    def decode(self, token_ids: TokenIds) -> Logits:
        return np.concatenate(self.prefill(check_token_ids(token_ids, self.cache_lengths)))

    def decode_block(self, token_ids: TokenIds) -> Logits:
        return self.prefill([token_ids], all_positions=True)[0]

    def truncate(self, lengths: Sequence[int]) -> None:
        kept = check_lengths(lengths, self.cache_lengths)
        if self._cache is not None and kept != self._cache.lengths:
            self._cache = self._shortened(self._cache, kept)

    def reset(self) -> None:
        self._cache = None

    def close(self) -> None:
        self._cache = self._session = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def _empty_cache(self, batch_size: int) -> Cache: ...

    @abstractmethod
    def _extend(self, cache: Cache, rows: list[Ids], all_positions: bool) -> tuple[list[Logits], Cache]:
        """Return the logits of `rows` appended to `cache`, and the cache that holds them."""

    @abstractmethod
    def _shortened(self, cache: Cache, lengths: tuple[int, ...]) -> Cache:
        """Return the cache with only the first tokens of each row; `lengths` was checked."""

    def _call(self, feeds: Mapping[str, Ids], past: Values) -> tuple[Logits, Values]:
        """Run the graph once; return the logits, copied out, and the past of the next call, not copied."""
        if self._session is None:
            raise UsageError("the runner is closed; open another")
        binding = self._session.io_binding()
        for name, array in feeds.items():  # read in place, so `feeds` must live until the run is over; here it does
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        for name, value in past.items():
            binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name)
        try:
            self._session.run_with_iobinding(binding)
        except RuntimeError as error:
            raise FailedError(f"onnxruntime failed in {self.variant.graph}: {one_line(error)}") from error
        present: Values = dict(zip(self._outputs, binding.get_outputs(), strict=True))
        logits: Logits = present.pop("logits").numpy()
        return logits, {name.replace("present.", "past_key_values."): value for name, value in present.items()}


class ConcatRunner(OrtRunner[ConcatCache]):
    """The portable graph: present = past + new tokens.

    | tensor                          | shape                                                   | dtype          |
    |---------------------------------|---------------------------------------------------------|----------------|
    | input_ids, position_ids         | [batch_size, sequence_length]                           | int64          |
    | attention_mask                  | [batch_size, total_sequence_length]                     | int64          |
    | past_key_values.N.key, .value   | [batch_size, kv_heads, past_sequence_length, head_dim]  | kv_cache.dtype |
    | num_logits_to_keep              | []: the last rows that get logits; 0, the default: all  | int64          |
    | -> logits                       | [batch_size, num_logits, vocab_size]                    | float32        |
    | -> present.N.key, .value        | [batch_size, kv_heads, total_sequence_length, head_dim] | kv_cache.dtype |

    Rows of different lengths are padded on the left, call by call, so that the last position is every row's last
    token. The mask hides the padding for good, also in the middle of the cache, and position_ids skip it. `truncate`
    hides what it drops, and copies what is left where slots at the end are hidden in every row.
    """

    def _empty_cache(self, batch_size: int) -> ConcatCache:
        return ConcatCache(
            tokens=(_NOTHING,) * batch_size,
            values=_zeros(self.variant.kv_cache, batch_size, length=0),
            mask=np.zeros((batch_size, 0), np.int64),
        )

    def _extend(self, cache: ConcatCache, rows: list[Ids], all_positions: bool) -> tuple[list[Logits], ConcatCache]:
        width = max(len(row) for row in rows)
        ids, positions, mask = (np.zeros((len(rows), width), np.int64) for _ in range(3))
        for b, (row, length) in enumerate(zip(rows, cache.lengths, strict=True)):
            ids[b, width - len(row) :] = row
            positions[b, width - len(row) :] = np.arange(length, length + len(row))
            mask[b, width - len(row) :] = 1
        mask = np.concatenate([cache.mask, mask], axis=1)  # (B, P + S)
        feeds = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": positions,
            "num_logits_to_keep": np.array(0 if all_positions else 1, np.int64),
        }
        logits, values = self._call(feeds, cache.values)  # (B, S or 1, V)
        wanted = [len(row) if all_positions else 1 for row in rows]
        return [logits[b, -n:] for b, n in enumerate(wanted)], ConcatCache(_joined(cache.tokens, rows), values, mask)

    def _shortened(self, cache: ConcatCache, lengths: tuple[int, ...]) -> ConcatCache:
        kept = np.array(lengths, np.int64)[:, None]
        mask = np.where(cache.mask.cumsum(axis=1) <= kept, cache.mask, 0)  # (B, P)
        slots = int(np.flatnonzero(mask.any(axis=0)).max(initial=-1)) + 1  # all after are hidden in every row
        values = cache.values if slots == mask.shape[1] else _first_slots(cache.values, slots)
        return ConcatCache(_cut(cache.tokens, lengths), values, mask[:, :slots])


class StaticRunner(OrtRunner[OrtCache]):
    """The graph made for TensorRT: the cache is a buffer of fixed capacity C, written at write_indices.

    | tensor                          | shape                                                   | dtype          |
    |---------------------------------|---------------------------------------------------------|----------------|
    | input_ids                       | [batch_size, sequence_length]                           | int64          |
    | write_indices                   | [batch_size]: the slot of each row's first token here   | int64          |
    | logit_index                     | [batch_size, 1]: the position here that gets logits     | int64          |
    | past_key_values.N.key, .value   | [batch_size, kv_heads, C, head_dim]                     | kv_cache.dtype |
    | -> logits                       | [batch_size, vocab_size]                                | float32        |
    | -> present.N.key, .value        | as past_key_values                                      | kv_cache.dtype |

    Rows of different lengths are padded on the right; what is written after a row's last token, and what `truncate`
    drops, is overwritten by its next. A slot is a position, and padding must not pass C either: where it would, the
    row starts earlier and computes tokens that the cache holds already once more, to the same values.

    The graph gives the logits of one position per row, so `all_positions` calls it once for each position; that is
    meant for verification, not for speed.
    """

    def _empty_cache(self, batch_size: int) -> OrtCache:
        spec = self.variant.kv_cache
        return OrtCache((_NOTHING,) * batch_size, _zeros(spec, batch_size, length=spec.max_cache_length))

    def _extend(self, cache: OrtCache, rows: list[Ids], all_positions: bool) -> tuple[list[Logits], OrtCache]:
        width = max(len(row) for row in rows)
        tokens = _joined(cache.tokens, rows)
        starts = np.minimum(np.array(cache.lengths, np.int64), self.max_cache_length - width)  # (B,)
        ids = np.zeros((len(rows), width), np.int64)
        for b, (row, start) in enumerate(zip(tokens, starts, strict=True)):
            window = row[start : start + width]
            ids[b, : len(window)] = window
        last = np.array([len(row) for row in tokens], np.int64) - 1 - starts  # (B,): of each row, in this call
        positions: list[Logits] = []
        values = cache.values
        for back in reversed(range(width if all_positions else 1)):
            index = np.maximum(last - back, 0)[:, None]
            feeds = {"input_ids": ids, "write_indices": starts, "logit_index": index}
            logits, values = self._call(feeds, cache.values)  # (B, V)
            positions.append(logits)
        wanted = [len(row) if all_positions else 1 for row in rows]
        by_row = np.stack(positions, axis=1)  # (B, S or 1, V)
        return [by_row[b, -n:] for b, n in enumerate(wanted)], OrtCache(tokens, values)

    def _shortened(self, cache: OrtCache, lengths: tuple[int, ...]) -> OrtCache:
        return OrtCache(_cut(cache.tokens, lengths), cache.values)


def open_ort(
    package: Path, variant: Variant, model: ModelSpec, threads: int | None, check: FileCheck | None = None
) -> ConcatRunner | StaticRunner | SharedRunner:
    """Load a variant's graph, or two, on the CPU execution provider.

    A prefill graph is loaded in the background; the first step that is meant for it waits until it is there, and raises
    what is wrong with it.

    Args:
        package: the package folder; the caller has checked presence and size of the variant's files.
        variant: which.
        model: the manifest's.
        threads: of an operator; None leaves it to onnxruntime.
        check: compares files of the package with the manifest; called with the graph before it is opened, and with its
            data while it is loaded. None: nothing is checked.

    Raises:
        IntegrityError: a file is not the one that was exported.
        PackageError: onnxruntime cannot load the graph, or it has other inputs and outputs than the manifest says.
        BackendError: the CPU execution provider is not there, or cannot hold the cache's dtype.
    """
    spec = variant.kv_cache
    if spec.form not in CACHE_DTYPES:
        known = ", ".join(CACHE_DTYPES)
        raise PackageError(f"variant {variant.name}: KV cache form {spec.form!r}, this version runs {known}")
    if spec.dtype not in CACHE_DTYPES[spec.form]:
        raise BackendError(f"variant {variant.name}: a {spec.dtype} KV cache does not run on {PROVIDER}")

    def load(graph: str, data: Sequence[str]) -> ort.InferenceSession:
        return _load_checked(package, variant, graph, data, threads, check)

    session = load(variant.graph, variant.data)
    match spec.form:
        case "concat":
            return ConcatRunner(session, variant, model)
        case "static":
            return StaticRunner(session, variant, model)
        case _:
            prefill: Future[ort.InferenceSession] | None = None
            if variant.prefill is not None:
                pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefill-graph")
                prefill = pool.submit(load, variant.prefill.graph, variant.prefill.data)
                pool.shutdown(wait=False)
            return SharedRunner(session, prefill, variant, model)


def _load_checked(
    package: Path, variant: Variant, graph: str, data: Sequence[str], threads: int | None, check: FileCheck | None
) -> ort.InferenceSession:
    """Load a graph while its data is checked; what the check finds goes before what onnxruntime says."""
    if check is None:
        return open_session(package / graph, variant, threads)
    check([graph])
    with ThreadPoolExecutor(max_workers=1) as pool:
        pending = pool.submit(check, data)
        try:
            return open_session(package / graph, variant, threads)
        finally:
            pending.result()


def _zeros(spec: KVCacheSpec, batch_size: int, length: int) -> Values:
    """Return an empty past of `length` slots. One value serves as all, since nothing is written to inputs."""
    shape = (batch_size, spec.num_key_value_heads, length, spec.head_dim)
    zeros = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.dtype(spec.dtype)))
    return {f"past_key_values.{n}.{kind}": zeros for n in range(spec.num_layers) for kind in ("key", "value")}


def _first_slots(values: Values, slots: int) -> Values:
    return {
        name: ort.OrtValue.ortvalue_from_numpy(value.numpy()[:, :, :slots].copy()) for name, value in values.items()
    }


def _joined(tokens: Sequence[Ids], rows: Sequence[Ids]) -> tuple[Ids, ...]:
    return tuple(np.concatenate([old, new]) for old, new in zip(tokens, rows, strict=True))


def _cut(tokens: Sequence[Ids], lengths: Sequence[int]) -> tuple[Ids, ...]:
    return tuple(row[:length] for row, length in zip(tokens, lengths, strict=True))
