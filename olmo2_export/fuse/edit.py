"""Small tools that the passes share: inputs, constants, typed nodes, casts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

TO_PRECISION = "to_precision"
"""`node.meta` of a Cast whose target is the precision of the graph, which `set_precision` fills in"""

IN_FLOAT32 = "in_float32"
"""`node.meta` of a node that reads no computed float, and gives float32 whatever the precision of the graph"""


def find_input(graph: ir.Graph, name: str) -> ir.Value | None:
    """Return the graph's input of that name."""
    return next((value for value in graph.inputs if value.name == name), None)


def ensure_input(graph: ir.Graph, name: str, shape: Sequence[int | str]) -> ir.Value:
    """Return the int64 input of that name; if there is none, add it after the first input."""
    found = find_input(graph, name)
    if found is None:
        found = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.INT64))
        graph.inputs.insert(1, found)
    return found


def is_dimension(graph: ir.Graph, node: ir.Node | None, axis: int, source: str = "input_ids") -> bool:
    """Tell whether a node gives that one dimension of an input; of input_ids 1 is the number of new tokens."""
    return (
        node is not None
        and is_op(node, "Shape")
        and node.inputs[0] is find_input(graph, source)
        and node.attributes.get_int("start", 0) == axis
        and node.attributes.get_int("end", -1) == axis + 1
    )


def new_token_count(graph: ir.Graph) -> ir.Node:
    """Return the node that gives the sequence length of this call, int64 [1]; added if it is not there yet."""
    for node in graph:
        if is_dimension(graph, node, 1):
            return node
    inputs = [find_input(graph, "input_ids")]
    node = new_node("Shape", inputs, "sequence_length", ir.DataType.INT64, [1], {"start": 1, "end": 2})
    graph.insert_before(next(iter(graph)), node)
    return node


def constant(
    graph: ir.Graph, name: str, data: float | Sequence[int], dtype: ir.DataType = ir.DataType.INT64
) -> ir.Value:
    """Return the initializer of that name, added if it is not there yet."""
    if name not in graph.initializers:
        tensor = ir.tensor(data, dtype=dtype, name=name)
        graph.register_initializer(
            ir.Value(name=name, const_value=tensor, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(dtype))
        )
    return graph.initializers[name]


def constant_ints(value: ir.Value | None) -> list[int] | None:
    """Return the content of a small int64 initializer that is not an input; None if it is something else."""
    if value is None or value.const_value is None or value.is_graph_input() or value.dtype != ir.DataType.INT64:
        return None
    return [int(i) for i in value.const_value.numpy().reshape(-1)]


def new_node(
    op_type: str,
    inputs: Sequence[ir.Value | None],
    output: str,
    dtype: ir.DataType,
    shape: ir.Shape | Sequence[int | str | ir.SymbolicDim | None] | None,
    attributes: Mapping[str, int | str] | None = None,
    domain: str = "",
) -> ir.Node:
    """Return a node, not yet in a graph, with one output of that name, dtype and shape."""
    value = ir.Value(name=output, type=ir.TensorType(dtype), shape=None if shape is None else ir.Shape(shape))
    return ir.node(op_type, inputs, attributes, domain=domain, outputs=[value], name=f"node_{output}")


def new_cast(value: ir.Value, output: str, *, to_precision: bool) -> ir.Node:
    """Return a Cast of a float value, to float32; `set_precision` changes that if it is marked `to_precision`."""
    node = new_node("Cast", [value], output, ir.DataType.FLOAT, value.shape, {"to": int(ir.DataType.FLOAT)})
    if to_precision:
        node.meta[TO_PRECISION] = True
    return node


def is_op(node: ir.Node | None, op_type: str) -> bool:
    """Tell whether the node is that operator of the default domain."""
    return node is not None and node.op_type == op_type and node.domain == ""


def only_user(value: ir.Value) -> ir.Node | None:
    """Return the one node that reads the value; None if several do, or if it is an output of the graph."""
    users = {use.node for use in value.uses()}
    return users.pop() if len(users) == 1 and not value.is_graph_output() else None


def name_of(value: ir.Value) -> str:
    """Return the value's name, which every value of a loaded or traced graph has."""
    assert value.name is not None
    return value.name
