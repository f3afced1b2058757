"""Bugs of the hidden states that a graph gives."""

from __future__ import annotations

import onnx_ir as ir
from support.bugs.edits import Bug


def state_node(model: ir.Model, name: str) -> ir.Node:
    """Return what gives an output in float32, be it cast before."""
    value = next(v for v in model.graph.outputs if v.name == name)
    node = value.producer()
    assert node is not None
    return node


def state_of_the_next_layer(model: ir.Model) -> None:
    """The output of layer 2 for that of layer 1: the numbers are those of transformers but for one."""
    wrong, right = state_node(model, "hidden_states.2"), state_node(model, "hidden_states.1")
    source = wrong.inputs[0]
    right.replace_input_with(0, source)
    model.graph.remove(right)
    model.graph.insert_after(wrong, right)


def last_state_without_its_norm(model: ir.Model) -> None:
    cast = state_node(model, "hidden_states.3")
    value = cast.inputs[0]
    while value is not None and value.producer() is not None and "Norm" not in value.producer().op_type:  # type: ignore[union-attr]
        value = value.producer().inputs[0]  # type: ignore[union-attr]
    assert value is not None
    norm = value.producer()
    assert norm is not None
    cast.replace_input_with(0, norm.inputs[0])


HIDDEN_BUGS: list[Bug] = [state_of_the_next_layer, last_state_without_its_norm]
