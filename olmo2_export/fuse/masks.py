"""The mask that the traced graph has: the causal rule and padding, and nothing else.

    slots = Range(0, Shape(attention_mask)[1], 1)                                             [P + S]
    own_slots = slots[Shape(attention_mask)[1] - Shape(input_ids)[1] :]                       [S]
    causal = LessOrEqual(Unsqueeze(slots, 0), Unsqueeze(own_slots, 1))                        [S, P + S]
    mask = And(Unsqueeze(causal, [0, 1]), Cast(Unsqueeze(attention_mask, [1, 2])))            [B, 1, S, P + S]

The operators that replace the attention hide later tokens and padding by themselves. A pass that drops a mask asks here
first, so that a window, a bias or any other rule is refused and not lost.
"""

from __future__ import annotations

import onnx_ir as ir

from olmo2_export.fuse.edit import constant_ints, find_input, is_dimension, is_op


def is_causal_and_padding(graph: ir.Graph, mask: ir.Value) -> bool:
    """Tell whether a mask is the one at the top of this file."""
    padding = find_input(graph, "attention_mask")
    both = mask.producer()
    if padding is None or both is None or not is_op(both, "And"):
        return False
    rule, shown = both.inputs
    return _is_causal(graph, _unsqueezed(rule, [0, 1])) and _is_padding(shown, padding)


def _is_padding(value: ir.Value | None, padding: ir.Value) -> bool:
    """Cast(Unsqueeze(attention_mask, [1, 2])) to bool"""
    cast = value.producer() if value is not None else None
    if cast is None or not is_op(cast, "Cast") or cast.attributes.get_int("to", 0) != int(ir.DataType.BOOL):
        return False
    return _unsqueezed(cast.inputs[0], [1, 2]) is padding


def _is_causal(graph: ir.Graph, value: ir.Value | None) -> bool:
    """slots <= own slots, in each row those from the number of past tokens on"""
    rule = value.producer() if value is not None else None
    if rule is None or not is_op(rule, "LessOrEqual"):
        return False
    slots, own = _unsqueezed(rule.inputs[0], [0]), _unsqueezed(rule.inputs[1], [1])
    count, cut = (v.producer() if v is not None else None for v in (slots, own))
    if count is None or not is_op(count, "Range") or cut is None or not is_op(cut, "Slice") or len(cut.inputs) != 5:
        return False
    zero, total, one = count.inputs
    source, start, stop, axis, step = cut.inputs
    return (
        (constant_ints(zero), constant_ints(one)) == ([0], [1])
        and _is_width(graph, total, "attention_mask")
        and source is slots
        and _is_past_length(graph, start)
        and (constant_ints(axis), constant_ints(step)) == ([0], [1])
        and (constant_ints(stop) or [0])[0] >= (1 << 31) - 1  # to the end
    )


def _is_past_length(graph: ir.Graph, value: ir.Value | None) -> bool:
    """Shape(attention_mask)[1] - Shape(input_ids)[1]"""
    reshape = value.producer() if value is not None else None
    if reshape is None or not is_op(reshape, "Reshape") or reshape.inputs[0] is None:
        return False
    difference = reshape.inputs[0].producer()
    if difference is None or not is_op(difference, "Sub"):
        return False
    total, new = difference.inputs
    return _is_width(graph, total, "attention_mask") and _is_width(graph, new, "input_ids")


def _is_width(graph: ir.Graph, value: ir.Value | None, source: str) -> bool:
    """Squeeze(Shape(source)[1:2])"""
    squeeze = value.producer() if value is not None else None
    if squeeze is None or not is_op(squeeze, "Squeeze") or squeeze.inputs[0] is None:
        return False
    return is_dimension(graph, squeeze.inputs[0].producer(), 1, source)


def _unsqueezed(value: ir.Value | None, axes: list[int]) -> ir.Value | None:
    """Return x of Unsqueeze(x, axes)."""
    node = value.producer() if value is not None else None
    if node is None or not is_op(node, "Unsqueeze") or constant_ints(node.inputs[1]) != axes:
        return None
    return node.inputs[0]
