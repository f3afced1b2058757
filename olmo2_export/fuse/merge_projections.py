"""Compute the linears that read the same value as one product: q, k and v; gate and up.

Matches (two or more products of one x):

    y_i = MatMul(x, W_i)              W_i: constant initializer [K, N_i] that has data, used nowhere else

Becomes:

    y_1, ..., y_n = Split(MatMul(x, W), [N_1, ..., N_n], axis=-1)         W: [K, N_1 + ... + N_n], the W_i side by side

The name of W is that of its parts, joined by `+`. Its data is put together when it is read: if that of the parts is
lazy, so is W's.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from olmo2_export.fuse.edit import constant, is_op, name_of, new_node

logger = logging.getLogger(__name__)

JOINT = "+"
"""between the names of a merged weight's parts"""


def merge_projections(model: ir.Model) -> int:
    """Apply the rewrite everywhere it matches; return the number of groups merged into one product."""
    graph = model.graph
    groups: dict[ir.Value, list[ir.Node]] = defaultdict(list)
    for node in graph:
        if not is_op(node, "MatMul") or node.inputs[0] is None:
            continue
        if (reason := _why_not(node)) is not None:
            logger.debug("merge_projections: %s: %s", node.name, reason)
            continue
        groups[node.inputs[0]].append(node)
    merged = [(x, nodes) for x, nodes in groups.items() if len(nodes) > 1]
    for x, nodes in merged:
        _rewrite(graph, x, nodes)
    return len(merged)


def _why_not(node: ir.Node) -> str | None:
    """Return why a product cannot be a part of a larger one, or None if it can."""
    x, weight = node.inputs
    if weight is None or not weight.is_initializer() or weight.is_graph_input() or weight.const_value is None:
        return "its right side is no constant initializer that has data"
    if weight.shape is None or len(weight.shape) != 2 or len(weight.uses()) != 1:
        return f"{weight.name} is no matrix, or is used {len(weight.uses())} times"
    if node.outputs[0].is_graph_output() or node.outputs[0].shape is None:
        return "its result is an output, or of unknown shape"
    if x is None or x.dtype != weight.dtype:
        return f"{weight.name} has another dtype than what it multiplies"
    return None


def _rewrite(graph: ir.Graph, x: ir.Value, nodes: Sequence[ir.Node]) -> None:
    weights = [weight for node in nodes if (weight := node.inputs[1]) is not None]
    olds = [node.outputs[0] for node in nodes]
    name = JOINT.join(name_of(weight) for weight in weights)
    widths = [_width(weight) for weight in weights]
    weight = _side_by_side(name, weights, sum(widths))
    graph.initializers.add(weight)
    dtype, shape = olds[0].dtype, olds[0].shape
    assert dtype is not None  # that of x
    assert shape is not None  # _why_not has seen to it
    product = new_node("MatMul", [x, weight], f"{olds[0].name}_merged", dtype, [*list(shape)[:-1], sum(widths)])
    sizes = constant(graph, f"widths_{'_'.join(map(str, widths))}", widths)
    outputs = [ir.Value(type=old.type, shape=old.shape) for old in olds]
    split = ir.node(
        "Split", [product.outputs[0], sizes], {"axis": -1}, outputs=outputs, name=f"node_{olds[0].name}_split"
    )
    graph.insert_before(nodes[0], [product, split])
    for node, old, output in zip(nodes, olds, outputs, strict=True):
        old.replace_all_uses_with(output)
        old.name, output.name = None, old.name
        graph.remove(node, safe=True)
    for part in weights:
        del graph.initializers[name_of(part)]


def _side_by_side(name: str, weights: Sequence[ir.Value], width: int) -> ir.Value:
    """Return the initializer that holds the columns of all weights, in this order."""
    dtype, shape = weights[0].dtype, weights[0].shape
    assert dtype is not None  # _why_not has seen to both
    assert shape is not None
    tensors = [weight.const_value for weight in weights if weight.const_value is not None]
    whole = ir.Shape([shape[0], width])

    def joined() -> ir.TensorProtocol:
        data = np.concatenate([tensor.numpy() for tensor in tensors], axis=1)
        for tensor in tensors:
            if isinstance(tensor, ir.ExternalTensor):
                tensor.release()  # it has mapped the whole file
        return ir.Tensor(data, dtype=dtype, name=name)

    lazy = ir.LazyTensor(joined, dtype=dtype, shape=whole, name=name)
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=whole, const_value=lazy)


def _width(weight: ir.Value) -> int:
    assert weight.shape is not None  # _why_not has seen to it
    return int(str(weight.shape[1]))
