"""Write the shape of a Reshape as a constant that copies the first two dimensions.

Matches:

    Reshape(x, Concat(Shape(input_ids)[0], Shape(input_ids)[1], constants...))    x: [batch_size, sequence_length, ...]

Becomes:

    Reshape(x, [0, 0, constants...])                                              0 copies x's own dimension

TensorRT then needs no shape arithmetic on the host, at every call, to know where a tensor's dimensions come from.
"""

from __future__ import annotations

import logging

import onnx_ir as ir

from olmo2_export.fuse.edit import constant, constant_ints, is_dimension, is_op

logger = logging.getLogger(__name__)


def plain_reshape(model: ir.Model) -> int:
    """Apply the rewrite everywhere it matches; return the number of Reshapes rewritten."""
    graph = model.graph
    rewritten = 0
    for node in list(graph):
        if not is_op(node, "Reshape"):
            continue
        tail = _constant_tail(graph, node)
        if tail is None:
            logger.debug("plain_reshape: %s: its shape is not batch_size, sequence_length, constants", node.name)
            continue
        shape = constant(graph, f"shape_{'_'.join(map(str, tail))}", [0, 0, *tail])
        node.replace_input_with(1, shape)
        node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)
        rewritten += 1
    return rewritten


def _constant_tail(graph: ir.Graph, node: ir.Node) -> list[int] | None:
    """Return the dimensions after the first two, if those are x's own and these constants."""
    x, target = node.inputs
    concat = target.producer() if target is not None else None
    if concat is None or not is_op(concat, "Concat") or len(concat.inputs) < 3:
        return None
    if x is None or x.shape is None or [str(d) for d in x.shape[:2]] != ["batch_size", "sequence_length"]:
        return None
    producers = [value.producer() if value is not None else None for value in concat.inputs[:2]]
    if not all(is_dimension(graph, producer, axis) for axis, producer in enumerate(producers)):
        return None
    tail: list[int] = []
    for value in concat.inputs[2:]:
        numbers = constant_ints(value)
        if numbers is None:
            return None
        tail += numbers
    return tail
