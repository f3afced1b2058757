"""How large the files of a graph will be, from the same graph of a model with fewer layers: nothing large is made.

All layers of a model have tensors of the same sizes. So the tensors of a graph with two layers, in the order in which
they are written, say those of a graph with any number: where a run of layer 0 is followed by the same run of layer 1,
one for each layer stands in the whole graph. Offsets follow by the rule of `files.place`, so that the data file is
predicted to the byte. Of the graph itself what tells of layer 0 is counted, and taken once for each layer.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from olmo2_export.config import ModelConfig
from olmo2_export.graphs.files import INSIDE, place, pointing_to, stored_outside
from runtimes.dtypes import find_dtype
from runtimes.errors import FusionError
from runtimes.manifest import KVCacheSpec

LAYERS = 2
"""of the graph that is made"""

_FRAME = 3  # bytes in front of a part: its field and its length
_NUMBER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class GraphBytes:
    """The two files of a graph."""

    graph: int
    """bytes of the ONNX file, within a few percent"""
    data: int
    """bytes of the file beside it, exact"""
    largest: int
    """bytes of its largest tensor"""


def cache_bytes_per_token(cache: KVCacheSpec) -> int:
    """Return what one token of one row takes in the KV cache, over all layers, without scales."""
    size = find_dtype(cache.dtype).size  # two codes of 4 bits share a uint8 of stored_head_dim
    return 2 * cache.num_layers * cache.num_key_value_heads * cache.stored_head_dim * size


def cache_bytes(cache: KVCacheSpec, tokens: int) -> int:
    """Return what so many tokens of one row take of memory; layers that keep a window have no more than that."""
    per_layer = cache_bytes_per_token(cache) // cache.num_layers
    windows = cache.windows or (0,) * cache.num_layers
    return sum(per_layer * min(tokens, window or tokens) for window in windows)


def shortened(config: ModelConfig, layers: int = LAYERS) -> ModelConfig:
    """Return a config with few layers, of each kind that it has if there are so many; all kinds have the same sizes."""
    count = config.num_hidden_layers
    per_layer = {
        field.name: tuple(dict.fromkeys(value))[:layers] if len(set(value)) >= layers else value[:layers]
        for field in dataclasses.fields(config)
        if field.name not in ("labels", "hidden_states")
        and isinstance(value := getattr(config, field.name), tuple)
        and len(value) == count
    }
    changed: dict[str, Any] = {"num_hidden_layers": min(count, layers), "hidden_states": (), **per_layer}
    return dataclasses.replace(config, **changed)


def predicted_bytes(model: ir.Model, layers: int) -> GraphBytes:
    """Predict the files of a graph with so many layers.

    Args:
        model: the graph of `shortened(config)`, all its initializers with data, which may be lazy; none is read.
        layers: of the model.

    Raises:
        FusionError: the tensors of its layers do not follow each other.
    """
    outside = stored_outside(model)
    offsets, size = place(tensor.nbytes for _, tensor in outside)
    with _zeros_inside(model), pointing_to(Path("model.onnx_data"), outside, offsets):
        proto = ir.to_proto(model)
    sizes = [(str(value.name), tensor.nbytes) for value, tensor in outside]
    largest = max((nbytes for _, nbytes in sizes), default=0)
    if layers <= LAYERS:
        return GraphBytes(proto.ByteSize(), size, largest)
    _, data = place(_unrolled(sizes, layers))
    return GraphBytes(proto.ByteSize() + (layers - LAYERS) * _layer_bytes(proto), data, largest)


@contextmanager
def _zeros_inside(model: ir.Model) -> Iterator[None]:
    """Give the small initializers that stay in the graph zeros for data, so that they can be counted unread."""
    lazy = [
        (value, tensor)
        for value in model.graph.initializers.values()
        if isinstance(tensor := value.const_value, ir.LazyTensor) and tensor.nbytes <= INSIDE
    ]
    try:
        for value, tensor in lazy:
            zeros = np.zeros(tensor.shape.numpy(), tensor.dtype.numpy())
            value.const_value = ir.Tensor(zeros, dtype=tensor.dtype, name=tensor.name)
        yield
    finally:
        for value, tensor in lazy:
            value.const_value = tensor


def _unrolled(sizes: Sequence[tuple[str, int]], layers: int) -> Iterator[int]:
    at = 0
    while at < len(sizes):
        name, nbytes = sizes[at]
        if _layer(name) is None:
            yield nbytes
            at += 1
            continue
        run = [n for _, n in takewhile(lambda item: _layer(item[0]) == 0, sizes[at:])]
        following = [n for item, n in sizes[at + len(run) : at + 2 * len(run)] if _layer(item) == 1]
        if not run or run != following:
            raise FusionError(f"{name}: its layer is not followed by one like it; the sizes cannot be predicted")
        for _ in range(layers):
            yield from run
        at += 2 * len(run)


def _layer(name: str) -> int | None:
    found = _NUMBER.search(name)
    return None if found is None else int(found[1])


def _layer_bytes(proto: onnx.ModelProto) -> int:
    """Return the bytes of an ONNX file that tell of layer 0.

    A node belongs to the layer whose weight was read last: from the first product of layer 0 to that of layer 1.
    """
    graph = proto.graph
    weights = {tensor.name for tensor in graph.initializer if tensor.name.startswith(("model.", "lm_head.", "score."))}
    layers: dict[str, int | None] = {}
    layer: int | None = None
    parts: list[onnx.NodeProto | onnx.TensorProto | onnx.ValueInfoProto] = []
    for node in graph.node:
        for name in node.input:
            if name in weights:
                layer = _layer(name)
        layers |= dict.fromkeys(node.output, layer)
        parts += [node] if layer == 0 else []
    parts += [tensor for tensor in graph.initializer if _layer(tensor.name) == 0]
    parts += [value for value in graph.value_info if layers.get(value.name, _layer(value.name)) == 0]
    parts += [value for values in (graph.input, graph.output) for value in values if _layer(value.name) == 0]
    return sum(part.ByteSize() + _FRAME for part in parts)
