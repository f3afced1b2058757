"""Let a graph take vectors in the place of tokens.

Matches:

    x = Gather(W, input_ids)                            W: model.embed_tokens.weight

Becomes:

    found = Gather(W, Max(input_ids, 0))
    x     = Where(Unsqueeze(input_ids < 0, -1), inputs_embeds, found)

    inputs_embeds: float32 [vectors_batch, vectors_length, hidden], by default zeros [1, 1, hidden]

A graph has no input that is one of two, so that it has both, and an id that is none says which is meant: tokens and
vectors may stand in one call, mask, positions and pooling go on as they are, and a runtime that knows nothing of
vectors leaves the input out. Its dimensions have names of their own, as onnxruntime takes two values whose dimensions
are called alike to be of one size, and shares memory. A static-cache graph, whose compiler knows no defaults, must be
given one of [batch_size, sequence_length, hidden].

The input stays float32 in every precision, as numpy has no bfloat16; `set_precision` casts what comes of it.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from olmo2_export.architecture import EMBED
from olmo2_export.fuse.edit import constant, find_input, is_op, name_of, new_node
from runtimes.errors import FusionError
from runtimes.manifest import EMBEDDINGS, ModelSpec, TensorSpec

_OPTIONAL, _REQUIRED = ("vectors_batch", "vectors_length"), ("batch_size", "sequence_length")
INT64, FLOAT, BOOL = ir.DataType.INT64, ir.DataType.FLOAT, ir.DataType.BOOL


def embedding_input(model: ModelSpec, *, optional: bool = True) -> tuple[TensorSpec, ...]:
    """Return the input, where there is one."""
    shape = (*(_OPTIONAL if optional else _REQUIRED), model.hidden_size)
    return (TensorSpec(EMBEDDINGS, "float32", shape, "embeddings"),) if model.inputs_embeds else ()


def take_embeddings(model: ir.Model) -> int:
    """Apply the rewrite; return 1.

    Args:
        model: the traced graph.

    Raises:
        FusionError: no single node looks tokens up.
    """
    graph = model.graph
    ids, weight = find_input(graph, "input_ids"), graph.initializers.get(f"{EMBED}.weight")
    found = [use.node for use in weight.uses() if is_op(use.node, "Gather")] if weight is not None else []
    if ids is None or len(found) != 1 or found[0].inputs[1] is not ids:
        raise FusionError(f"graph {graph.name}: {len(found)} nodes look tokens up, expected 1")
    (gather,) = found
    old = gather.outputs[0]
    size = int(str(weight.shape[1])) if weight is not None and weight.shape is not None else 0
    zero, last = constant(graph, "zero", 0), constant(graph, "axis_last", [-1])
    known = new_node("Max", [ids, zero], "known_ids", INT64, ids.shape)
    given = new_node("Less", [ids, zero], "is_vector", BOOL, ids.shape)
    wide = new_node("Unsqueeze", [given.outputs[0], last], "is_vector_wide", BOOL, ["batch_size", "sequence_length", 1])
    vectors = ir.Value(name=EMBEDDINGS, type=ir.TensorType(FLOAT), shape=ir.Shape([*_OPTIONAL, size]))
    vectors.const_value = ir.tensor(np.zeros((1, 1, size), np.float32), name=EMBEDDINGS)
    graph.inputs.append(vectors)
    graph.register_initializer(vectors)
    chosen = new_node("Where", [wide.outputs[0], vectors, old], f"{name_of(old)}_or_vector", FLOAT, old.shape)
    old.replace_all_uses_with(chosen.outputs[0])
    chosen.replace_input_with(2, old)
    graph.insert_before(gather, [known, given, wide])
    graph.insert_after(gather, chosen)
    gather.replace_input_with(1, known.outputs[0])
    return 1


def require_embeddings(model: ir.Model) -> None:
    """Take the default away, where the input is there, and let it have as many rows and tokens as the ids have."""
    vectors = find_input(model.graph, EMBEDDINGS)
    if vectors is not None and vectors.is_initializer():
        del model.graph.initializers[EMBEDDINGS]
        vectors.const_value = None
        assert vectors.shape is not None  # `take_embeddings` gave it
        vectors.shape = ir.Shape([*_REQUIRED, vectors.shape[2]])
