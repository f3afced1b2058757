"""Forms of a stored shared-cache graph, made in memory on the stored weights, and what is read from it.

| form      | computes                                                                                    |
|-----------|---------------------------------------------------------------------------------------------|
| as stored | what the graph says: inputs of linears in 8 bits, the cache in 8 or 4 where it is quantised |
| exact     | in float32 with the same weights: neither activations nor the cache are rounded             |
| float     | what the graph says, but for the cache, which is in float32                                 |
| cache     |                                                                                             |

A graph that computes in bfloat16 has the rounded form of `static_forms`.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_ir as ir
import torch

from olmo2_export.fuse.matmul_integer import multiply_floats
from olmo2_export.graphs.lazy_tensors import LazyTensors
from olmo2_export.graphs.stored_blocks import input_order, read_array


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


def block_inputs(graph: ir.Model) -> dict[str, tuple[int, np.ndarray | None]]:
    """Return how the input of each linear in blocks is cut, by the checkpoint's names, without reading weights.

    Returns:
        Columns of a block, and the order in which they are taken, int64 [K]; None: as they are.
    """
    return {
        str(node.inputs[1].name).removesuffix(".packed"): (node.attributes["block_size"].as_int(), input_order(node))
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
        return torch.from_numpy((read_array(codes).astype(np.float32) * read_array(scales)).T)

    names = [n.removesuffix(".int8") for n in initializers if n.endswith(".int8")]
    return LazyTensors({name: partial(load, name) for name in names if f"{name}.channel_scales" in initializers})
