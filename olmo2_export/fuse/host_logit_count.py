"""Compute on the host which rows of logits are kept, for a runtime that has the rest of the graph on a GPU.

Matches:

    Slice(x, Reshape(Neg(num_logits_to_keep)), ...)

Becomes:

    Slice(x, sequence_length - num_logits_to_keep - sequence_length, ...)    sequence_length = Shape(input_ids)[1:2]

Slice reads its start on the host. onnxruntime keeps small integers there that come from a Shape, and the graph's inputs
that meet them; a Neg of an input alone it puts on the GPU, and its result has to be copied back, which no CUDA graph
can hold.

Source: onnxruntime, onnxruntime/core/framework/fallback_cpu_capability.cc.
"""

from __future__ import annotations

import onnx_ir as ir

from olmo2_export.fuse.edit import find_input, is_op, new_node, new_token_count

INT64 = ir.DataType.INT64


def host_logit_count(model: ir.Model) -> int:
    """Apply the rewrite everywhere it matches; return the number of starts rewritten."""
    graph = model.graph
    keep = find_input(graph, "num_logits_to_keep")
    rewritten = 0
    for node in list(graph):
        start = node.inputs[1] if is_op(node, "Slice") and len(node.inputs) > 1 else None
        shaped = start.producer() if start is not None else None
        if keep is None or shaped is None or shaped.inputs[0] is None or not is_op(shaped, "Reshape"):
            continue
        negated = shaped.inputs[0].producer()
        if negated is None or not is_op(negated, "Neg") or negated.inputs[0] is not keep:
            continue
        length = new_token_count(graph).outputs[0]
        dropped = new_node("Sub", [length, keep], "num_logits_dropped", INT64, [1])
        first = new_node("Sub", [dropped.outputs[0], length], "first_logit", INT64, [1])
        graph.insert_before(node, [dropped, first])
        node.replace_input_with(1, first.outputs[0])
        rewritten += 1
    return rewritten
