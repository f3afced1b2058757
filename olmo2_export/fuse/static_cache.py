"""Write the new keys and values into a cache of fixed capacity, in place, and attend to that.

Matches:

    y, present_key, present_value = Attention(q, k, v, mask, past_key, past_value, scale=s)
                        past_*: inputs [batch_size, kv_heads, past_sequence_length, head_dim]; present_*: outputs

Becomes:

    present_key   = TensorScatter(past_key, k, write_indices, axis=-2, mode="linear")
    present_value = TensorScatter(past_value, v, write_indices, axis=-2, mode="linear")
    y = trt::TRT_Attention(q * s, present_key, present_value, , , kv_lengths, causal_kind="lower_right")
                        past_*, present_*: [batch_size, kv_heads, max_cache_length, head_dim]
                        kv_lengths = int32(write_indices + sequence_length)

and where the mask has a window

    y = trt::TRT_Attention(q * s, present_key, present_value, visible)
                        visible = slots <= own and slots > own - window       bool [batch_size, 1, S, max_cache_length]
                        own = write_indices + 0, 1, ... sequence_length - 1

TensorRT turns the scatter into an update of the input's own memory if the cache is an input, its result an output, and
nothing but the attention reads it. The attention mask, which must be that of `masks`, has no work left: padding is on
the right, where the causal rule hides it from every token that counts, and the next token is written over it.
"""

from __future__ import annotations

import logging

import onnx_ir as ir

from olmo2_export.fuse.cached_attention import CachedAttention, cached_attention
from olmo2_export.fuse.edit import constant, ensure_input, is_op, name_of, new_node, new_token_count
from olmo2_export.fuse.masks import read_rule
from olmo2_export.fuse.trt_attention import CAUSAL_KIND, DOMAIN, NAME, WINDOW, trt_attention_function
from olmo2_export.fuse.write_index_positions import positions

logger = logging.getLogger(__name__)

OPSET = 24
"""the first with TensorScatter"""
IR_VERSION = 12
CAPACITY = "max_cache_length"
"""the dimension that `set_cache_length` makes a number"""


def static_cache(model: ir.Model) -> int:
    """Apply the rewrite everywhere it matches; return the number of attentions rewritten."""
    graph = model.graph
    rewritten = 0
    overloads: set[str] = set()
    for node in list(graph):
        if not is_op(node, "Attention"):
            continue
        found = _match(graph, node)
        if isinstance(found, str):
            logger.debug("static_cache: %s: %s", node.name, found)
            continue
        rule = read_rule(graph, found.mask)
        assert rule is not None  # _match has seen to it
        _rewrite(graph, node, found, rule.window)
        overloads.add("" if rule.window is None else WINDOW)
        rewritten += 1
    for overload in sorted(overloads):
        function = trt_attention_function(OPSET, overload)
        model.functions[function.identifier()] = function
    if rewritten:
        model.opset_imports.update({"": OPSET, DOMAIN: 1})
        model.ir_version = IR_VERSION
    return rewritten


def _match(graph: ir.Graph, node: ir.Node) -> CachedAttention | str:
    """Return what the pattern binds, or why it does not match."""
    found = cached_attention(node)
    if isinstance(found, str):
        return found
    if (known := graph.initializers.get("query_scale")) is not None:
        assert known.const_value is not None  # `constant` made it
        if known.const_value.numpy() != ir.tensor(found.scale).numpy():
            return f"scale {found.scale} is not that of the other layers"
    if read_rule(graph, found.mask) is None:
        return f"its mask {found.mask.name} is not the causal rule, with or without a window, and attention_mask alone"
    for past in found.past:
        if past.shape is None or len(past.shape) != 4:
            return f"{past.name} has the shape {past.shape}"
    return found


def _rewrite(graph: ir.Graph, node: ir.Node, found: CachedAttention, window: int | None) -> None:
    y, *presents = node.outputs
    scale = constant(graph, "query_scale", found.scale, ir.DataType.FLOAT)
    scaled = new_node("Mul", [found.query, scale], f"{y.name}_query", ir.DataType.FLOAT, found.query.shape)
    scatters = [_scatter(graph, *pair) for pair in zip(found.past, (found.key, found.value), strict=True)]
    caches = [scatter.outputs[0] for scatter in scatters]
    seen = [None, None, _kv_lengths(graph)] if window is None else [_visible(graph, window)]
    causal: dict[str, int | str] = {"causal_kind": CAUSAL_KIND} if window is None else {}
    attention = new_node(
        NAME,
        [scaled.outputs[0], *caches, *seen],
        f"{y.name}_trt",
        ir.DataType.FLOAT,
        y.shape,
        causal | {"TRT_decomposable": 1},
        domain=DOMAIN,
    )
    attention.overload = "" if window is None else WINDOW
    graph.insert_before(node, [scaled, *scatters, attention])
    y.replace_all_uses_with(attention.outputs[0])
    for old, new in zip(presents, caches, strict=True):
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        old.name, new.name = None, old.name
    graph.remove(node, safe=True)


def _scatter(graph: ir.Graph, past: ir.Value, new: ir.Value) -> ir.Node:
    """Return the node that writes `new` into `past`, whose length becomes the capacity."""
    assert past.shape is not None  # _match has seen to it
    batch, heads, _, head_dim = past.shape
    past.shape = ir.Shape([batch, heads, CAPACITY, head_dim])
    write_indices = ensure_input(graph, "write_indices", ["batch_size"])
    name = f"{name_of(past)}_written"
    attributes: dict[str, int | str] = {"axis": -2, "mode": "linear"}
    return new_node("TensorScatter", [past, new, write_indices], name, ir.DataType.FLOAT, past.shape, attributes)


def _visible(graph: ir.Graph, window: int) -> ir.Value:
    """Return which slots of the cache each token sees, bool [batch_size, 1, S, capacity]; computed once per window."""
    name = f"window_{window}"
    for node in graph:
        if node.outputs[0].name == name:
            return node.outputs[0]
    own, last = positions(graph)
    bool_type, int64 = ir.DataType.BOOL, ir.DataType.INT64
    wide: list[int | str] = ["batch_size", 1, "sequence_length", 1]
    each: list[int | str] = ["batch_size", 1, "sequence_length", CAPACITY]
    start, end, step = constant(graph, "zero", 0), constant(graph, CAPACITY, 0), constant(graph, "one", 1)
    slots = new_node("Range", [start, end, step], "cache_slots", int64, [CAPACITY])
    place = new_node("Unsqueeze", [own, constant(graph, "axes_1_3", [1, 3])], "own_slots", int64, wide)
    before = new_node("Sub", [place.outputs[0], constant(graph, "window", window)], f"before_{name}", int64, wide)
    causal = new_node("LessOrEqual", [slots.outputs[0], place.outputs[0]], "not_later", bool_type, each)
    recent = new_node("Greater", [slots.outputs[0], before.outputs[0]], f"recent_{name}", bool_type, each)
    both = new_node("And", [causal.outputs[0], recent.outputs[0]], name, bool_type, each)
    graph.insert_after(last, [slots, place, before, causal, recent, both])
    return both.outputs[0]


def _kv_lengths(graph: ir.Graph) -> ir.Value:
    """Return the number of valid slots of each row after this call, int32 [batch_size]; computed once per graph."""
    for node in graph:
        if node.outputs[0].name == "kv_lengths":
            return node.outputs[0]
    write_indices = ensure_input(graph, "write_indices", ["batch_size"])
    count = new_token_count(graph)
    total = new_node("Add", [write_indices, count.outputs[0]], "kv_lengths_int64", ir.DataType.INT64, ["batch_size"])
    to_int32 = {"to": int(ir.DataType.INT32)}
    cast = new_node("Cast", [total.outputs[0]], "kv_lengths", ir.DataType.INT32, ["batch_size"], to_int32)
    graph.insert_after(count, [total, cast])
    return cast.outputs[0]
