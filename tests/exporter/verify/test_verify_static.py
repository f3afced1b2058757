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
from support.cases import assert_full_matrix, large
from support.rebuilt_packages import rebuilt_trt, with_trt_graph

from olmo2_export.config import ModelConfig
from olmo2_export.measure.parity import GATES, Check, ParityReport
from olmo2_export.package.trt_variants import TrtOptions
from olmo2_export.verify import feeds, measure
from olmo2_export.verify import static as verify_static
from olmo2_export.verify import verify as verify_module
from olmo2_export.verify.feeds import MODES
from olmo2_export.verify.verify import format_reports, verify
from olmo2_export.views.static_forms import device_form, rounded_form, stored_input_scales
from olmo2_export.weights.checkpoint import open_checkpoint
from runtimes import open_runner
from runtimes.errors import BackendError, PackageError, UsageError, VariantNotFoundError
from runtimes.manifest import MANIFEST_NAME, Precision, Variant, find_variant, load_manifest
from runtimes.ort import open as ort_runner
from runtimes.ort.devices import Device, GpuMemory, Shapes
from runtimes.sealed import read_sealed, seal

LAYER = 1
ATTENTION, MLP = f"model.layers.{LAYER}.self_attn", f"model.layers.{LAYER}.mlp"
QKV = "+".join(f"{ATTENTION}.{kind}_proj.weight" for kind in "qkv")
GATE_UP = f"{MLP}.gate_proj.weight+{MLP}.up_proj.weight"
CAPACITY = 64


@pytest.fixture(scope="module")
def packages(tiny_package: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Precision], Path]:
    """Packages of the random model with a graph for TensorRT; each is made once."""
    made: dict[str, Path] = {}

    def package(precision: Precision) -> Path:
        if precision not in made:
            out = tmp_path_factory.mktemp(precision) / "tiny"
            made[precision] = with_trt_graph(tiny_package, out, TrtOptions(precision, CAPACITY))
        return made[precision]

    return package


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short sequences, and little or no quality: random weights are hard to round, and the bugs here show elsewhere."""
    monkeypatch.setattr(feeds, "LENGTHS", (19, 17, 13))
    monkeypatch.setattr(measure, "quality_tokens", partial(measure.quality_tokens, most=128))
    monkeypatch.setattr(verify_static, "_check_quality", lambda *_: (Check("quality", "not measured", ()), None))


def report_of(package: Path, checkpoint: Path, precision: str) -> ParityReport:
    (report,) = verify(package, open_checkpoint(str(checkpoint)), variants=[f"trt_{precision}"])
    return report


def red(report: ParityReport) -> set[str]:
    """The parts of a report that failed: own, exact, rounded, greedy, and checks by name."""
    parts = {"own" if c.mode in MODES else c.mode.split()[0] for c in report.cases if not c.passed}
    return parts | ({"greedy"} if not report.greedy.passed else set()) | {c.name for c in report.checks if not c.passed}


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_a_rounded_graph_passes(
    precision: Precision, packages: Callable[[Precision], Path], tiny_checkpoint: Path
) -> None:
    report = report_of(packages(precision), tiny_checkpoint, precision)
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


@pytest.mark.parametrize("precision", ["int4", "int8", "fp8"])
def test_a_quantised_graph_computes_what_its_weights_say(
    precision: Precision, packages: Callable[[Precision], Path], tiny_checkpoint: Path
) -> None:
    report = report_of(packages(precision), tiny_checkpoint, precision)
    assert red(report) == {"quality"}, format_reports([report])  # random weights are hard to round
    assert_full_matrix(report, "", "rounded ")
    assert all(c.error_ratio < 1.2 for c in large(report))
    assert all((c.nmse < 1e-11) == (c.mode in MODES) for c in report.cases)
    calibrated = ["calibration"] if precision != "int4" else []
    assert [c.name for c in report.checks] == ["weights", "scales", "input scales", *calibrated, "quality"]
    linears = {"int4": 22, "int8": 18, "fp8": 21}[precision]
    assert report.checks[1].found.startswith(f"{linears} tensors, scales within ")


@pytest.mark.parametrize(("precision", "kl"), [("int4", 0.008), ("int8", 2.6e-4), ("fp8", 1.2e-3)])
def test_the_demo_meets_the_gates_of_quality(
    precision: Precision, kl: float, demo_package: Path, tmp_path: Path
) -> None:
    """On held-out text, with scales from the bundled text; bfloat16 alone costs 8e-5."""
    package = with_trt_graph(demo_package, tmp_path / "demo", TrtOptions(precision, 300))
    checkpoint = open_checkpoint("demo")
    entry, _ = find_variant(package, f"trt_{precision}")
    config = ModelConfig.from_json(checkpoint.folder / "config.json")
    static = verify_static.StaticForms(package, entry, config.spec, ir.load(package / entry.graph))
    check, change = verify_static._check_quality(static.open_all_positions(), entry, checkpoint, config)
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
    for module in (verify_module, verify_static, ort_runner):
        monkeypatch.setattr(module, "find_device", lambda _: FakeCuda("cuda", GpuMemory(kind="cpu")))


@pytest.mark.usefixtures("fake_cuda")
def test_on_a_device_the_graph_is_verified_as_itself(
    packages: Callable[[Precision], Path], tiny_checkpoint: Path
) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    (report,) = verify(packages("fp16"), checkpoint, variants=["trt_fp16"], device="cuda")
    assert report.passed, format_reports([report])
    assert_full_matrix(report)
    assert report.gate == GATES["fp16"]
    with pytest.raises(UsageError, match="variant trt_fp16: verify has fp16, bf16, q4f16 for device nv-rtx"):
        verify(packages("fp16"), checkpoint, variants=["trt_fp16"], device="nv-rtx")


@pytest.mark.usefixtures("fake_cuda")
def test_on_a_device_quantised_weights_are_dequantised_as_they_are(
    packages: Callable[[Precision], Path], tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU stands in for the GPU in float32, rounded where the device form has bfloat16."""

    def with_float32_cache(package: Path, name: str) -> tuple[Variant, Any]:
        entry, files = find_variant(package, name)
        return replace(entry, kv_cache=replace(entry.kv_cache, dtype="float32")), files

    # Random weights are hard to round.
    monkeypatch.setattr(verify_static, "_check_quality", lambda *_: (Check("quality", "not measured", ()), None))
    monkeypatch.setattr(verify_static, "find_variant", with_float32_cache)
    monkeypatch.setattr(verify_static, "device_form", lambda graph: rounded_form(device_form(graph)))
    (report,) = verify(packages("int8"), open_checkpoint(str(tiny_checkpoint)), variants=["trt_int8"], device="cuda")
    assert report.passed, format_reports([report])
    assert_full_matrix(report)
    assert all(1e-6 < c.nmse < 1e-2 for c in report.cases)
    assert [c.name for c in report.checks] == ["weights", "scales", "input scales", "calibration", "quality"]


@pytest.mark.parametrize("precision", ["int4", "int8", "fp8"])
def test_the_device_form_changes_no_number(precision: Precision, packages: Callable[[Precision], Path]) -> None:
    """All scales and results of its quantisers are float32, and rounded it computes what the rounded graph computes."""
    package = packages(precision)
    graph = ir.load(package / f"trt/model_{precision}.onnx")
    form = device_form(graph)
    quantisers = [node for node in form.graph if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert quantisers
    for node in quantisers:
        values = [node.inputs[1], node.inputs[0] if node.op_type == "QuantizeLinear" else node.outputs[0]]
        assert [value.dtype for value in values if value is not None] == [ir.DataType.FLOAT] * 2
    found = []
    for model in (graph, form):
        entry, _ = find_variant(package, f"trt_{precision}")
        static = verify_static.StaticForms(package, entry, load_manifest(package).model, model)
        with static.open(rounded_form) as runner:
            found.append(runner.prefill([list(range(40))])[0])
    assert np.array_equal(*found)


def test_quantised_graphs_are_refused_as_they_are(packages: Callable[[Precision], Path]) -> None:
    for device in ("cpu", "cuda"):
        with pytest.raises(BackendError, match="trt_int8: onnxruntime has no kernel that dequantises to bfloat16; run"):
            open_runner(packages("int8"), variant="trt_int8", device=device)


def test_without_names_every_graph_is_verified(packages: Callable[[Precision], Path], tiny_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    assert [r.variant for r in verify(packages("fp32"), checkpoint)] == ["fp32", "trt_fp32"]
    with pytest.raises(VariantNotFoundError, match="no engine for trt_rtx; run: olmo2-export build"):
        verify(packages("fp32"), checkpoint, backend="trt_rtx")


def change(model: ir.Model, name: str, edit: Callable[[np.ndarray], np.ndarray]) -> None:
    value = model.graph.initializers[name]
    assert value.const_value is not None
    value.const_value = ir.tensor(edit(value.const_value.numpy().copy()), dtype=value.dtype, name=name)


def scaled(index: tuple[int, ...], factor: float) -> Callable[[np.ndarray], np.ndarray]:
    def edit(array: np.ndarray) -> np.ndarray:
        array[index] = array[index] * array.dtype.type(factor)
        return array

    return edit


def halves_swapped(array: np.ndarray) -> np.ndarray:
    return np.roll(array, array.shape[-1] // 2, axis=-1)


def one_scale_shifted(model: ir.Model) -> None:
    change(model, f"{ATTENTION}.o_proj.weight.scales", scaled((2, 3), 1.4))


def gate_and_up_swapped_inside_the_merged_weight(model: ir.Model) -> None:
    for part in ("codes", "scales"):
        change(model, f"{GATE_UP}.{part}", halves_swapped)


def codes_of_neighbours_swapped(model: ir.Model) -> None:
    change(model, f"{MLP}.down_proj.weight.codes", lambda a: a.reshape(len(a), -1, 2)[..., ::-1].reshape(a.shape))


def query_and_key_split_at_the_wrong_place(model: ir.Model) -> None:
    """The key is taken from the first 32 columns and the query from the 96 after them."""
    split = [n for n in model.graph if n.op_type == "Split"][2 * LAYER]
    query, key, value = split.outputs
    sizes = ir.tensor(np.array([32, 96, 32]), name="wrong_widths")
    widths = ir.Value(name="wrong_widths", const_value=sizes)
    model.graph.register_initializer(widths)
    wrong = ir.node("Split", [split.inputs[0], widths], {"axis": -1}, num_outputs=3)
    for old, new in zip((key, query, value), wrong.outputs, strict=True):
        new.type, new.shape = old.type, old.shape
        old.replace_all_uses_with(new)
    model.graph.insert_after(split, wrong)
    model.graph.remove(split, safe=True)


def one_channel_scale_wrong(model: ir.Model) -> None:
    name = next(n for n in model.graph.initializers if n.startswith(f"{ATTENTION}.q_proj.weight") and "scales" in n)
    change(model, name, scaled((5,), 1.1))


def one_activation_scale_doubled(model: ir.Model) -> None:
    name = next(n for n in model.graph.initializers if n.startswith(f"{MLP}.gate_proj") and n.endswith("input_scale"))
    change(model, name, lambda a: a * a.dtype.type(2))


def inputs_not_quantised(model: ir.Model) -> None:
    rounding = next(n for n in model.graph if n.op_type == "QuantizeLinear")
    (use,) = rounding.outputs[0].uses()
    assert rounding.inputs[0] is not None
    use.node.outputs[0].replace_all_uses_with(rounding.inputs[0])


def one_kept_weight_off_by_a_bit(model: ir.Model) -> None:
    change(model, "lm_head.weight", scaled((17, 4), 1.01))


def embedding_shifted_by_a_token(model: ir.Model) -> None:
    change(model, "model.embed_tokens.weight", lambda a: np.roll(a, 1, axis=0))


def q_norm_ignored(model: ir.Model) -> None:
    norm = next(
        n for n in model.graph
        if n.op_type == "RMSNormalization" and n.inputs[1] is model.graph.initializers[f"{ATTENTION}.q_norm.weight"]
    )  # fmt: skip
    assert norm.inputs[0] is not None
    norm.outputs[0].replace_all_uses_with(norm.inputs[0])


def eps_ten_times_too_large(model: ir.Model) -> None:
    for node in model.graph:
        if node.op_type == "RMSNormalization":
            node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-5)


BUGS: list[tuple[Precision, Callable[[ir.Model], None], str]] = [
    ("int4", one_scale_shifted, "scales"),
    ("int4", gate_and_up_swapped_inside_the_merged_weight, "scales"),
    ("int4", codes_of_neighbours_swapped, "scales"),
    ("int4", query_and_key_split_at_the_wrong_place, "own"),
    ("int4", q_norm_ignored, "own"),
    ("int4", embedding_shifted_by_a_token, "weights"),
    ("int8", one_channel_scale_wrong, "scales"),
    ("int8", one_activation_scale_doubled, "input scales"),
    ("int8", inputs_not_quantised, "input scales"),
    ("int8", one_kept_weight_off_by_a_bit, "weights"),
    ("int8", eps_ten_times_too_large, "own"),
    ("fp8", one_channel_scale_wrong, "scales"),
    ("fp8", one_activation_scale_doubled, "input scales"),
    ("fp8", query_and_key_split_at_the_wrong_place, "own"),
    ("bf16", one_kept_weight_off_by_a_bit, "weights"),
    ("bf16", q_norm_ignored, "exact"),
    ("bf16", eps_ten_times_too_large, "exact"),
]


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(("precision", "bug", "part"), BUGS, ids=lambda x: getattr(x, "__name__", x))
def test_bug_turns_verify_red(
    precision: Precision,
    bug: Callable[[ir.Model], None],
    part: str,
    packages: Callable[[Precision], Path],
    tiny_checkpoint: Path,
    tmp_path: Path,
) -> None:
    broken = rebuilt_trt(packages(precision), tmp_path / "p", bug, precision)
    report = report_of(broken, tiny_checkpoint, precision)
    assert part in red(report), format_reports([report])


@pytest.mark.usefixtures("short")
def test_a_wrong_calibration_turns_verify_red(
    packages: Callable[[Precision], Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """The manifest says the same wrong scale as the graph, as a bug in calibration would have it."""
    broken = rebuilt_trt(packages("int8"), tmp_path / "p", one_activation_scale_doubled, "int8")
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


@pytest.mark.usefixtures("short")
def test_a_rebuilt_graph_without_a_bug_passes(
    packages: Callable[[Precision], Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    same = rebuilt_trt(packages("int4"), tmp_path / "p", lambda _: None, "int4")
    assert report_of(same, tiny_checkpoint, "int4").passed


def test_another_set_of_quantised_weights_is_refused(
    packages: Callable[[Precision], Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    def renamed(model: ir.Model) -> None:
        for part in ("codes", "scales"):
            value = model.graph.initializers.pop(f"{MLP}.down_proj.weight.{part}")
            value.name = f"{MLP}.other.{part}"
            model.graph.register_initializer(value)

    broken = rebuilt_trt(packages("int4"), tmp_path / "p", renamed, "int4")
    with pytest.raises(PackageError, match=r"the model has no|other weights than its manifest"):
        report_of(broken, tiny_checkpoint, "int4")
