"""Keep the KV cache in 8 or 4 bits.

Matches:

    y, present_key, present_value = com.microsoft::GroupQueryAttention(q, k, v, past_key, past_value, seqlens_k,
                                                                       total_sequence_length, cos, sin, ...)

Becomes:

    y, present_key, present_value = com.microsoft::GroupQueryAttention(..., cos, sin, , , , k_scale, v_scale,
        k_quant_type="PER_CHANNEL", v_quant_type="PER_CHANNEL", kv_cache_bit_width=bits, ...)
                        past_*, present_*: int8 [B, kv_heads, P, head_dim], or uint8 [..., head_dim / 2] for 4 bits
                        k_scale, v_scale: constant initializers float32 [kv_heads, 1, head_dim], in the graph itself

so that graphs with several caches share the file of the weights.

Source: onnxruntime, docs/ContribOperators.md, com.microsoft.GroupQueryAttention; CPU kernels since 1.27.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

import olmo2_export.catalog as catalog
from olmo2_export.dtypes import ir_dtype
from olmo2_export.fuse.group_query_attention import DOMAIN, NAME

KEPT_INSIDE = "kept inside"
"""in the `meta` of an initializer that goes into no file beside the graph, whatever its size"""

_INPUTS = 9  # up to sin


def quantized_kv_cache(model: ir.Model, scales: Mapping[str, np.ndarray], bits: int) -> int:
    """Apply the rewrite; return the number of attentions rewritten.

    Args:
        model: a shared-cache graph.
        scales: `N.key` and `N.value` of each layer, float32 [kv_heads, 1, head_dim].
        bits: 8 or 4.
    """
    graph = model.graph
    (dtype,) = {ir_dtype(cache.dtype) for cache in catalog.KV_CACHES if cache.bits == bits}
    rewritten = 0
    for node in list(graph):
        if node.domain != DOMAIN or node.op_type != NAME or len(node.inputs) != _INPUTS:
            continue
        past = node.inputs[3:5]
        names = [str(value.name).removeprefix("past_key_values.") for value in past if value is not None]
        if any(name not in scales for name in names):
            continue
        added = [_initializer(graph, f"kv_cache.{name}.scale", scales[name]) for name in names]
        fused = ir.node(
            NAME,
            [*node.inputs, None, None, None, *added],
            {
                **{name: attribute.value for name, attribute in node.attributes.items()},
                "k_quant_type": "PER_CHANNEL",
                "v_quant_type": "PER_CHANNEL",
                "kv_cache_bit_width": bits,
            },
            domain=DOMAIN,
            outputs=[ir.Value(type=v.type, shape=v.shape) for v in node.outputs],
            name=f"{node.name}_kv{bits}",
        )
        graph.insert_before(node, fused)
        for old, new in zip(node.outputs, fused.outputs, strict=True):
            old.replace_all_uses_with(new, replace_graph_outputs=True)
            old.name, new.name = None, old.name
        graph.remove(node, safe=True)
        for value in [*past, *fused.outputs[1:]]:
            assert value is not None  # the pass that made the node gave it all
            assert value.shape is not None
            batch, heads, length, size = value.shape
            value.type = ir.TensorType(dtype)
            value.shape = ir.Shape([batch, heads, length, int(str(size)) * bits // 8])
        rewritten += 1
    return rewritten


def _initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    value = ir.Value(
        name=name,
        const_value=ir.tensor(array, name=name),
        shape=ir.Shape(array.shape),
        type=ir.TensorType(ir.DataType.FLOAT),
    )
    value.meta[KEPT_INSIDE] = True
    graph.register_initializer(value)
    return value
