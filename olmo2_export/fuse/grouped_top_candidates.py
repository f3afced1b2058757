"""Let the graph pick the likeliest tokens of every row of logits, in two steps that a GPU can spread out.

Matches:

    logits                                                       first output of the graph, [batch_size, n, vocab_size]

Becomes:

    logits
    top_logits, top_ids = TopK(logits, k)                        outputs [batch_size, n, k], after `logits`

where the vocabulary is cut into G groups of at most `GROUP` tokens, if it can be:

    values, places = TopK(Reshape(logits, [0, 0, G, vocab_size / G]), k)
    top_logits, picked = TopK(Reshape(values, [0, 0, G * k]), k)
    top_ids = GatherElements(Reshape(places + [0, 1, ...] * vocab_size / G, [0, 0, G * k]), picked)

onnxruntime's CUDA kernel gives each row of a TopK to one block of threads: over 100,352 logits in one row that is one
of the GPU's processors, several times over. Among equal logits the lower id is first.

Source: onnxruntime, onnxruntime/core/providers/cuda/math/topk_impl.cuh.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from olmo2_export.fuse.edit import constant, new_node

GROUP = 2048
"""logits that one block of threads looks through"""

INT64 = ir.DataType.INT64


def grouped_top_candidates(model: ir.Model, k: int, group: int = GROUP) -> int:
    """Apply the rewrite; return 1, or 0 if the first output is not such logits or the candidates are there already.

    Args:
        model: gets the outputs `top_ids`, int64 [batch_size, num_logits, k], and `top_logits`, of the logits' dtype.
        k: candidates per row.
        group: logits per group, at most.
    """
    graph = model.graph
    logits = graph.outputs[0]
    names = {value.name for value in graph.outputs}
    if logits.name != "logits" or logits.shape is None or len(logits.shape) != 3 or "top_ids" in names:
        return 0
    batch, count, vocab_size = logits.shape
    if not isinstance(vocab_size, int):
        return 0
    groups = _groups(vocab_size, k, group)
    nodes: list[ir.Node] = []
    source, places = logits, None
    if groups > 1:
        width = vocab_size // groups
        cut = _reshape(graph, logits, "logits_grouped", [0, 0, groups, width], [batch, count, groups, width])
        best, inner = _top(graph, cut.outputs[0], k, "group")
        offsets = ir.tensor(np.arange(groups, dtype=np.int64)[:, None] * width, name="group_offsets")
        table = ir.Value(
            name="group_offsets", const_value=offsets, shape=ir.Shape([groups, 1]), type=ir.TensorType(INT64)
        )
        graph.register_initializer(table)
        ids = new_node("Add", [inner, table], "group_ids_whole", INT64, inner.shape)
        flat = [batch, count, groups * k]
        values = _reshape(graph, best, "group_logits_flat", [0, 0, groups * k], flat)
        whole = _reshape(graph, ids.outputs[0], "group_ids_flat", [0, 0, groups * k], flat)
        producer = best.producer()
        assert producer is not None  # just made
        nodes += [cut, producer, ids, values, whole]
        source, places = values.outputs[0], whole.outputs[0]
    top_logits, top_ids = _top(graph, source, k, "top")
    producer = top_logits.producer()
    assert producer is not None  # just made
    nodes.append(producer)
    if places is not None:
        top_ids.name = "top_places"
        gather = new_node("GatherElements", [places, top_ids], "top_ids", INT64, top_ids.shape, {"axis": -1})
        nodes.append(gather)
        top_ids = gather.outputs[0]
    graph.extend(nodes)
    graph.outputs[1:1] = [top_ids, top_logits]
    return 1


def _groups(vocab_size: int, k: int, group: int) -> int:
    """Return the smallest number of equal groups that are small enough and hold k logits each; 1 if there is none."""
    fitting = (n for n in range(1, vocab_size // k + 1) if vocab_size % n == 0 and vocab_size // n <= group)
    return next(fitting, 1)


def _top(graph: ir.Graph, values: ir.Value, k: int, name: str) -> tuple[ir.Value, ir.Value]:
    """Return the k largest along the last axis and their places, of a node that is not yet in the graph."""
    assert values.shape is not None  # given by whoever made it
    assert values.dtype is not None
    shape = ir.Shape([*list(values.shape)[:-1], k])
    best = ir.Value(name=f"{name}_logits", type=ir.TensorType(values.dtype), shape=shape)
    places = ir.Value(name=f"{name}_ids", type=ir.TensorType(INT64), shape=shape)
    ir.node(
        "TopK",
        [values, constant(graph, "top_k", [k])],
        {"axis": -1, "largest": 1, "sorted": 1},
        outputs=[best, places],
        name=f"node_{name}_candidates",
    )
    return best, places


def _reshape(
    graph: ir.Graph,
    value: ir.Value,
    name: str,
    sizes: Sequence[int],
    shape: Sequence[int | str | ir.SymbolicDim | None],
) -> ir.Node:
    assert value.dtype is not None  # that of the logits, or of ids
    target = constant(graph, f"{name}_shape", sizes)
    return new_node("Reshape", [value, target], name, value.dtype, shape)
