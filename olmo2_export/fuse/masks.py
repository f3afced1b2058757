"""The masks that the traced graph has: the causal rule, with or without a window, and padding, and nothing else.

    slots = Range(0, Shape(attention_mask)[1], 1)                                             [P + S]
    own_slots = slots[Shape(attention_mask)[1] - Shape(input_ids)[1] :]                       [S]
    causal = LessOrEqual(Unsqueeze(slots, 0), Unsqueeze(own_slots, 1))                        [S, P + S]
    mask = And(Unsqueeze(causal, [0, 1]), Cast(Unsqueeze(attention_mask, [1, 2])))            [B, 1, S, P + S]

and with a window, which counts the tokens of a row and no padding

    counts = CumSum(attention_mask, 1)                                                        [B, P + S]
    own_counts = counts[:, Shape(attention_mask)[1] - Shape(input_ids)[1] :]                  [B, S]
    recent = Greater(Unsqueeze(counts, 1), Sub(Unsqueeze(own_counts, 2), window))             [B, S, P + S]
    windowed = And(mask, Unsqueeze(recent, 1))                                                [B, 1, S, P + S]

The operators that replace the attention hide later tokens and padding by themselves. A pass that drops a mask asks here
first, so that a window is taken over, and a bias or any other rule is refused and not lost.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from olmo2_export.fuse.edit import constant_ints, find_input, is_dimension, is_op


@dataclass(frozen=True)
class Rule:
    """What a mask of the form at the top of this file hides beside padding."""

    window: int | None
    """tokens that each sees, itself among them; None: all up to itself"""


def read_rule(graph: ir.Graph, mask: ir.Value) -> Rule | None:
    """Return what a mask hides; None if it is not of the form at the top of this file."""
    if _is_whole(graph, mask):
        return Rule(None)
    both = mask.producer()
    if both is None or not is_op(both, "And") or both.inputs[0] is None or not _is_whole(graph, both.inputs[0]):
        return None
    window = _window(graph, _unsqueezed(both.inputs[1], [1]))
    return None if window is None else Rule(window)


def _is_whole(graph: ir.Graph, mask: ir.Value) -> bool:
    """the causal rule and padding"""
    padding = find_input(graph, "attention_mask")
    both = mask.producer()
    if padding is None or both is None or not is_op(both, "And"):
        return False
    rule, shown = both.inputs
    return _is_causal(graph, _unsqueezed(rule, [0, 1])) and _is_padding(shown, padding)


def _window(graph: ir.Graph, value: ir.Value | None) -> int | None:
    """own counts - window < counts; the size of the window"""
    recent = value.producer() if value is not None else None
    if recent is None or not is_op(recent, "Greater"):
        return None
    counts = _unsqueezed(recent.inputs[0], [1])
    total = counts.producer() if counts is not None else None
    first = recent.inputs[1].producer() if recent.inputs[1] is not None else None
    if first is None or not is_op(first, "Sub") or total is None or not _is_count(graph, total):
        return None
    own = _unsqueezed(first.inputs[0], [2])
    size = constant_ints(first.inputs[1])
    cut = own.producer() if own is not None else None
    if cut is None or cut.inputs[0] is not counts or not _is_own_part(graph, cut, 1):
        return None
    return size[0] if size is not None and len(size) == 1 and size[0] > 0 else None


def _is_count(graph: ir.Graph, node: ir.Node) -> bool:
    """CumSum(attention_mask, 1)"""
    plain = all(node.attributes.get_int(name, 0) == 0 for name in ("exclusive", "reverse"))
    mask = find_input(graph, "attention_mask")
    return is_op(node, "CumSum") and node.inputs[0] is mask and constant_ints(node.inputs[1]) == [1] and plain


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
    if count is None or not is_op(count, "Range") or cut is None:
        return False
    zero, total, one = count.inputs
    return (
        (constant_ints(zero), constant_ints(one)) == ([0], [1])
        and _is_width(graph, total, "attention_mask")
        and cut.inputs[0] is slots
        and _is_own_part(graph, cut, 0)
    )


def _is_own_part(graph: ir.Graph, node: ir.Node, axis: int) -> bool:
    """x[past length :] along an axis"""
    if not is_op(node, "Slice") or len(node.inputs) != 5:
        return False
    _, start, stop, along, step = node.inputs
    return (
        _is_past_length(graph, start)
        and (constant_ints(along), constant_ints(step)) == ([axis], [1])
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
