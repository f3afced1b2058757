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

TensorRT turns the scatter into an update of the input's own memory if the cache is an input, its result an output, and
nothing but the attention reads it. The attention mask has no work left: padding is on the right, where kv_lengths ends
before it, or where the next token overwrites it.
"""

from __future__ import annotations

import logging

import onnx_ir as ir

from olmo2_export.fuse.edit import constant, ensure_input, find_input, is_op, name_of, new_node, new_token_count
from olmo2_export.fuse.trt_attention import CAUSAL_KIND, DOMAIN, NAME, trt_attention_function

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
    for node in list(graph):
        if not is_op(node, "Attention"):
            continue
        if (reason := _why_not(graph, node)) is not None:
            logger.debug("static_cache: %s: %s", node.name, reason)
            continue
        kv_lengths = _kv_lengths(graph)
        query, key, value, _, past_key, past_value = node.inputs
        assert query and key and value and past_key and past_value  # _why_not has seen to it
        y, present_key, present_value = node.outputs
        scale = constant(graph, "query_scale", node.attributes["scale"].as_float(), ir.DataType.FLOAT)
        scaled = new_node("Mul", [query, scale], f"{y.name}_query", ir.DataType.FLOAT, query.shape)
        key_cache, value_cache = _scatter(graph, past_key, key), _scatter(graph, past_value, value)
        caches = [key_cache.outputs[0], value_cache.outputs[0]]
        attention = new_node(
            NAME,
            [scaled.outputs[0], *caches, None, None, kv_lengths],
            f"{y.name}_trt",
            ir.DataType.FLOAT,
            y.shape,
            {"causal_kind": CAUSAL_KIND, "TRT_decomposable": 1},
            domain=DOMAIN,
        )
        graph.insert_before(node, [scaled, key_cache, value_cache, attention])
        y.replace_all_uses_with(attention.outputs[0])
        for old, new in zip((present_key, present_value), caches, strict=True):
            old.replace_all_uses_with(new, replace_graph_outputs=True)
            old.name, new.name = None, old.name
        graph.remove(node, safe=True)
        rewritten += 1
    if rewritten:
        function = trt_attention_function(OPSET)
        model.functions[function.identifier()] = function
        model.opset_imports.update({"": OPSET, DOMAIN: 1})
        model.ir_version = IR_VERSION
    return rewritten


def _why_not(graph: ir.Graph, node: ir.Node) -> str | None:
    """Return why the pattern does not match, or None if it does."""
    if len(node.inputs) != 6 or any(value is None for value in node.inputs) or len(node.outputs) != 3:
        return "not an attention with mask, past and present"
    _, key, value, mask, *pasts = node.inputs
    if set(node.attributes) != {"scale"}:
        return f"attributes {sorted(node.attributes)}, expected scale alone"
    scale = node.attributes["scale"].as_float()
    known = graph.initializers.get("query_scale")
    if (
        known is not None
        and known.const_value is not None
        and known.const_value.numpy().item() != ir.tensor(scale).numpy()
    ):
        return f"scale {scale} is not that of the other layers"
    if find_input(graph, "input_ids") is None or not _derives_from(mask, find_input(graph, "attention_mask")):
        return "its mask does not come from attention_mask"
    for past, present, new in zip(pasts, node.outputs[1:], (key, value), strict=True):
        assert past is not None and new is not None
        if not past.is_graph_input() or len(past.uses()) != 1 or not present.is_graph_output() or present.uses():
            return f"{past.name} and {present.name} are not the cache's input and output, used here alone"
        if past.shape is None or len(past.shape) != 4 or new.shape is None:
            return f"{past.name} has the shape {past.shape}"
    return None


def _derives_from(value: ir.Value | None, source: ir.Value | None) -> bool:
    """Tell whether a value is computed from an input of the graph."""
    pending, seen = [value], set[ir.Value]()
    while pending:
        current = pending.pop()
        if current is None or current in seen:
            continue
        if current is source:
            return True
        seen.add(current)
        producer = current.producer()
        pending.extend(producer.inputs if producer is not None else ())
    return False


def _kv_lengths(graph: ir.Graph) -> ir.Value:
    """Return the number of valid slots of each row after this call, int32 [batch_size]; computed once per graph."""
    found = next((node.outputs[0] for node in graph if node.outputs[0].name == "kv_lengths"), None)
    if found is not None:
        return found
    write_indices = ensure_input(graph, "write_indices", ["batch_size"])
    input_ids = find_input(graph, "input_ids")
    assert input_ids is not None  # _why_not has seen to it
    count = new_token_count(graph, input_ids)
    producer = count.producer()
    assert producer is not None  # a Shape
    total = new_node("Add", [write_indices, count], "kv_lengths_int64", ir.DataType.INT64, ["batch_size"])
    to_int32 = {"to": int(ir.DataType.INT32)}
    cast = new_node("Cast", [total.outputs[0]], "kv_lengths", ir.DataType.INT32, ["batch_size"], to_int32)
    graph.insert_after(producer, [total, cast])
    return cast.outputs[0]


def _scatter(graph: ir.Graph, past: ir.Value, new: ir.Value) -> ir.Node:
    """Return the node that writes `new` into `past`, whose length becomes the capacity."""
    assert past.shape is not None
    batch, heads, _, head_dim = past.shape
    past.shape = ir.Shape([batch, heads, CAPACITY, head_dim])
    write_indices = ensure_input(graph, "write_indices", ["batch_size"])
    return new_node(
        "TensorScatter",
        [past, new, write_indices],
        f"{name_of(past)}_written",
        ir.DataType.FLOAT,
        past.shape,
        {"axis": -2, "mode": "linear"},
    )
