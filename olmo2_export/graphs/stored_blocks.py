"""The weights in blocks that a written graph holds, as its kernels read them."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import onnx_ir as ir

from olmo2_export.catalog import BlockFormat
from olmo2_export.fuse.matmul_nbits import unordered
from olmo2_export.graphs.lazy_tensors import LazyTensors
from olmo2_export.quantize.blocks import QuantizedMatrix

_FOLDED = "folded_order"
"""of a product's metadata: the order of its columns, int32 in base64, which nothing computes with"""


def stored_matrices(graph: ir.Model) -> LazyTensors[QuantizedMatrix]:
    """Return the weights in blocks as a written graph has them, by the checkpoint's names; each is read when asked."""
    makers: dict[str, Callable[[], QuantizedMatrix]] = {}
    for node in graph.graph:
        if node.op_type not in ("MatMulNBits", "GatherBlockQuantized"):
            continue
        packed = node.inputs[0 if node.op_type == "GatherBlockQuantized" else 1]
        assert packed is not None  # the operators need it
        makers[str(packed.name).removesuffix(".packed")] = partial(_stored_matrix, graph, node, str(packed.name))
    return LazyTensors(makers)


def note_folded_orders(graph: ir.Model, orders: Mapping[str, np.ndarray]) -> None:
    """Write beside products in which order their columns are, and what they read: see `imported.FoldedOrders`."""
    for node in graph.graph:
        name = _weight(node)
        if name in orders:
            node.metadata_props[_FOLDED] = base64.b64encode(orders[name].astype("<i4").tobytes()).decode()


def folded_orders(graph: ir.Model) -> dict[str, np.ndarray]:
    """Return these orders, int64 [K], by the checkpoint's names."""
    noted = {_weight(node): node.metadata_props[_FOLDED] for node in graph.graph if _FOLDED in node.metadata_props}
    return {name: np.frombuffer(base64.b64decode(text), "<i4").astype(np.int64) for name, text in noted.items()}


def _weight(node: ir.Node) -> str:
    """Return the name of the weight of a product in blocks; that of none is empty."""
    packed = node.inputs[1] if node.op_type == "MatMulNBits" else None
    return str(packed.name).removesuffix(".packed") if packed is not None else ""


def _stored_matrix(graph: ir.Model, node: ir.Node, packed: str) -> QuantizedMatrix:
    initializers, name = graph.graph.initializers, packed.removesuffix(".packed")
    parts = {part: initializers.get(f"{name}.{part}") for part in ("packed", "scales", "zero_points")}
    codes, scales, zeros = (
        None if v is None or v.const_value is None else read_array(v.const_value) for v in parts.values()
    )
    assert codes is not None
    assert scales is not None
    gather = node.op_type == "GatherBlockQuantized"
    bits, block = node.attributes["bits"].as_int(), node.attributes["block_size"].as_int()
    form = BlockFormat(bits, block, symmetric=zeros is None)
    columns = codes.shape[1] * 8 // bits if gather else node.attributes["K"].as_int()
    if gather:  # without the padding of the last block
        width = form.blocks(columns) * block * bits // 8
        codes = np.pad(codes, ((0, 0), (0, width - codes.shape[1])))
    rows, blocks = len(codes), form.blocks(columns)
    order = None if gather else input_order(node)
    return QuantizedMatrix(form, rows, columns, codes.reshape(rows, blocks, -1), scales, zeros, order)


def input_order(node: ir.Node) -> np.ndarray | None:
    """Return the order in which a product in blocks wants the columns of its input; None: as they are."""
    assert node.inputs[0] is not None  # a product has two inputs
    _, order = unordered(node.inputs[0])
    return None if order is None or order.const_value is None else read_array(order.const_value).astype(np.int64)


def read_array(tensor: ir.TensorProtocol) -> np.ndarray:
    """Copy a tensor out of its file, which is not kept mapped."""
    array = np.array(tensor.numpy())
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()
    return array
