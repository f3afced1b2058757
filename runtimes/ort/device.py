"""The runner of the shared-cache graph on a GPU, through onnxruntime; see `SharedRunner` for the graph's tensors.

The KV buffer lies in device memory and has the whole context of every row from the start, so that it never moves while
rows come and go: it is reallocated only where there are more rows than ever before, and then copied on the device.

A decode step moves token ids, a mask and the logits (or the candidates) and nothing else: its inputs and outputs are
tensors on the device, at fixed addresses, updated in place. On CUDA each number of rows is captured as a CUDA graph of
its own, under an id of its own; every other call runs uncaptured. What onnxruntime demands of a captured call
(docs/execution-providers/CUDA-ExecutionProvider.md, "Using CUDA Graphs"): IO binding, the same shapes and addresses at
every replay, no node that computes tensors on the host. total_sequence_length, which the host reads, is the mask's
length, so the mask of a decode step has the length of the buffer.

Where the graph takes LoRA adapters, each number of rows is captured for each adapter that they all have; a step of rows
with different ones is not captured, and runs in parts as on the host.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort  # type: ignore[import-untyped]

from runtimes.dtypes import find_dtype
from runtimes.errors import ContextLengthError, InputError, UsageError
from runtimes.manifest import EMBEDDINGS, KVCacheSpec, ModelSpec, Variant
from runtimes.one_thread import one_thread
from runtimes.ort.adapters import Adapters
from runtimes.ort.devices import GpuMemory, Shapes
from runtimes.ort.shared import SharedRunner, attention_mask
from runtimes.runners.runner import Ids
from runtimes.runners.slots import DEFAULT_SLOTS

PREFILL_CHUNK = 2048
"""tokens of one sequence per call"""

MAX_COMPILED_ROWS = 16
"""rows at most where the device compiles for some shapes"""

_BATCHED_LOGITS = 512  # as in SharedRunner; a GPU has more room
_GRAPH_ID = "gpu_graph_id"  # of a run: the captured graph to make or replay
_NO_CAPTURE = "-1"
_INT64 = np.dtype(np.int64)


@dataclass(frozen=True)
class _DecodeStep:
    """What a decode step of so many rows reads and writes, on the device; its binding and its CUDA graph hold these."""

    input_ids: Any
    """OrtValue, int64 [B, 1]"""
    attention_mask: Any
    """OrtValue, int64 [B, C]"""
    outputs: dict[str, Any]
    """name -> OrtValue [B, 1, ...]"""
    host: tuple[Any, ...]
    """what else is bound, kept alive"""
    binding: Any
    options: ort.RunOptions


def compiled_shapes(spec: KVCacheSpec, vectors: int | None = None) -> Shapes:
    """Return for which shapes the graph is compiled, where a device does that; one row's decode step is the usual.

    Args:
        spec: the KV cache.
        vectors: size of those that a graph may take in the place of tokens.
    """
    capacity = spec.max_cache_length
    chunk, cache = min(PREFILL_CHUNK, capacity), (spec.num_key_value_heads, capacity, spec.stored_head_dim)
    caches = [f"past_key_values.{layer}.{kind}" for layer in range(spec.num_layers) for kind in ("key", "value")]
    return {
        "input_ids": ((1, 1), (1, 1), (MAX_COMPILED_ROWS, chunk)),
        "attention_mask": ((1, 1), (1, capacity), (MAX_COMPILED_ROWS, capacity)),
        "num_logits_to_keep": ((0,), (1,), (chunk,)),
        **({} if vectors is None else {EMBEDDINGS: ((1, 1, vectors),) * 2 + ((MAX_COMPILED_ROWS, chunk, vectors),)}),
        **dict.fromkeys(caches, ((1, *cache), (1, *cache), (MAX_COMPILED_ROWS, *cache))),
    }


class DeviceRunner(SharedRunner):
    """The shared-cache graph on a GPU; implements `runtimes.runners.runner.Runner`."""

    prefill_chunk = PREFILL_CHUNK
    batched_logits = _BATCHED_LOGITS
    _copies_rows = False  # onnxruntime copies no part of a row on a device; a row's prefix is computed once more

    def __init__(
        self,
        session: ort.InferenceSession,
        variant: Variant,
        model: ModelSpec,
        memory: GpuMemory,
        *,
        capture: bool,
        max_rows: int | None = None,
        max_slots: int = DEFAULT_SLOTS,
        adapters: Adapters | None = None,
    ) -> None:
        """Args:
        session: on the device.
        variant, model: the manifest's.
        memory: of the device.
        capture: make CUDA graphs of decode steps; the session was opened for it.
        max_rows: for which the session was compiled; None: any number.
        max_slots: sequences at once.
        adapters: in the device's memory; None: none.
        """
        self._device = DeviceBuffer(variant.kv_cache, memory, session, max_rows)
        super().__init__(session, None, variant, model, max_slots, buffer=self._device, adapters=adapters)
        self._memory = memory
        self._graph_ids = itertools.count(1) if capture else None
        self._run_options = _run_options(_NO_CAPTURE if capture else None)
        self._steps: dict[tuple[int, str | None], _DecodeStep] = {}  # by rows, and the adapter of all of them
        self._steps_of = -1  # the buffer's version they are bound to

    @one_thread
    def close(self) -> None:
        self._steps.clear()  # before the memory they are bound to
        super().close()

    def _reserve(self, rows: int) -> None:
        if self._device.rows:  # not a copy for each slot that is taken
            rows = max(rows, min(1 << (rows - 1).bit_length(), self.max_slots))
        super()._reserve(rows)

    def _step(self, ids: Ids, starts: Ids, wanted: Sequence[str]) -> list[npt.NDArray[Any]]:
        if self._decode_session is None:
            raise UsageError("the runner is closed; open another")
        self._reserve(max(len(ids), len(self._tokens)))
        if self._steps_of != self._device.version:
            self._steps.clear()
            self._steps_of = self._device.version
        if len(self._by_adapter(0, len(ids))) > 1:
            return super()._step(ids, starts, wanted)
        key = len(ids), self._adapters.get(0)
        if key not in self._steps:
            self._steps[key] = self._new_step(self._decode_session, len(ids))
        step = self._steps[key]
        step.input_ids.update_inplace(np.ascontiguousarray(ids))
        step.attention_mask.update_inplace(attention_mask(starts + 1, self.max_cache_length))
        self._run_bound(self._decode_session, step.binding, step.options)
        found = [step.outputs[name].numpy() for name in wanted]
        return [array if array.ndim == 2 else array[:, 0] for array in found]

    def _new_step(self, session: ort.InferenceSession, rows: int) -> _DecodeStep:
        """Allocate and bind a step of so many rows; the first run of its id captures it."""
        input_ids = self._memory.allocate((rows, 1), _INT64)
        mask = self._memory.allocate((rows, self.max_cache_length), _INT64)
        names = (self._logits, *self._candidates)
        outputs = {
            name: self._memory.allocate(array.shape, array.dtype)
            for name, array in self._outputs(rows, 1, 1, names).items()
        }
        keep = np.array(1, np.int64)
        count = ort.OrtValue.ortvalue_from_numpy(keep)  # read on the host, when the graph is captured
        binding = self._device.new_binding(session, 0, rows)
        binding.bind_ortvalue_input("input_ids", input_ids)
        binding.bind_ortvalue_input("attention_mask", mask)
        if self._counts:
            binding.bind_ortvalue_input("num_logits_to_keep", count)
        if self.adapters and self._lora is not None:
            self._lora.bind(binding, self._adapters.get(0))
        for name, value in outputs.items():
            binding.bind_ortvalue_output(name, value)
        graph_id = None if self._graph_ids is None else str(next(self._graph_ids))
        return _DecodeStep(input_ids, mask, outputs, (keep, count), binding, _run_options(graph_id))


class DeviceBuffer:
    """Keys and values of some rows in device memory, [rows, kv_heads, max_cache_length, head_dim] each, zero at first.

    Finite from the start, as what is masked may be multiplied, too. The host knows them as unsigned integers of the
    same size, since numpy has no bfloat16, and binds them by address with the type they have.
    """

    def __init__(
        self, spec: KVCacheSpec, memory: GpuMemory, session: ort.InferenceSession, max_rows: int | None = None
    ) -> None:
        """Args:
        spec: the KV cache.
        memory: of the device.
        session: any whose outputs are the caches.
        max_rows: for which it was compiled; None: any number.
        """
        self._spec = spec
        self._memory = memory
        self._session: ort.InferenceSession | None = session
        self._max_rows = max_rows
        self._names = [f"{layer}.{kind}" for layer in range(spec.num_layers) for kind in ("key", "value")]
        self._values: dict[str, Any] = {}
        self._bindings: dict[tuple[int, int, tuple[str, ...]], Any] = {}
        self.rows = 0
        self.version = 0
        """grows whenever the memory moves"""

    @property
    def _row_shape(self) -> tuple[int, int, int]:
        return (self._spec.num_key_value_heads, self._spec.max_cache_length, self._spec.stored_head_dim)

    def reserve(self, rows: int, held: Sequence[int]) -> None:  # noqa: ARG002  # all of it is kept
        """Make room for so many rows, keeping what the rows have.

        Raises:
            InputError: more than the session was compiled for.
            ContextLengthError: the device's memory does not hold them.
            UsageError: it is closed.
        """
        if rows <= self.rows:
            return
        if self._session is None:
            raise UsageError("the runner is closed; open another")
        if self._max_rows is not None and rows > self._max_rows:
            raise InputError(f"{rows} rows; this device takes {self._max_rows}, device cuda any number")
        self._bindings.clear()
        stored = find_dtype(self._spec.dtype)
        dtype = stored.raw  # the host does not compute with it
        try:
            grown = {name: self._memory.allocate((rows, *self._row_shape), dtype) for name in self._names}
        except RuntimeError as error:
            size = len(self._names) * rows * int(np.prod(self._row_shape)) * stored.size
            raise ContextLengthError(
                f"a KV cache of {rows} rows of {self._spec.max_cache_length} tokens needs {size:,} bytes of the GPU's "
                "memory; use fewer rows"
            ) from error
        zeros = np.zeros((rows - self.rows, *self._row_shape), dtype)
        for name, value in grown.items():
            self._part(self._session, value, self.rows, rows).update_inplace(zeros)
            if self.rows:
                self._part(self._session, value, 0, self.rows).update_inplace(self._values[name])
        self._values = grown
        self.rows = rows
        self.version += 1

    def _part(self, session: ort.InferenceSession, value: Any, start: int, stop: int) -> Any:
        """Return rows start to stop of a tensor as an OrtValue of their own, in the same memory.

        onnxruntime makes one of an address only where it binds it, to an output of any name.
        """
        dtype = find_dtype(self._spec.dtype).raw
        shape = [stop - start, *self._row_shape]
        address = value.data_ptr() + start * int(np.prod(self._row_shape)) * dtype.itemsize
        binding = session.io_binding()
        name = f"present.{self._names[0]}"
        binding.bind_output(name, self._memory.kind, self._memory.index, dtype, shape, address)
        return binding.get_outputs()[0]

    def binding(self, session: ort.InferenceSession, start: int, stop: int, outputs: Sequence[str]) -> Any:
        """Return the binding of rows start to stop as past and present; kept."""
        key = (start, stop, tuple(outputs))
        if key not in self._bindings:
            self._bindings[key] = self.new_binding(session, start, stop)
        return self._bindings[key]

    def new_binding(self, session: ort.InferenceSession, start: int, stop: int) -> Any:
        """Return a binding of rows start to stop as past and present, both at one address."""
        binding = session.io_binding()
        shape = [stop - start, *self._row_shape]
        stored = find_dtype(self._spec.dtype)
        offset = start * int(np.prod(self._row_shape)) * stored.size
        for name, value in self._values.items():
            address = value.data_ptr() + offset
            binding.bind_input(
                f"past_key_values.{name}", self._memory.kind, self._memory.index, stored.onnx, shape, address
            )
            binding.bind_output(f"present.{name}", self._memory.kind, self._memory.index, stored.onnx, shape, address)
        return binding

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copy the first tokens of a row to another; through the host, as this is for proof."""
        for value in self._values.values():
            content = value.numpy()
            content[target, :, :length] = content[source, :, :length]
            value.update_inplace(content)

    def clear(self, row: int, start: int) -> None:
        """Set a row's keys and values to zero from one position on; through the host, as this is for errors."""
        for value in self._values.values():
            content = value.numpy()
            content[row : row + 1, :, start:] = 0
            value.update_inplace(content)

    def close(self) -> None:
        """Free the memory."""
        self._session = None
        self._bindings.clear()
        self._values.clear()
        self.rows = 0
        self.version += 1


def _run_options(graph_id: str | None) -> ort.RunOptions | None:
    if graph_id is None:
        return None
    options = ort.RunOptions()
    options.add_run_config_entry(_GRAPH_ID, graph_id)
    return options
