"""Count the tokens of each row in float32.

Matches:

    cache_lengths = ReduceSum(attention_mask, axis 1)                       int64

Becomes:

    cache_lengths = Cast(ReduceSum(Cast(attention_mask, float32), axis 1), int64)

which is exact up to 2^24 tokens. onnxruntime's CUDA kernel sums int64 through cuDNN, and float32 by itself.

Source: onnxruntime, onnxruntime/core/providers/cuda/reduction/reduction_ops.cc.
"""

from __future__ import annotations

import onnx_ir as ir

from olmo2_export.fuse.edit import find_input, is_op, name_of, new_node

INT64, FLOAT = ir.DataType.INT64, ir.DataType.FLOAT


def float32_lengths(model: ir.Model) -> int:
    """Apply the rewrite everywhere it matches; return the number of sums rewritten."""
    graph = model.graph
    mask = find_input(graph, "attention_mask")
    rewritten = 0
    for node in list(graph):
        if mask is None or not is_op(node, "ReduceSum") or node.inputs[0] is not mask:
            continue
        total = node.outputs[0]
        up = new_node("Cast", [mask], "attention_mask_float32", FLOAT, mask.shape, {"to": int(FLOAT)})
        down = new_node("Cast", [total], f"{name_of(total)}_int64", INT64, total.shape, {"to": int(INT64)})
        total.type = ir.TensorType(FLOAT)
        graph.insert_before(node, up)
        graph.insert_after(node, down)
        node.replace_input_with(0, up.outputs[0])
        total.replace_all_uses_with(down.outputs[0])
        down.replace_input_with(0, total)
        rewritten += 1
    return rewritten
