"""The static-cache graph at its first call, for tools that know nothing of a cache written in place.

Matches:

    present = TensorScatter(past, new, write_indices)       past, write_indices: inputs; present: output

Becomes:

    present = Concat(new, zeros, axis 2)            zeros: [batch, kv_heads, max_cache_length - tokens, head_dim]

with a batch of one and a fixed number of tokens. That is what the scatter gives where the cache is empty; nothing else
changes, and past and write_indices, now zeros, are no inputs any more.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from olmo2_export.dtypes import HALVES
from olmo2_export.fuse.edit import constant, find_input, is_op, new_cast
from runtimes.errors import FusionError
from runtimes.manifest import EMBEDDINGS


def first_call(model: ir.Model, tokens: int) -> int:
    """Apply the rewrite, in place, and give every intermediate float as an output; return the caches rewritten.

    Args:
        model: a static-cache graph.
        tokens: of the call.

    Raises:
        FusionError: it has no input write_indices.
    """
    graph = model.graph
    write_indices = find_input(graph, "write_indices")
    if write_indices is None:
        raise FusionError(f"graph {graph.name}: no input write_indices; it is not a static-cache graph")
    rewritten = 0
    for node in list(graph):
        if not is_op(node, "TensorScatter"):
            continue
        past, new, _ = node.inputs
        present = node.outputs[0]
        assert past is not None  # the operator needs them
        assert new is not None
        assert present.shape is not None
        _, heads, capacity, head_dim = (int(d) if isinstance(d, int) else 0 for d in present.shape)
        zeros = np.zeros((1, heads, capacity - tokens, head_dim), past.dtype.numpy() if past.dtype else np.float32)
        name = f"no_tokens_{heads}_{head_dim}"
        if name not in graph.initializers:
            tensor = ir.tensor(zeros, name=name)
            value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(zeros.shape), type=past.type)
            graph.register_initializer(value)
        concat = ir.node("Concat", [new, graph.initializers[name]], {"axis": 2}, name=node.name)
        result = concat.outputs[0]
        result.name, result.type, result.shape = present.name, present.type, present.shape
        graph.insert_before(node, concat)
        present.replace_all_uses_with(result, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        rewritten += 1
    write_indices.replace_all_uses_with(constant(graph, "first_slot", [0]))
    vectors = find_input(graph, EMBEDDINGS)
    if vectors is not None and vectors.shape is not None:
        size = int(str(vectors.shape[2]))
        tensor = ir.tensor(np.zeros((1, 1, size), np.float32), name="no_vectors")
        none = ir.Value(name="no_vectors", const_value=tensor, shape=ir.Shape([1, 1, size]), type=vectors.type)
        graph.register_initializer(none)
        vectors.replace_all_uses_with(none)
    fixed = {"input_ids": [1, tokens], "logit_index": [1, 1]}
    kept = [value for value in graph.inputs if value.name in fixed]
    graph.inputs.clear()
    graph.inputs.extend(kept)
    for value in kept:
        value.shape = ir.Shape(fixed[str(value.name)])
    _expose(graph)
    return rewritten


def at_first_call(graph: ir.Model, tokens: int) -> ir.Model:
    """Return a static-cache graph at its first call, which knows nothing of a cache that is written in place."""
    form = graph.clone()
    first_call(form, tokens)
    return form


def float32_name(name: str) -> str:
    """Return the name of the output that has a value of fewer bits in float32."""
    return f"{name}.float32"


def _expose(graph: ir.Graph) -> None:
    """Make every float an output, in float32; tools in numpy have no bfloat16."""
    names = {value.name for node in graph for value in node.outputs}
    for node in list(graph):
        for value in node.outputs:
            value.shape = None  # of one row now; the tools infer it
            if value.is_graph_output():
                continue
            if value.dtype == ir.DataType.FLOAT:
                graph.outputs.append(value)
            elif value.dtype in HALVES and value.name is not None and not value.name.endswith(".rounded"):
                name = float32_name(value.name)
                if name not in names:
                    cast = new_cast(value, name, to_precision=False)
                    graph.insert_after(node, cast)
                    graph.outputs.append(cast.outputs[0])
