"""Let the graph pick the likeliest tokens itself, so that a runner on a device need not move all logits.

Matches:

    logits                                                              output of the graph, [batch_size, vocab_size]

Becomes:

    logits
    top_logits, top_ids = TopK(logits, k, axis=-1, largest=1, sorted=1)   outputs, [batch_size, k], after `logits`

Among equal logits the lower id is first, as the operator says and as ArgMax has it.
"""

from __future__ import annotations

import onnx_ir as ir

from olmo2_export.fuse.edit import constant


def top_candidates(model: ir.Model, k: int) -> int:
    """Apply the rewrite; return 1, or 0 if the first output is not such logits or the candidates are there already.

    Args:
        model: gets the outputs `top_ids`, int64 [batch_size, k], and `top_logits`, of the logits' dtype.
        k: candidates per row, at most the vocabulary.
    """
    graph = model.graph
    logits = graph.outputs[0]
    names = {value.name for value in graph.outputs}
    if logits.name != "logits" or logits.shape is None or len(logits.shape) != 2 or "top_ids" in names:
        return 0
    shape = ir.Shape([logits.shape[0], k])
    top_logits = ir.Value(name="top_logits", type=logits.type, shape=shape)
    top_ids = ir.Value(name="top_ids", type=ir.TensorType(ir.DataType.INT64), shape=shape)
    count = constant(graph, "top_k", [k])
    node = ir.node(
        "TopK",
        [logits, count],
        {"axis": -1, "largest": 1, "sorted": 1},
        outputs=[top_logits, top_ids],
        name="node_top_candidates",
    )
    graph.append(node)
    graph.outputs[1:1] = [top_ids, top_logits]
    return 1
