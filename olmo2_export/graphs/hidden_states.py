"""Give hidden states of the new tokens as outputs of the portable graph, behind its answer.

Matches:

    x_N                                     what the embedding gives (0), or layer N, counted from 1
    logits = MatMul(Norm(some rows of x_L), head)

Becomes:

    hidden_states.N = Cast(x_N, float32)                    [batch_size, sequence_length, hidden]
    hidden_states.L = Cast(Norm(x_L), float32)              of all rows, L the number of layers
    logits          as before

so numbered, and the last one normed, as transformers' `output_hidden_states` has them. The Cast changes nothing here;
in a graph of another precision it gives float32, as logits have. The norm is a second node on the same weight, as what
gets logits may be one row of many.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx_ir as ir

from olmo2_export.architecture import FINAL_NORM, Operation, norm_operators
from olmo2_export.fuse.edit import new_cast, new_node
from olmo2_export.graphs.taps import find_segments
from runtimes.errors import FusionError
from runtimes.manifest import HIDDEN_STATES, ModelSpec, TensorSpec


def hidden_outputs(model: ModelSpec) -> Iterator[TensorSpec]:
    """Return the outputs, in order."""
    for number in model.hidden_states:
        shape = ("batch_size", "sequence_length", model.hidden_size)
        yield TensorSpec(f"{HIDDEN_STATES}.{number}", "float32", shape, "hidden_state")


def give_hidden_states(model: ir.Model, rows: Sequence[Operation], numbers: Sequence[int]) -> int:
    """Apply the rewrite; return how many outputs the graph got.

    Args:
        model: the traced graph; its answer is its first output.
        rows: of the model.
        numbers: of the hidden states, ascending.

    Raises:
        FusionError: the answer is not read from a norm.
        PackageError: the graph is not one of this exporter.
    """
    if not numbers:
        return 0
    graph = model.graph
    values = {value.name: value for node in graph for value in node.outputs}
    *parts, end = find_segments(model, rows)
    sources = [values[part.result] for part in parts]
    added = []
    for number in numbers:
        source = sources[number]
        if number == len(sources) - 1:
            source = _normed(graph, source, values[end.taps[FINAL_NORM]])
        cast = new_cast(source, f"{HIDDEN_STATES}.{number}", to_precision=False)
        producer = source.producer()
        assert producer is not None  # no layer gives an input
        graph.insert_after(producer, cast)
        added.append(cast.outputs[0])
    graph.outputs[1:1] = added
    return len(added)


def _normed(graph: ir.Graph, x: ir.Value, result: ir.Value) -> ir.Value:
    """Apply the norm that gives `result` to all rows."""
    node = result.producer()
    if node is None or node.op_type not in norm_operators():
        raise FusionError(f"graph {graph.name}: {result.name} is not the result of a norm")
    again = new_node(node.op_type, [x, *node.inputs[1:]], "normed_states", ir.DataType.FLOAT, x.shape)
    for name, attribute in node.attributes.items():
        again.attributes[name] = attribute
    graph.insert_before(node, again)
    return again.outputs[0]
