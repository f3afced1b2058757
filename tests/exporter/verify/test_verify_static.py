"""Graphs for TensorRT of every precision, through onnxruntime: what verify shows of a good one, and of a bad one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from support.bugs.edits import Bug
from support.bugs.static import BUGS, MLP, one_activation_scale_doubled
from support.cases import assert_full_matrix, large
from support.matrix import seen
from support.rebuilt_packages import rebuilt_trt, with_trt_graph

from olmo2_export.config import ModelConfig
from olmo2_export.measure.parity import GATES, Check, ParityReport
from olmo2_export.measure.quality import gate_of, measure_quality, quality_check, quality_tokens
from olmo2_export.package.trt_variants import TrtOptions
from olmo2_export.truth.torch_layers import reference_logits
from olmo2_export.verify import checks as verify_checks
from olmo2_export.verify import variant as verify_variant
from olmo2_export.verify import verify as verify_module
from olmo2_export.verify.feeds import MODES
from olmo2_export.verify.verify import format_reports, verify
from olmo2_export.views import runners, table
from olmo2_export.views.runners import open_all_positions, open_form
from olmo2_export.views.static_forms import device_form, rounded_form, stored_input_scales
from olmo2_export.weights.checkpoint import open_checkpoint
from runtimes import open_package, open_runner
from runtimes.errors import BackendError, PackageError, UsageError, VariantNotFoundError
from runtimes.manifest import MANIFEST_NAME, Precision, Variant
from runtimes.ort import open as ort_runner
from runtimes.ort.devices import Device, GpuMemory, Shapes
from runtimes.sealed import read_sealed, seal

pytestmark = pytest.mark.usefixtures("remembered")


NO_QUALITY = [Check("quality", "not measured", ())], None


@pytest.fixture
def hardly_quality(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little or no quality: random weights are hard to round, and the bugs here show elsewhere."""
    monkeypatch.setattr(verify_checks, "quality_tokens", partial(verify_checks.quality_tokens, most=128))
    measured = verify_variant.quality_checks

    def without_quality_of_quantised(package: Any, entry: Variant, *others: Any, **options: Any) -> Any:
        return NO_QUALITY if entry.quantization is not None else measured(package, entry, *others, **options)

    monkeypatch.setattr(verify_variant, "quality_checks", without_quality_of_quantised)


def report_of(package: Path, checkpoint: Path, precision: str) -> ParityReport:
    (report,) = verify(package, open_checkpoint(str(checkpoint)), variants=[f"trt_{precision}"])
    return report


def red(report: ParityReport) -> set[str]:
    """The parts of a report that failed: own, exact, rounded, greedy, and checks by name."""
    parts = {"own" if c.mode in MODES else c.mode.split()[0] for c in report.cases if not c.passed}
    return parts | ({"greedy"} if not report.greedy.passed else set()) | {c.name for c in report.checks if not c.passed}


@pytest.mark.usefixtures("little_text")
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_a_rounded_graph_passes(
    precision: Precision,
    trt_package: Callable[[Precision], Path],
    tiny_checkpoint: Path,
    request: pytest.FixtureRequest,
) -> None:
    report = report_of(trt_package(precision), tiny_checkpoint, precision)
    assert report.passed, format_reports([report])
    views = [""] if precision == "fp32" else ["", "exact "]
    assert_full_matrix(report, *views)
    assert all(c.error_ratio < 1.2 for c in large(report))
    own = [c.nmse for c in large(report) if c.mode in MODES]
    least = {"bf16": 1e-5, "fp16": 1e-7, "fp32": 1e-14}[precision]  # the rounding is there, and no more of it
    assert all(least < nmse < 100 * least for nmse in own)
    assert report.checks[0].found == "36 tensors, 0 differ from the checkpoint's"
    assert [c.name for c in report.checks] == ["weights", "quality"]
    assert report.perplexity is not None
    assert abs(report.perplexity.relative) < 0.05
    seen(request, "olmo2", "graph for TensorRT", precision, "verified")


@pytest.mark.usefixtures("little_text")
@pytest.mark.parametrize("precision", ["int4", "int8", "fp8"])
def test_a_quantised_graph_computes_what_its_weights_say(
    precision: Precision,
    trt_package: Callable[[Precision], Path],
    tiny_checkpoint: Path,
    request: pytest.FixtureRequest,
) -> None:
    report = report_of(trt_package(precision), tiny_checkpoint, precision)
    assert red(report) == {"quality"}, format_reports([report])  # random weights are hard to round
    assert_full_matrix(report, "", "rounded ")
    assert all(c.error_ratio < 1.2 for c in large(report))
    assert all((c.nmse < 1e-11) == (c.mode in MODES) for c in report.cases)
    calibrated = ["calibration"] if precision != "int4" else []
    assert [c.name for c in report.checks] == ["weights", "scales", "input scales", *calibrated, "quality"]
    linears = {"int4": 22, "int8": 18, "fp8": 21}[precision]
    assert report.checks[1].found.startswith(f"{linears} tensors, scales within ")
    seen(request, "olmo2", "graph for TensorRT", precision, "verified")


@pytest.mark.parametrize(("precision", "kl"), [("int4", 0.008), ("int8", 2.6e-4), ("fp8", 1.2e-3)])
def test_the_demo_meets_the_gates_of_quality(
    precision: Precision, kl: float, demo_package: Path, tmp_path: Path
) -> None:
    """On held-out text, with scales from the bundled text; bfloat16 alone costs 8e-5."""
    package = with_trt_graph(demo_package, tmp_path / "demo", TrtOptions(precision, 300))
    checkpoint = open_checkpoint("demo")
    entry = open_package(package).variant(f"trt_{precision}")
    config = ModelConfig.from_json(checkpoint.folder / "config.json")
    sequences, origin = quality_tokens(checkpoint, config, length=256)
    runner = open_all_positions(open_package(package), entry)
    measured = measure_quality(runner, sequences, reference_logits(checkpoint, config, sequences), origin)
    check, change = quality_check("quality", measured, 256, gate_of(entry, config)), measured.perplexity
    assert change.low < change.relative < change.high < 0.02
    assert check.passed, check.failures
    found = float(check.found.split()[1].rstrip(","))
    assert kl / 2 < found < kl * 1.1


class FakeCuda(Device):
    """A GPU that is the CPU: its memory is bound by address."""

    def configure(self, options: ort.SessionOptions, *, capture: bool, shapes: Shapes | None = None) -> list[Any]:  # noqa: ARG002
        assert not capture
        assert shapes is None
        return ["CPUExecutionProvider"]

    def check(self, found: list[str]) -> None:
        pass


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (verify_module, runners, ort_runner):
        monkeypatch.setattr(module, "find_device", lambda _: FakeCuda("cuda", GpuMemory(kind="cpu")))


@pytest.mark.usefixtures("fake_cuda", "little_text", "short_rows")
def test_on_a_device_the_graph_is_verified_as_itself(
    trt_package: Callable[[Precision], Path], tiny_checkpoint: Path
) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    (report,) = verify(trt_package("fp16"), checkpoint, variants=["trt_fp16"], device="cuda")
    assert report.passed, format_reports([report])
    assert_full_matrix(report)
    assert report.gate == GATES["fp16"]
    with pytest.raises(UsageError, match="variant trt_fp16: verify has fp16, bf16, q4f16 for device nv-rtx"):
        verify(trt_package("fp16"), checkpoint, variants=["trt_fp16"], device="nv-rtx")


@pytest.mark.usefixtures("fake_cuda", "short_rows")
def test_on_a_device_quantised_weights_are_dequantised_as_they_are(
    trt_package: Callable[[Precision], Path], tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU stands in for the GPU in float32, rounded where the device form has bfloat16."""

    def with_float32_cache(*arguments: Any) -> Any:
        view = on_gpu(*arguments)
        return replace(view, model=rounded_form(view.model), variant=table.in_float32(view.variant))

    on_gpu = table._on_gpu
    # Random weights are hard to round.
    monkeypatch.setattr(verify_variant, "quality_checks", lambda *_, **__: NO_QUALITY)
    monkeypatch.setattr(table, "_on_gpu", with_float32_cache)
    (report,) = verify(trt_package("int8"), open_checkpoint(str(tiny_checkpoint)), variants=["trt_int8"], device="cuda")
    assert report.passed, format_reports([report])
    assert_full_matrix(report)
    assert all(1e-6 < c.nmse < 1e-2 for c in report.cases)
    assert [c.name for c in report.checks] == ["weights", "scales", "input scales", "calibration", "quality"]


@pytest.mark.parametrize("precision", ["int4", "int8", "fp8"])
def test_the_device_form_changes_no_number(precision: Precision, trt_package: Callable[[Precision], Path]) -> None:
    """All scales and results of its quantisers are float32, and rounded it computes what the rounded graph computes."""
    package = trt_package(precision)
    graph = ir.load(package / f"trt/model_{precision}.onnx")
    form = device_form(graph)
    quantisers = [node for node in form.graph if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert quantisers
    for node in quantisers:
        values = [node.inputs[1], node.inputs[0] if node.op_type == "QuantizeLinear" else node.outputs[0]]
        assert [value.dtype for value in values if value is not None] == [ir.DataType.FLOAT] * 2
    found = []
    for model in (graph, form):
        entry = open_package(package).variant(f"trt_{precision}")
        path, variant = package / entry.graph, table.in_float32(entry)
        with open_form(path, rounded_form(model), variant, open_package(package).manifest.model) as runner:
            found.append(runner.prefill([list(range(40))])[0])
    assert np.array_equal(*found)


def test_quantised_graphs_are_refused_as_they_are(trt_package: Callable[[Precision], Path]) -> None:
    for device in ("cpu", "cuda"):
        with pytest.raises(BackendError, match="trt_int8: onnxruntime has no kernel that dequantises to bfloat16; run"):
            open_runner(trt_package("int8"), variant="trt_int8", device=device)


@pytest.mark.usefixtures("little_text", "short_rows")
def test_without_names_every_graph_is_verified(trt_package: Callable[[Precision], Path], tiny_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    assert [r.variant for r in verify(trt_package("fp32"), checkpoint)] == ["fp32", "trt_fp32"]
    with pytest.raises(VariantNotFoundError, match="no engine for trt_rtx; run: olmo2-export build"):
        verify(trt_package("fp32"), checkpoint, backend="trt_rtx")


@pytest.mark.usefixtures("short_rows", "hardly_quality")
@pytest.mark.parametrize(("precision", "bug", "part"), BUGS, ids=lambda x: getattr(x, "__name__", x))
def test_bug_turns_verify_red(
    precision: Precision,
    bug: Bug,
    part: str,
    trt_package: Callable[[Precision], Path],
    tiny_checkpoint: Path,
    tmp_path: Path,
) -> None:
    broken = rebuilt_trt(trt_package(precision), tmp_path / "p", bug, precision)
    report = report_of(broken, tiny_checkpoint, precision)
    assert part in red(report), format_reports([report])


@pytest.mark.usefixtures("short_rows", "hardly_quality")
def test_a_wrong_calibration_turns_verify_red(
    trt_package: Callable[[Precision], Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """The manifest says the same wrong scale as the graph, as a bug in calibration would have it."""
    broken = rebuilt_trt(trt_package("int8"), tmp_path / "p", one_activation_scale_doubled, "int8")
    scales = stored_input_scales(ir.load(broken / "trt" / "model_int8.onnx"))
    path = broken / "trt" / MANIFEST_NAME
    document = read_sealed(path)
    document["variants"]["trt_int8"]["quantization"]["input_scales"] = scales
    path.write_bytes(seal(document))
    report = report_of(broken, tiny_checkpoint, "int8")
    assert "calibration" in red(report)
    assert "input scales" not in red(report)
    (check,) = [c for c in report.checks if c.name == "calibration"]
    assert "2.00 x what calibration gives" in check.failures[0]


@pytest.mark.usefixtures("short_rows", "hardly_quality")
def test_a_rebuilt_graph_without_a_bug_passes(
    trt_package: Callable[[Precision], Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    same = rebuilt_trt(trt_package("int4"), tmp_path / "p", lambda _: None, "int4")
    assert report_of(same, tiny_checkpoint, "int4").passed


def test_another_set_of_quantised_weights_is_refused(
    trt_package: Callable[[Precision], Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    def renamed(model: ir.Model) -> None:
        for part in ("codes", "scales"):
            value = model.graph.initializers.pop(f"{MLP}.down_proj.weight.{part}")
            value.name = f"{MLP}.other.{part}"
            model.graph.register_initializer(value)

    broken = rebuilt_trt(trt_package("int4"), tmp_path / "p", renamed, "int4")
    with pytest.raises(PackageError, match=r"the model has no|other weights than its manifest"):
        report_of(broken, tiny_checkpoint, "int4")
