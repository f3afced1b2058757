"""Polygraphy on the graphs for TensorRT: what is refused, which tensor differs first, which nodes still fail."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from support.rebuilt_packages import rebuilt_trt

from olmo2_export.catalog import VARIANTS
from olmo2_export.cli import main
from olmo2_export.debug.debug import (
    TOKENS,
    TOLERANCES,
    TensorDifference,
    capability,
    compare,
    first_difference,
    format_differences,
    onnxruntime_runner,
    reduce,
)
from olmo2_export.engine.build import build
from olmo2_export.engine.options import EngineOptions
from olmo2_export.graphs.files import save_graph
from olmo2_export.views.first_call import first_call
from olmo2_export.views.openers import tensorrt_runner
from runtimes import open_runner
from runtimes.errors import BackendError, FusionError, IntegrityError, UsageError, VariantNotFoundError

IDS = np.arange(TOKENS, dtype=np.int64) * 7 % 131


@pytest.fixture(scope="module")
def package(tiny_package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the fp32 graph, which onnxruntime runs as it is, and that of bf16."""
    out = Path(shutil.copytree(tiny_package, tmp_path_factory.mktemp("debug") / "tiny"))
    build(out, EngineOptions("fp32", compute_capabilities=["8.9"]), progress=False)
    build(out, EngineOptions("bf16", compute_capabilities=["8.9"]), progress=False)
    return out


def load(package: Path) -> ir.Model:
    return ir.load(package / "trt" / "model_fp32.onnx")


def test_every_dtype_of_a_graph_for_tensorrt_has_its_tolerance() -> None:
    assert TOLERANCES.keys() == {row.dtype for row in VARIANTS if row.graph == "static"}


def test_the_first_call_computes_what_the_runner_computes(package: Path) -> None:
    model = load(package)
    assert first_call(model, TOKENS) == 6
    names = {value.name for value in model.graph.outputs}
    assert {"logits", "present.2.value", "layers.1.rms_norm_1", "embedding"} <= names
    assert [value.name for value in model.graph.inputs] == ["input_ids", "logit_index"]
    differences = compare(load(package), load(package), IDS)
    assert len(differences) > 100
    assert first_difference(differences, 0.0) is None


def test_logits_of_the_first_call_are_those_of_a_prefill(package: Path, tmp_path: Path) -> None:
    model = load(package)
    first_call(model, TOKENS)
    save_graph(model, tmp_path / "first.onnx")
    with onnxruntime_runner(tmp_path / "first.onnx") as polygraphy_runner:
        feed = {"input_ids": IDS[None], "logit_index": np.array([[TOKENS - 1]])}
        found = polygraphy_runner.infer(feed)["logits"][0]
    with open_runner(package, variant="trt_fp32") as runner:
        (wanted,) = runner.prefill([IDS])
    np.testing.assert_allclose(found, wanted[-1], rtol=0, atol=2e-5)


def _epsilon(model: ir.Model) -> None:
    node = [n for n in model.graph if n.op_type == "RMSNormalization"][5]
    node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.5)


def _scale(model: ir.Model) -> None:
    (node,) = [n for n in model.graph if n.name == "node_layers.1.linear_2"]
    weight = node.inputs[1]
    assert weight is not None
    assert weight.const_value is not None
    weight.const_value = ir.tensor(weight.const_value.numpy() * 1.01, name=weight.name)


@pytest.mark.parametrize(
    ("change", "name", "op_type"),
    [(_epsilon, "layers.1.rms_norm_1", "RMSNormalization"), (_scale, "layers.1.linear_2", "MatMul")],
)
def test_the_first_tensor_that_differs_is_named(
    package: Path, change: Callable[[ir.Model], None], name: str, op_type: str
) -> None:
    changed = load(package)
    change(changed)
    differences = compare(load(package), changed, IDS)
    first = first_difference(differences, 1e-4)
    assert first is not None
    assert (first.name, first.op_type) == (name, op_type)
    (line,) = [line for line in format_differences(differences, first).splitlines() if "<-" in line]
    assert line.startswith(name)


def test_what_is_not_a_number_differs() -> None:
    bad = TensorDifference("x", "MatMul", float("nan"), float("nan"))
    assert first_difference([bad], 1.0) is bad


def test_a_graph_without_write_indices_is_refused(tiny_package: Path) -> None:
    with pytest.raises(FusionError, match="no input write_indices"):
        first_call(ir.load(tiny_package / "onnx" / "model.onnx"), TOKENS)


def test_tensorrt_takes_the_whole_graph(package: Path) -> None:
    supported, said = capability(package, "trt_fp32", "trt_rtx")
    assert supported, said


def _softcap(model: ir.Model) -> None:
    """TensorRT has no QuickGelu; onnxruntime has."""
    node = next(n for n in model.graph if n.op_type == "Sigmoid")
    node.op_type, node.domain = "QuickGelu", "com.microsoft"
    model.opset_imports["com.microsoft"] = 1


def test_a_node_that_tensorrt_does_not_take_is_named(package: Path, tmp_path: Path) -> None:
    broken = rebuilt_trt(package, tmp_path / "broken", _softcap)
    supported, said = capability(broken, "trt_fp32", "trt_rtx")
    assert not supported
    assert "QuickGelu" in said


def test_a_failing_graph_is_reduced_to_the_node(package: Path, tmp_path: Path) -> None:
    broken = rebuilt_trt(package, tmp_path / "broken", _softcap)
    reduce(broken, "trt_fp32", tmp_path / "reduced.onnx", "trt_rtx")
    nodes = onnx.load(tmp_path / "reduced.onnx").graph.node
    assert nodes[-1].op_type == "QuickGelu"
    assert len(nodes) < 45


def test_a_check_of_the_users_own(package: Path, tmp_path: Path) -> None:
    check = ["sh", "-c", '! grep -q logit_row "$0"']
    reduce(package, "trt_fp32", tmp_path / "reduced.onnx", "trt_rtx", check)
    assert len(onnx.load(tmp_path / "reduced.onnx").graph.node) <= 2


def test_what_does_not_fail_is_not_reduced(package: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to reduce"):
        reduce(package, "trt_fp32", tmp_path / "reduced.onnx", "trt_rtx")
    with pytest.raises(UsageError, match="cannot be run"):
        reduce(package, "trt_fp32", tmp_path / "reduced.onnx", "trt_rtx", [str(tmp_path / "missing")])
    assert not (tmp_path / "reduced.onnx").exists()


def test_unknown_and_damaged_graphs(package: Path, tiny_package: Path, tmp_path: Path) -> None:
    with pytest.raises(VariantNotFoundError, match="it has trt_bf16, trt_fp32"):
        capability(package, "trt_int4", "trt_rtx")
    with pytest.raises(VariantNotFoundError, match="it has none"):
        capability(tiny_package, "trt_bf16", "trt_rtx")
    copy = Path(shutil.copytree(package, tmp_path / "copy"))
    with (copy / "trt" / "model_fp32.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(IntegrityError, match="build it again"):
        capability(copy, "trt_fp32", "trt_rtx")


@pytest.mark.filterwarnings("default")  # Polygraphy sets a timing cache, which TensorRT for RTX deprecates
def test_without_a_gpu_tensorrt_computes_nothing(package: Path) -> None:
    with pytest.raises(BackendError, match="no engine for this machine's GPU"):
        compare(load(package), load(package), IDS, tensorrt_runner("trt_rtx"))


def test_the_command_compares_a_precision_with_float32(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """bfloat16 costs less than 6 % anywhere in this model, and more than 0.1 % in the logits."""
    assert main(["debug", "compare", str(package)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "<-" not in "".join(lines)
    (logits,) = [line.split() for line in lines if line.startswith("logits ")]
    assert 1e-3 < float(logits[-1]) < 6e-2
    assert main(["debug", "compare", str(package), "--tolerance", "1e-3"]) == 1
    assert "<- the first that differs" in capsys.readouterr().out


def test_the_command_says_what_tensorrt_takes(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["debug", "capability", str(package), "--backend", "trt_rtx"]) == 0
    assert "fully supported" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["capability", "--tolerance", "1"], "no use for it"),
        (["capability", "--backend", "ort"], "asks a TensorRT"),
        (["reduce"], "--out says"),
        (["reduce", "--out", "x.onnx", "--variant", "trt_fp32"], "nothing to reduce"),
        (["compare", "--check", "true"], "no use for it"),
        (["compare", "--tolerance", "nan"], "expected a number above 0"),
        (["compare", "--backend", "trt"], "tensorrt cannot be imported"),
    ],
)
def test_the_command_refuses(
    package: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    question, *options = arguments
    assert main(["debug", question, str(package), *options]) == 2
    assert message in capsys.readouterr().err
