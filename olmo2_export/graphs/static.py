"""Package -> the static-cache graph that TensorRT compiles and onnxruntime runs.

| tensor                         | shape                                                  | dtype     |
|--------------------------------|--------------------------------------------------------|-----------|
| input_ids                      | [batch_size, sequence_length]                          | int64     |
| write_indices                  | [batch_size]: the position of each row's first token   | int64     |
| logit_index                    | [batch_size, 1]: the token of each row to get logits   | int64     |
| past_key_values.N.key, .value  | [batch_size, kv_heads, max_cache_length, head_dim]     | see below |
| inputs_embeds, if asked for    | [batch_size, sequence_length, hidden]: of negative ids | float32   |
| -> logits                      | [batch_size, vocab_size]                               | float32   |
| -> top_ids                     | [batch_size, top_k]: the likeliest tokens, best first  | int64     |
| -> top_logits                  | [batch_size, top_k]: their logits                      | float32   |
| -> score, of a classifier      | [batch_size, labels]; then none of the three above     | float32   |
| -> hidden_states.N, if asked for | [batch_size, sequence_length, hidden]                | float32   |
| -> present.N.key, .value       | the past with the new tokens written in it             | see below |

Row b's token i goes to the position write_indices[b] + i, which must be below max_cache_length; it sees the positions
up to its own. TensorRT writes in place: present must be bound to the memory of past. That memory must hold
finite numbers, such as zeros, from the start: positions that are not seen yet are read, and weighted with 0. Prompts of
different lengths are padded on the right: logit_index picks each one's last token, and the next one is written over
its padding.

In bf16, fp16 and fp32 weights, embedding, head, attention, the residual stream and the cache have that precision, as in
transformers; RMSNorm, rotary embedding and the scaling of the queries are computed in float32. The three graphs differ
in dtypes alone. int4, int8 and fp8 are the bf16 graph with quantised linears (`quantize.static` says which):

| precision | weights                                 | their inputs           | products                           |
|-----------|-----------------------------------------|------------------------|------------------------------------|
| int4      | DequantizeLinear(int4, blocks)          | bfloat16               | q, k and v as one; gate and up too |
| int8      | DequantizeLinear(int8, per channel)     | QuantizeLinear to int8 | apart                              |
| fp8       | DequantizeLinear(float8e4m3fn, channel) | QuantizeLinear to fp8  | q, k and v as one; gate and up too |

TensorRT for RTX 1.7 merges int8 products of one input by itself: concatenated they cost a kernel per layer more where
the batch is 1, and one less where it is 4. So it is with fp8, concatenated for the latter, the default of `build`. int4
it merges at batch 1 alone: there concatenation costs nothing, and at batch 4 it saves three kernels per layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import onnx_ir as ir

from olmo2_export.architecture import Operation, count, norm_counts, norms, operations, shared_inputs
from olmo2_export.catalog import static_row
from olmo2_export.config import ModelConfig, config_of
from olmo2_export.dtypes import ir_dtype
from olmo2_export.fuse import TENSORRT, apply, check_applied, check_op_counts
from olmo2_export.fuse.dequantize_weights import CODES, SCALES, dequantize_weights
from olmo2_export.fuse.merge_projections import JOINT, merge_projections
from olmo2_export.fuse.quantize_inputs import quantize_inputs
from olmo2_export.fuse.set_cache_length import set_cache_length
from olmo2_export.fuse.set_precision import WeightRounding, set_precision
from olmo2_export.fuse.static_cache import OPSET
from olmo2_export.fuse.top_candidates import top_candidates
from olmo2_export.graphs.hidden_states import hidden_outputs
from olmo2_export.graphs.inputs_embeds import embedding_input, require_embeddings
from olmo2_export.graphs.trace import answer
from olmo2_export.quantize.linear import QuantizedLinear, side_by_side
from olmo2_export.quantize.static import StaticWeights
from olmo2_export.stored_graph import load_graph
from runtimes.errors import FusionError
from runtimes.manifest import KVCacheSpec, Manifest, ModelSpec, Precision, Role, TensorSpec, Variant
from runtimes.ort.versions import oldest_onnxruntime


def static_inputs(model: ModelSpec, precision: Precision, max_cache_length: int) -> tuple[TensorSpec, ...]:
    """Return the inputs of the static-cache graph, in order."""
    return (
        TensorSpec("input_ids", "int64", ("batch_size", "sequence_length"), "token_ids"),
        TensorSpec("write_indices", "int64", ("batch_size",), "write_indices"),
        TensorSpec("logit_index", "int64", ("batch_size", 1), "logit_index"),
        *_caches("past_key_values", "past", model, precision, max_cache_length),
        *embedding_input(model, optional=False),
    )


def static_outputs(
    model: ModelSpec, precision: Precision, max_cache_length: int, top_k: int = 1
) -> tuple[TensorSpec, ...]:
    """Return the outputs of the static-cache graph, in order."""
    hidden = hidden_outputs(model)
    if model.labels:
        return (answer(model), *hidden, *_caches("present", "present", model, precision, max_cache_length))
    return (
        answer(model, ("batch_size",)),
        TensorSpec("top_ids", "int64", ("batch_size", top_k), "candidate_ids"),
        TensorSpec("top_logits", "float32", ("batch_size", top_k), "candidate_logits"),
        *hidden,
        *_caches("present", "present", model, precision, max_cache_length),
    )


def expected_op_counts(rows: Sequence[Operation], precision: Precision) -> dict[str, int]:
    """Return how often each fused operator must occur in the static-cache graph."""
    attention = count(rows, "attention")
    return {
        "MatMul": len(shared_inputs(rows)) if static_row(precision).weights.merged else count(rows, "linear"),
        **norm_counts(rows),
        "RotaryEmbedding": count(rows, "rotary"),
        "TensorScatter": 2 * attention,
        "trt::TRT_Attention": attention,
        "Attention": 0,
    }


def expected_passes(rows: Sequence[Operation]) -> dict[str, int]:
    """Return how often each pass must apply."""
    attention, rotary = count(rows, "attention"), count(rows, "rotary")
    return {
        "gather_logit_row": 1,
        "write_index_positions": rotary,
        "static_cache": attention,
        "float32_norm": count(rows, *norms()),
        "float32_rotary": rotary,
        "float32_logits": 1,
        "plain_reshape": 4 * attention,
    }


def static_graph(
    portable: ir.Model,
    config: ModelConfig,
    precision: Precision,
    max_cache_length: int,
    top_k: int = 1,
    weights: StaticWeights | None = None,
) -> tuple[ir.Model, WeightRounding]:
    """Turn the portable graph into the static-cache graph, in place.

    Args:
        portable: as `trace` returns it or as it is loaded from a package; float32. Weights stay where they are until
            the graph is written, and are then rounded one at a time.
        config: the model's.
        precision: of weights, activations and cache; where weights are quantised, of the weights.
        max_cache_length: of the cache, in tokens.
        top_k: candidates that the graph picks per row.
        weights: the linears, where they are quantised; read when the graph is written.

    Returns:
        The graph, and what rounds its weights, whose `check` is to be called when they have been written.

    Raises:
        FusionError: a pass did not find what it must find, or the result is not the graph of the table above.
    """
    model, rows, row = config.spec, operations(config), static_row(precision)
    require_embeddings(portable)
    check_applied(portable, apply(portable, TENSORRT), expected_passes(rows), "expected_passes in graphs/static.py")
    if row.weights.merged:
        merge_projections(portable)
    if not config.labels:
        top_candidates(portable, top_k)
    rounding = set_precision(portable, ir_dtype(row.dtype))
    set_cache_length(portable, max_cache_length)
    if weights is not None:
        _quantize(portable, weights)
    check_op_counts(portable, expected_op_counts(rows, precision))
    _check_interface(portable.graph.inputs, static_inputs(model, precision, max_cache_length))
    _check_interface(portable.graph.outputs, static_outputs(model, precision, max_cache_length, top_k))
    return portable, rounding


def load_static_graph(
    package: Path,
    manifest: Manifest,
    precision: Precision,
    max_cache_length: int,
    top_k: int = 1,
    weights: StaticWeights | None = None,
) -> tuple[ir.Model, WeightRounding]:
    """Make the static-cache graph of a package from its fp32 variant; arguments and errors as `static_graph`."""
    portable = load_graph(package / manifest.variants["fp32"].graph)
    config = config_of(package, manifest.model)
    return static_graph(portable, config, precision, max_cache_length, top_k, weights)


def static_variant(
    model: ModelSpec,
    precision: Precision,
    max_cache_length: int,
    top_k: int,
    op_counts: dict[str, int],
) -> Variant:
    """Return the manifest's entry of a static-cache graph."""
    row = static_row(precision)
    cache = KVCacheSpec(
        form=row.form,
        dtype=row.dtype,
        num_layers=model.num_hidden_layers,
        num_key_value_heads=model.num_key_value_heads,
        head_dim=model.head_dim,
        max_cache_length=max_cache_length,
    )
    return Variant(
        name=row.name,
        precision=precision,
        graph=row.path,
        data=(f"{row.path}_data",),
        opset=OPSET,
        inputs=static_inputs(model, precision, max_cache_length),
        outputs=static_outputs(model, precision, max_cache_length, top_k),
        kv_cache=cache,
        op_counts=op_counts,
        min_onnxruntime=oldest_onnxruntime(cache),
    )


def _quantize(model: ir.Model, weights: StaticWeights) -> None:
    """Quantise linears and their inputs; their data is made when it is read, the two parts of a weight in a row."""
    dequantize_weights(model, weights.forms)
    quantize_inputs(model, weights.forms)

    @lru_cache(maxsize=1)
    def joined(name: str) -> QuantizedLinear:
        return side_by_side([weights.linear(part) for part in name.split(JOINT)])

    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            continue
        assert value.dtype is not None  # the pass gave both
        assert value.shape is not None

        def load(name: str = name, dtype: ir.DataType = value.dtype) -> ir.TensorProtocol:
            linear = joined(name.removesuffix(CODES).removesuffix(SCALES))
            return ir.Tensor(linear.codes if name.endswith(CODES) else linear.scales, dtype=dtype, name=name)

        value.const_value = ir.LazyTensor(load, dtype=value.dtype, shape=value.shape, name=name)


def _caches(
    prefix: str, role: Role, model: ModelSpec, precision: Precision, max_cache_length: int
) -> Iterator[TensorSpec]:
    shape = ("batch_size", model.num_key_value_heads, max_cache_length, model.head_dim)
    for layer in range(model.num_hidden_layers):
        for kind in ("key", "value"):
            yield TensorSpec(f"{prefix}.{layer}.{kind}", static_row(precision).dtype, shape, role)


def _check_interface(values: Iterable[ir.Value], specs: tuple[TensorSpec, ...]) -> None:
    """Compare the inputs or outputs of a graph with the table.

    Raises:
        FusionError: naming the first that differs.
    """
    found = [_form(value) for value in values]
    for one, other in zip(found, [(spec.name, spec.dtype, spec.shape) for spec in specs], strict=False):
        if one != other:
            raise FusionError(f"static-cache graph has {one}, expected {other}")
    if len(found) != len(specs):
        raise FusionError(f"static-cache graph has {len(found)} inputs or outputs, expected {len(specs)}")


def _form(value: ir.Value) -> tuple[str, str, tuple[int | str, ...]]:
    dtype = value.dtype.numpy().name if value.dtype is not None else "none"
    dimensions = tuple(d if isinstance(d, int) else str(d) for d in value.shape or ())
    return str(value.name), dtype, dimensions
