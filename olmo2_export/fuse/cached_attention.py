"""The attention that the traced graph has, which the passes for both runtimes replace.

    y, present_key, present_value = Attention(q, k, v, mask, past_key, past_value, scale=s)

past_*: inputs of the graph, used here alone; present_*: its outputs, used nowhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir


@dataclass(frozen=True)
class CachedAttention:
    """What the pattern binds."""

    query: ir.Value
    key: ir.Value
    value: ir.Value
    mask: ir.Value
    past: tuple[ir.Value, ir.Value]
    scale: float


def cached_attention(node: ir.Node) -> CachedAttention | str:
    """Return what the pattern binds in an Attention node, or why it does not match."""
    inputs = [value for value in node.inputs if value is not None]
    if len(inputs) != 6 or len(node.inputs) != 6 or len(node.outputs) != 3:
        return "not an attention with mask, past and present"
    if set(node.attributes) != {"scale"}:
        return f"attributes {sorted(node.attributes)}, expected scale alone"
    query, key, value, mask, past_key, past_value = inputs
    for past, present in zip((past_key, past_value), node.outputs[1:], strict=True):
        if not past.is_graph_input() or len(past.uses()) != 1 or not present.is_graph_output() or present.uses():
            return f"{past.name} and {present.name} are not input and output, used here alone"
    return CachedAttention(query, key, value, mask, (past_key, past_value), node.attributes["scale"].as_float())
