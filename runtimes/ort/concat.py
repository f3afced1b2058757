"""Runners on onnxruntime, one per form of KV cache; see `ConcatRunner` for the portable graph.

Its KV cache stays in onnxruntime's memory: the present values of one call are bound as the past of the next. Which
outputs these are, the manifest says by their role; others than them and the logits are not asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped]

from runtimes.errors import BackendError, FailedError, PackageError, UsageError
from runtimes.manifest import KVCacheSpec, ModelSpec, Variant
from runtimes.one_thread import OneThread, one_thread
from runtimes.ort.device import MAX_COMPILED_ROWS, DeviceRunner, compiled_shapes
from runtimes.ort.devices import find_device
from runtimes.ort.session import one_line, open_session
from runtimes.ort.shared import SharedRunner
from runtimes.ort.static_session import OrtStaticSession
from runtimes.ort.versions import check_padded_rows, new_enough, without_too_new
from runtimes.package import Package
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
from runtimes.runners.static import StaticRunner
from runtimes.targets import engine_backend_words, find_target, ort_targets, runnable, runs

PREFILL_CHUNK = 512
"""tokens of a row per call of a concat graph"""

FileCheck: TypeAlias = Callable[[Sequence[str]], None]
"""gets paths in the package; raises IntegrityError"""

Values: TypeAlias = dict[str, Any]
"""name of a past_key_values input -> its OrtValue"""

logger = logging.getLogger(__name__)

_NOTHING: Ids = np.zeros(0, np.int64)


@dataclass(frozen=True)
class ConcatCache:
    """The cache between two calls of the graph; never changed, each call makes the next one."""

    tokens: tuple[Ids, ...]
    """per row, the ids of the tokens in it"""
    values: Values
    mask: Ids
    """[B, slots]: 1 where the slot holds a token, 0 where padding was put or a token was dropped"""

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(len(row) for row in self.tokens)


class ConcatRunner:
    """The portable graph: present = past + new tokens; implements `runtimes.runners.runner.Runner`.

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

    Prompts are computed in pieces of `prefill_chunk` tokens, since the attention weights of a call take heads x
    sequence_length x total_sequence_length numbers; where all positions are asked for, in one.

    A new cache is computed and the old one left untouched, so that a call that fails changes nothing.
    """

    prefill_chunk = PREFILL_CHUNK

    def __init__(self, session: ort.InferenceSession, variant: Variant, model: ModelSpec) -> None:
        self.variant = variant
        self.model = model
        self.max_cache_length = variant.kv_cache.max_cache_length
        self.top_k = 0
        self.exclusive = OneThread()
        self._session: ort.InferenceSession | None = session
        self._logits = variant.name_of("logits")
        self._pasts = list(variant.caches)
        self._outputs = [self._logits, *variant.caches.values()]
        self._cache: ConcatCache | None = None

    @property
    def cache_lengths(self) -> tuple[int, ...]:
        return () if self._cache is None else self._cache.lengths

    @property
    def cached_tokens(self) -> tuple[Ids, ...]:
        return () if self._cache is None else self._cache.tokens

    @one_thread
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

    @one_thread
    def decode(self, token_ids: TokenIds) -> Logits:
        return np.concatenate(self.prefill(check_token_ids(token_ids, self.cache_lengths)))

    @one_thread
    def decode_top(self, token_ids: TokenIds) -> tuple[Ids, Logits]:  # noqa: ARG002
        raise no_candidates(self.variant)

    @one_thread
    def decode_block(self, token_ids: TokenIds) -> Logits:
        return self.prefill([token_ids], all_positions=True)[0]

    @one_thread
    def truncate(self, lengths: Sequence[int]) -> None:
        kept = check_lengths(lengths, self.cache_lengths)
        if self._cache is not None and kept != self._cache.lengths:
            self._cache = self._shortened(self._cache, kept)

    @one_thread
    def reset(self) -> None:
        self._cache = None

    @one_thread
    def close(self) -> None:
        self._cache = self._session = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _empty_cache(self, batch_size: int) -> ConcatCache:
        return ConcatCache(
            tokens=(_NOTHING,) * batch_size,
            values=dict.fromkeys(self._pasts, _zeros(self.variant.kv_cache, batch_size, length=0)),
            mask=np.zeros((batch_size, 0), np.int64),
        )

    def _extend(self, cache: ConcatCache, rows: list[Ids], all_positions: bool) -> tuple[list[Logits], ConcatCache]:
        """Return the logits of `rows` appended to `cache`, and the cache that holds them."""
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
        for start in range(0, width, width if all_positions else self.prefill_chunk):
            stop = width if all_positions else min(width, start + self.prefill_chunk)
            feeds = {
                "input_ids": np.ascontiguousarray(ids[:, start:stop]),
                "attention_mask": np.ascontiguousarray(mask[:, : past + stop]),
                "position_ids": np.ascontiguousarray(positions[:, start:stop]),
                "num_logits_to_keep": np.array(0 if all_positions else 1, np.int64),
            }
            logits, values = self._call(feeds, values)  # (B, S or 1, V)
        wanted = [len(row) if all_positions else 1 for row in rows]
        return [logits[b, -n:] for b, n in enumerate(wanted)], ConcatCache(_joined(cache.tokens, rows), values, mask)

    def _shortened(self, cache: ConcatCache, lengths: tuple[int, ...]) -> ConcatCache:
        """Return the cache with only the first tokens of each row; `lengths` was checked."""
        kept = np.array(lengths, np.int64)[:, None]
        mask = np.where(cache.mask.cumsum(axis=1) <= kept, cache.mask, 0)  # (B, P)
        slots = int(np.flatnonzero(mask.any(axis=0)).max(initial=-1)) + 1  # all after are hidden in every row
        values = cache.values if slots == mask.shape[1] else _first_slots(cache.values, slots)
        return ConcatCache(_cut(cache.tokens, lengths), values, mask[:, :slots])

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
        logits, *present = binding.get_outputs()
        return logits.numpy(), dict(zip(self._pasts, present, strict=True))


def default_variant(package: Package, device: str) -> str | None:
    """Return the variant that a device runs where none is named: the fastest that is verified, of those that it runs.

    Variants that were made for the device go before others; what parity.json says passed, before what it does not
    know, and that before what it says failed.

    Args:
        package: which.
        device: cpu, cuda or nv-rtx.

    Raises:
        BackendError: a GPU, and no variant for it.
    """
    target, manifest = find_target("ort", device), package.manifest
    able = runnable(package, target)
    if not able and not target.takes_others:
        raise BackendError(
            f"device {device}: the package has {', '.join(manifest.variants)}; "
            f"export it with --variant {target.variants[0]}"
        )
    able = able or list(manifest.variants)  # opening it says why not
    able = [name for name in able if new_enough(manifest.variants[name], ort.__version__)] or able
    passed = package.verdicts
    ranked = sorted(able, key=lambda name: {True: 0, None: 1, False: 2}[passed.get(name)])  # stable: the fastest first
    for name in able[: able.index(ranked[0])] if ranked else ():
        said = "not verified yet" if passed.get(name) is None else "failed when it was verified"
        logger.info("variant %s: %s; %s is taken", name, said, ranked[0])
    if ranked and passed.get(ranked[0]) is False:
        logger.warning("variant %s failed when it was verified, and there is no other", ranked[0])
    return ranked[0] if ranked else None


def open_ort(
    package: Path,
    variant: Variant,
    model: ModelSpec,
    threads: int | None,
    check: FileCheck | None = None,
    device: str = "cpu",
) -> ConcatRunner | StaticRunner | SharedRunner:
    """Load a variant's graph, or two, on one device.

    A prefill graph is loaded in the background; the first step that is meant for it waits until it is there, and raises
    what is wrong with it.

    Args:
        package: the package folder; the caller has checked presence and size of the variant's files.
        variant: which.
        model: the manifest's.
        threads: of an operator on the CPU; None leaves it to onnxruntime.
        check: compares files of the package with the manifest; called with the graph before it is opened, and with its
            data while it is loaded. None: nothing is checked.
        device: cpu, cuda or nv-rtx.

    Raises:
        IntegrityError: a file is not the one that was exported.
        PackageError: onnxruntime cannot load the graph, or it has other inputs and outputs than the manifest says.
        BackendError: the device, its provider or its libraries are not there, it does not run this variant, or
            onnxruntime is too old for it.
    """
    spec, target = variant.kv_cache, find_target("ort", device)
    known = dict.fromkeys(form for other in ort_targets() for form in other.caches)
    if spec.form not in known:
        raise PackageError(f"variant {variant.name}: KV cache form {spec.form!r}, this version runs {', '.join(known)}")
    if spec.form == "static" and variant.quantization is not None:
        raise BackendError(
            f"variant {variant.name}: onnxruntime has no kernel that dequantises to {spec.dtype}; run an engine of it "
            f"with {engine_backend_words()}"
        )
    if not runs(variant, target):
        others = [other.device for other in ort_targets() if runs(variant, other)]
        raise BackendError(
            f"variant {variant.name}: a {spec.dtype} KV cache does not run on device {device}; "
            f"it runs on {', '.join(others) or 'none'}, and {', '.join(target.variants)} are made for {device}"
        )
    variant = without_too_new(variant, ort.__version__, device)
    found = find_device(device)
    capture = device == "cuda" and spec.form == "shared"
    shapes = compiled_shapes(spec) if device == "nv-rtx" else None

    def load(graph: str, data: Sequence[str]) -> ort.InferenceSession:
        def opened() -> ort.InferenceSession:
            return open_session(package / graph, variant, threads, device=found, capture=capture, shapes=shapes)

        return _load_checked(opened, graph, data, check)

    session = load(variant.graph, variant.data)
    match spec.form:
        case "concat":
            return ConcatRunner(session, variant, model)
        case "static":
            return StaticRunner(OrtStaticSession(session, variant, memory=found.memory), variant, model)
        case _ if found.memory is not None:
            rows = MAX_COMPILED_ROWS if shapes else None
            return DeviceRunner(session, variant, model, found.memory, capture=capture, max_rows=rows)
        case _:
            prefill: Future[ort.InferenceSession] | None = None
            if variant.prefill is not None:
                pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefill-graph")
                prefill = pool.submit(load, variant.prefill.graph, variant.prefill.data)
                pool.shutdown(wait=False)
            return SharedRunner(session, prefill, variant, model)


def _load_checked(
    load: Callable[[], ort.InferenceSession], graph: str, data: Sequence[str], check: FileCheck | None
) -> ort.InferenceSession:
    """Load a graph while its data is checked; what the check finds goes before what onnxruntime says."""
    if check is None:
        return load()
    check([graph])
    with ThreadPoolExecutor(max_workers=1) as pool:
        pending = pool.submit(check, data)
        try:
            return load()
        finally:
            pending.result()


def _zeros(spec: KVCacheSpec, batch_size: int, length: int) -> ort.OrtValue:
    """Return an empty past of `length` slots; it serves as all of them, since nothing is written to inputs."""
    shape = (batch_size, spec.num_key_value_heads, length, spec.head_dim)
    return ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.dtype(spec.dtype)))


def _first_slots(values: Values, slots: int) -> Values:
    return {
        name: ort.OrtValue.ortvalue_from_numpy(value.numpy()[:, :, :slots].copy()) for name, value in values.items()
    }


def _joined(tokens: Sequence[Ids], rows: Sequence[Ids]) -> tuple[Ids, ...]:
    return tuple(np.concatenate([old, new]) for old, new in zip(tokens, rows, strict=True))


def _cut(tokens: Sequence[Ids], lengths: Sequence[int]) -> tuple[Ids, ...]:
    return tuple(row[:length] for row, length in zip(tokens, lengths, strict=True))
