"""Edits that bugs of several graphs are made of; those that are one bug in all of them stand here whole."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

Bug = Callable[[ir.Model], None]
"""puts one mistake into a graph, in place"""

LAYER = 1
"""the layer that has the bug, where only one has"""
PREFIX = f"model.layers.{LAYER}"


def nodes(model: ir.Model, op_type: str) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == op_type]


def constant(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    model.graph.register_initializer(value)
    return value


def change(model: ir.Model, name: str, edit: Callable[[np.ndarray], np.ndarray]) -> None:
    """Replace an initializer by what `edit` makes of a copy of it; it keeps its dtype."""
    value = model.graph.initializers[name]
    assert value.const_value is not None
    value.const_value = ir.tensor(edit(value.const_value.numpy().copy()), dtype=value.dtype, name=name)


def scaled(index: tuple[int, ...], factor: float) -> Callable[[np.ndarray], np.ndarray]:
    def edit(array: np.ndarray) -> np.ndarray:
        array[index] = array[index] * array.dtype.type(factor)
        return array

    return edit


def norm_ignored(model: ir.Model, weight: str) -> None:
    norm = next(n for n in nodes(model, "RMSNormalization") if n.inputs[1] is not None and n.inputs[1].name == weight)
    assert norm.inputs[0] is not None
    norm.outputs[0].replace_all_uses_with(norm.inputs[0])


def q_norm_ignored(model: ir.Model) -> None:
    norm_ignored(model, f"{PREFIX}.self_attn.q_norm.weight")


def post_attention_norm_ignored(model: ir.Model) -> None:
    norm_ignored(model, f"{PREFIX}.post_attention_layernorm.weight")


def eps_ten_times_too_large(model: ir.Model) -> None:
    for node in nodes(model, "RMSNormalization"):
        node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-5)


def rope_theta_wrong(model: ir.Model) -> None:
    for name, function in (("rotary_cos", np.cos), ("rotary_sin", np.sin)):
        shape = model.graph.initializers[name].shape
        assert shape is not None
        length, half = (int(str(d)) for d in shape)
        angles = np.outer(np.arange(length), 10_000.0 ** (-np.arange(half) / half))
        change(model, name, lambda _, f=function, a=angles: f(a).astype(np.float32))  # type: ignore[misc]


def norm_weight_nan(model: ir.Model) -> None:
    change(model, "model.norm.weight", lambda a: np.where(np.arange(len(a)) == 0, math.nan, a).astype(np.float32))


def float_attribute_scaled(node: ir.Node, name: str, factor: float) -> None:
    node.attributes[name] = ir.AttrFloat32(name, node.attributes[name].as_float() * factor)
