"""Fuse rotary embedding, KV cache and attention into the operator that updates a shared KV buffer in place.

Matches:

    q = RotaryEmbedding(Transpose(Reshape(q0)), cos, sin, position_ids)         q0, k0, v0: [B, S, heads * head_dim]
    k = RotaryEmbedding(Transpose(Reshape(k0)), cos, sin, position_ids)
    v = Transpose(Reshape(v0))
    a, present_key, present_value = Attention(q, k, v, mask, past_key, past_value, scale=s)
    y = Reshape(Transpose(a))

Becomes:

    y, present_key, present_value = com.microsoft::GroupQueryAttention(
        q0, k0, v0, past_key, past_value, seqlens_k, total_sequence_length, cos, sin, do_rotary=1, scale=s,
        local_window_size=window, where the mask has one)
    seqlens_k = int32(ReduceSum(attention_mask, axis=1) - 1)                     [batch_size]
    total_sequence_length = int32(Shape(attention_mask)[1])                      []

Padding is on the right: a row's tokens are the first sum(attention_mask[row]) slots, and their slots are their
positions, so position_ids has no work left. Where past and present are bound to one buffer the operator writes behind
what it holds; where they are not, it concatenates.

Source: onnxruntime, docs/ContribOperators.md, com.microsoft.GroupQueryAttention.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import onnx_ir as ir

from olmo2_export.fuse.cached_attention import cached_attention
from olmo2_export.fuse.edit import constant, find_input, is_op, new_node, only_user
from olmo2_export.fuse.masks import read_rule

logger = logging.getLogger(__name__)

DOMAIN = "com.microsoft"
NAME = "GroupQueryAttention"
INT32, INT64, FLOAT = ir.DataType.INT32, ir.DataType.INT64, ir.DataType.FLOAT


@dataclass(frozen=True)
class _Attention:
    """What the pattern binds."""

    query: ir.Value
    key: ir.Value
    value: ir.Value
    """as they come from the projections and norms, [B, S, heads * head_dim]"""
    past: tuple[ir.Value, ir.Value]
    tables: tuple[ir.Value, ir.Value]
    scale: float
    window: int | None
    heads: int
    kv_heads: int
    merged: ir.Node
    """the Reshape after the attention"""


def group_query_attention(model: ir.Model) -> int:
    """Apply the rewrite everywhere it matches; return the number of attentions rewritten."""
    graph = model.graph
    rewritten = 0
    for node in list(graph):
        if not is_op(node, "Attention"):
            continue
        found = _match(graph, node)
        if isinstance(found, str):
            logger.debug("group_query_attention: %s: %s", node.name, found)
            continue
        _rewrite(graph, node, found)
        rewritten += 1
    if rewritten:
        model.opset_imports[DOMAIN] = 1
    return rewritten


def _match(graph: ir.Graph, node: ir.Node) -> _Attention | str:
    """Return what the pattern binds, or why it does not match."""
    found = cached_attention(node)
    if isinstance(found, str):
        return found
    query, key, value, mask = found.query, found.key, found.value, found.mask
    position_ids = find_input(graph, "position_ids")
    if position_ids is None or find_input(graph, "attention_mask") is None or mask.is_graph_input():
        return "no position_ids, or no attention_mask to count with"
    rule = read_rule(graph, mask)
    if rule is None:
        return f"its mask {mask.name} is not the causal rule, with or without a window, and attention_mask alone"
    rotary = [value.producer() for value in (query, key)]
    for rotation in rotary:
        if rotation is None or not is_op(rotation, "RotaryEmbedding") or set(rotation.attributes) - {"interleaved"}:
            return "query or key is not rotated as a whole"
        if len(rotation.inputs) != 4:
            return "rotated without positions"
        if rotation.inputs[3] is not position_ids or rotation.attributes.get_int("interleaved", 0) != 0:
            return "rotated by something else than position_ids, or interleaved"
    assert rotary[0] is not None
    assert rotary[1] is not None
    if list(rotary[0].inputs[1:3]) != list(rotary[1].inputs[1:3]):
        return "query and key have different tables"
    cos, sin = rotary[0].inputs[1:3]
    split = [_split_heads(v) for v in (rotary[0].inputs[0], rotary[1].inputs[0], value)]
    if any(v is None for v in split) or cos is None or sin is None:
        return "query, key or value do not come from split heads"
    merged = _merge_heads(node.outputs[0])
    if merged is None:
        return "its heads are not merged at once"
    if query.shape is None or key.shape is None:
        return "the number of heads is not known"
    heads, kv_heads = query.shape[1], key.shape[1]
    if not isinstance(heads, int) or not isinstance(kv_heads, int):
        return f"{heads} and {kv_heads} heads, expected numbers"
    q0, k0, v0 = (v for v in split if v is not None)
    return _Attention(q0, k0, v0, found.past, (cos, sin), found.scale, rule.window, heads, kv_heads, merged)


def _split_heads(value: ir.Value | None) -> ir.Value | None:
    """Return x of Transpose(Reshape(x), perm=[0, 2, 1, 3]), which is [B, S, heads * head_dim]."""
    transpose = value.producer() if value is not None else None
    if transpose is None or not _is_head_transpose(transpose):
        return None
    reshape = transpose.inputs[0].producer() if transpose.inputs[0] is not None else None
    if reshape is None or not is_op(reshape, "Reshape"):
        return None
    source = reshape.inputs[0]
    return source if source is not None and source.shape is not None and len(source.shape) == 3 else None


def _merge_heads(value: ir.Value) -> ir.Node | None:
    """Return the Reshape node of Reshape(Transpose(value, perm=[0, 2, 1, 3])) to [B, S, heads * head_dim]."""
    transpose = only_user(value)
    if transpose is None or not _is_head_transpose(transpose):
        return None
    reshape = only_user(transpose.outputs[0])
    if reshape is None or not is_op(reshape, "Reshape"):
        return None
    shape = reshape.outputs[0].shape
    return reshape if shape is not None and len(shape) == 3 else None


def _is_head_transpose(node: ir.Node) -> bool:
    return is_op(node, "Transpose") and list(node.attributes["perm"].as_ints()) == [0, 2, 1, 3]


def _rewrite(graph: ir.Graph, node: ir.Node, found: _Attention) -> None:
    merged = found.merged.outputs[0]
    seqlens, total = _lengths(graph)
    outputs = [
        ir.Value(name=f"{node.outputs[0].name}_merged", type=ir.TensorType(FLOAT), shape=merged.shape),
        *(ir.Value(type=v.type, shape=v.shape) for v in node.outputs[1:]),
    ]
    fused = ir.node(
        NAME,
        [found.query, found.key, found.value, *found.past, seqlens, total, *found.tables],
        {"num_heads": found.heads, "kv_num_heads": found.kv_heads, "scale": found.scale, "do_rotary": 1}
        | ({} if found.window is None else {"local_window_size": found.window}),
        domain=DOMAIN,
        outputs=outputs,
        name=f"node_{node.outputs[0].name}_fused",
    )
    graph.insert_before(node, fused)
    merged.replace_all_uses_with(outputs[0])
    for old, new in zip(node.outputs[1:], outputs[1:], strict=True):
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        old.name, new.name = None, old.name
    unused = [found.merged, found.merged.inputs[0].producer() if found.merged.inputs[0] else None, node]
    for old_node in unused:
        assert old_node is not None
        graph.remove(old_node, safe=True)


def _lengths(graph: ir.Graph) -> tuple[ir.Value, ir.Value]:
    """Return seqlens_k and total_sequence_length, computed once per graph."""
    known = {node.outputs[0].name: node.outputs[0] for node in graph}
    if "seqlens_k" in known:
        return known["seqlens_k"], known["total_sequence_length"]
    mask = find_input(graph, "attention_mask")
    axis, one = constant(graph, "axis_1", [1]), constant(graph, "one", 1)
    to_int32 = {"to": int(INT32)}
    count = new_node("ReduceSum", [mask, axis], "cache_lengths", INT64, ["batch_size"], {"keepdims": 0})
    last = new_node("Sub", [count.outputs[0], one], "last_slots", INT64, ["batch_size"])
    seqlens = new_node("Cast", [last.outputs[0]], "seqlens_k", INT32, ["batch_size"], to_int32)
    width = new_node("Shape", [mask], "mask_length", INT64, [1], {"start": 1, "end": 2})
    scalar = new_node("Squeeze", [width.outputs[0]], "mask_length_scalar", INT64, [])
    total = new_node("Cast", [scalar.outputs[0]], "total_sequence_length", INT32, [], to_int32)
    graph.insert_before(next(iter(graph)), [count, last, seqlens, width, scalar, total])
    return seqlens.outputs[0], total.outputs[0]
