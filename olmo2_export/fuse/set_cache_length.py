"""Fix the capacity of the static KV cache.

Matches:

    past_key_values.N.* and present.N.*: [batch_size, kv_heads, "max_cache_length", head_dim]

    the initializer "max_cache_length" of a graph with windows, int64 []

Becomes:

    the same values with the number in the place of the symbol, and that number

TensorRT updates a cache in place only if its length is static.
"""

from __future__ import annotations

import onnx_ir as ir

from olmo2_export.fuse.static_cache import CAPACITY


def set_cache_length(model: ir.Model, max_cache_length: int) -> int:
    """Apply everywhere; return the number of values whose shape has become static, two for each cache."""
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    fixed = 0
    if (capacity := model.graph.initializers.get(CAPACITY)) is not None:
        capacity.const_value = ir.tensor(max_cache_length, dtype=ir.DataType.INT64, name=CAPACITY)
    for value in values:
        if value.shape is None or all(str(d) != CAPACITY for d in value.shape):
            continue
        value.shape = ir.Shape([max_cache_length if str(d) == CAPACITY else d for d in value.shape])
        fixed += 1
    return fixed
