"""The operator `trt::TRT_Attention`, with a body that says in standard operators what TensorRT computes.

| input         | shape                                          | dtype         |
|---------------|------------------------------------------------|---------------|
| query         | [batch, heads, sequence_length, head_dim]      | T, scaled by the caller |
| key, value    | [batch, kv_heads, max_cache_length, head_dim]  | T             |
| mask          | absent, or [batch, 1, sequence_length, max_cache_length] | bool |
| query_lengths | absent                                         |               |
| kv_lengths    | [batch]                                        | int32         |
| -> output     | [batch, heads, sequence_length, head_dim]      | T             |

T is float32, float16 or bfloat16. Without a mask query i of row b sees the key slots j <= kv_lengths[b] -
sequence_length + i (causal_kind "lower_right"). With one it sees those where the mask is true, and kv_lengths and
causal_kind are absent; that is the overload `WINDOW` of the function. Heads share kv_heads in groups. TensorRT's parser
ignores the body and builds its native attention; onnxruntime has no such operator, inlines the body and computes the
same.

`TRT_decomposable` lets TensorRT compile float32, for which it has no dedicated kernel, from several kernels; where it
has one (float16 and bfloat16 with a head_dim that is a multiple of 8 from 16 to 256), the plan is the same without it.

Source: inputs and attributes as the parser of TensorRT for RTX 1.7.1 reads them, found by experiment; the mask is in
the CUDA source of the float32 kernel that its plans carry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx_ir as ir

DOMAIN = "trt"
NAME = "TRT_Attention"
CAUSAL_KIND = "lower_right"
WINDOW = "window"
"""the overload of the function that takes a mask; TensorRT's parser does not look at it"""
_INPUTS = ("query", "key", "value", "mask", "query_lengths", "kv_lengths")
_ATTRIBUTES = {"causal_kind": ir.AttributeType.STRING, "TRT_decomposable": ir.AttributeType.INT}


def trt_attention_function(opset: int, overload: str = "") -> ir.Function:
    """Return the operator as a model-local function over the default domain's `opset`.

    Args:
        opset: of the default domain.
        overload: empty, or `WINDOW`.
    """
    inputs = {name: ir.Value(name=name) for name in _INPUTS}
    nodes: list[ir.Node] = []

    def add(op_type: str, *operands: ir.Value, **attributes: object) -> ir.Value:
        node = ir.node(op_type, operands, attributes)  # type: ignore[arg-type]  # ints, a float and tensors
        node.outputs[0].name = f"v{len(nodes)}"
        nodes.append(node)
        return node.outputs[0]

    visible = inputs["mask"] if overload == WINDOW else _visible(add, inputs)
    output = add("Attention", inputs["query"], inputs["key"], inputs["value"], visible, scale=1.0)
    graph = ir.Graph(list(inputs.values()), [output], nodes=nodes, opset_imports={"": opset}, name=NAME)
    attributes = [ir.Attr(name, kind, None) for name, kind in _ATTRIBUTES.items()]
    return ir.Function(DOMAIN, NAME, overload, graph=graph, attributes=attributes)


def _visible(add: Callable[..., ir.Value], inputs: Mapping[str, ir.Value]) -> ir.Value:
    """Return which slots each query sees, bool [batch, 1, sequence_length, max_cache_length]."""
    zero = add("Constant", value=ir.tensor(0))
    one = add("Constant", value=ir.tensor(1))
    axis_1 = add("Constant", value=ir.tensor([1]))
    axes_1_3 = add("Constant", value=ir.tensor([1, 3]))
    length = add("Shape", inputs["query"], start=2, end=3)  # (1,)
    capacity = add("Shape", inputs["key"], start=2, end=3)
    slots = add("Range", zero, add("Squeeze", capacity), one)  # (C,)
    steps = add("Range", zero, add("Squeeze", length), one)  # (S,)
    before = add("Sub", add("Cast", inputs["kv_lengths"], to=int(ir.DataType.INT64)), length)  # (B,)
    last = add("Add", add("Unsqueeze", before, axis_1), steps)  # (B, S): the last slot each query sees
    return add("LessOrEqual", slots, add("Unsqueeze", last, axes_1_3))
