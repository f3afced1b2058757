"""Bugs of the graphs with weights of few bits: of what they compute, and of the weights that they say they have."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from support.bugs.edits import (
    LAYER,
    PREFIX,
    Bug,
    change,
    constant,
    eps_ten_times_too_large,
    float_attribute_scaled,
    nodes,
    norm_weight_nan,
    post_attention_norm_ignored,
    q_norm_ignored,
    rope_theta_wrong,
    scaled,
)

GRAPH, PREFILL_GRAPH = "onnx/model_q4_shared.onnx", "onnx/model_q4_prefill.onnx"
PORTABLE_GRAPH = "onnx/model_q4.onnx"
INT8_CACHE, INT8_CACHE_PREFILL = "onnx/model_q4_shared_kv_int8.onnx", "onnx/model_q4_prefill_kv_int8.onnx"


def gate_and_up_swapped(model: ir.Model) -> None:
    gate, up = (
        next(
            n for n in nodes(model, "MatMulNBits") if str(n.inputs[1].name) == f"{PREFIX}.mlp.{kind}_proj.weight.packed"
        )  # type: ignore[union-attr]
        for kind in ("gate", "up")
    )
    a, b = gate.outputs[0], up.outputs[0]
    uses_a, uses_b = list(a.uses()), list(b.uses())
    for use in uses_a:
        use.node.replace_input_with(use.idx, b)
    for use in uses_b:
        use.node.replace_input_with(use.idx, a)
    model.graph.sort()


def rope_interleaved(model: ir.Model) -> None:
    for node in nodes(model, "GroupQueryAttention"):
        node.attributes["rotary_interleaved"] = ir.AttrInt64("rotary_interleaved", 1)


def attention_scale_wrong(model: ir.Model) -> None:
    node = nodes(model, "GroupQueryAttention")[LAYER]
    float_attribute_scaled(node, "scale", 1.02)


def attention_sees_a_window(model: ir.Model) -> None:
    node = nodes(model, "GroupQueryAttention")[LAYER]
    node.attributes["local_window_size"] = ir.AttrInt64("local_window_size", 9)


def kv_heads_misread(model: ir.Model) -> None:
    """Key heads in another order than value heads."""
    name = f"{PREFIX}.self_attn.k_norm.weight"
    head = int(str(model.graph.initializers[name].shape[0])) // 2  # type: ignore[index]
    node = nodes(model, "GroupQueryAttention")[LAYER]
    key = node.inputs[1]
    order = constant(model, "order", np.roll(np.arange(2 * head), head))
    gather = ir.node("Gather", [key, order], attributes={"axis": -1})
    model.graph.insert_before(node, gather)
    node.replace_input_with(1, gather.outputs[0])


def key_and_value_cache_swapped(model: ir.Model) -> None:
    node = nodes(model, "GroupQueryAttention")[LAYER]
    key, value = node.inputs[3], node.inputs[4]
    node.replace_input_with(3, value)
    node.replace_input_with(4, key)


EXACT_BUGS: list[Bug] = [
    q_norm_ignored,
    post_attention_norm_ignored,
    gate_and_up_swapped,
    eps_ten_times_too_large,
    rope_interleaved,
    rope_theta_wrong,
    attention_scale_wrong,
    attention_sees_a_window,
    kv_heads_misread,
    key_and_value_cache_swapped,
    norm_weight_nan,
]


# Of the portable graph alone, and the only cases that each must show in.


def lengths_of_the_mask(model: ir.Model) -> None:
    """The slots of a row end with its sum, as in the runner's graph: what follows padding is written over it."""
    graph = model.graph
    total = next(n for n in graph if n.name == "node_padding.last_slots")
    mask = next(v for v in graph.inputs if v.name == "attention_mask")
    axis = constant(model, "of_a_row", np.array([1], np.int64))
    count = ir.node("ReduceSum", [mask, axis], {"keepdims": 0})
    one = constant(model, "last_of_a_row", np.array(1, np.int64))
    last = ir.node("Sub", [count.outputs[0], one])
    cast = ir.node("Cast", [last.outputs[0]], {"to": int(ir.DataType.INT32)})
    graph.insert_before(total, [count, last, cast])
    total.outputs[0].replace_all_uses_with(cast.outputs[0])


def positions_of_tokens_alone(model: ir.Model) -> None:
    """cumsum - 1, as other graphs take: the keys of a first call are counted from its first slot."""
    places = next(n for n in model.graph if n.name == "node_padding.token_places")
    places.replace_input_with(1, constant(model, "minus_one", np.array([[-1]], np.int64)))


PADDING_BUGS: dict[Bug, set[str]] = {
    lengths_of_the_mask: {"left padded", "right padded"},
    positions_of_tokens_alone: {"left padded"},
}


def one_scale_shifted(model: ir.Model) -> None:
    change(model, f"{PREFIX}.mlp.up_proj.weight.scales", scaled((3, 0), 1.4))


def scales_rolled_by_one_block(model: ir.Model) -> None:
    change(model, f"{PREFIX}.mlp.down_proj.weight.scales", lambda a: np.roll(a, 1, axis=1))


def nibbles_swapped(model: ir.Model) -> None:
    change(model, f"{PREFIX}.self_attn.v_proj.weight.packed", lambda a: (a >> 4) | (a << 4))


def zero_points_ignored(model: ir.Model) -> None:
    change(model, "lm_head.weight.zero_points", lambda a: np.full_like(a, 0x88))


def embedding_scale_shifted(model: ir.Model) -> None:
    change(model, "model.embed_tokens.weight.scales", scaled((17, 1), 0.6))


def tensor_zeroed(model: ir.Model) -> None:
    change(model, f"{PREFIX}.mlp.down_proj.weight.scales", np.zeros_like)


WEIGHT_BUGS: list[Bug] = [
    tensor_zeroed,
    one_scale_shifted,
    scales_rolled_by_one_block,
    nibbles_swapped,
    zero_points_ignored,
    embedding_scale_shifted,
]


# Of the prefill graph alone.


def int8_scale_shifted(model: ir.Model) -> None:
    change(model, f"{PREFIX}.mlp.up_proj.weight.channel_scales", scaled((3,), 1.4))


def inputs_rounded_to_six_bits(model: ir.Model) -> None:
    change(model, "quantization_step", lambda a: a * np.float32(2))
