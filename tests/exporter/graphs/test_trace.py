"""The portable graph: operators, names, shapes, nothing local in it; and its one pass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from support.checkpoints import OLMO3, SHAPE

from olmo2_export.config import ModelConfig
from olmo2_export.fuse import check_op_counts, op_counts
from olmo2_export.fuse.fold_weight_transpose import fold_weight_transpose
from olmo2_export.graphs import trace as trace_module
from olmo2_export.graphs.trace import portable_inputs, portable_outputs, trace
from runtimes.errors import FusionError

CONFIG = ModelConfig.from_dict(SHAPE | {"model_type": "olmo2"})
TRACED = trace_module._traced
"""as it is before a test runs: `support.traces`"""


@pytest.fixture(scope="module")
def graph() -> ir.Model:
    return trace(CONFIG)


def test_fused_operators_are_counted(graph: ir.Model) -> None:
    counts = op_counts(graph)
    assert (counts["RMSNormalization"], counts["RotaryEmbedding"], counts["Attention"]) == (4 * 3 + 1, 2 * 3, 3)
    assert counts["MatMul"] == 7 * 3 + 1
    assert graph.opset_imports == {"": 23}
    assert not graph.functions


def test_a_count_that_is_off_raises(graph: ir.Model) -> None:
    with pytest.raises(FusionError, match="Attention: expected 4, found 3"):
        check_op_counts(graph, {"Attention": 4, "MatMul": 22})


def test_names_and_shapes_are_those_of_the_table(graph: ir.Model) -> None:
    for values, specs in (
        (graph.graph.inputs, portable_inputs(CONFIG)),
        (graph.graph.outputs, portable_outputs(CONFIG)),
    ):
        assert [v.name for v in values] == [s.name for s in specs]
        for value, spec in zip(values, specs, strict=True):
            assert value.shape is not None
            assert value.dtype is not None
            assert [d if isinstance(d, int) else d.value for d in value.shape] == list(spec.shape)
            assert value.dtype.numpy() == np.dtype(spec.dtype)


def test_empty_cache_can_be_sized_from_the_metadata_alone(tiny_package: Path) -> None:
    """transformers.js takes the symbol batch_size as 1 and every other symbol as 0."""
    model = onnx.load(tiny_package / "onnx" / "model.onnx", load_external_data=False)
    past = next(i for i in model.graph.input if i.name == "past_key_values.2.value")
    dims = [d.dim_param or d.dim_value for d in past.type.tensor_type.shape.dim]
    assert dims == ["batch_size", 2, "past_sequence_length", 16]


def test_initializers_bear_the_checkpoints_names(graph: ir.Model) -> None:
    names = {name for name in graph.graph.initializers if "." in name}
    assert len(names) == 3 * 11 + 3
    assert "model.layers.2.post_feedforward_layernorm.weight" in names
    down = graph.graph.initializers["model.layers.0.mlp.down_proj.weight"]
    assert down.shape is not None
    assert list(down.shape) == [160, 96]  # [in, out]
    assert down.meta["transposed"]


def test_no_local_path_and_no_source_line_is_left(tiny_package: Path) -> None:
    raw = (tiny_package / "onnx" / "model.onnx").read_bytes()
    for note in (b"site-packages", b".py", b"stack_trace", b"pkg.torch", str(Path.cwd()).encode()):
        assert note not in raw


def test_the_traced_program_is_not_kept_in_memory(graph: ir.Model) -> None:
    """Each node and value had a note that led to all of it."""
    assert [part for part in [*graph.graph, *graph.graph.initializers.values()] if "node" in part.meta] == []


def test_what_the_tests_share_is_what_is_traced(graph: ir.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced in other sizes of vocabulary and context, too."""
    assert trace_module._traced is not TRACED
    monkeypatch.setattr(trace_module, "_traced", TRACED)
    monkeypatch.setattr(trace_module, "_as_traced", lambda config: config)
    fresh = trace(CONFIG)
    assert ir.to_proto(graph) == ir.to_proto(fresh)
    for name, value in fresh.graph.initializers.items():
        assert graph.graph.initializers[name].meta.get("transposed") == value.meta.get("transposed")


SAME = {
    "rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "tied": {"tie_word_embeddings": True},
    "context": {"max_position_embeddings": 64},
    "vocabulary": {"vocab_size": 257},
    "hidden states": {},
}
OTHER = {
    "epsilon": {"rms_norm_eps": 1e-5},
    "bias": {"attention_bias": True},
    "two ropes": OLMO3 | {"num_hidden_layers": 3},
}


@pytest.mark.parametrize(("fields", "same"), [(f, f in SAME.values()) for f in (*SAME.values(), *OTHER.values())])
def test_what_a_trace_does_not_see_is_traced_once(
    fields: dict[str, object], same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[ModelConfig] = []
    traced = trace_module._traced(trace_module._as_traced(CONFIG))
    monkeypatch.setattr(trace_module, "_traced", lambda config: asked.append(config) or traced)
    monkeypatch.setattr(trace_module, "check_op_counts", lambda *_: {})
    other = ModelConfig.from_dict(SHAPE | {"model_type": "olmo2"} | fields)
    found = [trace(CONFIG), trace(other if fields else other.giving((1,)))]
    assert (asked[0] == asked[1]) == same
    assert traced.graph.outputs[1].name == "present.0.key"  # what is added, is to a copy
    assert (found[1].graph.outputs[1].name == "hidden_states.1") == (not fields)
    if same:
        context, vocabulary = other.max_position_embeddings, other.vocab_size
        sizes = {"rotary_sin": [context, 8], "model.embed_tokens.weight": [vocabulary, 96]}
        assert {name: found[1].graph.initializers[name].shape for name in sizes} == sizes
        assert found[1].graph.initializers["lm_head.weight"].shape == [96, vocabulary]
        assert found[1].graph.outputs[0].shape == ["batch_size", "num_logits", vocabulary]


def test_classifiers_of_as_many_labels_are_traced_once() -> None:
    fields = SHAPE | {"model_type": "olmo2", "architectures": ["Olmo2ForSequenceClassification"]}
    named, padded, more = (
        trace_module._as_traced(ModelConfig.from_dict(fields | changed))
        for changed in (
            {"id2label": {"0": "no", "1": "yes"}, "pad_token_id": None},
            {"num_labels": 2},
            {"num_labels": 3},
        )
    )
    assert named == padded != more


def test_graph_passes_the_checker(tiny_package: Path) -> None:
    onnx.checker.check_model(str(tiny_package / "onnx" / "model.onnx"), full_check=True)


def _linear(*, perm: list[int], second_use: bool = False, with_data: bool = False) -> ir.Model:
    """x @ W^T, in variations."""
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=[5, 7])
    w = ir.val("w", dtype=ir.DataType.FLOAT, shape=[7, 7])
    if with_data:
        w.const_value = ir.tensor(np.ones((7, 7), np.float32), name="w")
    transposed = ir.node("Transpose", [w], attributes={"perm": perm})
    product = ir.node("MatMul", [x, transposed.outputs[0]])
    nodes = [transposed, product]
    if second_use:
        nodes.append(ir.node("MatMul", [x, w]))
    graph = ir.Graph([x], [nodes[-1].outputs[0]], nodes=nodes, initializers=[w], opset_imports={"": 23}, name="g")
    return ir.Model(graph, ir_version=11)


def test_fold_matches_once_and_is_idempotent() -> None:
    model = _linear(perm=[1, 0])
    assert fold_weight_transpose(model) == 1
    assert [n.op_type for n in model.graph] == ["MatMul"]
    assert fold_weight_transpose(model) == 0


@pytest.mark.parametrize(
    "model",
    [_linear(perm=[0, 1]), _linear(perm=[1, 0], second_use=True), _linear(perm=[1, 0], with_data=True)],
    ids=["identity", "shared-weight", "has-data"],
)
def test_fold_leaves_other_graphs_alone(model: ir.Model) -> None:
    before = [n.op_type for n in model.graph]
    assert fold_weight_transpose(model) == 0
    assert [n.op_type for n in model.graph] == before
