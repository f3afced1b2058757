"""Runners on onnxruntime, one per form of KV cache; see `ConcatRunner` and `StaticRunner` for their graphs.

The KV cache stays in onnxruntime's memory: the present values of one call are bound as the past of the next, under the
name `.replace("present.", "past_key_values.")`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import onnxruntime as ort  # type: ignore[import-untyped]
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state  # type: ignore[import-untyped]

from runtimes.errors import BackendError, FailedError, PackageError, UsageError, first_names
from runtimes.manifest import KVCacheSpec, ModelSpec, Variant
from runtimes.runner import Logits, TokenIds, check_finite, check_rows, check_token_ids

PROVIDER = "CPUExecutionProvider"

Ids: TypeAlias = npt.NDArray[np.int64]
Values: TypeAlias = dict[str, Any]
"""name of a past_key_values input -> its OrtValue"""

# What loading raises; these have no common base but Exception.
_LOAD_ERRORS = (
    ort_state.EPFail,
    ort_state.Fail,
    ort_state.InvalidArgument,
    ort_state.InvalidGraph,
    ort_state.InvalidProtobuf,
    ort_state.NoModel,
    ort_state.NoSuchFile,
    ort_state.NotFound,
    ort_state.NotImplemented,
    ort_state.RuntimeException,
)
_ERRORS_ONLY = 4  # onnxruntime's log severity "fatal": errors reach the caller as exceptions, once


@dataclass(frozen=True)
class ConcatCache:
    """The cache between two calls of a `concat` graph."""

    mask: Ids
    """[B, slots]: 1 where the slot holds a token, 0 where padding was put"""
    values: Values

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(int(n) for n in self.mask.sum(axis=1))


@dataclass(frozen=True)
class StaticCache:
    """The cache between two calls of a `static` graph."""

    tokens: tuple[Ids, ...]
    """per row, the ids of the tokens in it"""
    values: Values

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(len(row) for row in self.tokens)


Cache = TypeVar("Cache", ConcatCache, StaticCache)


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
            raise FailedError(f"onnxruntime failed in {self.variant.graph}: {_one_line(error)}") from error
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
    token. The mask hides the padding for good, also in the middle of the cache, and position_ids skip it.
    """

    def _empty_cache(self, batch_size: int) -> ConcatCache:
        return ConcatCache(np.zeros((batch_size, 0), np.int64), _zeros(self.variant.kv_cache, batch_size, length=0))

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
        return [logits[b, -n:] for b, n in enumerate(wanted)], ConcatCache(mask, values)


class StaticRunner(OrtRunner[StaticCache]):
    """The graph made for TensorRT: the cache is a buffer of fixed capacity C, written at write_indices.

    | tensor                          | shape                                                   | dtype          |
    |---------------------------------|---------------------------------------------------------|----------------|
    | input_ids                       | [batch_size, sequence_length]                           | int64          |
    | write_indices                   | [batch_size]: the slot of each row's first token here   | int64          |
    | logit_index                     | [batch_size, 1]: the position here that gets logits     | int64          |
    | past_key_values.N.key, .value   | [batch_size, kv_heads, C, head_dim]                     | kv_cache.dtype |
    | -> logits                       | [batch_size, vocab_size]                                | float32        |
    | -> present.N.key, .value        | as past_key_values                                      | kv_cache.dtype |

    Rows of different lengths are padded on the right; what is written after a row's last token is overwritten by its
    next. A slot is a position, and padding must not pass C either: where it would, the row starts earlier and computes
    tokens that the cache holds already once more, to the same values.

    The graph gives the logits of one position per row, so `all_positions` calls it once for each position; that is
    meant for verification, not for speed.
    """

    def _empty_cache(self, batch_size: int) -> StaticCache:
        spec = self.variant.kv_cache
        nothing = np.zeros(0, np.int64)
        return StaticCache((nothing,) * batch_size, _zeros(spec, batch_size, length=spec.max_cache_length))

    def _extend(self, cache: StaticCache, rows: list[Ids], all_positions: bool) -> tuple[list[Logits], StaticCache]:
        width = max(len(row) for row in rows)
        tokens = tuple(np.concatenate([old, new]) for old, new in zip(cache.tokens, rows, strict=True))
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
        return [by_row[b, -n:] for b, n in enumerate(wanted)], StaticCache(tokens, values)


def open_ort(package: Path, variant: Variant, model: ModelSpec, threads: int | None) -> ConcatRunner | StaticRunner:
    """Load a variant's graph on the CPU execution provider.

    Args:
        package: the package folder; the caller has checked the variant's files.
        variant: which graph.
        model: the manifest's.
        threads: of an operator; None leaves it to onnxruntime, which takes the physical cores.

    Raises:
        PackageError: onnxruntime cannot load the graph, or it has other inputs and outputs than the manifest says.
        BackendError: the CPU execution provider is not there, or cannot hold the cache's dtype.
    """
    spec = variant.kv_cache
    if spec.form not in ("concat", "static"):
        raise PackageError(f"variant {variant.name}: KV cache form {spec.form!r}, this version runs concat and static")
    if spec.dtype not in ("float32", "float16"):
        raise BackendError(f"variant {variant.name}: a {spec.dtype} KV cache does not run on {PROVIDER}")
    session = _open_session(package / variant.graph, threads)
    found = session.get_providers()
    if PROVIDER not in found:
        raise BackendError(f"onnxruntime gave {', '.join(found)}, expected {PROVIDER}; reinstall 'olmo2-export[cpu]'")
    inputs = [*session.get_inputs(), *session.get_overridable_initializers()]
    _check_names(variant, "inputs", [v.name for v in inputs], [t.name for t in variant.inputs])
    _check_names(variant, "outputs", [v.name for v in session.get_outputs()], [t.name for t in variant.outputs])
    return (ConcatRunner if spec.form == "concat" else StaticRunner)(session, variant, model)


def _open_session(graph: Path, threads: int | None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return ort.InferenceSession(graph, options, providers=[PROVIDER])
    except _LOAD_ERRORS as error:
        raise PackageError(f"{graph}: onnxruntime cannot load it ({_one_line(error)}); export it again") from error


def _check_names(variant: Variant, kind: str, found: list[str], expected: list[str]) -> None:
    """Refuse a graph whose inputs or outputs are not those of the manifest."""
    if set(found) == set(expected):
        return
    missing = first_names(sorted(set(expected) - set(found))) or "none"
    extra = first_names(sorted(set(found) - set(expected))) or "none"
    raise PackageError(
        f"{variant.graph}: its {kind} are not the manifest's (missing: {missing}; unexpected: {extra}); "
        "export the package again"
    )


def _zeros(spec: KVCacheSpec, batch_size: int, length: int) -> Values:
    """Return an empty past of `length` slots. One value serves as all, since nothing is written to inputs."""
    shape = (batch_size, spec.num_key_value_heads, length, spec.head_dim)
    zeros = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.dtype(spec.dtype)))
    return {f"past_key_values.{n}.{kind}": zeros for n in range(spec.num_layers) for kind in ("key", "value")}


def _one_line(error: Exception) -> str:
    return str(error).strip().replace("\n", " ")[:300]
