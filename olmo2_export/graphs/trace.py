"""Trace the model, without weights, into the portable ONNX graph.

| tensor                         | shape                                                        | dtype   |
|--------------------------------|--------------------------------------------------------------|---------|
| input_ids                      | [batch_size, sequence_length]                                | int64   |
| attention_mask                 | [batch_size, total_sequence_length]                          | int64   |
| position_ids                   | [batch_size, sequence_length]                                | int64   |
| past_key_values.N.key, .value  | [batch_size, kv_heads, past_sequence_length, head_dim]       | float32 |
| num_logits_to_keep             | [], optional, default 0: the last rows that get logits, 0: all | int64 |
| inputs_embeds, if asked for    | [vectors_batch, vectors_length, hidden], optional: `inputs_embeds.py` | float32 |
| -> logits                      | [batch_size, num_logits, vocab_size]                         | float32 |
| -> score, of a classifier      | [batch_size, labels]; then neither of the two above          | float32 |
| -> hidden_states.N, if asked for | [batch_size, sequence_length, hidden]                      | float32 |
| -> present.N.key, .value       | [batch_size, kv_heads, total_sequence_length, head_dim]      | float32 |

total_sequence_length = past_sequence_length + sequence_length. num_logits_to_keep is an input with a default (an
initializer of the same name), so that a runtime that does not know it can leave it out. A classifier scores the last
token of each row in the call that is no padding, as transformers does: `fuse.pooled_row`.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache

import onnx_ir as ir
import onnxscript.optimizer
import torch

from olmo2_export.architecture import Operation, count, norm_counts, operations
from olmo2_export.config import ModelConfig
from olmo2_export.fuse import PORTABLE, apply, check_op_counts
from olmo2_export.fuse.pooled_row import NO_PADDING, pooled_row
from olmo2_export.graphs.hidden_states import give_hidden_states, hidden_outputs
from olmo2_export.graphs.inputs_embeds import embedding_input, take_embeddings
from olmo2_export.graphs.repeat_layers import one_of_each_kind, repeat_layers
from olmo2_export.model.olmo import OlmoForCausalLM
from olmo2_export.rope import Rope
from runtimes.errors import FusionError
from runtimes.manifest import ModelSpec, TensorSpec

OPSET = 23
IR_VERSION = 11


def portable_inputs(config: ModelConfig) -> tuple[TensorSpec, ...]:
    """Return the inputs of the portable graph, in order."""
    cache = ("batch_size", config.num_key_value_heads, "past_sequence_length", config.head_dim)
    return (
        TensorSpec("input_ids", "int64", ("batch_size", "sequence_length"), "token_ids"),
        TensorSpec("attention_mask", "int64", ("batch_size", "total_sequence_length"), "attention_mask"),
        TensorSpec("position_ids", "int64", ("batch_size", "sequence_length"), "position_ids"),
        *(TensorSpec(f"past_key_values.{name}", "float32", cache, "past") for name in _cache_names(config)),
        *logit_count(config.spec),
        *embedding_input(config.spec),
    )


def portable_outputs(config: ModelConfig) -> tuple[TensorSpec, ...]:
    """Return the outputs of the portable graph, in order."""
    cache = ("batch_size", config.num_key_value_heads, "total_sequence_length", config.head_dim)
    return (
        answer(config.spec),
        *hidden_outputs(config.spec),
        *(TensorSpec(f"present.{name}", "float32", cache, "present") for name in _cache_names(config)),
    )


def logit_count(model: ModelSpec) -> tuple[TensorSpec, ...]:
    """Return the input that says which rows get logits; a classifier has none."""
    return () if model.labels else (TensorSpec("num_logits_to_keep", "int64", (), "logit_count"),)


def answer(model: ModelSpec, rows: tuple[str, ...] = ("batch_size", "num_logits")) -> TensorSpec:
    """Return the output of what the model says: logits of these rows, or a score of each sequence for each label."""
    if model.labels:
        return TensorSpec("score", "float32", ("batch_size", len(model.labels)), "score")
    return TensorSpec("logits", "float32", (*rows, model.vocab_size), "logits")


def expected_op_counts(rows: Sequence[Operation]) -> dict[str, int]:
    """Return how often each fused operator must occur in the portable graph."""
    fused = {"RotaryEmbedding": count(rows, "rotary"), "Attention": count(rows, "attention")}
    return norm_counts(rows) | fused | ({"Clip": clips} if (clips := count(rows, "clip")) else {})


def trace(config: ModelConfig) -> ir.Model:
    """Trace one layer of each kind on the meta device, once in a process for all models that have the same of these,
    and copy them to the model's number of layers.

    Args:
        config: the model's shape.

    Returns:
        The portable graph, a copy to edit. Its initializers bear the names of the checkpoint's tensors and of the
        model's buffers, and have no data yet; `value.meta["transposed"]` marks those stored as [in, out].

    Raises:
        FusionError: the exporter did not emit the expected operators, inputs or outputs.
    """
    plain, rows = _as_traced(config), operations(config)
    model = _traced(one_of_each_kind(plain)).clone()
    repeat_layers(model, plain)
    _resize(model.graph, {_VOCABULARY: config.vocab_size, _POSITIONS: config.max_position_embeddings})
    pad = NO_PADDING if config.pad_token_id is None else config.pad_token_id
    if config.labels and not pooled_row(model, pad):
        raise FusionError(f"graph {config.model_type}: pooled_row: expected 1, applied 0 times")
    if config.inputs_embeds:
        take_embeddings(model)
    give_hidden_states(model, rows, config.hidden_states)
    check_op_counts(model, expected_op_counts(rows))
    return model


def _as_traced(config: ModelConfig) -> ModelConfig:
    """Return the config without what tracing does not see: numbers of RoPEs, names, and what is added to the graph.

    Vocabulary and positions are only dimensions of tables, and of logits; their sizes are set afterwards.
    """
    sliding = _PLAIN if len(config.ropes) == 1 else _OTHER
    labels = tuple(map(str, range(len(config.labels))))
    plain = replace(config.giving(()), full_rope=_PLAIN, sliding_rope=sliding, labels=labels)
    plain = replace(plain, vocab_size=_VOCABULARY, max_position_embeddings=_POSITIONS)
    return replace(plain, pad_token_id=None, tie_word_embeddings=False)


def _resize(graph: ir.Graph, sizes: Mapping[int, int]) -> None:
    for value in [*_all_values(graph), *graph.initializers.values()]:
        if value.shape is not None:
            value.shape = ir.Shape([sizes.get(d, d) if isinstance(d, int) else d for d in value.shape])


_PLAIN, _OTHER = Rope(), Rope("linear")
_VOCABULARY, _POSITIONS = (1 << 24) - 3, (1 << 22) - 3  # wider than any layer; nothing of this size is made


# Many revisions of a model have one graph, and some sizes are exported in turns; without weights a layer is 0.1 MB.
@lru_cache(maxsize=8)
def _traced(config: ModelConfig) -> ir.Model:
    with torch.device("meta"):
        model = OlmoForCausalLM(config).eval()
        arguments, dynamic_shapes = _example(config)
    inputs, outputs = portable_inputs(config), portable_outputs(config)
    if config.labels:  # a pass pools afterwards; until then each position is scored
        inputs = (*inputs, TensorSpec("num_logits_to_keep", "int64", (), "logit_count"))
        outputs = (
            TensorSpec("logits", "float32", ("batch_size", "num_logits", len(config.labels)), "logits"),
            *outputs[1:],
        )
    with _quiet_exporter():
        program = torch.onnx.export(
            model,
            arguments,
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=dynamic_shapes,
            input_names=[spec.name for spec in inputs],
            output_names=[spec.name for spec in outputs],
            optimize=False,  # its constant folding reads the weights, which do not exist
            verbose=False,
        )
        assert program is not None  # dynamo=True always returns a program
        graph_model = program.model
        for value in graph_model.graph.initializers.values():
            value.const_value = None
        onnxscript.optimizer.optimize_ir(graph_model)
    apply(graph_model, PORTABLE)
    _name_dimensions(graph_model, inputs, outputs)
    _strip(graph_model, config.model_type)
    _give_default(graph_model.graph, "num_logits_to_keep", 0)
    return graph_model


def _cache_names(config: ModelConfig) -> Iterator[str]:
    return (f"{layer}.{kind}" for layer in range(config.num_hidden_layers) for kind in ("key", "value"))


def _example(config: ModelConfig) -> tuple[tuple[object, ...], tuple[object, ...]]:
    """Return example arguments, of sizes that are all different, and which of their dimensions are dynamic."""
    batch, sequence, past = 3, 5, 7
    shape = (batch, config.num_key_value_heads, past, config.head_dim)
    ids = torch.zeros(batch, sequence, dtype=torch.int64)
    mask = torch.ones(batch, past + sequence, dtype=torch.int64)
    cache = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(config.num_hidden_layers)]
    dynamic = torch.export.Dim.DYNAMIC
    rows, cached = {0: dynamic, 1: dynamic}, {0: dynamic, 2: dynamic}
    return (ids, mask, ids.clone(), cache, 2), (rows, rows, rows, [(cached, cached) for _ in cache], dynamic)


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence what the exporter says of packages that are not needed and of its own deprecations."""
    loggers = [
        logging.getLogger(name) for name in ("torch.onnx._internal.exporter._registration", "onnx_ir", "onnxscript")
    ]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _name_dimensions(model: ir.Model, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
    """Give the dynamic dimensions, s26 and the like, the names of the I/O table, in the whole graph."""
    names: dict[str, str] = {}
    for value, spec in zip([*model.graph.inputs, *model.graph.outputs], [*inputs, *outputs], strict=True):
        if value.name != spec.name or value.shape is None or len(value.shape) != len(spec.shape):
            raise FusionError(f"traced {value.name} {value.shape}, expected {spec.name} {list(spec.shape)}")
        for found, expected in zip(value.shape, spec.shape, strict=True):
            if isinstance(expected, int):
                if found != expected:
                    raise FusionError(f"traced {value.name} {value.shape}, expected {list(spec.shape)}")
            elif names.setdefault(str(found), expected) != expected:
                raise FusionError(f"traced {value.name} {value.shape}: {found} is also {names[str(found)]}")
    for value in _all_values(model.graph):
        if value.shape is not None:
            value.shape = ir.Shape([d if isinstance(d, int) else names.get(str(d)) for d in value.shape])


def _all_values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    for node in graph:
        yield from node.outputs


def _strip(model: ir.Model, name: str) -> None:
    """Remove the exporter's notes: they hold local paths and source lines, differ from machine to machine, and keep the
    whole traced program in memory."""
    model.producer_name, model.producer_version, model.doc_string = "olmo2-export", None, None
    model.ir_version = IR_VERSION
    model.metadata_props.clear()
    model.graph.name, model.graph.doc_string = name, None
    model.graph.metadata_props.clear()
    values = [*_all_values(model.graph), *model.graph.initializers.values()]
    for noted in [*model.graph, *values]:
        noted.metadata_props.clear()
        noted.doc_string = None
        noted.meta.pop("node", None)


def _give_default(graph: ir.Graph, name: str, default: int) -> None:
    """Make an int64 scalar input optional."""
    value = next(v for v in graph.inputs if v.name == name)
    value.const_value = ir.tensor(default, dtype=ir.DataType.INT64, name=name)
    graph.register_initializer(value)
