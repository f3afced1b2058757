"""Bugs of what OLMo 1 and Olmo 3 have of their own, in each kind of graph."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from support.bugs.edits import LAYER, PREFIX, Bug, change, constant, nodes

FULL_LAYER = 3
"""of an Olmo 3, the one that sees all"""


def _norms(model: ir.Model) -> list[ir.Node]:
    return nodes(model, "LayerNormalization")


def layer_norm_is_an_rms_norm(model: ir.Model) -> None:
    node = next(n for n in _norms(model) if n.inputs[1] is not None and str(n.inputs[1].name).startswith(PREFIX))
    node.op_type = "RMSNormalization"


def layer_norm_ignored(model: ir.Model) -> None:
    node = next(n for n in _norms(model) if n.inputs[1] is not None and str(n.inputs[1].name).startswith(PREFIX))
    assert node.inputs[0] is not None
    node.outputs[0].replace_all_uses_with(node.inputs[0])


def last_norm_has_another_epsilon(model: ir.Model) -> None:
    _norms(model)[-1].attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-3)


def clip_ignored(model: ir.Model) -> None:
    """Of the keys of one layer."""
    node = nodes(model, "Clip")[3 * LAYER + 1]
    assert node.inputs[0] is not None
    node.outputs[0].replace_all_uses_with(node.inputs[0])


def clip_has_another_limit(model: ir.Model) -> None:
    node = nodes(model, "Clip")[3 * LAYER + 2]
    for position, limit in ((1, -1.4), (2, 1.4)):
        old = node.inputs[position]
        assert old is not None
        assert old.dtype is not None
        array = np.array(limit, old.dtype.numpy())
        node.replace_input_with(position, constant(model, f"limit_{position}", array))


OLMO1_BUGS: list[Bug] = [
    layer_norm_is_an_rms_norm,
    layer_norm_ignored,
    last_norm_has_another_epsilon,
    clip_ignored,
    clip_has_another_limit,
]
"""of graphs in which each product is a node: portable, decode, static"""


def _sizes_of_windows(model: ir.Model, edit: Callable[[int], int]) -> None:
    """Change the window of the masks of a portable or a static graph."""
    found = 0
    for node in nodes(model, "Sub"):
        value = node.inputs[1]
        if value is None or value.const_value is None or node.outputs[0].shape is None:
            continue
        if any(is_greater(use.node) for use in node.outputs[0].uses()):
            size = int(value.const_value.numpy())
            node.replace_input_with(1, constant(model, f"window_{found}_wrong", np.array(edit(size), np.int64)))
            found += 1
    assert found == 1


def is_greater(node: ir.Node) -> bool:
    return node.op_type == "Greater"


def _attributes_of_windows(model: ir.Model, edit: Callable[[int], int]) -> None:
    for node in nodes(model, "GroupQueryAttention"):
        size = node.attributes.get_int("local_window_size", -1)
        if size > 0:
            node.attributes["local_window_size"] = ir.AttrInt64("local_window_size", edit(size))


def window_off_by_one(model: ir.Model) -> None:
    if nodes(model, "GroupQueryAttention"):
        _attributes_of_windows(model, lambda size: size + 1)
    else:
        _sizes_of_windows(model, lambda size: size + 1)


def window_without_the_token_itself(model: ir.Model) -> None:
    """One less: the present token was not counted."""
    if nodes(model, "GroupQueryAttention"):
        _attributes_of_windows(model, lambda size: size - 1)
    else:
        _sizes_of_windows(model, lambda size: size - 1)


def window_ignored_in_one_layer(model: ir.Model) -> None:
    fused = nodes(model, "GroupQueryAttention")
    if fused:
        del fused[LAYER].attributes["local_window_size"]
        return
    attentions = nodes(model, "Attention")
    if attentions:
        attentions[LAYER].replace_input_with(3, attentions[FULL_LAYER].inputs[3])
        return
    windowed, full = nodes(model, "TRT_Attention")[LAYER], nodes(model, "TRT_Attention")[FULL_LAYER]
    both = windowed.inputs[3]
    assert both is not None
    node = both.producer()
    assert node is not None
    windowed.replace_input_with(3, node.inputs[0])  # the causal rule alone
    assert full.inputs[3] is None


def full_layer_has_a_window(model: ir.Model) -> None:
    fused = nodes(model, "GroupQueryAttention")
    if fused:
        fused[FULL_LAYER].attributes["local_window_size"] = ir.AttrInt64("local_window_size", 8)
        return
    attentions = nodes(model, "Attention")
    attentions[FULL_LAYER].replace_input_with(3, attentions[0].inputs[3])


def yarn_in_all_layers(model: ir.Model) -> None:
    for name in ("rotary_cos", "rotary_sin"):
        value = model.graph.initializers[name].const_value
        assert value is not None
        change(model, f"{name}_sliding", lambda _, v=value: v.numpy())  # type: ignore[misc]


def yarn_in_no_layer(model: ir.Model) -> None:
    for name in ("rotary_cos", "rotary_sin"):
        value = model.graph.initializers[f"{name}_sliding"].const_value
        assert value is not None
        change(model, name, lambda _, v=value: v.numpy())  # type: ignore[misc]


def attention_factor_of_yarn_forgotten(model: ir.Model) -> None:
    factor = 0.1 * math.log(8.0) + 1
    for name in ("rotary_cos", "rotary_sin"):
        change(model, name, lambda array: (array / factor).astype(array.dtype))


OLMO3_BUGS: list[Bug] = [
    window_off_by_one,
    window_without_the_token_itself,
    window_ignored_in_one_layer,
    full_layer_has_a_window,
    yarn_in_all_layers,
    yarn_in_no_layer,
    attention_factor_of_yarn_forgotten,
]
