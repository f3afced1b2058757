"""Make the shared-cache graph in float16 or bfloat16, for the CUDA execution provider of onnxruntime.

| tensor                        | shape                                                            | dtype          |
|-------------------------------|------------------------------------------------------------------|----------------|
| inputs                        | as in `graphs/shared.py`                                         | kv_cache.dtype |
| -> logits                     | [batch_size, num_logits, vocab_size]                             | float32        |
| -> top_ids                    | [batch_size, num_logits, TOP_K]: the likeliest, best first       | int64          |
| -> top_logits                 | [batch_size, num_logits, TOP_K]: their logits                    | float32        |
| -> present.N.key, .value      | as past_key_values                                               | kv_cache.dtype |

Weights, residual stream and cache have the precision; what is rounded, and where:

- RMSNormalization reads and writes the precision and computes in float32 between, the product with its weight
  included, as OLMo 2 is trained: in the CUDA kernel one cast at the end (cuApplyLayerNorm in layer_norm_impl.cu). No
  square of a float16 overflows, and a norm is one kernel.
- GroupQueryAttention wants its rotary tables in the precision of its queries; its CUDA kernels exist in float16 and
  bfloat16 alone, so that a float32 graph cannot run there.
- The logits are cast to float32 after the head, as in transformers.
- In float16 what a text has shown to overflow may stay in float32, see `fp16/safety.py` and `fuse/float32_islands.py`.

Decoding can be captured as a CUDA graph: every node but those that compute shapes has a CUDA kernel in this precision,
no shape depends on the contents of a tensor, and the tensor whose length is total_sequence_length, the mask, may have
the length of the buffer at every step. The sum of the mask is taken in float32, which is exact up to 2^24 tokens:
the CUDA kernel for int64 needs cuDNN, which onnxruntime-gpu 1.31 does not install.

CUDA kernels of onnxruntime-gpu 1.31.1, by its own registry: GroupQueryAttention T, T_CACHE = float16, bfloat16;
RMSNormalization-23 T, V = float16, bfloat16; MatMulNBits T1 = float16, bfloat16; QuickGelu, MatMul, Add, Mul, Cast,
Split, Slice, Gather: both; TopK-11 float32. Its optimizer makes a QuickGelu, one kernel rounded once, of each Sigmoid
and Mul there. The parser of the plugin for TensorRT for RTX (onnxruntime-ep-nv-tensorrt-rtx-cu13 0.5.0) knows every
operator here: GroupQueryAttention with queries, keys and values apart, MatMulNBits in float16 with blocks of 32, 64 or
128, but no QuickGelu.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import onnx_ir as ir

from olmo2_export.architecture import Operation, count, norm_counts, operations, shared_inputs
from olmo2_export.config import ModelConfig
from olmo2_export.fp16.values import Float32Islands
from olmo2_export.fuse import check_op_counts
from olmo2_export.fuse.drop_unused import drop_unused
from olmo2_export.fuse.float32_islands import float32_islands
from olmo2_export.fuse.float32_lengths import float32_lengths
from olmo2_export.fuse.float32_logits import float32_logits
from olmo2_export.fuse.grouped_top_candidates import grouped_top_candidates
from olmo2_export.fuse.host_logit_count import host_logit_count
from olmo2_export.fuse.matmul_nbits import matmul_nbits
from olmo2_export.fuse.merge_projections import merge_projections
from olmo2_export.fuse.set_precision import WeightRounding, set_precision
from olmo2_export.graphs.files import attach_weights
from olmo2_export.graphs.shared import attach_blocks, shared_outputs
from olmo2_export.quantize.recipes import QuantizedWeights
from olmo2_export.weights.checkpoint import Checkpoint
from runtimes.errors import FusionError
from runtimes.manifest import KVCacheSpec, ModelSpec, TensorSpec

TOP_K = 1
"""candidates that the graph picks: what greedy decoding needs"""


def device_outputs(model: ModelSpec, cache: KVCacheSpec) -> tuple[TensorSpec, ...]:
    """Return the outputs of the graph, in order."""
    logits, *rest = shared_outputs(model, cache)
    if logits.role == "score":
        return (logits, *rest)
    shape = (*logits.shape[:-1], TOP_K)
    ids = TensorSpec("top_ids", "int64", shape, "candidate_ids")
    return (logits, ids, TensorSpec("top_logits", "float32", shape, "candidate_logits"), *rest)


def device_graph(
    shared: ir.Model,
    checkpoint: Checkpoint,
    config: ModelConfig,
    dtype: ir.DataType,
    weights: QuantizedWeights | None = None,
    wide: Float32Islands | None = None,
) -> tuple[ir.Model, WeightRounding, dict[str, int]]:
    """Give a shared-cache graph its weights and its precision.

    Args:
        shared: as `shared.shared_graph` returns it with the passes `DEVICE`, float32 and without weights; left as
            it is.
        checkpoint: read, and rounded, one tensor at a time when the graph is written.
        config: the model's.
        dtype: FLOAT16 or BFLOAT16; FLOAT gives the same graph unrounded.
        weights: the products to keep in blocks, whose scales are rounded; None: none.
        wide: what stays in float32; none of it in blocks. None: nothing.

    Returns:
        The graph, what rounds its weights, and the operators that were counted.

    Raises:
        FusionError: a pass did not find what it must find.
    """
    graph, wide, rows = shared.clone(), wide or Float32Islands(), operations(config)
    in_float32 = wide.operations(rows)
    float32_logits(graph)
    float32_islands(graph, rows, in_float32, wide.values)
    if weights is not None:
        matmul_nbits(graph, weights.formats, accuracy_level=0)
        attach_blocks(graph, weights)
    attach_weights(graph, checkpoint, config)
    applied = {
        "merge_projections": merge_projections(graph),
        "float32_lengths": float32_lengths(graph),
        "host_logit_count": host_logit_count(graph),
        "grouped_top_candidates": grouped_top_candidates(graph, TOP_K),
    }
    quantized = {} if weights is None else weights.formats
    products = products_of(rows, in_float32, quantized)
    expected = {"merge_projections": sum(len(group) > 1 for group in products)}
    if config.labels:  # no candidates, and one row
        expected |= {"host_logit_count": 0, "grouped_top_candidates": 0}
    for name, times in applied.items():
        if times != expected.get(name, 1):
            raise FusionError(f"graph {graph.graph.name}: {name}: expected {expected.get(name, 1)}, applied {times}")
    drop_unused(graph)
    rounding = set_precision(graph, dtype)
    return graph, rounding, check_op_counts(graph, expected_op_counts(rows, len(products), len(quantized)))


def products_of(
    rows: Iterable[Operation], in_float32: Collection[str], quantized: Collection[str]
) -> list[list[Operation]]:
    """Return the products that are not in blocks: linears that read one value in one dtype are merged."""
    groups = [[row for row in group if row.weight not in quantized] for group in shared_inputs(rows)]
    parts = [[row for row in group if (row.name in in_float32) == wide] for group in groups for wide in (False, True)]
    return [part for part in parts if part]


def expected_op_counts(rows: Sequence[Operation], products: int, in_blocks: int) -> dict[str, int]:
    """Return how often each operator that costs time must occur, with so many products of floats and of blocks."""
    return {
        "MatMul": products,
        "com.microsoft::MatMulNBits": in_blocks,
        **norm_counts(rows),
        "com.microsoft::GroupQueryAttention": count(rows, "attention"),
        "Sigmoid": count(rows, "silu"),
    }
