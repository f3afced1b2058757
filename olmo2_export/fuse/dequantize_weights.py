"""Store weights in 4 or 8 bits, and say in standard operators what they stand for.

Matches:

    y = MatMul(x, W)                  W: constant initializer [K, N], used nowhere else, one of those given

Becomes:

    y = MatMul(x, DequantizeLinear(W.codes, W.scales, axis=0, block_size))       scales [K / block_size, N]
    y = MatMul(x, DequantizeLinear(W.codes, W.scales, axis=1))                   scales [N], where block_size is 0

The result of DequantizeLinear has the dtype of the scales, which is that of x. TensorRT does not write it to memory:
4-bit weights are dequantised within the product; of 8-bit ones the scale is applied to the product of the codes, if x
comes from DequantizeLinear too (`quantize_inputs`).

Source: onnx, DequantizeLinear-24.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from olmo2_export.catalog import static_row
from olmo2_export.dtypes import ir_dtype
from olmo2_export.fuse.edit import is_op, name_of, new_node
from olmo2_export.fuse.merge_projections import JOINT
from olmo2_export.quantize.static import LinearForm

CODES, SCALES = ".codes", ".scales"


def dequantize_weights(model: ir.Model, forms: Mapping[str, LinearForm]) -> int:
    """Apply the rewrite to the weights named in `forms`; return the number of products rewritten.

    The new initializers have no data yet; they are named after the weight: `.codes` and `.scales`. A merged weight
    (`merge_projections`) is rewritten if its parts have one form.
    """
    graph = model.graph
    rewritten = 0
    for node in list(graph):
        weight = node.inputs[1] if is_op(node, "MatMul") else None
        if weight is None or not weight.is_initializer() or weight.is_graph_input() or len(weight.uses()) != 1:
            continue
        found = {forms.get(part) for part in name_of(weight).split(JOINT)}
        form = found.pop()
        if form is None or found:
            continue
        _rewrite(graph, node, weight, form)
        rewritten += 1
    return rewritten


def _rewrite(graph: ir.Graph, node: ir.Node, weight: ir.Value, form: LinearForm) -> None:
    name, shape, dtype = name_of(weight), weight.shape, weight.dtype
    assert shape is not None  # an initializer has both
    assert dtype is not None
    columns, rows = (int(str(size)) for size in shape)
    blocks = [columns // form.block_size] if form.block_size else []
    dtype_of_codes = ir_dtype(static_row(form.precision).weights.codes)
    codes = ir.Value(name=name + CODES, type=ir.TensorType(dtype_of_codes), shape=shape)
    scales = ir.Value(name=name + SCALES, type=ir.TensorType(dtype), shape=ir.Shape([*blocks, rows]))
    graph.initializers.add(codes)
    graph.initializers.add(scales)
    attributes: dict[str, int | str] = {"axis": 0, "block_size": form.block_size} if blocks else {"axis": 1}
    dequantized = new_node("DequantizeLinear", [codes, scales], f"{name}.dequantized", dtype, shape, attributes)
    graph.insert_before(node, dequantized)
    node.replace_input_with(1, dequantized.outputs[0])
    del graph.initializers[name]
