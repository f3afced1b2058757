"""Make the graphs that onnxruntime runs fastest: shared KV buffer, fused operators, quantised weights.

| tensor                         | shape                                                        | dtype          |
|--------------------------------|--------------------------------------------------------------|----------------|
| input_ids                      | [batch_size, sequence_length]                                | int64          |
| attention_mask                 | [batch_size, total_sequence_length], padding on the right    | int64          |
| past_key_values.N.key, .value  | [batch_size, kv_heads, past_sequence_length, head_dim]       | kv_cache.dtype |
| num_logits_to_keep             | [], optional, default 0: the last rows that get logits, 0: all | int64        |
| inputs_embeds, if asked for    | as in `graphs/trace.py`                                      | float32        |
| -> logits                      | [batch_size, num_logits, vocab_size]                         | float32        |
| -> score, of a classifier      | [batch_size, labels]; then neither of the two above          | float32        |
| -> hidden_states.N, if asked for | [batch_size, sequence_length, hidden]                      | float32        |
| -> present.N.key, .value       | as past_key_values                                           | kv_cache.dtype |

Past and present may be bound to one buffer of any length, which is then written in place; otherwise present is past +
new tokens, as in the portable graph. With a past that is not empty, several tokens at a time need a batch of one.

A variant may have two graphs of this form: `decode_graph`, its weights in blocks of 4 or 8 bits, and `prefill_graph`,
int8 by int8, faster where a step has many rows.

`padded_graph` gives the form that other runtimes load, on the weights of `decode_graph`: past and present are float32,
and padding may be on either side.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import onnx_ir as ir

from olmo2_export.architecture import Operation, count, norm_counts, quantizable
from olmo2_export.fuse import ONNXRUNTIME, OTHER_RUNTIMES, Pass, apply, check_applied, check_op_counts
from olmo2_export.fuse.gather_block_quantized import gather_block_quantized
from olmo2_export.fuse.matmul_integer import matmul_integer
from olmo2_export.fuse.matmul_nbits import matmul_nbits
from olmo2_export.graphs.hidden_states import hidden_outputs
from olmo2_export.graphs.inputs_embeds import embedding_input
from olmo2_export.graphs.stored_blocks import note_folded_orders
from olmo2_export.graphs.trace import answer, logit_count
from olmo2_export.quantize.int8 import quantize_int8
from olmo2_export.quantize.recipes import QuantizedWeights
from olmo2_export.stored_graph import load_graph
from olmo2_export.weights.stored_names import EMBEDDING, HEAD
from runtimes.manifest import KVCacheSpec, ModelSpec, Role, TensorSpec


def shared_inputs(model: ModelSpec, cache: KVCacheSpec) -> tuple[TensorSpec, ...]:
    """Return the inputs of the shared-cache graph, in order."""
    return (
        TensorSpec("input_ids", "int64", ("batch_size", "sequence_length"), "token_ids"),
        TensorSpec("attention_mask", "int64", ("batch_size", "total_sequence_length"), "attention_mask"),
        *_caches("past_key_values", "past", cache, "past_sequence_length"),
        *logit_count(model),
        *embedding_input(model),
    )


def shared_outputs(model: ModelSpec, cache: KVCacheSpec) -> tuple[TensorSpec, ...]:
    """Return the outputs of the shared-cache graph, in order."""
    return (
        answer(model),
        *hidden_outputs(model),
        *_caches("present", "present", cache, "total_sequence_length"),
    )


def expected_passes(rows: Sequence[Operation]) -> dict[str, int]:
    """Return how often each pass must apply."""
    return {"group_query_attention": count(rows, "attention"), "quick_gelu": count(rows, "silu")}


def shared_graph(portable: ir.Model, rows: Sequence[Operation], passes: list[Pass] = ONNXRUNTIME) -> ir.Model:
    """Return the portable graph with its operators fused and its cache shared; weights and their names stay.

    Args:
        portable: as `trace` returns it, without weights; left as it is.
        rows: of the model.
        passes: the fusions; `DEVICE` for GPUs.

    Raises:
        FusionError: a pass did not find what it must find.
    """
    fused = portable.clone()
    check_applied(fused, apply(fused, passes), expected_passes(rows), "expected_passes in graphs/shared.py")
    return fused


def padded_graph(shared: ir.Model, rows: Sequence[Operation]) -> ir.Model:
    """Return a shared-cache graph, not quantised yet, that takes rows padded on either side; see `shared_graph`."""
    padded = shared.clone()
    expected = {"either_padding": count(rows, "attention")}
    check_applied(padded, apply(padded, OTHER_RUNTIMES), expected, "padded_graph in graphs/shared.py")
    return padded


def decode_graph(
    shared: ir.Model, weights: QuantizedWeights, rows: Sequence[Operation]
) -> tuple[ir.Model, dict[str, int]]:
    """Quantise the weights of a shared-cache graph in blocks.

    Args:
        shared: as `shared_graph` returns it; left as it is.
        weights: products and embedding, those that stay floats left out; read when the graph is written.
        rows: of the model.

    Returns:
        The graph and the operators that were counted in it.
    """
    graph = shared.clone()
    gather_block_quantized(graph, weights.formats)
    matmul_nbits(graph, weights.formats, orders=weights.orders)
    note_folded_orders(graph, weights.folded)
    attach_blocks(graph, weights)
    linears = sum(row.weight in weights.formats for row in quantizable(rows) if row.kind == "linear")
    expected = {
        "com.microsoft::MatMulNBits": linears,
        "MatMul": count(rows, "linear") - linears,
        "com.microsoft::GatherBlockQuantized": int(EMBEDDING in weights.formats),
    }
    return graph, check_op_counts(graph, expected_op_counts(rows) | expected)


def prefill_graph(
    shared: ir.Model,
    weights: QuantizedWeights,
    rows: Sequence[Operation],
    in_blocks: Collection[str] = (),
    decode: Path | None = None,
) -> tuple[ir.Model, dict[str, int]]:
    """Quantise the products of the layers to int8 by int8; head, embedding and the linears `in_blocks` as they are in
    `decode_graph`; see there. Where that is stored, at `decode`, they are read from its file, not made again."""
    graph = shared.clone()
    kept = {
        name: form
        for name, form in weights.formats.items()
        if name == HEAD or name.removesuffix(".weight").endswith(tuple(in_blocks) or (" ",))
    }
    gather_block_quantized(graph, weights.formats)
    matmul_nbits(graph, kept)
    matmul_integer(graph, weights.formats.keys() - kept.keys() - {EMBEDDING})
    attach_blocks(graph, weights, decode)
    linears = count(quantizable(rows), "linear")
    counts = {"MatMulInteger": linears - len(kept), "MatMul": count(rows, "linear") - linears}
    expected = {"com.microsoft::MatMulNBits": len(kept), **counts}
    return graph, check_op_counts(graph, expected_op_counts(rows) | expected)


def expected_op_counts(rows: Sequence[Operation]) -> dict[str, int]:
    """Return how often each operator but the products must occur in both graphs."""
    return {
        **norm_counts(rows),
        "com.microsoft::GroupQueryAttention": count(rows, "attention"),
        "com.microsoft::QuickGelu": count(rows, "silu"),
        "com.microsoft::GatherBlockQuantized": count(rows, "gather"),
    }


def attach_blocks(model: ir.Model, weights: QuantizedWeights, stored: Path | None = None) -> None:
    """Give the quantised initializers lazy tensors; the parts of a weight are written in a row: it is made once.

    Args:
        model: whose.
        weights: makes them.
        stored: a graph with some of the blocks, which are read from its file.
    """

    @lru_cache(maxsize=1)
    def blocks(weight: str) -> dict[str, np.ndarray | None]:
        matrix = weights.matrix(weight)
        packed = matrix.gather_layout()[0] if weight == EMBEDDING else matrix.packed
        return {"packed": packed, "scales": matrix.scales, "zero_points": matrix.zero_points}

    @lru_cache(maxsize=1)
    def int8(weight: str) -> dict[str, np.ndarray | None]:
        codes, scales = quantize_int8(weights.source(weight))
        return {"int8": codes, "channel_scales": scales}

    makers = {"packed": blocks, "scales": blocks, "zero_points": blocks, "int8": int8, "channel_scales": int8}
    written = {} if stored is None else load_graph(stored).graph.initializers
    for name, value in model.graph.initializers.items():
        weight, _, part = name.rpartition(".")
        if value.const_value is not None or part not in makers:
            continue
        if name in written:
            value.const_value = written[name].const_value
            continue
        assert value.dtype is not None  # the pass gave both
        assert value.shape is not None

        def load(name: str = name, weight: str = weight, part: str = part) -> ir.TensorProtocol:
            array = makers[part](weight)[part]
            assert array is not None  # the graph has zero points where the format has them
            return ir.Tensor(array, name=name)

        value.const_value = ir.LazyTensor(load, dtype=value.dtype, shape=value.shape, name=name)


def _caches(prefix: str, role: Role, cache: KVCacheSpec, length: str) -> Iterator[TensorSpec]:
    shape = ("batch_size", cache.num_key_value_heads, length, cache.stored_head_dim)
    for layer in range(cache.num_layers):
        for kind in ("key", "value"):
            yield TensorSpec(f"{prefix}.{layer}.{kind}", cache.dtype, shape, role)
