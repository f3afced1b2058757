"""Keep some operations, and what they hand to each other, in float32 whatever the precision of the graph.

Matches, for each named operation:

    y = f(x, weight)                        f: a product, a norm, an addition, SiLU, the lookup of the embedding

Becomes:

    y = Cast(f(Cast(x, float32), weight), precision)                                   weight stays float32

without the first Cast where x is wide already, and without the second where y is to stay wide. All readers of one value
share its Cast. Between an operation and its reader there may be nodes that only move numbers; they follow along.

All of it has kernels for CUDA in float32: MatMul, Add, Mul, Sigmoid, Gather, Slice, Split, Cast both ways, and
RMSNormalization-23 with x and weight both float32 (core/providers/cuda/nn/rms_norm.cc). GroupQueryAttention has none,
nor has MatMulNBits: the pass refuses to widen what they read. A Cast is one small kernel whose shapes are those of its
value, so that a step can still be captured as a CUDA graph. The products are merged after this pass: those of one value
in one precision, so that a wide gate beside a narrow up costs a kernel more.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import onnx_ir as ir

from olmo2_export.architecture import Operation, find_kind
from olmo2_export.fuse.edit import IN_FLOAT32, is_op, name_of, new_cast
from runtimes.errors import FusionError, first_names
from runtimes.manifest import EMBEDDINGS

_MOVES = ("Slice", "GatherND", "Split", "Reshape", "Transpose", "Identity")


def float32_islands(
    model: ir.Model, rows: Iterable[Operation], operations: Collection[str], values: Collection[str]
) -> int:
    """Apply the rewrite; return the number of operations that compute in float32 now.

    Args:
        model: a shared-cache graph, before its products are merged and before `set_precision`.
        rows: of the model.
        operations: names of those that compute in float32; all readers of `values` are among them.
        values: names of those whose result stays float32 too.

    Raises:
        FusionError: an operation that the graph does not have, or a reader of a wide value that cannot be wide.
    """
    graph = model.graph
    found = {name: nodes for name, nodes in find_operations(graph, rows).items() if name in operations}
    if missing := sorted(set(operations) - found.keys()):
        raise FusionError(f"graph {graph.name}: no nodes of {first_names(missing)}, which are to be float32")
    owner = {node: name for name, nodes in found.items() for node in nodes}
    wide: set[ir.Value] = set()
    casts: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        name = owner.get(node)
        computed = [v for v in node.inputs if v is not None and v.dtype == ir.DataType.FLOAT and not v.is_initializer()]
        if name is None:
            if not wide.isdisjoint(computed):
                if node.op_type not in (*_MOVES, "Cast"):
                    raise FusionError(f"graph {graph.name}: {node.name}, {node.op_type}, would read float32")
                wide.update(node.outputs if node.op_type != "Cast" else ())
            continue
        for position, value in enumerate(node.inputs):
            if value is not None and value.name == EMBEDDINGS:
                node.meta[IN_FLOAT32] = True  # `set_precision` leaves vectors as they are given to it
                continue
            if value is None or value not in computed or value in wide:
                continue
            if value not in casts:
                cast = new_cast(value, f"{name_of(value)}_float32", to_precision=False)
                graph.insert_before(node, cast)
                casts[value] = cast.outputs[0]
            node.replace_input_with(position, casts[value])
        if not computed:
            node.meta[IN_FLOAT32] = True
        result = node.outputs[0]
        if node is not found[name][-1] or name in values:
            wide.add(result)
            continue
        down = new_cast(result, f"{name_of(result)}_rounded", to_precision=True)
        graph.insert_after(node, down)
        result.replace_all_uses_with(down.outputs[0])
        down.replace_input_with(0, result)
    return len(found)


def find_operations(graph: ir.Graph, rows: Iterable[Operation]) -> dict[str, list[ir.Node]]:
    """Return the nodes of each operation that the graph has, the last of which gives its value.

    What has a weight is found by its name, everything else by what it reads. Rotations, attention, and what reads them
    without a weight, are not looked for.
    """
    found: dict[str, list[ir.Node]] = {}
    values: dict[str, ir.Value] = {}
    for row in rows:
        operator = find_kind(row.kind).operator
        if operator is None:
            continue
        weight = graph.initializers.get(row.weight) if row.weight is not None else None
        read = [weight] if row.weight is not None else [values.get(name) for name in row.reads]
        nodes = [_reader(operator, *read)]
        if row.times > 1 and nodes[0] is None:  # applied to hidden states, too: the one with an answer comes last
            nodes = _readers(operator, *read)
        if row.kind == "gather" and nodes[0] is not None:  # a vector may stand in its place
            nodes += [n for n in (_reader("Where", nodes[0].outputs[0]),) if n is not None]
        if row.kind == "silu" and nodes[0] is not None:
            nodes.append(_reader("Mul", *read, nodes[0].outputs[0]))
        if row.bias is not None and nodes[0] is not None:
            nodes.append(_reader("Add", nodes[0].outputs[0], graph.initializers.get(row.bias)))
        whole = [node for node in nodes if node is not None]
        if len(whole) == len(nodes):
            found[row.name], values[row.name] = whole, whole[-1].outputs[0]
    return found


def _reader(op_type: str, *read: ir.Value | None) -> ir.Node | None:
    """Return the one node of that operator that reads all of these values."""
    nodes = _readers(op_type, *read)
    return nodes[0] if len(nodes) == 1 else None


def _readers(op_type: str, *read: ir.Value | None) -> list[ir.Node | None]:
    """Return the nodes of that operator that read all of these values, in the graph's order."""
    users = [{use.node for use in value.uses()} if value is not None else set() for value in read]
    both = set.intersection(*users)
    graph = next(iter(both)).graph if both else None
    return [node for node in graph or () if node in both and is_op(node, op_type)]
