"""Bugs of the portable graph, and of the graph for TensorRT where that is not quantised."""

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
)


def gate_and_up_swapped(model: ir.Model) -> None:
    products = {
        kind: next(n for n in nodes(model, "MatMul") if n.inputs[1] is not None and n.inputs[1].name == name)
        for kind in ("gate", "up")
        for name in [f"{PREFIX}.mlp.{kind}_proj.weight"]
    }
    gate, up = products["gate"].inputs[1], products["up"].inputs[1]
    products["gate"].replace_input_with(1, up)
    products["up"].replace_input_with(1, gate)


def rope_interleaved(model: ir.Model) -> None:
    for node in nodes(model, "RotaryEmbedding"):
        node.attributes["interleaved"] = ir.AttrInt64("interleaved", 1)


def kv_heads_interleaved_instead_of_grouped(model: ir.Model) -> None:
    node = nodes(model, "Attention")[LAYER]
    q, y = node.inputs[0], node.outputs[0]
    assert q is not None
    assert q.shape is not None
    heads = int(str(q.shape[1]))
    order = np.arange(heads).reshape(2, -1).T.ravel()
    shuffled = ir.node("Gather", [q, constant(model, "order", order)], attributes={"axis": 1})
    back = ir.node("Gather", [y, constant(model, "back", np.argsort(order))], attributes={"axis": 1})
    y.replace_all_uses_with(back.outputs[0])
    back.replace_input_with(0, y)
    node.replace_input_with(0, shuffled.outputs[0])
    model.graph.insert_before(node, shuffled)
    model.graph.insert_after(node, back)


def attention_scale_wrong(model: ir.Model) -> None:
    node = nodes(model, "Attention")[LAYER]
    float_attribute_scaled(node, "scale", 1.02)


def _shift_causal_mask(model: ir.Model, by: int) -> None:
    node = nodes(model, "LessOrEqual")[0]
    add = ir.node("Add", [node.inputs[1], constant(model, "shift", np.array(by, np.int64))])
    node.replace_input_with(1, add.outputs[0])
    model.graph.insert_before(node, add)


def causal_mask_shows_the_next_token(model: ir.Model) -> None:
    _shift_causal_mask(model, 1)


def causal_mask_hides_the_token_itself(model: ir.Model) -> None:
    _shift_causal_mask(model, -1)


def key_and_value_cache_swapped(model: ir.Model) -> None:
    node = nodes(model, "Attention")[LAYER]
    key, value = node.inputs[4], node.inputs[5]
    node.replace_input_with(4, value)
    node.replace_input_with(5, key)


def one_weight_off_by_a_thousandth(model: ir.Model) -> None:
    def edit(array: np.ndarray) -> np.ndarray:
        array[3, 5] += 1e-3
        return array

    change(model, f"{PREFIX}.self_attn.o_proj.weight", edit)


def head_gives_nan(model: ir.Model) -> None:
    norm_weight_nan(model)


BUGS: list[Bug] = [
    q_norm_ignored,
    post_attention_norm_ignored,
    gate_and_up_swapped,
    eps_ten_times_too_large,
    rope_interleaved,
    rope_theta_wrong,
    kv_heads_interleaved_instead_of_grouped,
    attention_scale_wrong,
    causal_mask_shows_the_next_token,
    causal_mask_hides_the_token_itself,
    key_and_value_cache_swapped,
    one_weight_off_by_a_thousandth,
    head_gives_nan,
]


# What the graph that TensorRT compiles has of its own: scaled queries, lengths instead of a mask, a cache that is
# written in place, and logits of one chosen row.


def query_scale_wrong(model: ir.Model) -> None:
    muls = [n for n in nodes(model, "Mul") if n.inputs[1] is not None and n.inputs[1].name == "query_scale"]
    value = model.graph.initializers["query_scale"].const_value
    assert value is not None
    wrong = (value.numpy() * 1.02).astype(np.float32)
    muls[LAYER].replace_input_with(1, constant(model, "query_scale_wrong", wrong))


def kv_lengths_one_too_large(model: ir.Model) -> None:
    attentions = nodes(model, "TRT_Attention")
    lengths = attentions[0].inputs[5]
    assert lengths is not None
    add = ir.node("Add", [lengths, constant(model, "one_too_many", np.array(1, np.int32))])
    for node in attentions:
        node.replace_input_with(5, add.outputs[0])
    model.graph.insert_before(attentions[0], add)


def key_and_value_written_into_each_others_cache(model: ir.Model) -> None:
    key, value = nodes(model, "TensorScatter")[2 * LAYER : 2 * LAYER + 2]
    new_key, new_value = key.inputs[1], value.inputs[1]
    key.replace_input_with(1, new_value)
    value.replace_input_with(1, new_key)


def logit_index_ignored(model: ir.Model) -> None:
    """The last row always; the input is read, as TensorRT and onnxruntime would otherwise drop it."""
    gather = nodes(model, "GatherND")[0]
    ids = next(v for v in model.graph.inputs if v.name == "input_ids")
    length = ir.node("Shape", [ids], attributes={"start": 1, "end": 2})
    last = ir.node("Sub", [length.outputs[0], constant(model, "back_one", np.array(1, np.int64))])
    nothing = ir.node("Mul", [gather.inputs[1], constant(model, "nothing", np.array(0, np.int64))])
    index = ir.node("Add", [nothing.outputs[0], last.outputs[0]])
    gather.replace_input_with(1, index.outputs[0])
    model.graph.insert_before(gather, [length, last, nothing, index])


TRT_BUGS: list[Bug] = [
    q_norm_ignored,
    post_attention_norm_ignored,
    gate_and_up_swapped,
    eps_ten_times_too_large,
    rope_interleaved,
    query_scale_wrong,
    kv_lengths_one_too_large,
    key_and_value_written_into_each_others_cache,
    logit_index_ignored,
]
