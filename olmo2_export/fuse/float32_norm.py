"""Compute norms in float32 whatever the precision of the graph.

Matches:

    y = RMSNormalization(x, weight)         or LayerNormalization

Becomes:

    y = Cast(RMSNormalization(Cast(x, float32), weight), precision)        weight stays float32

The squares of a float16 x overflow from |x| = 256 on. The weight is multiplied before the rounding, as the model was
trained. In a float32 graph both casts do nothing, and are there so that all precisions are one graph.
Source: transformers, Olmo2RMSNorm.
"""

from __future__ import annotations

import onnx_ir as ir

from olmo2_export.architecture import norm_operators
from olmo2_export.fuse.edit import TO_PRECISION, is_op, name_of, new_cast


def float32_norm(model: ir.Model) -> int:
    """Apply the rewrite everywhere it matches; return the number of norms rewritten."""
    graph = model.graph
    rewritten, operators = 0, norm_operators()
    for node in list(graph):
        if not any(is_op(node, operator) for operator in operators) or _is_done(node):
            continue
        x, y = node.inputs[0], node.outputs[0]
        assert x is not None  # every norm requires it
        up = new_cast(x, f"{name_of(y)}_input_float32", to_precision=False)
        down = new_cast(y, f"{name_of(y)}_rounded", to_precision=True)
        graph.insert_before(node, up)
        graph.insert_after(node, down)
        node.replace_input_with(0, up.outputs[0])
        y.replace_all_uses_with(down.outputs[0])
        down.replace_input_with(0, y)
        rewritten += 1
    return rewritten


def _is_done(node: ir.Node) -> bool:
    x = node.inputs[0]
    producer = x.producer() if x is not None else None
    return producer is not None and is_op(producer, "Cast") and TO_PRECISION not in producer.meta
