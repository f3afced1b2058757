"""Layers that are copied compute what layers that are traced do: the graph is the same but for names inside it."""

from __future__ import annotations

import hashlib
from typing import Any

import onnx_ir as ir
import pytest
from support.checkpoints import OLMO3, SHAPE

from olmo2_export.architecture import operations
from olmo2_export.config import ModelConfig
from olmo2_export.graphs import trace as trace_module
from olmo2_export.graphs.repeat_layers import one_of_each_kind
from olmo2_export.graphs.taps import find_segments
from olmo2_export.graphs.trace import trace

SLIDING, FULL = "sliding_attention", "full_attention"
SHAPES: dict[str, dict[str, Any]] = {
    "olmo": {"model_type": "olmo", "clip_qkv": 4.0},
    "olmo2": {"model_type": "olmo2", "attention_bias": True},
    "score": {"model_type": "olmo2", "architectures": ["Olmo2ForSequenceClassification"], "num_labels": 3},
    "one layer": {"model_type": "olmo2", "num_hidden_layers": 1},
    "full first": OLMO3 | {"num_hidden_layers": 4, "layer_types": [FULL, SLIDING, SLIDING, FULL]},
    "sliding first": OLMO3 | {"num_hidden_layers": 3, "layer_types": [SLIDING, FULL, SLIDING]},
}


def meaning(graph: ir.Graph) -> dict[str, str]:
    """Return a hash of how each output is computed, from the names of inputs and weights on: of operators, attributes
    and constants, types and shapes."""
    known = {
        value: repr((None if value.const_value is None else value.const_value.numpy().tolist(), value.dtype))
        if value.const_value is not None and value not in graph.inputs
        else repr((value.name, value.dtype, value.shape, value.meta.get("transposed")))
        for value in (*graph.inputs, *graph.initializers.values())
    }
    for node in graph:
        inputs = [known[value] if value else None for value in node.inputs]
        attributes = sorted((a.name, str(a.value)) for a in node.attributes.values())
        for index, value in enumerate(node.outputs):
            said = repr((node.domain, node.op_type, inputs, attributes, index, value.dtype, value.shape))
            known[value] = hashlib.sha256(said.encode()).hexdigest()
    return {str(value.name): known[value] for value in graph.outputs}


@pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES)
def test_the_graph_is_that_of_a_trace_of_all_layers(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig.from_dict(SHAPE | fields)
    copied = trace(config)
    monkeypatch.setattr(trace_module, "one_of_each_kind", lambda config: config)
    monkeypatch.setattr(trace_module, "repeat_layers", lambda *_: None)
    whole = trace(config)
    assert meaning(copied.graph) == meaning(whole.graph)
    for of in (copied, whole):
        assert len({node.name for node in of.graph}) == sum(1 for _ in of.graph)
    for names in ("inputs", "outputs", "initializers"):
        found, expected = (
            [getattr(v, "name", v) for v in getattr(of.graph, names) if "." in getattr(v, "name", v)]
            for of in (copied, whole)
        )
        assert found == expected


def test_another_meaning_is_seen() -> None:
    """That the comparison above can fail."""
    config = ModelConfig.from_dict(SHAPE | {"model_type": "olmo2"})
    graph, other = trace(config).graph, trace(config).graph
    assert meaning(graph) == meaning(other)
    add = next(node for node in other if node.name and node.name.startswith("node_layers.2.") and node.op_type == "Add")
    add.replace_input_with(0, next(value for value in add.inputs[1:] if value))
    changed = {name for name, said in meaning(other).items() if said != meaning(graph)[name]}
    assert "logits" in changed
    assert "present.1.key" not in changed


def test_a_value_inside_says_which_layer_it_is_of() -> None:
    config = ModelConfig.from_dict(SHAPE | {"model_type": "olmo2"})
    parts = find_segments(trace(config), operations(config))[1:-1]
    assert [str(part.result).split(".")[:2] for part in parts] == [["layers", str(n)] for n in range(3)]


def test_kinds_are_in_the_order_of_the_model() -> None:
    config = ModelConfig.from_dict(SHAPE | SHAPES["full first"])
    assert one_of_each_kind(config).layer_types == (FULL, SLIDING)
    assert one_of_each_kind(config).num_hidden_layers == 2
