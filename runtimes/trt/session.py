"""An engine of either TensorRT, computing: execution contexts, the memory they read and write, CUDA graphs.

One context per phase, as each has an optimization profile of its own. With full TensorRT a context for decoding has one
batch size and one CUDA graph, recorded at its second step: what a context prepares for its shapes belongs to the graph.
TensorRT for RTX records by itself. The contexts share their activation memory, since they never run at once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

import runtimes.trt.cuda as cuda
from runtimes.dtypes import find_dtype
from runtimes.errors import FailedError, InputError, UsageError
from runtimes.manifest import Engine, KVCacheSpec, TensorSpec, Variant
from runtimes.runners.runner import Ids
from runtimes.trt.jit_cache import JitCache
from runtimes.trt.nvidia import TensorRT, captures_itself, create_context, create_runtime_cache, said

logger = logging.getLogger(__name__)


class _Resource(Protocol):
    def close(self) -> None: ...


_R = TypeVar("_R", bound=_Resource)


@dataclass(frozen=True)
class Sizes:
    """Where everything is that an engine reads and writes, in bytes."""

    inputs: dict[str, int]
    """name -> offset in the memory of the inputs"""
    inputs_size: int
    outputs: dict[str, int]
    outputs_size: int
    caches: dict[str, int]
    """`N.key` and `N.value` -> offset in the memory of the KV cache"""
    caches_size: int
    cache_row: int
    """bytes of one row in one of them"""


_ORDER = {"token_ids": 1, "logits": 1, "embeddings": 2, "hidden_state": 2}
"""of what has no fixed size"""


def plan_memory(engine: Engine, variant: Variant) -> Sizes:
    """Place the inputs and outputs of an engine one after the other."""
    batch, spec = engine.max_batch_size, variant.kv_cache
    offsets: dict[str, dict[str, int]] = {"inputs": {}, "outputs": {}}
    ends = {}
    for kind, tensors in (("inputs", variant.inputs), ("outputs", variant.outputs)):
        end = 0
        # Those of a fixed size first, so that what a call copies is one piece.
        for tensor in sorted(_flat(tensors), key=lambda t: (_ORDER.get(t.role, 0), t.name)):
            sizes = {"batch_size": batch, "sequence_length": engine.prefill_chunk}
            count = prod(sizes[d] if isinstance(d, str) else d for d in tensor.shape)
            offsets[kind][tensor.name] = end
            end += _aligned(count * find_dtype(tensor.dtype).size)
        ends[kind] = end
    row = spec.num_key_value_heads * spec.max_cache_length * spec.head_dim * find_dtype(spec.dtype).size
    names = [f"{layer}.{kind}" for layer in range(spec.num_layers) for kind in ("key", "value")]
    step = _aligned(batch * row)
    return Sizes(
        inputs=offsets["inputs"],
        inputs_size=ends["inputs"],
        outputs=offsets["outputs"],
        outputs_size=ends["outputs"],
        caches={name: n * step for n, name in enumerate(names)},
        caches_size=len(names) * step,
        cache_row=row,
    )


def _flat(tensors: Iterable[TensorSpec]) -> list[TensorSpec]:
    """Return those that are not part of the KV cache."""
    return [t for t in tensors if t.role not in ("past", "present")]


def _aligned(size: int) -> int:
    return -(-size // cuda.ALIGNMENT) * cuda.ALIGNMENT


class _Context:
    """An IExecutionContext on one optimization profile, and what it was last told."""

    def __init__(self, context: Any, tensorrt: TensorRT, profile: int, stream: cuda.Stream) -> None:
        self.graph: cuda.Graph | None = None
        self.bound: tuple[int, int, int] | None = None
        """first row, rows and tokens of the call that it has the shapes and addresses of"""
        self.runs = 0
        """since these changed"""
        self._context = context
        self._tensorrt = tensorrt
        self._stream = stream
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._check(context.set_optimization_profile_async(profile, stream.handle), f"optimization profile {profile}")
        stream.synchronize()

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        if self._shapes.get(name) != shape:
            self._check(self._context.set_input_shape(name, shape), f"shape {shape} of {name}")
            self._shapes[name] = shape
            self.runs = 0

    def set_address(self, name: str, address: int) -> None:
        if self._addresses.get(name) != address:
            self._check(self._context.set_tensor_address(name, address), f"the memory of {name}")
            self._addresses[name] = address
            self.runs = 0

    def execute(self) -> None:
        """Give the work to the stream."""
        if not self._context.execute_async_v3(self._stream.handle):
            texts = said(self._tensorrt.messages)
            raise FailedError(f"TensorRT {self._tensorrt.version} failed to run the engine: {texts}")
        self.runs += 1

    def _check(self, accepted: bool, what: str) -> None:
        if not accepted:
            raise FailedError(
                f"TensorRT {self._tensorrt.version} refused {what}: {said(self._tensorrt.messages)}; build the engine "
                "again"
            )


class TrtSession:
    """Implements `runtimes.runners.static.StaticSession` with an engine."""

    def __init__(
        self, tensorrt: TensorRT, runtime: Any, engine: Any, entry: Engine, variant: Variant, jit_cache: JitCache
    ) -> None:
        """Allocate the memory and make the contexts.

        Args:
            tensorrt: the library.
            runtime: IRuntime, kept alive as long as the engine.
            engine: ICudaEngine; the caller has compared it with `entry`.
            entry: the manifest's.
            variant: the graph it was compiled from.
            jit_cache: keeps what TensorRT for RTX compiles for this GPU.

        Raises:
            ResourceError: the GPU's memory does not hold it.
            FailedError: TensorRT or CUDA failed.
        """
        self.prefill_chunk = entry.prefill_chunk
        self._jit_cache = jit_cache
        self._tensorrt = tensorrt
        self._runtime, self._engine = runtime, engine
        self._entry = entry
        self._spec: KVCacheSpec = variant.kv_cache
        self._outputs = {t.name: t for t in _flat(variant.outputs)}
        self._embeds = next((t for t in variant.inputs if t.role == "embeddings"), None)
        self._sizes = sizes = plan_memory(entry, variant)
        self._activation_size = int(engine.device_memory_size_v2)
        self._prefill: _Context | None = None
        self._decode: dict[int, _Context] = {}
        self._records = True
        self._resources: list[_Resource] = []
        self._runtime_cache: Any = None
        try:
            self._stream = self._owned(cuda.Stream())
            self._caches = self._owned(cuda.DeviceBuffer(sizes.caches_size, "the KV cache"))
            self._activations = self._owned(cuda.DeviceBuffer(self._activation_size, "activations"))
            self._inputs = self._owned(cuda.DeviceBuffer(sizes.inputs_size, "inputs"))
            self._results = self._owned(cuda.DeviceBuffer(sizes.outputs_size, "outputs"))
            self._host_inputs = self._owned(cuda.PinnedBuffer(sizes.inputs_size))
            self._host_results = self._owned(cuda.PinnedBuffer(sizes.outputs_size))
            self._runtime_cache = create_runtime_cache(tensorrt, engine, jit_cache.load())
            self._prefill = self._context("prefill")
            self._decode[self._decode_key(1)] = self._context("decode")  # compiled here, not at the first token
        except BaseException:
            self.close()
            raise

    def reserve(self, rows: int) -> None:
        most = self._entry.max_batch_size
        if rows > most:
            raise InputError(
                f"{rows} rows, but engine {self._entry.name} was built for batch <= {most}; "
                f"build it with --max-batch-size {rows}"
            )

    def run(
        self,
        first_row: int,
        input_ids: Ids,
        write_indices: Ids,
        logit_index: Ids,
        wanted: Sequence[str],
        vectors: npt.NDArray[np.float32] | None = None,
    ) -> list[npt.NDArray[Any]]:
        if self._engine is None:
            raise UsageError("the runner is closed; open another")
        batch, width = input_ids.shape
        self._check_shape(first_row, width)
        inputs: dict[str, npt.NDArray[Any]] = {
            "input_ids": input_ids,
            "write_indices": write_indices,
            "logit_index": logit_index[:, None],
        }
        if vectors is not None and self._embeds is not None:  # else what is there is not read
            inputs[self._embeds.name] = vectors
        try:
            with self._tensorrt.collected():
                context = self._chosen(first_row, batch, width)
                self._feed(inputs)
                self._compute(context)
            self._fetch(wanted, batch, width)
        finally:
            self._stream.synchronize()  # also where it failed: the next call may write the pinned memory
        return [self._result(name, batch, width) for name in wanted]

    def clear(self, row: int, start: int) -> None:
        spec = self._spec
        token = spec.head_dim * find_dtype(spec.dtype).size
        free = (spec.max_cache_length - start) * token
        for offset in self._sizes.caches.values() if free else ():
            self._caches.clear(
                offset + row * self._sizes.cache_row + start * token,
                pitch=spec.max_cache_length * token,
                width=free,
                height=spec.num_key_value_heads,
                stream=self._stream,
            )
        self._stream.synchronize()

    def copy_row(self, source: int, target: int, length: int) -> None:
        spec, row = self._spec, self._sizes.cache_row
        token = spec.head_dim * find_dtype(spec.dtype).size
        for offset in self._sizes.caches.values():
            self._caches.copy(
                offset + source * row,
                offset + target * row,
                pitch=spec.max_cache_length * token,
                width=length * token,
                height=spec.num_key_value_heads,
                stream=self._stream,
            )
        self._stream.synchronize()

    def close(self) -> None:
        for context in self._decode.values():
            if context.graph is not None:
                context.graph.close()
        self._decode.clear()
        self._prefill = None
        try:
            if self._engine is not None and self._runtime_cache is not None:
                self._jit_cache.save(bytes(self._runtime_cache.serialize()))
        finally:
            self._runtime_cache = self._engine = self._runtime = None  # in this order: the last outlives the others
            while self._resources:
                self._resources.pop().close()

    def _owned(self, resource: _R) -> _R:
        self._resources.append(resource)
        return resource

    def _context(self, phase: str) -> _Context:
        """Make a context for one phase, with everything bound that does not change from call to call."""
        context = create_context(self._tensorrt, self._engine, self._runtime_cache, cuda_graph=phase == "decode")
        context.set_device_memory(self._activations.address, self._activation_size)
        bound = _Context(context, self._tensorrt, list(self._entry.profiles).index(phase), self._stream)
        for name, offset in self._sizes.inputs.items():
            bound.set_address(name, self._inputs.address + offset)
        for name, offset in self._sizes.outputs.items():
            bound.set_address(name, self._results.address + offset)
        return bound

    def _check_shape(self, first_row: int, width: int) -> None:
        if width > self.prefill_chunk:
            raise InputError(
                f"{width} tokens in one call, but engine {self._entry.name} was built for {self.prefill_chunk}; "
                f"build it with --prefill-chunk {width}"
            )
        if first_row * self._sizes.cache_row % cuda.ALIGNMENT:
            raise UsageError(
                f"row {first_row} begins at no multiple of {cuda.ALIGNMENT} bytes, as a row of the KV cache has "
                f"{self._sizes.cache_row}; for slots build the engine with a --max-cache-length that is a multiple "
                "of 32"
            )

    def _chosen(self, first_row: int, batch: int, width: int) -> _Context:
        """Return the context for a call, with its shapes and addresses set."""
        if width == 1 and first_row == 0:
            key = self._decode_key(batch)
            if key not in self._decode:
                self._decode[key] = self._context("decode")
            context = self._decode[key]
        else:
            assert self._prefill is not None
            context = self._prefill
        call = (first_row, batch, width)
        if context.bound == call:
            return context
        spec, context.bound = self._spec, None
        for name, offset in self._sizes.caches.items():
            address = self._caches.address + offset + first_row * self._sizes.cache_row
            context.set_address(f"past_key_values.{name}", address)
            context.set_address(f"present.{name}", address)
            context.set_shape(
                f"past_key_values.{name}", (batch, spec.num_key_value_heads, spec.max_cache_length, spec.head_dim)
            )
        context.set_shape("input_ids", (batch, width))
        context.set_shape("write_indices", (batch,))
        context.set_shape("logit_index", (batch, 1))
        if self._embeds is not None:
            context.set_shape(self._embeds.name, (batch, width, int(self._embeds.shape[2])))
        context.bound = call
        return context

    def _decode_key(self, batch: int) -> int:
        """Return which context decodes so many rows: with full TensorRT one for each, as it has one CUDA graph."""
        return 0 if captures_itself(self._tensorrt) else batch

    def _feed(self, inputs: dict[str, npt.NDArray[Any]]) -> None:
        """Begin to copy the inputs to the GPU, in one piece."""
        end = 0
        for name, array in inputs.items():
            at = self._sizes.inputs[name]
            self._host_inputs.array[at : at + array.nbytes] = np.ascontiguousarray(array).view(np.uint8).ravel()
            end = max(end, at + array.nbytes)
        cuda.copy_to_device(self._inputs.address, self._host_inputs.address, end, self._stream)

    def _compute(self, context: _Context) -> None:
        if context is not self._prefill and not captures_itself(self._tensorrt) and context.runs > 0:
            if context.graph is None and self._records:
                context.graph = self._recorded(context)
            if context.graph is not None:
                context.graph.launch(self._stream)
                return
        context.execute()

    def _recorded(self, context: _Context) -> cuda.Graph | None:
        try:
            with cuda.captured(self._stream) as graphs:
                context.execute()
        except FailedError as error:
            logger.warning("decoding goes on without CUDA graphs, more slowly: %s", error)
            self._records = False
            return None
        return graphs[0]

    def _fetch(self, wanted: Sequence[str], batch: int, width: int) -> None:
        """Begin to copy outputs to the host, in one piece: wanted together, they lie side by side."""
        pieces = [self._piece(name, self._shape(name, batch, width)) for name in wanted]
        if pieces:
            start, end = min(p.start for p in pieces), max(p.stop for p in pieces)
            cuda.copy_to_host(
                self._host_results.address + start, self._results.address + start, end - start, self._stream
            )

    def _result(self, name: str, batch: int, width: int) -> npt.NDArray[Any]:
        shape, dtype = self._shape(name, batch, width), self._outputs[name].dtype
        return self._host_results.array[self._piece(name, shape)].view(dtype).reshape(shape).copy()

    def _shape(self, name: str, batch: int, width: int) -> list[int]:
        sizes = {"batch_size": batch, "sequence_length": width}
        return [sizes[d] if isinstance(d, str) else d for d in self._outputs[name].shape]

    def _piece(self, name: str, shape: Sequence[int]) -> slice:
        start = self._sizes.outputs[name]
        return slice(start, start + prod(shape) * find_dtype(self._outputs[name].dtype).size)
