"""Bugs of the graphs for TensorRT of fewer bits, each with a precision and what verify must show red."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from support.bugs.edits import LAYER, PREFIX, Bug, change, constant, eps_ten_times_too_large, q_norm_ignored, scaled

from runtimes.manifest import Precision

ATTENTION, MLP = f"{PREFIX}.self_attn", f"{PREFIX}.mlp"
GATE_UP = f"{MLP}.gate_proj.weight+{MLP}.up_proj.weight"


def halves_swapped(array: np.ndarray) -> np.ndarray:
    return np.roll(array, array.shape[-1] // 2, axis=-1)


def one_scale_shifted(model: ir.Model) -> None:
    change(model, f"{ATTENTION}.o_proj.weight.scales", scaled((2, 3), 1.4))


def gate_and_up_swapped_inside_the_merged_weight(model: ir.Model) -> None:
    for part in ("codes", "scales"):
        change(model, f"{GATE_UP}.{part}", halves_swapped)


def codes_of_neighbours_swapped(model: ir.Model) -> None:
    change(model, f"{MLP}.down_proj.weight.codes", lambda a: a.reshape(len(a), -1, 2)[..., ::-1].reshape(a.shape))


def query_and_key_split_at_the_wrong_place(model: ir.Model) -> None:
    """The key is taken from the first 32 columns and the query from the 96 after them."""
    split = [n for n in model.graph if n.op_type == "Split"][2 * LAYER]
    query, key, value = split.outputs
    widths = constant(model, "wrong_widths", np.array([32, 96, 32]))
    wrong = ir.node("Split", [split.inputs[0], widths], {"axis": -1}, num_outputs=3)
    for old, new in zip((key, query, value), wrong.outputs, strict=True):
        new.type, new.shape = old.type, old.shape
        old.replace_all_uses_with(new)
    model.graph.insert_after(split, wrong)
    model.graph.remove(split, safe=True)


def one_channel_scale_wrong(model: ir.Model) -> None:
    name = next(n for n in model.graph.initializers if n.startswith(f"{ATTENTION}.q_proj.weight") and "scales" in n)
    change(model, name, scaled((5,), 1.1))


def one_activation_scale_doubled(model: ir.Model) -> None:
    name = next(n for n in model.graph.initializers if n.startswith(f"{MLP}.gate_proj") and n.endswith("input_scale"))
    change(model, name, lambda a: a * a.dtype.type(2))


def inputs_not_quantised(model: ir.Model) -> None:
    rounding = next(n for n in model.graph if n.op_type == "QuantizeLinear")
    (use,) = rounding.outputs[0].uses()
    assert rounding.inputs[0] is not None
    use.node.outputs[0].replace_all_uses_with(rounding.inputs[0])


def one_kept_weight_off_by_a_bit(model: ir.Model) -> None:
    change(model, "lm_head.weight", scaled((17, 4), 1.01))


def embedding_shifted_by_a_token(model: ir.Model) -> None:
    change(model, "model.embed_tokens.weight", lambda a: np.roll(a, 1, axis=0))


BUGS: list[tuple[Precision, Bug, str]] = [
    ("int4", one_scale_shifted, "scales"),
    ("int4", gate_and_up_swapped_inside_the_merged_weight, "scales"),
    ("int4", codes_of_neighbours_swapped, "scales"),
    ("int4", query_and_key_split_at_the_wrong_place, "own"),
    ("int4", q_norm_ignored, "own"),
    ("int4", embedding_shifted_by_a_token, "weights"),
    ("int8", one_channel_scale_wrong, "scales"),
    ("int8", one_activation_scale_doubled, "input scales"),
    ("int8", inputs_not_quantised, "input scales"),
    ("int8", one_kept_weight_off_by_a_bit, "weights"),
    ("int8", eps_ten_times_too_large, "own"),
    ("fp8", one_channel_scale_wrong, "scales"),
    ("fp8", one_activation_scale_doubled, "input scales"),
    ("fp8", query_and_key_split_at_the_wrong_place, "own"),
    ("bf16", one_kept_weight_off_by_a_bit, "weights"),
    ("bf16", q_norm_ignored, "exact"),
    ("bf16", eps_ten_times_too_large, "exact"),
]
