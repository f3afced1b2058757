"""Find the same tensors in every form of graph that this exporter makes, and cut a graph where its layers meet.

| name, after `model.layers.N.`  | shape                              | what gives it                          |
|--------------------------------|------------------------------------|----------------------------------------|
| self_attn.{q,k,v}_proj         | [B, S, heads * head_dim]           | linear                                 |
| self_attn.{q,k}_norm           | [B, S, heads * head_dim]           | RMS norm                               |
| self_attn.{q,k}_rotary         | [B, heads, S, head_dim]            | rotary embedding, where it is a node   |
| self_attn.{key,value}_cache    | [B, kv_heads, length, head_dim]    | KV cache write: the output present.N   |
| self_attn.attention            | [B, S, heads * head_dim]           | attention; the input of o_proj         |
| self_attn.o_proj               | [B, S, hidden]                     | linear                                 |
| post_attention_layernorm       | [B, S, hidden]                     | RMS norm                               |
| after_attention                | [B, S, hidden]                     | residual add; the input of gate and up |
| mlp.{gate,up}_proj             | [B, S, intermediate]               | linear                                 |
| mlp.gated                      | [B, S, intermediate]               | gated activation; the input of down    |
| mlp.down_proj                  | [B, S, hidden]                     | linear                                 |
| post_feedforward_layernorm     | [B, S, hidden]                     | RMS norm                               |
| output                         | [B, S, hidden]                     | residual add                           |

and model.embed_tokens, model.norm_input (the rows that get logits), model.norm, logits. Values are found from the names
of weights, which no pass changes but for a suffix, and from who reads them: a norm that is ignored has the value that
its reader sees. Weights may be float, in blocks, int8, quantised and merged; activations may be cast and quantised.

A segment is the embedding, one layer, or norm and head, as a graph of its own. One segment at a time needs the weights
of one layer in memory, whatever the model's size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from olmo2_export.dtypes import HALVES
from olmo2_export.fuse.edit import is_op, name_of
from olmo2_export.fuse.merge_projections import JOINT
from runtimes.errors import PackageError

HIDDEN = "hidden"
"""the input of a segment that stands for what the segment before it gives"""
PRODUCTS = ("MatMul", "MatMulNBits", "MatMulInteger", "Gather", "GatherBlockQuantized")
_SUFFIXES = ("", ".packed", ".int8", ".codes")
_FLOATS = (ir.DataType.FLOAT, *HALVES)


@dataclass(frozen=True)
class Segment:
    """A part of a graph that is run by itself."""

    layer: int | None
    taps: dict[str, str]
    """canonical name -> value of the graph"""
    source: str | None
    """the value that `HIDDEN` stands for; None: the segment starts from input_ids"""
    result: str | None
    """the value that the next segment starts from"""


def layer_name(layer: int, tensor: str) -> str:
    """Return the canonical name of a tensor of a layer."""
    return f"model.layers.{layer}.{tensor}"


def find_segments(model: ir.Model, layers: int) -> list[Segment]:
    """Find the tensors of a graph; it is not changed.

    Args:
        model: portable, shared-cache, device or static-cache, in any form.
        layers: how many it has.

    Returns:
        The embedding, each layer, norm and head.

    Raises:
        PackageError: a weight's product, or the cache of a layer, is not in the graph.
    """
    graph = model.graph
    starts = [_linear(graph, layer_name(i, "self_attn.q_proj.weight"))[0] for i in range(layers)]
    normed = _linear(graph, "lm_head.weight")[0]
    rows = _back(normed, "Cast")
    norm = rows.producer()
    rows = norm.inputs[0] if is_op(norm, "RMSNormalization") and norm is not None and norm.inputs[0] else normed
    rows = _back(rows, "Cast")
    pick = rows.producer()
    picked = pick is not None and pick.op_type in ("Slice", "GatherND")
    last = pick.inputs[0] if picked and pick is not None else rows
    assert last is not None  # a slice has an input
    ends = [name_of(value) for value in (*starts, last)]
    segments = [Segment(None, {"model.embed_tokens": ends[0]}, None, ends[0])]
    segments += [
        Segment(i, _layer_taps(graph, i, starts[i], (*starts, last)[i + 1]), ends[i], ends[i + 1])
        for i in range(layers)
    ]
    head = {"model.norm_input": name_of(rows), "model.norm": name_of(normed), "logits": "logits"}
    return [*segments, Segment(None, head, ends[-1], None)]


def cut(model: ir.Model, segment: Segment, hidden_shape: Sequence[int] | None = None) -> ir.Model:
    """Return a segment as a graph; its outputs are its taps and its result, in float32 where they are bfloat16.

    Args:
        model: as `find_segments` has seen it; left as it is.
        segment: of it.
        hidden_shape: of the value that it starts from, where the graph does not say: it is fixed to this.
    """
    part = model.clone()
    graph = part.graph
    values = {name_of(v): v for node in graph for v in node.outputs if v.name}
    graph.outputs.clear()
    if segment.source is not None:
        old = values[segment.source]
        hidden = ir.Value(name=HIDDEN, type=old.type, shape=old.shape)
        if hidden.shape is None and hidden_shape is not None:
            hidden.shape = ir.Shape(hidden_shape)
        graph.inputs.append(hidden)
        old.replace_all_uses_with(hidden)
    wanted = dict.fromkeys([*segment.taps.values(), *([segment.result] if segment.result else [])])
    wanted.pop(segment.source or "", None)  # known, and to compute it is what the segments before are for
    for name in wanted:
        graph.outputs.append(values[name])
    RemoveUnusedNodesPass()(part)
    for value in list(graph.inputs):
        if not value.uses():
            graph.inputs.remove(value)
    _float32_interface(graph)
    return part


def _float32_interface(graph: ir.Graph) -> None:
    """Give inputs and outputs of bfloat16, which numpy does not have, in float32; no number changes."""
    for value in graph.inputs:
        if value.dtype == ir.DataType.BFLOAT16:
            down = ir.node("Cast", [value], {"to": int(ir.DataType.BFLOAT16)})
            result = down.outputs[0]
            result.name, result.shape = f"{value.name}.bfloat16", value.shape
            result.type = ir.TensorType(ir.DataType.BFLOAT16)
            value.type = ir.TensorType(ir.DataType.FLOAT)
            value.replace_all_uses_with(result)
            down.replace_input_with(0, value)
            first = next(iter(graph), None)
            assert first is not None  # somebody reads the input
            graph.insert_before(first, down)
    for index, value in enumerate(list(graph.outputs)):
        producer = value.producer()
        if value.dtype == ir.DataType.BFLOAT16 and producer is not None:
            up = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)})
            name, value.name = value.name, f"{value.name}.bfloat16"
            up.outputs[0].name, up.outputs[0].type = name, ir.TensorType(ir.DataType.FLOAT)
            graph.insert_after(producer, up)
            graph.outputs[index] = up.outputs[0]


def _layer_taps(graph: ir.Graph, layer: int, x: ir.Value, output: ir.Value) -> dict[str, str]:
    def linear(name: str) -> tuple[ir.Value, ir.Value]:
        return _linear(graph, layer_name(layer, f"{name}.weight"))

    projected = {kind: linear(f"self_attn.{kind}_proj")[1] for kind in "qkv"}
    attended, after_o = linear("self_attn.o_proj")
    h, gate = linear("mlp.gate_proj")
    gated, down = linear("mlp.down_proj")
    attention, key, value = _attention(graph, layer)
    query_key = attention.inputs[:2] if key.producer() is attention else [attention.inputs[0], None]
    found: dict[str, ir.Value] = {f"self_attn.{kind}_proj": y for kind, y in projected.items()}
    for kind, seen in zip("qk", query_key, strict=True):
        weight = layer_name(layer, f"self_attn.{kind}_norm.weight")
        norm = _norm(graph, weight)
        if norm is None:  # ignored: what is read in its place
            norm = _back(seen, "Cast", "Gather", "Mul", "Transpose", "Reshape", "RotaryEmbedding") if seen else None
            norm = norm or projected[kind]
        found[f"self_attn.{kind}_norm"] = norm
        if (rotated := _rotated(norm)) is not None:
            found[f"self_attn.{kind}_rotary"] = rotated
    found |= {"self_attn.key_cache": key, "self_attn.value_cache": value}
    found |= {"self_attn.attention": attended, "self_attn.o_proj": after_o}
    norms = {
        name: _norm(graph, layer_name(layer, f"{name}.weight")) or _added(total, one, ignored)
        for name, total, one, ignored in (
            ("post_attention_layernorm", h, x, after_o),
            ("post_feedforward_layernorm", output, h, down),
        )
    }
    found |= {"post_attention_layernorm": norms["post_attention_layernorm"], "after_attention": h}
    found |= {"mlp.gate_proj": gate, "mlp.up_proj": linear("mlp.up_proj")[1], "mlp.gated": gated}
    found |= {"mlp.down_proj": down, "post_feedforward_layernorm": norms["post_feedforward_layernorm"]}
    found |= {"output": output}
    return {layer_name(layer, name): name_of(value) for name, value in found.items()}


def _attention(graph: ir.Graph, layer: int) -> tuple[ir.Node, ir.Value, ir.Value]:
    """Return the attention of a layer, and the caches that it or a scatter gives."""
    outputs = {value.name: value for value in graph.outputs}
    caches = [outputs.get(f"present.{layer}.{kind}") for kind in ("key", "value")]
    key, value = caches
    if key is None or value is None:
        raise PackageError(f"graph {graph.name}: no output present.{layer}.*; it is not a graph of this exporter")
    producer = key.producer()
    if producer is not None and producer.op_type in ("Attention", "GroupQueryAttention"):
        return producer, key, value
    readers = [user for user in _users(key) if user.op_type in ("Attention", "TRT_Attention")]
    if not readers:
        raise PackageError(f"graph {graph.name}: no attention reads present.{layer}.key")
    return readers[0], key, value


def _linear(graph: ir.Graph, weight: str) -> tuple[ir.Value, ir.Value]:
    """Return input and result of the product with a weight, the latter with its bias."""
    for name, initializer in graph.initializers.items():
        for suffix in _SUFFIXES:
            parts = name.removesuffix(suffix).split(JOINT) if name.endswith(suffix) else []
            if weight not in parts:
                continue
            product = _product(initializer)
            if product is None:
                continue
            x = _unquantized(product.inputs[1 if product.op_type.startswith("Gather") else 0], product)
            y = _scaled(product)
            if len(parts) > 1:
                split = next((user for user in _users(_seen(y)) if is_op(user, "Split")), None)
                if split is None:
                    raise PackageError(f"graph {graph.name}: the product with {name} is not split")
                y = split.outputs[parts.index(weight)]
            return x, _seen(_biased(_seen(y), weight.removesuffix(".weight") + ".bias"))
    raise PackageError(f"graph {graph.name}: no product with {weight}; it is not a graph of this exporter")


def _product(value: ir.Value) -> ir.Node | None:
    """Return the node that multiplies with a weight, which may be cast or dequantised before."""
    for user in _users(value):
        if user.op_type in PRODUCTS:
            return user
        if user.op_type in ("Cast", "DequantizeLinear", "Transpose"):
            found = _product(user.outputs[0])
            if found is not None:
                return found
    return None


def _unquantized(value: ir.Value | None, product: ir.Node) -> ir.Value:
    """Return the input of a product before it was quantised."""
    assert value is not None  # a product has two inputs
    if is_op(product, "MatMulInteger"):
        return _back(value, "Reshape", "QuantizeLinear")
    node = _back(value, "Cast").producer()
    if is_op(node, "DequantizeLinear") and node is not None and node.inputs[0] is not None:
        rounding = node.inputs[0].producer()
        if is_op(rounding, "QuantizeLinear") and rounding is not None and rounding.inputs[0] is not None:
            return rounding.inputs[0]
    return value


def _scaled(product: ir.Node) -> ir.Value:
    """Return the result of a product, for integers after Cast and the two scales."""
    y = product.outputs[0]
    if not is_op(product, "MatMulInteger"):
        return y
    for op_type in ("Cast", "Mul", "Mul"):
        y = next((user.outputs[0] for user in _users(y) if is_op(user, op_type)), y)
    return y


def _biased(y: ir.Value, bias: str) -> ir.Value:
    for user in _users(y):
        names = [_back(v, "Cast").name for v in user.inputs if v is not None] if is_op(user, "Add") else []
        if bias in names:
            return user.outputs[0]
    return y


def _norm(graph: ir.Graph, weight: str) -> ir.Value | None:
    """Return the result of the norm with that weight, if somebody reads it."""
    for node in graph:
        if is_op(node, "RMSNormalization") and node.inputs[1] is not None:
            scale = _back(node.inputs[1], "Cast")
            if scale.name == weight and node.outputs[0].uses():
                return _seen(node.outputs[0])
    return None


def _rotated(value: ir.Value) -> ir.Value | None:
    """Return the rotary embedding of a value, if it is a node of its own."""
    for user in _users(value):
        if is_op(user, "RotaryEmbedding"):
            return _seen(user.outputs[0])
        if user.op_type in ("Reshape", "Transpose", "Cast"):
            found = _rotated(user.outputs[0])
            if found is not None:
                return found
    return None


def _added(total: ir.Value, one: ir.Value, fallback: ir.Value) -> ir.Value:
    """Return what was added to `one`."""
    node = _back(total, "Cast").producer()
    inputs = [value for value in node.inputs if value is not None] if is_op(node, "Add") and node is not None else []
    others = [value for value in inputs if value is not one]
    return others[0] if len(others) == 1 else fallback


def _seen(value: ir.Value) -> ir.Value:
    """Return a value as its readers see it: rounded, where that is done at once."""
    while True:
        users = list(_users(value))
        if len(users) != 1 or not is_op(users[0], "Cast") or value.is_graph_output():
            return value
        if users[0].outputs[0].dtype not in _FLOATS or name_of(users[0].outputs[0]).endswith("_input_float32"):
            return value
        value = users[0].outputs[0]


def _back(value: ir.Value, *op_types: str) -> ir.Value:
    """Walk to the first input, through these operators."""
    while (node := value.producer()) is not None and node.op_type in op_types and node.inputs[0] is not None:
        value = node.inputs[0]
    return value


def _users(value: ir.Value) -> Iterator[ir.Node]:
    return (use.node for use in value.uses())
