"""Forms of a stored shared-cache graph, made in memory on the stored weights, and the weights that it stores.

| form      | computes                                                                                    |
|-----------|---------------------------------------------------------------------------------------------|
| as stored | what the graph says: inputs of linears in 8 bits, the cache in 8 or 4 where it is quantised |
| exact     | in float32 with the same weights: neither activations nor the cache are rounded             |
| float     | what the graph says, but for the cache, which is in float32                                 |
| cache     |                                                                                             |

A graph that computes in bfloat16 has the rounded form of `static_forms`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import onnx_ir as ir
import torch

from olmo2_export.catalog import BlockFormat
from olmo2_export.fuse.matmul_integer import multiply_floats
from olmo2_export.fuse.matmul_nbits import unordered
from olmo2_export.quantize.blocks import QuantizedMatrix
from olmo2_export.views.lazy_tensors import LazyTensors


def exact_form(graph: ir.Model) -> ir.Model:
    """Return a graph that computes in float32 with the same weights: no rounding of activations or cache."""
    exact = float_cache_form(graph)
    for node in list(exact.graph):
        if node.op_type == "MatMulInteger":
            multiply_floats(exact.graph, node)
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 0)
    return exact


def float_cache_form(graph: ir.Model) -> ir.Model:
    """Return a graph that rounds what it rounded, but for the cache."""
    exact = graph.clone()
    for node in list(exact.graph):
        if node.op_type == "GroupQueryAttention" and "kv_cache_bit_width" in node.attributes:
            bits = node.attributes["kv_cache_bit_width"].as_int()
            for name in ("k_quant_type", "v_quant_type", "kv_cache_bit_width"):
                del node.attributes[name]
            for index in range(9, len(node.inputs)):
                node.replace_input_with(index, None)
            for value in (*node.inputs[3:5], *node.outputs[1:3]):
                assert value is not None  # past and present
                assert value.shape is not None
                *outer, size = value.shape
                value.type = ir.TensorType(ir.DataType.FLOAT)
                value.shape = ir.Shape([*outer, int(str(size)) * 8 // bits])
    return exact


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


def _stored_matrix(graph: ir.Model, node: ir.Node, packed: str) -> QuantizedMatrix:
    initializers, name = graph.graph.initializers, packed.removesuffix(".packed")
    parts = {part: initializers.get(f"{name}.{part}") for part in ("packed", "scales", "zero_points")}
    codes, scales, zeros = (
        None if v is None or v.const_value is None else _read(v.const_value) for v in parts.values()
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
    order = None if gather else _order(node)
    return QuantizedMatrix(form, rows, columns, codes.reshape(rows, blocks, -1), scales, zeros, order)


def _order(node: ir.Node) -> np.ndarray | None:
    """Return the order in which a product in blocks wants the columns of its input; None: as they are."""
    assert node.inputs[0] is not None  # a product has two inputs
    _, order = unordered(node.inputs[0])
    return None if order is None or order.const_value is None else _read(order.const_value).astype(np.int64)


def _read(tensor: ir.TensorProtocol) -> np.ndarray:
    """Copy a tensor out of its file, which is not kept mapped."""
    array = np.array(tensor.numpy())
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()
    return array


def block_inputs(graph: ir.Model) -> dict[str, tuple[int, np.ndarray | None]]:
    """Return how the input of each linear in blocks is cut, by the checkpoint's names, without reading weights.

    Returns:
        Columns of a block, and the order in which they are taken, int64 [K]; None: as they are.
    """
    return {
        str(node.inputs[1].name).removesuffix(".packed"): (node.attributes["block_size"].as_int(), _order(node))
        for node in graph.graph
        if node.op_type == "MatMulNBits" and node.inputs[1] is not None
    }


def stored_int8(graph: ir.Model) -> LazyTensors[torch.Tensor]:
    """Return the dequantised int8 weights of a written prefill graph, float32 [out, in], by the checkpoint's names."""
    initializers = graph.graph.initializers

    def load(name: str) -> torch.Tensor:
        codes, scales = initializers[f"{name}.int8"].const_value, initializers[f"{name}.channel_scales"].const_value
        assert codes is not None  # loaded from a file
        assert scales is not None
        return torch.from_numpy((_read(codes).astype(np.float32) * _read(scales)).T)

    names = [n.removesuffix(".int8") for n in initializers if n.endswith(".int8")]
    return LazyTensors({name: partial(load, name) for name in names if f"{name}.channel_scales" in initializers})
