"""Let one token of each sequence reach the final norm and the head: the last that is no padding.

Matches:

    x'     = Slice(x, -num_logits_to_keep, end, axis 1)     x: [batch_size, sequence_length, hidden]
    logits = MatMul(Norm(x'), score)                        [batch_size, num_logits, labels]

Becomes:

    real   = Cast(Not(Equal(input_ids, pad)), float32)      [batch_size, sequence_length]
    last   = Cast(ReduceMax(real * Range(0, sequence_length), axis 1), int64)       [batch_size, 1]
    x'     = GatherND(x, last, batch_dims=1)
    score  = MatMul(Norm(x'), score)                        [batch_size, labels]

The rule of transformers: the largest i with input_ids[i] != pad, 0 where all are padding, whatever the mask says. A pad
of -1 is no token's id: the last token. Counted in float32, exact up to 2^24 tokens, as in `float32_lengths`.

Source: transformers, modeling_layers.py, GenericForSequenceClassification.
"""

from __future__ import annotations

import onnx_ir as ir

from olmo2_export.fuse.drop_unused import drop_unused
from olmo2_export.fuse.edit import constant, find_input, new_node, new_token_count
from olmo2_export.fuse.gather_logit_row import find_slice, take_row

POOLED = "pooled_token"
"""the name of the index, int64 [batch_size, 1]"""
NO_PADDING = -1
INT64, FLOAT, BOOL = ir.DataType.INT64, ir.DataType.FLOAT, ir.DataType.BOOL


def pooled_row(model: ir.Model, pad: int) -> int:
    """Apply the rewrite; return 1, or 0 if the graph does not end in this way.

    Args:
        model: the traced graph; its output is named `score` then.
        pad: the id of padding, or NO_PADDING.
    """
    graph = model.graph
    node, ids = find_slice(graph), find_input(graph, "input_ids")
    if node is None or ids is None:
        return 0
    rows: list[int | str] = ["batch_size", "sequence_length"]
    zero, one, axis = constant(graph, "zero", 0), constant(graph, "one", 1), constant(graph, "axis_1", [1])
    padding = new_node("Equal", [ids, constant(graph, "pad_token_id", pad)], "is_padding", BOOL, rows)
    real = new_node("Not", [padding.outputs[0]], "is_token", BOOL, rows)
    weight = new_node("Cast", [real.outputs[0]], "is_token_float32", FLOAT, rows, {"to": int(FLOAT)})
    count = new_token_count(graph)
    scalar = new_node("Squeeze", [count.outputs[0]], "token_count", INT64, [])
    steps = new_node("Range", [zero, scalar.outputs[0], one], "token_indices", INT64, ["sequence_length"])
    wide = new_node("Cast", [steps.outputs[0]], "token_indices_float32", FLOAT, ["sequence_length"], {"to": int(FLOAT)})
    places = new_node("Mul", [weight.outputs[0], wide.outputs[0]], "token_places", FLOAT, rows)
    last = new_node("ReduceMax", [places.outputs[0], axis], "last_token", FLOAT, ["batch_size", 1], {"keepdims": 1})
    index = new_node("Cast", [last.outputs[0]], POOLED, INT64, ["batch_size", 1], {"to": int(INT64)})
    graph.insert_before(node, [padding, real, weight, scalar, steps, wide, places, last, index])
    take_row(graph, node, index.outputs[0])
    graph.outputs[0].name = "score"
    drop_unused(model)
    return 1
