"""A parity test that cannot fail is a defect: each bug below, put into one layer or one number, must turn it red."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from support.rebuilt_packages import rebuilt, rebuilt_trt

from olmo2_export.engine.build import build
from olmo2_export.engine.options import EngineOptions
from olmo2_export.measure.parity import GATES, ParityReport
from olmo2_export.verify.measure import Truth, ask_pytorch, measure_runner
from olmo2_export.weights.checkpoint import open_checkpoint
from runtimes import open_runner

LAYER = 1


def nodes(model: ir.Model, op_type: str) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == op_type]


def norm(model: ir.Model, weight: str) -> ir.Node:
    return next(n for n in nodes(model, "RMSNormalization") if n.inputs[1] is not None and n.inputs[1].name == weight)


def bypass(node: ir.Node) -> None:
    assert node.inputs[0] is not None
    node.outputs[0].replace_all_uses_with(node.inputs[0])


def constant(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    model.graph.register_initializer(value)
    return value


def q_norm_ignored(model: ir.Model) -> None:
    bypass(norm(model, f"model.layers.{LAYER}.self_attn.q_norm.weight"))


def post_attention_norm_ignored(model: ir.Model) -> None:
    bypass(norm(model, f"model.layers.{LAYER}.post_attention_layernorm.weight"))


def gate_and_up_swapped(model: ir.Model) -> None:
    products = {
        kind: next(n for n in nodes(model, "MatMul") if n.inputs[1] is not None and n.inputs[1].name == name)
        for kind in ("gate", "up")
        for name in [f"model.layers.{LAYER}.mlp.{kind}_proj.weight"]
    }
    gate, up = products["gate"].inputs[1], products["up"].inputs[1]
    products["gate"].replace_input_with(1, up)
    products["up"].replace_input_with(1, gate)


def eps_ten_times_too_large(model: ir.Model) -> None:
    for node in nodes(model, "RMSNormalization"):
        node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-5)


def rope_interleaved(model: ir.Model) -> None:
    for node in nodes(model, "RotaryEmbedding"):
        node.attributes["interleaved"] = ir.AttrInt64("interleaved", 1)


def rope_theta_wrong(model: ir.Model) -> None:
    for name, function in (("rotary_cos", np.cos), ("rotary_sin", np.sin)):
        value = model.graph.initializers[name]
        assert value.shape is not None
        length, half = (int(str(d)) for d in value.shape)
        angles = np.outer(np.arange(length), 10_000.0 ** (-np.arange(half) / half))
        value.const_value = ir.tensor(function(angles).astype(np.float32), name=name)


def kv_heads_interleaved_instead_of_grouped(model: ir.Model) -> None:
    node = nodes(model, "Attention")[LAYER]
    q, y = node.inputs[0], node.outputs[0]
    assert q is not None
    assert q.shape is not None
    heads = int(str(q.shape[1]))
    order = np.arange(heads).reshape(2, -1).T.ravel()
    shuffled = ir.node("Gather", [q, constant(model, "order", order)], attributes={"axis": 1})
    back = ir.node("Gather", [y, constant(model, "back", np.argsort(order))], attributes={"axis": 1})
    y.replace_all_uses_with(back.outputs[0])
    back.replace_input_with(0, y)
    node.replace_input_with(0, shuffled.outputs[0])
    model.graph.insert_before(node, shuffled)
    model.graph.insert_after(node, back)


def attention_scale_wrong(model: ir.Model) -> None:
    node = nodes(model, "Attention")[LAYER]
    node.attributes["scale"] = ir.AttrFloat32("scale", node.attributes["scale"].as_float() * 1.02)


def _shift_causal_mask(model: ir.Model, by: int) -> None:
    node = nodes(model, "LessOrEqual")[0]
    add = ir.node("Add", [node.inputs[1], constant(model, "shift", np.array(by, np.int64))])
    node.replace_input_with(1, add.outputs[0])
    model.graph.insert_before(node, add)


def causal_mask_shows_the_next_token(model: ir.Model) -> None:
    _shift_causal_mask(model, 1)


def causal_mask_hides_the_token_itself(model: ir.Model) -> None:
    _shift_causal_mask(model, -1)


def key_and_value_cache_swapped(model: ir.Model) -> None:
    node = nodes(model, "Attention")[LAYER]
    key, value = node.inputs[4], node.inputs[5]
    node.replace_input_with(4, value)
    node.replace_input_with(5, key)


def one_weight_off_by_a_thousandth(model: ir.Model) -> None:
    value = model.graph.initializers[f"model.layers.{LAYER}.self_attn.o_proj.weight"]
    assert value.const_value is not None
    array = value.const_value.numpy().copy()
    array[3, 5] += 1e-3
    value.const_value = ir.tensor(array, name=value.name)


def head_gives_nan(model: ir.Model) -> None:
    value = model.graph.initializers["model.norm.weight"]
    assert value.const_value is not None
    array = value.const_value.numpy().copy()
    array[0] = math.nan
    value.const_value = ir.tensor(array, name=value.name)


BUGS: list[Callable[[ir.Model], None]] = [
    q_norm_ignored,
    post_attention_norm_ignored,
    gate_and_up_swapped,
    eps_ten_times_too_large,
    rope_interleaved,
    rope_theta_wrong,
    kv_heads_interleaved_instead_of_grouped,
    attention_scale_wrong,
    causal_mask_shows_the_next_token,
    causal_mask_hides_the_token_itself,
    key_and_value_cache_swapped,
    one_weight_off_by_a_thousandth,
    head_gives_nan,
]


def measure(package: Path, variant: str, truth: Truth) -> ParityReport:
    """Feed a float32 graph as it is stored; neither its weights nor quality are looked at."""
    with open_runner(package, variant=variant) as runner:
        return measure_runner(runner, truth, truth.own["fp32"], GATES["fp32"], truth.draws, variant, "fp32", "")


@pytest.fixture(scope="module", params=["tiny", "demo"])
def case(request: pytest.FixtureRequest) -> tuple[Path, Truth]:
    """A package, random or trained, and what PyTorch says of its model."""
    package: Path = request.getfixturevalue(f"{request.param}_package")
    model = "demo" if request.param == "demo" else str(request.getfixturevalue("tiny_checkpoint"))
    return package, ask_pytorch(package, open_checkpoint(model), ["fp32"])


def test_a_rebuilt_package_without_a_bug_passes(case: tuple[Path, Truth], tmp_path: Path) -> None:
    package, truth = case
    report = measure(rebuilt(package, tmp_path / "copy", lambda _: None), "fp32", truth)
    assert report.passed
    assert all(0 < c.error_ratio < 4 for c in report.cases)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_bug_turns_parity_red(case: tuple[Path, Truth], tmp_path: Path, bug: Callable[[ir.Model], None]) -> None:
    package, truth = case
    report = measure(rebuilt(package, tmp_path / "copy", bug), "fp32", truth)
    assert not report.passed, [(c.mode, c.error_ratio, c.nmse) for c in report.cases]


# The same for the graph that TensorRT compiles. What it has of its own: scaled queries, lengths instead of a mask, a
# cache that is written in place, and logits of one chosen row.


def query_scale_wrong(model: ir.Model) -> None:
    muls = [n for n in nodes(model, "Mul") if n.inputs[1] is not None and n.inputs[1].name == "query_scale"]
    value = model.graph.initializers["query_scale"].const_value
    assert value is not None
    wrong = (value.numpy() * 1.02).astype(np.float32)
    muls[LAYER].replace_input_with(1, constant(model, "query_scale_wrong", wrong))


def kv_lengths_one_too_large(model: ir.Model) -> None:
    attentions = nodes(model, "TRT_Attention")
    lengths = attentions[0].inputs[5]
    assert lengths is not None
    add = ir.node("Add", [lengths, constant(model, "one_too_many", np.array(1, np.int32))])
    for node in attentions:
        node.replace_input_with(5, add.outputs[0])
    model.graph.insert_before(attentions[0], add)


def key_and_value_written_into_each_others_cache(model: ir.Model) -> None:
    key, value = nodes(model, "TensorScatter")[2 * LAYER : 2 * LAYER + 2]
    new_key, new_value = key.inputs[1], value.inputs[1]
    key.replace_input_with(1, new_value)
    value.replace_input_with(1, new_key)


def logit_index_ignored(model: ir.Model) -> None:
    """The last row always; the input is read, as TensorRT and onnxruntime would otherwise drop it."""
    gather = nodes(model, "GatherND")[0]
    ids = next(v for v in model.graph.inputs if v.name == "input_ids")
    length = ir.node("Shape", [ids], attributes={"start": 1, "end": 2})
    last = ir.node("Sub", [length.outputs[0], constant(model, "back_one", np.array(1, np.int64))])
    nothing = ir.node("Mul", [gather.inputs[1], constant(model, "nothing", np.array(0, np.int64))])
    index = ir.node("Add", [nothing.outputs[0], last.outputs[0]])
    gather.replace_input_with(1, index.outputs[0])
    model.graph.insert_before(gather, [length, last, nothing, index])


TRT_CAPACITY = 64
TRT_BUGS: list[Callable[[ir.Model], None]] = [
    q_norm_ignored,
    post_attention_norm_ignored,
    gate_and_up_swapped,
    eps_ten_times_too_large,
    rope_interleaved,
    query_scale_wrong,
    kv_lengths_one_too_large,
    key_and_value_written_into_each_others_cache,
    logit_index_ignored,
]


@pytest.fixture(scope="module")
def trt_case(tiny_package: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Truth]:
    """A package with an engine of fp32, and what PyTorch says of its model."""
    package = Path(shutil.copytree(tiny_package, tmp_path_factory.mktemp("trt") / "tiny"))
    build(package, EngineOptions("fp32", compute_capabilities=["8.9"], max_cache_length=TRT_CAPACITY), progress=False)
    return package, ask_pytorch(package, open_checkpoint(str(tiny_checkpoint)), ["fp32"], TRT_CAPACITY)


def test_a_rebuilt_trt_graph_without_a_bug_passes(trt_case: tuple[Path, Truth], tmp_path: Path) -> None:
    package, truth = trt_case
    report = measure(rebuilt_trt(package, tmp_path / "copy", lambda _: None), "trt_fp32", truth)
    assert report.passed
    assert all(0 < c.error_ratio < 4 for c in report.cases)


@pytest.mark.parametrize("bug", TRT_BUGS, ids=lambda bug: bug.__name__)
def test_bug_in_the_trt_graph_turns_parity_red(
    trt_case: tuple[Path, Truth], tmp_path: Path, bug: Callable[[ir.Model], None]
) -> None:
    package, truth = trt_case
    report = measure(rebuilt_trt(package, tmp_path / "copy", bug), "trt_fp32", truth)
    assert not report.passed, [(c.mode, c.error_ratio, c.nmse) for c in report.cases]
