"""Bugs of vectors in the place of tokens."""

from __future__ import annotations

import onnx_ir as ir
from support.bugs.edits import Bug, nodes
from support.bugs.hidden import state_node


def _choice(model: ir.Model) -> ir.Node:
    (node,) = (n for n in nodes(model, "Where") if (n.outputs[0].name or "").endswith("_or_vector"))
    return node


def vectors_ignored(model: ir.Model) -> None:
    """Each is the embedding of token 0."""
    node = _choice(model)
    node.replace_input_with(1, node.inputs[2])


def state_ignores_vectors(model: ir.Model) -> None:
    """Hidden state 0 is the embedding of tokens, and of token 0 for each vector; all logits are right."""
    state_node(model, "hidden_states.0").replace_input_with(0, _choice(model).inputs[2])


VECTOR_BUGS: list[Bug] = [vectors_ignored]
STATE_BUGS: list[Bug] = [state_ignores_vectors]
"""those of graphs that give hidden states, too"""
