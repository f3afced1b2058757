"""Bugs of what stands behind the layers of a classifier."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from support.bugs.edits import Bug, constant, nodes


def _pick(model: ir.Model) -> ir.Node:
    (node,) = (n for n in nodes(model, "GatherND") if n.attributes.get_int("batch_dims", 0) == 1)
    return node


def pooled_at_the_last_token(model: ir.Model) -> None:
    """Padding or not. In a graph for TensorRT, which has no padding: behind the one that it is told."""
    pick = _pick(model)
    index = pick.inputs[1]
    assert index is not None
    tokens = next(v for v in model.graph.inputs if v.name == "input_ids")
    length = ir.node("Shape", [tokens], {"start": 1, "end": 2})
    last = ir.node("Sub", [length.outputs[0], constant(model, "one_wrong", np.array([1]))])
    none = ir.node("Mul", [index, constant(model, "zero_wrong", np.array([0]))])
    both = ir.node("Add", [none.outputs[0], last.outputs[0]])
    model.graph.insert_before(pick, [length, last, none, both])
    pick.replace_input_with(1, both.outputs[0])


def pooled_at_the_first_token(model: ir.Model) -> None:
    pick = _pick(model)
    index = pick.inputs[1]
    assert index is not None
    none = ir.node("Mul", [index, constant(model, "zero_wrong", np.array([0]))])
    model.graph.insert_before(pick, none)
    pick.replace_input_with(1, none.outputs[0])


def pooled_where_the_first_row_is(model: ir.Model) -> None:
    """Right for every row alone."""
    pick = _pick(model)
    index = pick.inputs[1]
    assert index is not None
    bounds = [constant(model, f"{name}_wrong", np.array([at])) for name, at in (("start", 0), ("stop", 1), ("axis", 0))]
    first = ir.node("Slice", [index, *bounds])
    none = ir.node("Mul", [index, constant(model, "zero_wrong", np.array([0]))])
    every = ir.node("Add", [none.outputs[0], first.outputs[0]])
    model.graph.insert_before(pick, [first, none, every])
    pick.replace_input_with(1, every.outputs[0])


def labels_swapped(model: ir.Model) -> None:
    value = model.graph.initializers["score.weight"]
    assert value.const_value is not None
    value.const_value = ir.tensor(value.const_value.numpy()[:, ::-1].copy(), dtype=value.dtype, name=value.name)


HEAD_BUGS: list[Bug] = [
    pooled_at_the_last_token,
    pooled_at_the_first_token,
    pooled_where_the_first_row_is,
    labels_swapped,
]
