"""Count the positions in the graph, from the cache slot at which each sequence is written.

Matches:

    RotaryEmbedding(x, cos, sin, position_ids)              position_ids: input, int64 [batch_size, sequence_length]

Becomes:

    positions = Unsqueeze(write_indices, 1) + Range(0, sequence_length)
    RotaryEmbedding(x, cos, sin, positions)                 write_indices: input, int64 [batch_size]

In a cache without left padding a token's position is its slot, so a second input could only contradict the first.
"""

from __future__ import annotations

import onnx_ir as ir

from olmo2_export.fuse.edit import constant, ensure_input, find_input, is_op, new_node, new_token_count

INT64 = ir.DataType.INT64
_NAME = "positions"


def write_index_positions(model: ir.Model) -> int:
    """Apply the rewrite; return the number of RotaryEmbedding nodes that now count for themselves."""
    graph = model.graph
    position_ids = find_input(graph, "position_ids")
    if position_ids is None or find_input(graph, "input_ids") is None:
        return 0
    uses = list(position_ids.uses())
    if not uses or any(not is_op(use.node, "RotaryEmbedding") or use.idx != 3 for use in uses):
        return 0
    places, _ = positions(graph)
    for use in uses:
        use.node.replace_input_with(use.idx, places)
    return len(uses)


def positions(graph: ir.Graph) -> tuple[ir.Value, ir.Node]:
    """Return the positions, int64 [batch_size, sequence_length], and the node that gives them; made once per graph."""
    for node in graph:
        if node.outputs[0].name == _NAME:
            return node.outputs[0], node
    write_indices = ensure_input(graph, "write_indices", ["batch_size"])
    zero, one = constant(graph, "zero", 0), constant(graph, "one", 1)
    axis = constant(graph, "axis_1", [1])
    count = new_token_count(graph)
    scalar = new_node("Squeeze", [count.outputs[0]], "sequence_length_scalar", INT64, [])
    steps = new_node("Range", [zero, scalar.outputs[0], one], "steps", INT64, ["sequence_length"])
    first = new_node("Unsqueeze", [write_indices, axis], "first_position", INT64, ["batch_size", 1])
    both = new_node("Add", [first.outputs[0], steps.outputs[0]], _NAME, INT64, ["batch_size", "sequence_length"])
    graph.insert_after(count, [scalar, steps, first, both])
    return both.outputs[0], both
