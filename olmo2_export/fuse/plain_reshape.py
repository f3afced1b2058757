"""Write the shape of a Reshape as a constant that copies the first two dimensions.

Matches:

    y = Reshape(x, Concat(Shape(input_ids)[0], Shape(input_ids)[1], ...))   x, y: [batch_size, sequence_length, ...]

Becomes:

    y = Reshape(x, [0, 0, the other dimensions of y])                       0 copies x's own dimension

TensorRT then needs no shape arithmetic on the host, at every call, to know where a tensor's dimensions come from.
"""

from __future__ import annotations

import logging

import onnx_ir as ir

from olmo2_export.fuse.edit import constant, is_dimension, is_op

logger = logging.getLogger(__name__)


def plain_reshape(model: ir.Model) -> int:
    """Apply the rewrite everywhere it matches; return the number of Reshapes rewritten."""
    graph = model.graph
    rewritten = 0
    for node in list(graph):
        if not is_op(node, "Reshape"):
            continue
        found = _match(graph, node)
        if isinstance(found, str):
            logger.debug("plain_reshape: %s: %s", node.name, found)
            continue
        shape = constant(graph, f"shape_{'_'.join(map(str, found))}", [0, 0, *found])
        node.replace_input_with(1, shape)
        node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)
        rewritten += 1
    return rewritten


def _match(graph: ir.Graph, node: ir.Node) -> list[int] | str:
    """Return the dimensions of y after the first two, or why the pattern does not match."""
    x, target = node.inputs
    concat = target.producer() if target is not None else None
    if concat is None or not is_op(concat, "Concat") or len(concat.inputs) < 3:
        return "its shape is not put together from dimensions"
    producers = [value.producer() if value is not None else None for value in concat.inputs[:2]]
    if not all(is_dimension(graph, producer, axis) for axis, producer in enumerate(producers)):
        return "its shape does not begin with those of input_ids"
    for value in (x, node.outputs[0]):
        if (
            value is None
            or value.shape is None
            or [str(d) for d in value.shape[:2]] != ["batch_size", "sequence_length"]
        ):
            return "not [batch_size, sequence_length, ...]"
    tail = list(node.outputs[0].shape[2:]) if node.outputs[0].shape is not None else []
    static = [d for d in tail if isinstance(d, int)]
    return static if static and len(static) == len(tail) else "its other dimensions are not known"
