"""Multiply by weights of 4 or 8 bits, quantised in blocks.

Matches:

    y = MatMul(x, W)                  W: constant initializer [K, N], used nowhere else, one of those given

Becomes:

    y = com.microsoft::MatMulNBits(x, W.packed, W.scales[, W.zero_points], bits, block_size, accuracy_level)

Where a weight's columns are in another order, x is Gather(x, W.order, axis=-1), one for all that want the same.

accuracy_level 4 quantises x too, block by block, which is what the fast kernels do; 0 computes in float32.

Source: onnxruntime, docs/ContribOperators.md, com.microsoft.MatMulNBits.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from olmo2_export.catalog import BlockFormat
from olmo2_export.fuse.edit import is_op, name_of

DOMAIN = "com.microsoft"
ACCURACY_LEVEL = 4
ORDER = ".order"
"""the end of the name of an order of columns"""
UINT8, FLOAT = ir.DataType.UINT8, ir.DataType.FLOAT


def matmul_nbits(
    model: ir.Model,
    formats: Mapping[str, BlockFormat],
    accuracy_level: int = ACCURACY_LEVEL,
    orders: Mapping[str, np.ndarray] | None = None,
) -> int:
    """Apply the rewrite to the weights named in `formats`; return the number of products rewritten.

    The new initializers have no data yet, but for `.order`; they are named after the weight: `.packed`, `.scales`,
    `.zero_points`.
    """
    graph = model.graph
    gathered: dict[tuple[str, bytes], ir.Value] = {}
    rewritten = 0
    for node in list(graph):
        weight = node.inputs[1] if is_op(node, "MatMul") else None
        if weight is None or weight.name not in formats or _why_not(weight) is not None:
            continue
        assert weight.shape is not None  # _why_not has seen to it
        columns, rows = (int(str(size)) for size in weight.shape)
        form = formats[name_of(weight)]
        old = node.outputs[0]
        output = ir.Value(name=f"{old.name}_nbits", type=old.type, shape=old.shape)
        attributes = {
            "K": columns,
            "N": rows,
            "bits": form.bits,
            "block_size": form.block_size,
            "accuracy_level": accuracy_level,
        }
        x, order = node.inputs[0], (orders or {}).get(name_of(weight))
        assert x is not None  # a product has two inputs
        if order is not None:
            key = (name_of(x), order.tobytes())
            if key not in gathered:
                gathered[key] = _in_order(graph, node, x, order, name_of(weight))
            x = gathered[key]
        inputs = [x, *block_initializers(graph, weight, form, rows, columns)]
        fused = ir.node("MatMulNBits", inputs, attributes, domain=DOMAIN, outputs=[output], name=f"node_{output.name}")
        graph.insert_before(node, fused)
        old.replace_all_uses_with(output, replace_graph_outputs=True)
        old.name, output.name = None, old.name
        graph.remove(node, safe=True)
        del graph.initializers[name_of(weight)]
        rewritten += 1
    if rewritten:
        model.opset_imports[DOMAIN] = 1
    return rewritten


def _in_order(graph: ir.Graph, node: ir.Node, x: ir.Value, order: np.ndarray, weight: str) -> ir.Value:
    """Return the columns of a product's input in an order, gathered in front of the product."""
    name = f"{weight}{ORDER}"
    table = ir.Value(
        name=name,
        const_value=ir.tensor(order.astype(np.int32), name=name),
        shape=ir.Shape([len(order)]),
        type=ir.TensorType(ir.DataType.INT32),
    )
    graph.register_initializer(table)
    output = ir.Value(name=f"{weight}.input", type=x.type, shape=x.shape)
    graph.insert_before(node, ir.node("Gather", [x, table], {"axis": -1}, outputs=[output], name=f"node_{output.name}"))
    return output


def unordered(value: ir.Value) -> tuple[ir.Value, ir.Value | None]:
    """Return the input of a product before it was gathered in another order, and that order; None: it was not."""
    node = value.producer()
    if node is None or not is_op(node, "Gather") or node.inputs[0] is None or node.inputs[1] is None:
        return value, None
    order = node.inputs[1]
    return (node.inputs[0], order) if str(order.name).endswith(ORDER) else (value, None)


def block_initializers(graph: ir.Graph, weight: ir.Value, form: BlockFormat, rows: int, columns: int) -> list[ir.Value]:
    """Register the initializers of a weight quantised in blocks; they have no data yet.

    Args:
        graph: gets them.
        weight: gives them its name.
        form: of the blocks.
        rows, columns: of the weight as the checkpoint has it, [out, in].

    Returns:
        packed uint8 [rows, blocks, block_size * bits / 8], scales float32 [rows, blocks] and, where the format is
        asymmetric, zero_points uint8 [rows, ceil(blocks * bits / 8)].
    """
    blocks = -(-columns // form.block_size)
    shapes = {
        "packed": (UINT8, [rows, blocks, form.block_size * form.bits // 8]),
        "scales": (FLOAT, [rows, blocks]),
        "zero_points": (UINT8, [rows, -(-blocks * form.bits // 8)]),
    }
    if form.symmetric:
        del shapes["zero_points"]
    values = [
        ir.Value(name=f"{weight.name}.{part}", type=ir.TensorType(dtype), shape=ir.Shape(shape))
        for part, (dtype, shape) in shapes.items()
    ]
    for value in values:
        graph.initializers.add(value)
    return values


def _why_not(weight: ir.Value) -> str | None:
    """Return why the pattern does not match, or None if it does."""
    if not weight.is_initializer() or weight.is_graph_input():
        return f"{weight.name} is no constant initializer"
    if weight.shape is None or len(weight.shape) != 2:
        return f"{weight.name} is no matrix"
    if len(weight.uses()) != 1:
        return f"{weight.name} is used {len(weight.uses())} times"
    return None
