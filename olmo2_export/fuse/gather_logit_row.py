"""Let one row per sequence reach the final norm and the head: the one whose logits are wanted.

Matches:

    x'     = Slice(x, -num_logits_to_keep, end, axis 1)     x: [batch_size, sequence_length, hidden]
    logits = MatMul(RMSNormalization(x'), lm_head)          [batch_size, num_logits, vocab]

Becomes:

    x'     = GatherND(x, logit_index, batch_dims=1)         logit_index: input, int64 [batch_size, 1]
    logits = MatMul(RMSNormalization(x'), lm_head)          [batch_size, vocab]

In a batch of right-padded prompts the last token of each is at a row of its own, which a slice cannot express.
"""

from __future__ import annotations

import logging

import onnx_ir as ir

from olmo2_export.fuse.edit import constant_ints, ensure_input, find_input, is_op, name_of, new_node, only_user

logger = logging.getLogger(__name__)


def gather_logit_row(model: ir.Model) -> int:
    """Apply the rewrite; return 1, or 0 if the graph does not end in this way."""
    graph = model.graph
    for node in list(graph):
        if not is_op(node, "Slice") or (reason := _why_not(graph, node)) is not None:
            if is_op(node, "Slice"):
                logger.debug("gather_logit_row: %s: %s", node.name, reason)
            continue
        x, sliced = node.inputs[0], node.outputs[0]
        assert x is not None  # _why_not has seen to it
        index = ensure_input(graph, "logit_index", ["batch_size", 1])
        gather = new_node("GatherND", [x, index], "logit_row", ir.DataType.FLOAT, _two_dimensions(x), {"batch_dims": 1})
        graph.insert_before(node, gather)
        sliced.replace_all_uses_with(gather.outputs[0])
        graph.remove(node, safe=True)
        for value in _to_the_end(gather.outputs[0]):
            value.shape = _two_dimensions(value)
        return 1
    return 0


def _why_not(graph: ir.Graph, node: ir.Node) -> str | None:
    """Return why the pattern does not match, or None if it does."""
    count = find_input(graph, "num_logits_to_keep")
    x, start = node.inputs[0], node.inputs[1]
    if count is None:
        return "no input num_logits_to_keep"
    if x is None or x.shape is None or len(x.shape) != 3:
        return "not a slice of three dimensions"
    source = start
    while source is not None and is_op(source.producer(), "Reshape"):
        source = source.producer().inputs[0]  # type: ignore[union-attr]  # is_op refuses None
    negation = source.producer() if source is not None else None
    if negation is None or not is_op(negation, "Neg") or negation.inputs[0] is not count:
        return "does not start at -num_logits_to_keep"
    if constant_ints(node.inputs[3]) != [1]:
        return "not along axis 1"
    ops = [v.producer().op_type for v in _to_the_end(node.outputs[0])]  # type: ignore[union-attr]
    if ops != ["RMSNormalization", "MatMul"]:
        return f"leads to {', '.join(ops) or 'nothing'}, not to the final norm and the head"
    return None


def _to_the_end(value: ir.Value) -> list[ir.Value]:
    """Return what follows a value as long as each has one user, up to an output of the graph."""
    chain: list[ir.Value] = []
    while (user := only_user(value)) is not None and len(user.outputs) == 1:
        value = user.outputs[0]
        chain.append(value)
    return chain


def _two_dimensions(value: ir.Value) -> ir.Shape:
    """Return the shape [batch_size, last dimension]."""
    assert value.shape is not None
    last = value.shape[-1]
    assert isinstance(last, int), f"{name_of(value)}: last dimension {last}"
    return ir.Shape(["batch_size", last])
