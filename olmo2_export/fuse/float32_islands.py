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

from collections.abc import Collection, Iterator

import onnx_ir as ir

from olmo2_export.fuse.edit import IN_FLOAT32, is_op, name_of, new_cast
from runtimes.errors import FusionError, first_names

_MOVES = ("Slice", "Split", "Reshape", "Transpose", "Identity")


def float32_islands(model: ir.Model, operations: Collection[str], values: Collection[str]) -> int:
    """Apply the rewrite; return the number of operations that compute in float32 now.

    Args:
        model: a shared-cache graph, before its products are merged and before `set_precision`.
        operations: names out of `fp16.values.operations` that compute in float32; all readers of `values` are among
            them.
        values: names of those whose result stays float32 too.

    Raises:
        FusionError: an operation that the graph does not have, or a reader of a wide value that cannot be wide.
    """
    graph = model.graph
    found = {name: nodes for name, nodes in _operations(graph) if name in operations}
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


def _operations(graph: ir.Graph) -> Iterator[tuple[str, list[ir.Node]]]:
    """Yield the operations of `fp16.values.operations` that the graph has, each with its nodes; the last gives its
    value."""
    for node in graph:
        for value in node.inputs:
            name = value.name if value is not None and value.is_initializer() else None
            if name is None or not name.endswith(".weight"):
                continue
            operation = name.removesuffix(".weight")
            if is_op(node, "Gather") or is_op(node, "RMSNormalization"):
                yield operation, [node]
            elif is_op(node, "MatMul"):
                yield operation, [node, *_reader(node, "Add", f"{operation}.bias")]
            layer, _, last = operation.rpartition(".")
            if last in ("post_attention_layernorm", "post_feedforward_layernorm"):
                residual = "attention_residual" if "attention" in last else "mlp_residual"
                yield f"{layer}.{residual}", _reader(node, "Add")
            if last == "gate_proj":
                yield from _gated(layer, [node, *_reader(node, "Add", f"{operation}.bias")][-1])


def _reader(node: ir.Node, op_type: str, other: str | None = None) -> list[ir.Node]:
    """Return the one reader of a node's result that is that operator, and that reads the initializer `other`."""
    users = {use.node for use in node.outputs[0].uses() if is_op(use.node, op_type)}
    if other is not None:
        users = {user for user in users if any(v is not None and v.name == other for v in user.inputs)}
    return list(users) if len(users) == 1 else []


def _gated(mlp: str, gate: ir.Node) -> Iterator[tuple[str, list[ir.Node]]]:
    """Yield SiLU, Mul(gate, Sigmoid(gate)), and the product of that and up."""
    silu = [*_reader(gate, "Sigmoid"), *_reader(gate, "Mul")]
    yield f"{mlp}.act_fn", silu
    if silu:
        yield f"{mlp}.product", _reader(silu[-1], "Mul")
