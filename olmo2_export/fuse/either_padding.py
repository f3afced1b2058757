"""Let attention with a shared cache take rows that are padded on either side.

Matches:

    y, present_key, present_value = com.microsoft::GroupQueryAttention(q, k, v, past_key, past_value, seqlens_k,
                                                                       total_sequence_length, cos, sin, ...)

where seqlens_k are the sums of attention_mask: so the tokens of a row must be the first of its slots.

Becomes:

    y, present_key, present_value = com.microsoft::GroupQueryAttention(
        q, k, v, past_key, past_value, last_slots, total_sequence_length, cos, sin, positions, bias, ...)
    counts = CumSum(attention_mask, 1)                                                    [B, T]
    last_slots = total_sequence_length - 1, for every row                                 [B]
    positions = where(attention_mask, counts - 1 + ArgMax(attention_mask, 1), slot)       [B, S], of the new tokens
    bias = where(attention_mask, 0, -3.4e38)                                              [B, 1, S, T]

Every slot counts for the cache, padding too, which the bias hides; the operator hides later slots by itself. With a
window (local_window_size, which counts slots and is left out) the bias hides also what stands `window` tokens or more
before: counts <= own counts - window. So a row may have padding in the middle as well: behind a prompt that was padded
on the right, before the tokens that follow it.

The operator takes of a call of several tokens the first position alone, and counts up from there: in a first call that
is 0, the slot of a padding or of the first token. A row's positions begin at its padding, which attention does not see:
RoPE tells distances alone.

Source: onnxruntime 1.31.1, contrib_ops/cpu/bert/group_query_attention.cc; docs/ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from olmo2_export.fuse.edit import constant, find_input, new_node
from olmo2_export.fuse.group_query_attention import DOMAIN, INT64, NAME

_INPUTS = 9  # up to sin
_LENGTHS, _TOTAL = 5, 6
_WINDOW = "local_window_size"
_HIDDEN = -3.4e38
BOOL, FLOAT, INT32 = ir.DataType.BOOL, ir.DataType.FLOAT, ir.DataType.INT32


def either_padding(model: ir.Model) -> int:
    """Apply the rewrite everywhere it matches; return the number of attentions rewritten."""
    graph = model.graph
    found = [node for node in graph if (node.domain, node.op_type, len(node.inputs)) == (DOMAIN, NAME, _INPUTS)]
    total = found[0].inputs[_TOTAL] if found else None
    if total is None or find_input(graph, "attention_mask") is None:
        return 0
    values = _Values(graph, total)
    for node in found:
        attributes = {name: attribute.value for name, attribute in node.attributes.items() if name != _WINDOW}
        window = node.attributes.get_int(_WINDOW, 0)
        fused = ir.node(
            NAME,
            [*node.inputs[:_LENGTHS], values.last_slots, *node.inputs[_TOTAL:], values.positions, values.bias(window)],
            attributes,
            domain=DOMAIN,
            outputs=[ir.Value(type=v.type, shape=v.shape) for v in node.outputs],
            name=f"{node.name}_padded",
        )
        graph.insert_before(node, fused)
        for old, new in zip(node.outputs, fused.outputs, strict=True):
            old.replace_all_uses_with(new, replace_graph_outputs=True)
            old.name, new.name = None, old.name
        graph.remove(node, safe=True)
    return len(found)


class _Values:
    """What the attentions read of the mask, computed once per graph, behind the total length."""

    def __init__(self, graph: ir.Graph, total: ir.Value) -> None:
        self._graph, self._last = graph, total.producer()
        self._biases: dict[int, ir.Value] = {}
        mask, ids = find_input(graph, "attention_mask"), find_input(graph, "input_ids")
        one, axis = self._constant("one", 1), self._constant("axis_1", [1])
        self._axis, self._all = axis, ["batch_size", "total_sequence_length"]
        batch = self._add("Shape", [mask], "row_count", INT64, [1], {"start": 0, "end": 1})
        new = self._add("Shape", [ids], "new_tokens", INT64, [1], {"start": 1, "end": 2})
        self._end = self._add("Shape", [mask], "slot_count", INT64, [1], {"start": 1, "end": 2})
        self._begin = self._add("Sub", [self._end, new], "first_new_slot", INT64, [1])
        last = self._add("Sub", [total, self._constant("one_int32", 1, INT32)], "last_slot", INT32, [])
        self.last_slots = self._add("Expand", [last, batch], "last_slots", INT32, ["batch_size"])
        self._seen = self._add("Cast", [mask], "slots_with_tokens", BOOL, self._all, {"to": int(BOOL)})
        self._counts = self._add("CumSum", [mask, one], "token_counts", INT64, self._all)
        first = self._add("ArgMax", [mask], "first_slots", INT64, ["batch_size", 1], {"axis": 1})
        before = self._add("Sub", [first, one], "slots_before_rows", INT64, ["batch_size", 1])
        places = self._add("Add", [self._counts, before], "token_places", INT64, self._all)
        width = self._add("Cast", [total], "slot_count_scalar", INT64, [], {"to": int(INT64)})
        slots = self._add("Range", [self._constant("zero", 0), width, one], "slots", INT64, self._all[1:])
        known = self._add("Where", [self._seen, places, slots], "slot_positions", INT64, self._all)
        self.positions = self._of_new_tokens(known, "positions")
        self._shape = self._add("Concat", [batch, axis, new, self._end], "bias_shape", INT64, [4], {"axis": 0})

    def bias(self, window: int) -> ir.Value:
        """Return float32 [B, 1, S, T]: 0 where a token sees a slot; `window` 0: it sees all."""
        if window not in self._biases:
            self._biases[window] = self._make_bias(window, f"_{window}" if window else "")
        return self._biases[window]

    def _make_bias(self, window: int, suffix: str) -> ir.Value:
        rows, slots = self._all
        whole: list[int | str] = [rows, 1, "sequence_length", slots]
        of_slots: list[int | str] = [rows, 1, 1, slots]
        axes = self._constant("axes_1_2", [1, 2])
        seen = self._add("Unsqueeze", [self._seen, axes], f"seen{suffix}", BOOL, of_slots)
        if window:
            own = self._of_new_tokens(self._counts, f"own_counts{suffix}")
            size = self._constant(f"window{suffix}", window)
            left = self._add("Sub", [own, size], f"counts_left{suffix}", INT64, [rows, "sequence_length"])
            of_tokens: list[int | str] = [rows, 1, "sequence_length", 1]
            left = self._add("Unsqueeze", [left, self._constant("axes_1_3", [1, 3])], f"left{suffix}", INT64, of_tokens)
            counts = self._add("Unsqueeze", [self._counts, axes], f"counts{suffix}", INT64, of_slots)
            recent = self._add("Greater", [counts, left], f"recent{suffix}", BOOL, whole)
            seen = self._add("And", [seen, recent], f"seen_recently{suffix}", BOOL, whole)
        shown, hidden = self._constant("shown", 0.0, FLOAT), self._constant("hidden", _HIDDEN, FLOAT)
        chosen = self._add("Where", [seen, shown, hidden], f"chosen{suffix}", FLOAT, whole if window else of_slots)
        return self._add("Expand", [chosen, self._shape], f"bias{suffix}", FLOAT, whole)

    def _of_new_tokens(self, value: ir.Value, name: str) -> ir.Value:
        inputs = [value, self._begin, self._end, self._axis]
        return self._add("Slice", inputs, name, INT64, [self._all[0], "sequence_length"])

    def _constant(self, name: str, data: float | Sequence[int], dtype: ir.DataType = INT64) -> ir.Value:
        return constant(self._graph, f"padding.{name}", data, dtype)

    def _add(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        output: str,
        dtype: ir.DataType,
        shape: Sequence[int | str],
        attributes: Mapping[str, int | str] | None = None,
    ) -> ir.Value:
        node = new_node(op_type, inputs, f"padding.{output}", dtype, shape, attributes)
        assert self._last is not None  # what gives the total length
        self._graph.insert_after(self._last, node)
        self._last = node
        return node.outputs[0]
