"""Passes that drop the attention mask do so where it is the causal rule and padding, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest
from support.checkpoints import OLMO3, SHAPE

from olmo2_export.architecture import operations
from olmo2_export.config import ModelConfig
from olmo2_export.fuse.group_query_attention import group_query_attention
from olmo2_export.fuse.masks import Rule, read_rule
from olmo2_export.fuse.static_cache import static_cache
from olmo2_export.graphs.shared import shared_graph
from olmo2_export.graphs.static import static_graph
from olmo2_export.graphs.trace import trace
from runtimes.errors import FusionError

LAYERS = 3


@pytest.fixture(scope="module")
def traced(tiny_checkpoint: Path) -> ir.Model:
    return trace(ModelConfig.from_json(tiny_checkpoint / "config.json"))


def first(model: ir.Model, op_type: str) -> ir.Node:
    return next(node for node in model.graph if node.op_type == op_type)


def constant(model: ir.Model, name: str, data: list[int] | int) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(data, dtype=ir.DataType.INT64, name=name))
    value.type, value.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([len(data)] if isinstance(data, list) else [])
    model.graph.register_initializer(value)
    return value


def replaced(model: ir.Model, value: ir.Value, op_type: str, others: list[ir.Value]) -> None:
    """Let whoever reads a value read op(value, others) instead."""
    uses = list(value.uses())
    node = ir.node(op_type, [value, *others])
    node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
    producer = value.producer()
    assert producer is not None
    model.graph.insert_after(producer, node)
    for use in uses:
        use.node.replace_input_with(use.idx, node.outputs[0])


def window(model: ir.Model) -> None:
    """Each token also sees no more than 4 slots: the causal rule And a second one, as a sliding window is."""
    rule = first(model, "LessOrEqual")
    slots, own = rule.inputs
    assert slots is not None
    assert own is not None
    oldest = ir.node("Sub", [own, constant(model, "window", [4])])
    inside = ir.node("Greater", [slots, oldest.outputs[0]])
    model.graph.insert_before(rule, [oldest, inside])
    replaced(model, rule.outputs[0], "And", [inside.outputs[0]])


def window_of_the_whole_mask(model: ir.Model) -> None:
    """The same, written around the mask with padding."""
    rule, both = first(model, "LessOrEqual"), first(model, "And")
    slots, own = rule.inputs
    assert slots is not None
    assert own is not None
    oldest = ir.node("Sub", [own, constant(model, "window", [4])])
    inside = ir.node("Greater", [slots, oldest.outputs[0]])
    model.graph.insert_before(both, [oldest, inside])
    replaced(model, both.outputs[0], "And", [inside.outputs[0]])


def bias(model: ir.Model) -> None:
    """A mask of floats, 0 or -inf, with a bias added."""
    mask = first(model, "And").outputs[0]
    zero = constant(model, "seen", 0)
    replaced(model, mask, "Where", [zero, constant(model, "hidden", -10000)])
    replaced(model, first(model, "Where").outputs[0], "Add", [constant(model, "bias", [3])])


def shifted(model: ir.Model) -> None:
    """Each token sees the next one too."""
    own = first(model, "LessOrEqual").inputs[1]
    assert own is not None
    replaced(model, own, "Add", [constant(model, "shift", [1])])


def strided(model: ir.Model) -> None:
    """Slots are counted in twos."""
    first(model, "Range").replace_input_with(2, constant(model, "two", 2))


def from_the_start(model: ir.Model) -> None:
    """A token's own slots are not those behind the past."""
    first(model, "Sub").replace_input_with(1, constant(model, "none", 0))


def no_padding(model: ir.Model) -> None:
    """Both sides are the causal rule."""
    both = first(model, "And")
    both.replace_input_with(1, both.inputs[0])


def inverted(model: ir.Model) -> None:
    """What is seen is hidden."""
    replaced(model, first(model, "Cast").outputs[0], "Not", [])


SPOILED = [window, window_of_the_whole_mask, bias, shifted, strided, from_the_start, no_padding, inverted]


def test_the_traced_mask_is_dropped(traced: ir.Model) -> None:
    model = traced.clone()
    mask = first(model, "Attention").inputs[3]
    assert mask is not None
    assert read_rule(model.graph, mask) == Rule(None)
    assert static_cache(model) == LAYERS
    assert group_query_attention(traced.clone()) == LAYERS


@pytest.fixture(scope="module")
def windowed() -> ir.Model:
    """An Olmo 3 of four layers: three see 8 tokens, the last one all."""
    return trace(ModelConfig.from_dict(SHAPE | OLMO3))


def masks_of(model: ir.Model) -> list[ir.Value]:
    masks = [node.inputs[3] for node in model.graph if node.op_type == "Attention"]
    return [mask for mask in masks if mask is not None]


def test_a_window_is_taken_over(windowed: ir.Model) -> None:
    assert [read_rule(windowed.graph, mask) for mask in masks_of(windowed)] == [*[Rule(8)] * 3, Rule(None)]
    model = windowed.clone()
    assert group_query_attention(model) == 4
    sizes = [n.attributes.get_int("local_window_size", -1) for n in model.graph if n.op_type == "GroupQueryAttention"]
    assert sizes == [8, 8, 8, -1]
    model = windowed.clone()
    assert static_cache(model) == 4
    attentions = [node for node in model.graph if node.op_type == "TRT_Attention"]
    assert [node.overload for node in attentions] == ["window"] * 3 + [""]
    assert [len(node.inputs) for node in attentions] == [4, 4, 4, 6]


def counts_exclusively(model: ir.Model) -> None:
    """A token is not counted at its own slot."""
    first(model, "CumSum").attributes["exclusive"] = ir.AttrInt64("exclusive", 1)


def counts_backwards(model: ir.Model) -> None:
    first(model, "CumSum").attributes["reverse"] = ir.AttrInt64("reverse", 1)


def counts_rows(model: ir.Model) -> None:
    """Along the batch."""
    first(model, "CumSum").replace_input_with(1, constant(model, "along_rows", 0))


def hides_what_is_recent(model: ir.Model) -> None:
    first(model, "Greater").op_type = "Less"


def counts_from_the_start(model: ir.Model) -> None:
    """A token's own counts are not those behind the past."""
    cut = [node for node in model.graph if node.op_type == "Slice"][1]
    cut.replace_input_with(1, constant(model, "from_the_start", [0]))


def window_is_computed(model: ir.Model) -> None:
    """Its size is no constant."""
    rule = first(model, "Greater").inputs[1]
    node = rule.producer() if rule is not None else None
    assert node is not None
    node.replace_input_with(1, first(model, "Squeeze").outputs[0])


def one_more_rule(model: ir.Model) -> None:
    """What is recent is inverted as well."""
    replaced(model, first(model, "Greater").outputs[0], "Not", [])


SPOILED_WINDOWS = [
    counts_exclusively,
    counts_backwards,
    counts_rows,
    hides_what_is_recent,
    counts_from_the_start,
    window_is_computed,
    one_more_rule,
]


@pytest.mark.parametrize("a_pass", [static_cache, group_query_attention])
@pytest.mark.parametrize("spoil", SPOILED_WINDOWS)
def test_another_window_is_kept(
    spoil: Callable[[ir.Model], None], a_pass: Callable[[ir.Model], int], windowed: ir.Model
) -> None:
    model = windowed.clone()
    spoil(model)
    assert a_pass(model) == 1  # the layer that sees all
    assert len(masks_of(model)) == 3


@pytest.mark.parametrize("a_pass", [static_cache, group_query_attention])
@pytest.mark.parametrize("spoil", SPOILED)
def test_another_mask_is_kept(
    spoil: Callable[[ir.Model], None], a_pass: Callable[[ir.Model], int], traced: ir.Model
) -> None:
    model = traced.clone()
    spoil(model)
    assert a_pass(model) == 0
    assert sum(node.op_type == "Attention" for node in model.graph) == LAYERS


def test_a_window_is_refused_and_not_lost(traced: ir.Model, tiny_checkpoint: Path) -> None:
    model = traced.clone()
    window(model)
    config = ModelConfig.from_json(tiny_checkpoint / "config.json")
    with pytest.raises(FusionError, match=r"static_cache: expected 3, applied 0 times"):
        static_graph(model, config, "fp32", 40)
    with pytest.raises(FusionError, match=r"group_query_attention: expected 3, applied 0 times"):
        shared_graph(model, operations(config))
