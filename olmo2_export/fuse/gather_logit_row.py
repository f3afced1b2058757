"""Let one row per sequence reach the final norm and the head: the one whose logits are wanted.

Matches:

    x'     = Slice(x, -num_logits_to_keep, end, axis 1)     x: [batch_size, sequence_length, hidden]
    logits = MatMul(Norm(x'), lm_head)                      [batch_size, num_logits, vocab]

Becomes:

    x'     = GatherND(x, logit_index, batch_dims=1)         logit_index: input, int64 [batch_size, 1]
    logits = MatMul(Norm(x'), lm_head)                      [batch_size, vocab]

In a batch of right-padded prompts the last token of each is at a row of its own, which a slice cannot express. A
classifier has GatherND already, on an index that its graph computes (`pooled_row`): logit_index takes its place.
"""

from __future__ import annotations

import logging

import onnx_ir as ir

from olmo2_export.architecture import norm_operators
from olmo2_export.fuse.edit import constant_ints, ensure_input, find_input, is_op, new_node, only_user

logger = logging.getLogger(__name__)


def gather_logit_row(model: ir.Model) -> int:
    """Apply the rewrite; return 1, or 0 if the graph does not end in this way."""
    graph = model.graph
    told = find_input(graph, "logit_index")
    pooled = [node for node in graph if is_op(node, "GatherND") and (told is None or node.inputs[1] is not told)]
    node = find_slice(graph)
    if node is None and len(pooled) != 1:
        return 0
    index = ensure_input(graph, "logit_index", ["batch_size", 1])
    if node is not None:
        take_row(graph, node, index)
    else:
        pooled[0].replace_input_with(1, index)
    return 1


def find_slice(graph: ir.Graph) -> ir.Node | None:
    """Return the node that picks the rows which get logits; None where there is none."""
    for node in graph:
        if not is_op(node, "Slice"):
            continue
        if (reason := _why_not(graph, node)) is None:
            return node
        logger.debug("gather_logit_row: %s: %s", node.name, reason)
    return None


def take_row(graph: ir.Graph, node: ir.Node, index: ir.Value) -> None:
    """Replace what `find_slice` found by one row of each sequence, that of an index, int64 [batch_size, 1]."""
    shape = _without_axis_1(node.outputs[0])
    gather = new_node("GatherND", [node.inputs[0], index], "logit_row", ir.DataType.FLOAT, shape, {"batch_dims": 1})
    graph.insert_before(node, gather)
    node.outputs[0].replace_all_uses_with(gather.outputs[0])
    graph.remove(node, safe=True)
    for value in _to_the_end(gather.outputs[0]):
        value.shape = _without_axis_1(value)


def _why_not(graph: ir.Graph, node: ir.Node) -> str | None:
    """Return why the pattern does not match, or None if it does."""
    count = find_input(graph, "num_logits_to_keep")
    if count is None:
        return "no input num_logits_to_keep"
    if len(node.inputs) < 4 or constant_ints(node.inputs[3]) != [1]:
        return "not along axis 1"
    if not _is_negated(node.inputs[1], count):
        return "does not start at -num_logits_to_keep"
    following = _to_the_end(node.outputs[0])
    producers = [value.producer() for value in following]
    normed = any(is_op(producers[0], operator) for operator in norm_operators()) if producers else False
    if len(producers) != 2 or not normed or not is_op(producers[1], "MatMul"):
        return f"leads to {len(producers)} nodes and an output, not to the final norm and the head"
    if any(value.shape is None or len(value.shape) != 3 for value in (node.outputs[0], *following)):
        return "not of three dimensions"
    return None


def _is_negated(value: ir.Value | None, source: ir.Value) -> bool:
    """Tell whether a value is the negative of an input, reshaped or not."""
    node = value.producer() if value is not None else None
    if node is not None and is_op(node, "Reshape"):
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    return node is not None and is_op(node, "Neg") and node.inputs[0] is source


def _to_the_end(value: ir.Value) -> list[ir.Value]:
    """Return what follows a value, as long as each has one user."""
    chain: list[ir.Value] = []
    while (user := only_user(value)) is not None and len(user.outputs) == 1:
        value = user.outputs[0]
        chain.append(value)
    return chain


def _without_axis_1(value: ir.Value) -> ir.Shape:
    assert value.shape is not None  # _why_not has seen to it
    return ir.Shape([value.shape[0], value.shape[2]])
