"""Round the inputs of linears to 8 bits with a scale that is known beforehand.

Matches:

    y = MatMul(x, DequantizeLinear(W.codes, W.scales))              W: one of those that have an input scale

Becomes (the first half once for all products of one x and scale):

    x' = DequantizeLinear(QuantizeLinear(x, s), s)                  s: constant, a scalar of x's dtype
    y = MatMul(x', DequantizeLinear(W.codes, W.scales))

TensorRT multiplies the codes, and folds the quantisation into the kernel that computes x.

Source: onnx, QuantizeLinear-24.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from olmo2_export.catalog import static_row
from olmo2_export.dtypes import ir_dtype
from olmo2_export.fuse.dequantize_weights import CODES
from olmo2_export.fuse.edit import is_op, name_of, new_node
from olmo2_export.fuse.merge_projections import JOINT
from olmo2_export.quantize.static import LinearForm

INPUT_SCALE = ".input_scale"


def quantize_inputs(model: ir.Model, forms: Mapping[str, LinearForm]) -> int:
    """Apply the rewrite to the products of the weights that have an input scale; return how many were rewritten."""
    graph = model.graph
    quantized: dict[tuple[ir.Value, float], ir.Value] = {}
    rewritten = 0
    for node in list(graph):
        codes = _codes(node)
        x = node.inputs[0]
        if codes is None or x is None:
            continue
        name = name_of(codes).removesuffix(CODES)
        found = {forms[part] for part in name.split(JOINT) if part in forms}
        form = found.pop() if found else None
        if form is None or form.input_scale is None or found:
            continue
        key = (x, form.input_scale)
        if key not in quantized:
            rounded = static_row(form.precision).weights.inputs
            assert rounded is not None  # it has a scale
            quantized[key] = _quantize(graph, node, x, name, form.input_scale, ir_dtype(rounded))
        node.replace_input_with(0, quantized[key])
        rewritten += 1
    return rewritten


def _codes(node: ir.Node) -> ir.Value | None:
    """Return the codes of the weight that a product multiplies with; None if it is another node, or done already."""
    if not is_op(node, "MatMul"):
        return None
    x, weight = (value.producer() if value is not None else None for value in node.inputs)
    if weight is None or not is_op(weight, "DequantizeLinear") or (x is not None and is_op(x, "DequantizeLinear")):
        return None
    return weight.inputs[0]


def _quantize(graph: ir.Graph, before: ir.Node, x: ir.Value, name: str, scale: float, codes: ir.DataType) -> ir.Value:
    """Return x rounded; `name` is that of the first weight that reads it."""
    assert x.dtype is not None  # set_precision has seen to it
    constant = f"{name}{INPUT_SCALE}"
    data = ir.tensor(np.array(scale, x.dtype.numpy()), dtype=x.dtype, name=constant)
    step = ir.Value(name=constant, const_value=data, type=ir.TensorType(x.dtype), shape=ir.Shape([]))
    graph.register_initializer(step)
    down = new_node("QuantizeLinear", [x, step], f"{name_of(x)}_codes", codes, x.shape, {"output_dtype": int(codes)})
    up = new_node("DequantizeLinear", [down.outputs[0], step], f"{name_of(x)}_quantized", x.dtype, x.shape)
    graph.insert_before(before, [down, up])
    return up.outputs[0]
