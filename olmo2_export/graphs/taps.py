"""Find the same tensors in every form of graph that this exporter makes, and cut a graph where its layers meet.

| name, after `model.layers.N.`  | shape                              | what gives it                          |
|--------------------------------|------------------------------------|----------------------------------------|
| self_attn.{q,k,v}_proj         | [B, S, heads * head_dim]           | linear                                 |
| self_attn.{q,k}_norm           | [B, S, heads * head_dim]           | RMS norm; not in OLMo 1                |
| self_attn.{q,k,v}_clip         | [B, S, heads * head_dim]           | clip; in OLMo 1 with clip_qkv          |
| self_attn.{q,k}_rotary         | [B, heads, S, head_dim]            | rotary embedding, where it is a node   |
| self_attn.{key,value}_cache    | [B, kv_heads, length, head_dim]    | KV cache write: the output present.N   |
| self_attn.attention            | [B, S, heads * head_dim]           | attention; the input of o_proj         |
| self_attn.o_proj               | [B, S, hidden]                     | linear                                 |
| post_attention_layernorm       | [B, S, hidden]                     | RMS norm; layer norm in OLMo 1         |
| after_attention                | [B, S, hidden]                     | residual add; the input of gate and up |
| mlp.{gate,up}_proj             | [B, S, intermediate]               | linear                                 |
| mlp.gated                      | [B, S, intermediate]               | gated activation; the input of down    |
| mlp.down_proj                  | [B, S, hidden]                     | linear                                 |
| post_feedforward_layernorm     | [B, S, hidden]                     | RMS norm; not in OLMo 1                |
| input_layernorm                | [B, S, hidden]                     | layer norm; in OLMo 1                  |
| output                         | [B, S, hidden]                     | residual add                           |

and model.embed_tokens, model.norm_input (the rows that get logits), model.norm, logits or score. Values are found from
the names of weights, which no pass changes but for a suffix, and from who reads them, as the rows of `architecture`
say: a norm that is ignored has the value that its reader sees. Weights may be float, in blocks, int8, quantised and
merged; activations may be cast and quantised.

A segment is the embedding, one layer, or norm and head, as a graph of its own. One segment at a time needs the weights
of one layer in memory, whatever the model's size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from olmo2_export.architecture import (
    EMBED,
    FINAL_NORM,
    SCORE,
    Operation,
    after_layers,
    norm_operators,
    norms,
    of_layer,
    within_layer,
)
from olmo2_export.dtypes import HALVES
from olmo2_export.fuse.edit import is_op, name_of
from olmo2_export.fuse.matmul_nbits import unordered
from olmo2_export.fuse.merge_projections import JOINT
from runtimes.errors import PackageError
from runtimes.manifest import LORA_A, LORA_B

HIDDEN = "hidden"
"""the input of a segment that stands for what the segment before it gives"""
PRODUCTS = ("MatMul", "MatMulNBits", "MatMulInteger", "Gather", "GatherBlockQuantized")
_OWN_NAMES = {"attention_residual": "after_attention", "mlp.product": "mlp.gated", "mlp_residual": "output"}
"""tensors that are called otherwise here than in `architecture`"""
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


def tap_name(row: Operation) -> str:
    """Return the name, within its layer, of the tensor that an operation of a layer writes."""
    name = within_layer(row)
    return _OWN_NAMES.get(name, name)


def find_segments(model: ir.Model, rows: Sequence[Operation]) -> list[Segment]:
    """Find the tensors of a graph; it is not changed.

    Args:
        model: portable, shared-cache, device or static-cache, in any form.
        rows: of the model.

    Returns:
        The embedding, each layer, norm and head.

    Raises:
        PackageError: a weight's product, or the cache of a layer, is not in the graph.
    """
    graph, values = model.graph, _Values(model.graph, rows)
    layers = [of_layer(rows, i) for i in range(1 + max(row.layer or 0 for row in rows))]
    starts = [layer[0].reads[0] for layer in layers]
    *norms, head = after_layers(rows)
    answer = "score" if head.name == SCORE else "logits"
    ends = [name_of(values.of(name)) for name in (*starts, norms[0].reads[0])]
    segments = [Segment(None, {EMBED: ends[0]}, None, ends[0])]
    segments += [Segment(i, _layer_taps(graph, values, layer), ends[i], ends[i + 1]) for i, layer in enumerate(layers)]
    taps = {"model.norm_input": name_of(values.read_by(norms[0])), FINAL_NORM: name_of(values.of(head.reads[0]))}
    return [*segments, Segment(None, taps | {answer: answer}, ends[-1], None)]


def cut(model: ir.Model, segment: Segment, hidden_shape: Sequence[int | str] | None = None) -> ir.Model:
    """Return a segment as a graph; its outputs are its taps and its result, in float32 where they are bfloat16.

    Args:
        model: as `find_segments` has seen it; left as it is.
        segment: of it.
        hidden_shape: of the value that it starts from, where the graph does not say: it is fixed to this.
    """
    values = {name_of(v): v for node in model.graph for v in node.outputs if v.name}
    source = None if segment.source is None else values[segment.source]
    wanted = dict.fromkeys([*segment.taps.values(), *([segment.result] if segment.result else [])])
    wanted.pop(segment.source or "", None)  # known, and to compute it is what the segments before are for
    starts = [*model.graph.inputs, *([] if source is None else [source])]
    graph = ir.convenience.extract(model.graph, starts, [values[name] for name in wanted])
    if source is not None:
        hidden = graph.inputs[-1]
        hidden.name = HIDDEN
        if hidden.shape is None and hidden_shape is not None:
            hidden.shape = ir.Shape(hidden_shape)
    for value in list(graph.inputs):
        if not value.uses() or name_of(value).endswith((LORA_A, LORA_B)):  # of an adapter: its default stays
            graph.inputs.remove(value)
    _float32_interface(graph)
    return ir.Model(graph, ir_version=model.ir_version, functions=list(model.functions.values()))


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


def _layer_taps(graph: ir.Graph, values: _Values, layer: Sequence[Operation]) -> dict[str, str]:
    found: dict[str, ir.Value | None] = {}
    for row in layer:
        if row.kind == "attention":
            _, key, value = _attention(graph, row)
            place = within_layer(row).rpartition("attention")[0]
            found |= {f"{place}key_cache": key, f"{place}value_cache": value}
        if row.kind != "silu":  # the gated activation is looked at as a whole
            found[tap_name(row)] = values.of(row.name) if row.kind != "rotary" else values.rotated(row)
    index = layer[0].layer or 0
    return {layer_name(index, name): name_of(value) for name, value in found.items() if value is not None}


class _Values:
    """Where the values of a model's rows are in a graph."""

    def __init__(self, graph: ir.Graph, rows: Iterable[Operation]) -> None:
        self._graph = graph
        self._rows = {row.name: row for row in rows}
        self._readers: dict[str, list[Operation]] = defaultdict(list)
        for row in self._rows.values():
            for name in row.reads:
                self._readers[name].append(row)

    def of(self, name: str) -> ir.Value:
        """Return what an operation writes, as its readers see it."""
        row, readers = self._rows[name], self._readers[name]
        if row.kind == "linear" and row.weight is not None:
            return linear_values(self._graph, row.weight)[1]
        linear = next((reader for reader in readers if reader.kind == "linear"), None)
        if linear is not None and linear.weight is not None:
            return linear_values(self._graph, linear.weight)[0]
        if row.kind in norms():
            return self._norm(row)
        if row.kind == "clip":
            return _clipped(self.of(row.reads[0]))
        norm = next((reader for reader in readers if reader.kind in norms()), None)
        if norm is None:
            raise PackageError(f"graph {self._graph.name}: no linear or norm reads {name}")
        picked = self.read_by(norm)
        node = picked.producer()
        source = node.inputs[0] if node is not None and node.op_type in ("Slice", "GatherND") else None
        return source or picked  # the last norm sees the rows that get logits

    def read_by(self, norm: Operation) -> ir.Value:
        """Return the input of a norm, found from its result; that is the result where the norm is ignored."""
        normed = self.of(norm.name)
        node = _back(normed, "Cast").producer()
        x = node.inputs[0] if node is not None and node.op_type in norm_operators() else None
        return _back(x or normed, "Cast")

    def rotated(self, row: Operation) -> ir.Value | None:
        """Return what a rotary embedding writes, where it is a node."""
        return _rotated(self.of(row.reads[0]))

    def _norm(self, row: Operation) -> ir.Value:
        """Return the result of a norm; where that is ignored, what is read in its place."""
        if row.weight is not None and (result := _norm(self._graph, row.weight)) is not None:
            return result
        ignored = self.of(row.reads[0])
        for reader in self._readers[row.name]:
            if reader.kind == "add":
                residual = next(name for name in reader.reads if name != row.name)
                return _added(self.of(reader.name), self.of(residual), ignored)
        return self._seen_by_attention(row) or ignored

    def _seen_by_attention(self, row: Operation) -> ir.Value | None:
        """Return what the attention reads of a norm, before it is rotated and its heads are split."""
        names = {row.name, *(reader.name for reader in self._readers[row.name] if reader.kind == "rotary")}
        attention = next(
            other for other in self._rows.values() if other.kind == "attention" and not names.isdisjoint(other.reads)
        )
        node, key, _ = _attention(self._graph, attention)
        place = next(i for i, name in enumerate(attention.reads) if name in names)
        # A key that is written into the cache by another node is not seen by itself.
        seen = node.inputs[place] if place == 0 or key.producer() is node else None
        moves = ("Cast", "Gather", "Mul", "Transpose", "Reshape", "RotaryEmbedding")
        return _back(seen, *moves) if seen is not None else None


def _attention(graph: ir.Graph, row: Operation) -> tuple[ir.Node, ir.Value, ir.Value]:
    """Return the attention of a layer, and the caches that it or a scatter gives."""
    outputs, layer = {value.name: value for value in graph.outputs}, row.layer
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


def linear_values(graph: ir.Graph, weight: str) -> tuple[ir.Value, ir.Value]:
    """Return input and result of the product with a weight, the latter with its bias and what adapters add."""
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
            return x, _seen(_adapted(_biased(_seen(y), weight.removesuffix(".weight") + ".bias")))
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
    value, _ = unordered(value)
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


def _adapted(y: ir.Value) -> ir.Value:
    for user in _users(y):
        added = user.inputs[1].producer() if is_op(user, "Add") and user.inputs[1] is not None else None
        matrix = added.inputs[1] if added is not None and is_op(added, "MatMul") else None
        if matrix is not None and name_of(_back(matrix, "Cast")).endswith(LORA_B):
            return user.outputs[0]
    return y


def _norm(graph: ir.Graph, weight: str) -> ir.Value | None:
    """Return the result of the norm with that weight, if somebody reads it."""
    for node in graph:
        if node.op_type in norm_operators() and len(node.inputs) > 1 and node.inputs[1] is not None:
            scale = _back(node.inputs[1], "Cast")
            if scale.name == weight and node.outputs[0].uses():
                return _seen(node.outputs[0])
    return None


def _clipped(value: ir.Value) -> ir.Value:
    """Return a value after the clip that reads it; itself, where none does, or nobody reads the clip."""
    for user in _users(value):
        if is_op(user, "Clip") and user.outputs[0].uses():
            return _seen(user.outputs[0])
        if is_op(user, "Cast"):
            found = _clipped(user.outputs[0])
            if found is not user.outputs[0]:
                return found
    return value


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
