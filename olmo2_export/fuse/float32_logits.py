"""Give the logits as float32 whatever the precision of the graph.

Matches:

    logits = MatMul(x, lm_head)                     logits: output of the graph

Becomes:

    logits = Cast(MatMul(x, lm_head), float32)

so that sampling, and every runner, sees one type.
"""

from __future__ import annotations

import onnx_ir as ir

from olmo2_export.fuse.edit import is_op, new_cast


def float32_logits(model: ir.Model) -> int:
    """Apply the rewrite; return 1, or 0 if the output `logits`, or `score`, is not the result of a MatMul."""
    graph = model.graph
    for logits in graph.outputs:
        node = logits.producer()
        if logits.name not in ("logits", "score") or node is None or not is_op(node, "MatMul"):
            continue
        name = logits.name
        cast = new_cast(logits, f"{name}_float32", to_precision=False)
        graph.insert_after(node, cast)
        graph.outputs[graph.outputs.index(logits)] = cast.outputs[0]
        logits.name, cast.outputs[0].name = f"{name}_rounded", name
        return 1
    return 0
