"""Give a graph that was traced with one layer of each kind all layers of the model.

PyTorch's exporter takes most of a second a layer, and layers of one kind differ in nothing but their numbers. So what
is traced has one of each kind, in the order in which the model has them first, and

    x_1 = layer_0(x_0, past_key_values.0)    the first kind
    x_2 = layer_1(x_1, past_key_values.1)    the second, if there is one

becomes x_N+1 = layer_N(x_N, past_key_values.N) for each layer N of the model: a copy of its kind's nodes, with weights,
cache and names of its own. What no layer's input reaches, such as masks and RoPE tables, is there once, as before.
"""

from __future__ import annotations

import re
from collections.abc import MutableSequence
from dataclasses import replace
from itertools import groupby

import onnx_ir as ir

from olmo2_export.architecture import operations
from olmo2_export.config import ModelConfig
from olmo2_export.fuse.edit import name_of
from olmo2_export.graphs.taps import find_segments

_NUMBERED = re.compile(r"(model\.layers|past_key_values|present)\.(\d+)\.")


def one_of_each_kind(config: ModelConfig) -> ModelConfig:
    """Return the config of a model with the first layer of each kind alone."""
    kinds = tuple(dict.fromkeys(config.layer_types))
    return replace(config, num_hidden_layers=len(kinds), layer_types=kinds)


def repeat_layers(model: ir.Model, config: ModelConfig) -> None:
    """Apply the rewrite, in place.

    Args:
        model: the portable graph of `one_of_each_kind(config)`; its initializers have no data.
        config: of the model.

    Raises:
        PackageError: the graph is not one of this exporter.
    """
    traced, graph = one_of_each_kind(config), model.graph
    values = {name_of(value): value for node in graph for value in node.outputs}
    _, *parts, _ = find_segments(model, operations(traced))
    hidden = [values[part.source or ""] for part in parts]
    end = values[parts[-1].result or ""]
    reached = [_reached(graph, value) for value in (*hidden, end)]
    nodes = [[node for node in graph if node in reached[i] - reached[i + 1]] for i in range(len(parts))]
    inputs, outputs, weights = list(graph.inputs), list(graph.outputs), list(graph.initializers.values())

    made: list[ir.Node] = []
    copies: list[dict[ir.Value, ir.Value]] = []
    state = hidden[0]
    for layer, kind in enumerate(config.layer_types):
        number = traced.layer_types.index(kind)
        copied = {value: _like(value, layer) for value in (*inputs, *weights) if _number(value) == number}
        copied[hidden[number]] = state
        made += [_copy(node, layer, copied) for node in nodes[number]]
        copies.append(copied)
        state = copied[values[parts[number].result or ""]]
    graph.insert_before(next(node for node in graph if node in reached[-1]), made)
    end.replace_all_uses_with(state)
    _spread(graph.outputs, outputs, copies)
    graph.remove([node for kind in nodes for node in kind], safe=True)
    _spread(graph.inputs, inputs, copies)
    graph.initializers.clear()
    spread: list[ir.Value] = []
    _spread(spread, weights, copies)
    graph.initializers.update({name_of(value): value for value in spread})


def _reached(graph: ir.Graph, value: ir.Value) -> set[ir.Node]:
    """Return the nodes that a value has an effect on."""
    found: set[ir.Node] = set()
    affected = {value}
    for node in graph:
        if affected & set(node.inputs):
            found.add(node)
            affected.update(node.outputs)
    return found


def _number(value: ir.Value) -> int | None:
    """Return which layer a weight, input or output is of."""
    match = _NUMBERED.match(name_of(value))
    return int(match[2]) if match else None


def _like(value: ir.Value, layer: int) -> ir.Value:
    """Return a value of another layer that has the same place there."""
    name, match = name_of(value), _NUMBERED.match(name_of(value))
    named = f"{match[1]}.{layer}.{name[match.end() :]}" if match else f"layers.{layer}.{name}"
    copy = ir.Value(name=named, type=value.type, shape=value.shape and value.shape.copy())
    copy.meta.update(value.meta)
    return copy


def _copy(node: ir.Node, layer: int, copied: dict[ir.Value, ir.Value]) -> ir.Node:
    """Copy a node into a layer, and note the copies of what it gives."""
    inputs = [None if value is None else copied.get(value, value) for value in node.inputs]
    outputs = [_like(value, layer) for value in node.outputs]
    copied.update(zip(node.outputs, outputs, strict=True))
    name = f"node_layers.{layer}.{(node.name or '').removeprefix('node_')}"  # as others: after what it gives
    return ir.Node(node.domain, node.op_type, inputs, node.attributes.values(), outputs=outputs, name=name)


def _spread(into: MutableSequence[ir.Value], old: list[ir.Value], copies: list[dict[ir.Value, ir.Value]]) -> None:
    """Write values anew: where some are of layers, those of all layers."""
    into.clear()
    for of_layers, run in groupby(old, key=lambda value: _number(value) is not None):
        values = list(run)
        into.extend([copied[v] for copied in copies for v in values if v in copied] if of_layers else values)
