"""The static-cache graph on onnxruntime's CPU or CUDA provider, with its KV cache written in place.

Past and present are bound to one buffer. TensorScatter then writes the new positions alone, where it otherwise copies
the whole cache (seen with onnxruntime 1.31 on a CPU: 0.007 instead of 2.4 ms for 32 MB).

On CUDA the cache lies in device memory and everything else is copied from and to the host at each call. That is for
proof, not for speed: nothing is captured, as shapes that the attention's mask needs are computed on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort  # type: ignore[import-untyped]

from runtimes.errors import ContextLengthError, FailedError, InputError, ResourceError, UsageError
from runtimes.manifest import KVCacheSpec, Variant
from runtimes.ort.device import DeviceBuffer
from runtimes.ort.devices import GpuMemory
from runtimes.ort.session import one_line
from runtimes.runners.runner import Ids

PREFILL_CHUNK = 512
"""tokens of a row per call; attention holds a score for each of them and each position of the cache"""


class OrtStaticSession:
    """Implements `runtimes.runners.static.StaticSession`."""

    def __init__(
        self,
        session: ort.InferenceSession,
        variant: Variant,
        *,
        memory: GpuMemory | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
        max_batch_size: int | None = None,
    ) -> None:
        """Take over a session.

        Args:
            session: of the variant's graph.
            variant: says what its cache is.
            memory: of the session's device, for the cache; None: the host's.
            prefill_chunk: tokens per row that one call takes at most.
            max_batch_size: rows at most; None: as many as memory holds.
        """
        self.prefill_chunk = min(prefill_chunk, variant.kv_cache.max_cache_length)
        self._session: ort.InferenceSession | None = session
        self._variant = variant
        self._max_batch_size = max_batch_size
        spec = variant.kv_cache
        self._buffer = _HostBuffer(spec) if memory is None else DeviceBuffer(spec, memory, session)

    def reserve(self, rows: int) -> None:
        if self._max_batch_size is not None and rows > self._max_batch_size:
            raise InputError(f"{rows} rows, this session takes {self._max_batch_size}")
        held, capacity = self._buffer.rows, self._variant.kv_cache.max_cache_length
        if rows <= held:
            return
        rows = 1 << (rows - 1).bit_length() if held else rows  # not a copy for each that comes
        try:
            self._buffer.reserve(rows, [capacity] * held)
        except ContextLengthError as error:
            raise ResourceError(str(error)) from error

    def run(
        self,
        first_row: int,
        input_ids: Ids,
        write_indices: Ids,
        logit_index: Ids,
        wanted: Sequence[str],
        vectors: npt.NDArray[np.float32] | None = None,
    ) -> list[npt.NDArray[Any]]:
        if self._session is None:
            raise UsageError("the runner is closed; open another")
        batch, tokens = input_ids.shape
        sizes = {"batch_size": batch, "sequence_length": tokens}
        # For these outputs alone: one that is bound to an array that is gone would be written there.
        binding = self._buffer.binding(self._session, first_row, first_row + batch, wanted)
        inputs: dict[str, npt.NDArray[Any]] = {
            "input_ids": np.ascontiguousarray(input_ids),
            "write_indices": np.ascontiguousarray(write_indices),
            "logit_index": np.ascontiguousarray(logit_index[:, None]),
        }
        for spec in self._variant.inputs:
            if spec.role == "embeddings":
                shape = (batch, tokens, int(spec.shape[2]))
                inputs[spec.name] = np.zeros(shape, np.float32) if vectors is None else vectors
        outputs: dict[str, npt.NDArray[Any]] = {}
        for name in wanted:
            spec = self._variant.results[name]
            outputs[name] = np.empty([sizes[d] if isinstance(d, str) else d for d in spec.shape], spec.dtype)
        for name, array in inputs.items():  # used in place, so they must live until the run is over; here they do
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        for name, array in outputs.items():
            binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(array))
        try:
            self._session.run_with_iobinding(binding)
        except RuntimeError as error:
            raise FailedError(f"onnxruntime failed in {self._variant.graph}: {one_line(error)}") from error
        return [outputs[name] for name in wanted]

    def clear(self, row: int, start: int) -> None:
        self._buffer.clear(row, start)

    def copy_row(self, source: int, target: int, length: int) -> None:
        self._buffer.copy_row(source, target, length)

    def close(self) -> None:
        self._session = None
        self._buffer.close()


class _HostBuffer:
    """Keys and values of some rows in host memory, [rows, kv_heads, max_cache_length, head_dim] each, zero at first."""

    def __init__(self, spec: KVCacheSpec) -> None:
        self._spec = spec
        names = [f"{layer}.{kind}" for layer in range(spec.num_layers) for kind in ("key", "value")]
        self._caches = dict.fromkeys(names, self._zeros(0))
        self._bindings: dict[tuple[int, int, tuple[str, ...]], Any] = {}

    @property
    def rows(self) -> int:
        return len(self._caches["0.key"])

    def reserve(self, rows: int, held: Sequence[int]) -> None:  # noqa: ARG002  # all of it is kept
        """Make room for so many rows, keeping what the rows have.

        Raises:
            ContextLengthError: memory for them is not to be had.
        """
        try:
            grown = {name: self._zeros(rows) for name in self._caches}
        except MemoryError as error:
            size = rows * len(self._caches) * self._zeros(1).nbytes
            raise ContextLengthError(
                f"a KV cache of {rows} rows needs {size:,} bytes of memory; use fewer rows"
            ) from error
        for name, array in grown.items():
            array[: self.rows] = self._caches[name]
        self._caches = grown
        self._bindings.clear()

    def binding(self, session: ort.InferenceSession, start: int, stop: int, outputs: Sequence[str]) -> Any:
        """Return the binding of rows start to stop as past and present; kept, as making it costs as much as a layer."""
        key = (start, stop, tuple(outputs))
        if key not in self._bindings:
            self._bindings[key] = binding = session.io_binding()
            for name, array in self._caches.items():
                value = ort.OrtValue.ortvalue_from_numpy(array[start:stop])
                binding.bind_ortvalue_input(f"past_key_values.{name}", value)
                binding.bind_ortvalue_output(f"present.{name}", value)
        return self._bindings[key]

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copy the first tokens of a row to another."""
        for array in self._caches.values():
            array[target, :, :length] = array[source, :, :length]

    def clear(self, row: int, start: int) -> None:
        """Set a row's keys and values to zero from one position on."""
        for array in self._caches.values():
            array[row : row + 1, :, start:] = 0

    def close(self) -> None:
        """Free the memory."""
        self._caches = dict.fromkeys(self._caches, self._zeros(0))
        self._bindings.clear()

    def _zeros(self, rows: int) -> npt.NDArray[Any]:
        spec = self._spec
        shape = (rows, spec.num_key_value_heads, spec.max_cache_length, spec.head_dim)
        return np.zeros(shape, np.dtype(spec.dtype))
