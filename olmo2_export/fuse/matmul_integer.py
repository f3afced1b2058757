"""Multiply int8 by int8: weights with a scale per output channel, activations with a scale per row, found on the fly.

Matches:

    y = MatMul(x, W)                  W: constant initializer [K, N], used nowhere else, one of those given

Becomes (the first half once for all products of one x):

    row_scale = Max(ReduceMax(x), -ReduceMin(x), tiny) / 127                        over the last axis, [B, S, 1]
    q = QuantizeLinear(Reshape(x, [-1, K]), Reshape(row_scale, [-1]), 128, axis=0)  uint8 [B * S, K]

    y = Float(MatMulInteger(Reshape(q, Shape(x)), W.int8, 128)) * W.channel_scales * row_scale

All are standard operators, and QuantizeLinear along the rows makes one pass over x where the textbook composition
(Abs, ReduceMax, Div, Round, Cast) makes five. Weights keep to 7 bits, so that the 16-bit sums of kernels without VNNI
cannot saturate.

Source: the per-row scheme is that of LLM.int8(), arXiv:2208.07339, section 3.1.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from olmo2_export.fuse.edit import constant, is_op, name_of, new_node
from runtimes.errors import FusionError

FLOAT, UINT8, INT8, INT32, INT64 = (
    ir.DataType.FLOAT,
    ir.DataType.UINT8,
    ir.DataType.INT8,
    ir.DataType.INT32,
    ir.DataType.INT64,
)
_TINY = 1e-30  # so that a row of zeros has a scale


def matmul_integer(model: ir.Model, weights: Collection[str]) -> int:
    """Apply the rewrite to those weights; return the number of products rewritten.

    The new initializers have no data yet: `.int8` int8 [K, N] and `.channel_scales` float32 [N].
    """
    graph = model.graph
    quantized: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
    rewritten = 0
    for node in list(graph):
        x, weight = node.inputs if is_op(node, "MatMul") else (None, None)
        if x is None or weight is None or weight.name not in weights or len(weight.uses()) != 1:
            continue
        if not weight.is_initializer() or weight.shape is None or x.shape is None or len(x.shape) != 3:
            continue
        if x not in quantized:
            quantized[x] = _quantize_rows(graph, node, x)
        codes, row_scale = quantized[x]
        _rewrite(graph, node, weight, codes, row_scale)
        rewritten += 1
    return rewritten


def multiply_floats(graph: ir.Graph, node: ir.Node) -> None:
    """Let one rewritten product multiply x itself by the same weight, y = MatMul(x, Float(W.int8)) * W.channel_scales:
    what the graph computes but for its rounding of x."""
    codes, weight = node.inputs[:2]
    assert weight is not None  # the rewrite gave it
    assert weight.shape is not None
    (wide,) = node.outputs[0].consumers()
    (channels,) = wide.outputs[0].consumers()
    (rows,) = channels.outputs[0].consumers()
    x = codes
    for step in ("Reshape", "QuantizeLinear", "Reshape"):
        producer = None if x is None else x.producer()
        if producer is None or producer.op_type != step:
            raise FusionError(f"{weight.name}: its input is not rounded by row: no {step}; export the package again")
        x = producer.inputs[0]
    name = name_of(wide.outputs[0])
    floats = new_node("Cast", [weight], f"{weight.name}_float", FLOAT, list(weight.shape), {"to": int(FLOAT)})
    product = new_node("MatMul", [x, floats.outputs[0]], f"{name}_exact", FLOAT, wide.outputs[0].shape)
    graph.insert_before(node, [floats, product])
    channels.replace_input_with(0, product.outputs[0])
    rows.replace_input_with(1, constant(graph, "not_rounded", 1.0, FLOAT))


def _quantize_rows(graph: ir.Graph, before: ir.Node, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Return x as uint8 around 128, and the scale of each row."""
    assert x.shape is not None  # the caller has seen to it
    name = name_of(x)
    row = [*list(x.shape)[:2], 1]
    columns = int(str(x.shape[2]))
    axis = constant(graph, "axis_last", [-1])
    tiny, step = constant(graph, "tiny", _TINY, FLOAT), constant(graph, "quantization_step", 1 / 127, FLOAT)
    flat = constant(graph, "flat", [-1])
    rows = constant(graph, f"rows_of_{columns}", [-1, columns])
    middle = _scalar(graph, "middle", np.array([128], np.uint8))
    high = new_node("ReduceMax", [x, axis], f"{name}_high", FLOAT, row, {"keepdims": 1})
    low = new_node("ReduceMin", [x, axis], f"{name}_low", FLOAT, row, {"keepdims": 1})
    depth = new_node("Neg", [low.outputs[0]], f"{name}_depth", FLOAT, row)
    size = new_node("Max", [high.outputs[0], depth.outputs[0], tiny], f"{name}_size", FLOAT, row)
    scale = new_node("Mul", [size.outputs[0], step], f"{name}_row_scale", FLOAT, row)
    flat_scale = new_node("Reshape", [scale.outputs[0], flat], f"{name}_flat_scale", FLOAT, [None])
    count = new_node("Shape", [flat_scale.outputs[0]], f"{name}_row_count", INT64, [1])
    zeros = new_node("Expand", [middle, count.outputs[0]], f"{name}_middle", UINT8, [None])
    flat_x = new_node("Reshape", [x, rows], f"{name}_rows", FLOAT, [None, columns])
    codes = new_node(
        "QuantizeLinear",
        [flat_x.outputs[0], flat_scale.outputs[0], zeros.outputs[0]],
        f"{name}_flat_codes",
        UINT8,
        [None, columns],
        {"axis": 0},
    )
    shape = new_node("Shape", [x], f"{name}_shape", INT64, [3])
    shaped = new_node("Reshape", [codes.outputs[0], shape.outputs[0]], f"{name}_codes", UINT8, x.shape)
    graph.insert_before(before, [high, low, depth, size, scale, flat_scale, count, zeros, flat_x, codes, shape, shaped])
    return shaped.outputs[0], scale.outputs[0]


def _rewrite(graph: ir.Graph, node: ir.Node, weight: ir.Value, codes: ir.Value, row_scale: ir.Value) -> None:
    assert weight.shape is not None  # the caller has seen to it
    old = node.outputs[0]
    name = name_of(old)
    parts = {"int8": (INT8, list(weight.shape)), "channel_scales": (FLOAT, [weight.shape[1]])}
    values = {
        part: ir.Value(name=f"{weight.name}.{part}", type=ir.TensorType(dtype), shape=ir.Shape(shape))
        for part, (dtype, shape) in parts.items()
    }
    for value in values.values():
        graph.initializers.add(value)
    middle = _scalar(graph, "middle_scalar", np.array(128, np.uint8))
    product = new_node("MatMulInteger", [codes, values["int8"], middle], f"{name}_int32", INT32, old.shape)
    wide = new_node("Cast", [product.outputs[0]], f"{name}_float", FLOAT, old.shape, {"to": int(FLOAT)})
    channels = new_node("Mul", [wide.outputs[0], values["channel_scales"]], f"{name}_channels", FLOAT, old.shape)
    result = new_node("Mul", [channels.outputs[0], row_scale], f"{name}_rows", FLOAT, old.shape)
    graph.insert_before(node, [product, wide, channels, result])
    old.replace_all_uses_with(result.outputs[0], replace_graph_outputs=True)
    old.name, result.outputs[0].name = None, name
    graph.remove(node, safe=True)
    del graph.initializers[name_of(weight)]


def _scalar(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    if name not in graph.initializers:
        tensor = ir.tensor(array, name=name)
        graph.register_initializer(
            ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.UINT8))
        )
    return graph.initializers[name]
