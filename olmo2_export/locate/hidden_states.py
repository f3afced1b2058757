"""Which value of a graph each of its hidden states is, told from the graph itself: they are passed on, not computed."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from olmo2_export.architecture import FINAL_NORM, Operation, norm_operators, operations
from olmo2_export.config import ModelConfig
from olmo2_export.fuse.edit import name_of
from olmo2_export.graphs.taps import find_segments
from olmo2_export.locate.layer_checks import TensorParity
from olmo2_export.stored_graph import load_graph
from runtimes import Package
from runtimes.manifest import HIDDEN_STATES, Variant

STATE = "hidden state"
"""the operation that `Location` names"""


def wrong_hidden_state(model: ir.Model, rows: Sequence[Operation]) -> tuple[str, str] | None:
    """Return the first output that is not the hidden state it is called, and what it is instead; None: all are.

    Args:
        model: a stored graph, in any form.
        rows: of the model.
    """
    outputs = {str(v.name): v for v in model.graph.outputs if str(v.name).startswith(f"{HIDDEN_STATES}.")}
    if not outputs:
        return None
    values = {name_of(v): v for node in model.graph for v in node.outputs if v.name}
    *parts, end = find_segments(model, rows)
    sources = [_uncast(values[str(part.result)]) for part in parts]
    last = len(sources) - 1
    for name, value in outputs.items():
        number, found = int(name.rpartition(".")[2]), _uncast(value)
        normed = None
        node = found.producer()
        if number == last and node is not None and node.op_type in norm_operators() and node.inputs[0] is not None:
            normed, found = node, _uncast(node.inputs[0])
        place = next((n for n, source in enumerate(sources) if source is found), None)
        if place != number:
            return name, _what(place, last)
        if number != last:
            continue
        if normed is None:
            return name, "it is what the last layer gives, without the last norm"
        answer = _uncast(values[end.taps[FINAL_NORM]]).producer()
        if answer is not None and _parameters(answer) != _parameters(normed):
            return name, "its norm has another weight, epsilon or axis than the last norm"
    return None


def hidden_states_check(package: Package, entry: Variant, config: ModelConfig) -> tuple[TensorParity, str] | None:
    """Look whether each hidden state of a variant's graphs is the one that it is called; return what is wrong."""
    portable = [] if entry.portable is None else [entry.portable.graph]
    for graph in (*(each.graph for each in entry.each_graph), *portable):
        found = wrong_hidden_state(load_graph(package.folder / graph), operations(config))
        if found is not None:
            name, what = found
            return TensorParity(name, None, STATE, 1.0, 0.0), f"In {graph}, the output {name} is another value: {what}."
    return None


def _what(place: int | None, last: int) -> str:
    if place is None:
        return "it is no value between two layers"
    return "it is the embedding" if place == 0 else f"it is what layer {place} of {last} gives"


def _parameters(norm: ir.Node) -> tuple[str | None, float, int]:
    weight, attributes = norm.inputs[1], norm.attributes
    name = None if weight is None else _uncast(weight).name
    return name, attributes.get_float("epsilon", 1e-5), attributes.get_int("axis", -1)


def _uncast(value: ir.Value) -> ir.Value:
    while (node := value.producer()) is not None and node.op_type == "Cast" and node.inputs[0] is not None:
        value = node.inputs[0]
    return value
