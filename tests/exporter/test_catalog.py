"""The variants, a row each: the rows agree, and a row that is added is offered, gated, drawn and run."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast, get_args

import pytest
from support.checkpoints import SHAPE

import olmo2_export.catalog as catalog
import runtimes.targets as targets
from olmo2_export.bench.entries import default_variants
from olmo2_export.bench.gpu import _backend_and_variant
from olmo2_export.catalog import INT4_BLOCKS, TRT_INT8, VARIANTS, BlockFormat, QualityGate, VariantRow
from olmo2_export.cli import parse_args
from olmo2_export.config import ModelConfig
from olmo2_export.engine.options import EngineOptions, resolve_options
from olmo2_export.measure import quality
from olmo2_export.measure.parity import KERNEL_PARITY, QUALITY
from olmo2_export.measure.quality import gate_of
from olmo2_export.package.export import export
from olmo2_export.package.plan import plan_export
from olmo2_export.package.trt_variants import TrtOptions
from olmo2_export.package.variants import check_variants
from olmo2_export.package.weight_choice import Options
from olmo2_export.report.data import _order
from olmo2_export.report.plots import colour
from olmo2_export.verify.variant import measure_variant
from olmo2_export.weights.checkpoint import open_checkpoint
from runtimes import open_runner
from runtimes.errors import PackageError, UsageError, VariantNotFoundError
from runtimes.manifest import OLDEST_GPU, KVCacheSpec, Precision, Variant
from runtimes.ort.open import default_variant
from runtimes.package import Package, open_package
from runtimes.targets import TARGETS, find_target, runnable, runs

PATHS = {
    "fp32": "onnx/model.onnx",
    "q4": "onnx/model_q4_shared.onnx",
    "q8": "onnx/model_q8_shared.onnx",
    "fp16": "onnx/model_fp16.onnx",
    "bf16": "onnx/model_bf16.onnx",
    "q4f16": "onnx/model_q4f16.onnx",
    "trt_bf16": "trt/model_bf16.onnx",
    "trt_fp16": "trt/model_fp16.onnx",
    "trt_fp32": "trt/model_fp32.onnx",
    "trt_int4": "trt/model_int4.onnx",
    "trt_int8": "trt/model_int8.onnx",
    "trt_fp8": "trt/model_fp8.onnx",
}


def entry(name: str, form: str = "shared", dtype: str = "float32") -> Variant:
    return Variant(name, "", "", (), 23, (), (), KVCacheSpec(form, dtype, 3, 2, 16, 256), {})


def package(*entries: Variant) -> Package:
    manifest = SimpleNamespace(variants={variant.name: variant for variant in entries})
    return cast("Package", SimpleNamespace(manifest=manifest, trt=None, verdicts={}))


@pytest.fixture
def config(tiny_checkpoint: Path) -> ModelConfig:
    return ModelConfig.from_json(tiny_checkpoint / "config.json")


def test_the_rows_agree_with_each_other_and_with_the_targets() -> None:
    assert {row.name: row.path for row in VARIANTS} == PATHS
    others = {row.name: (row.portable_path, row.data) for row in VARIANTS if row.portable_path != row.path}
    assert others == {
        "q4": ("onnx/model_q4.onnx", "onnx/model_q4.onnx_data"),
        "q8": ("onnx/model_quantized.onnx", "onnx/model_quantized.onnx_data"),  # what transformers.js opens
    }
    assert sorted(catalog.precisions()) == sorted(get_args(Precision)) == sorted(OLDEST_GPU)
    assert catalog.exported() == ["fp32", "q4", "q8", "fp16", "bf16", "q4f16"]
    assert max(Counter(row.colour for row in VARIANTS).values()) == 1
    known = {target.name: target for target in TARGETS}
    for row in VARIANTS:
        assert (row.weights.gates is not None) == row.weights.quantized
        assert (row.defaults is not None) == (row.weights.quantized and row.graph != "static")
        for name in row.targets:
            assert runs(entry(row.name, row.form, row.dtype), known[name])
    for target in TARGETS:
        made = {row.name for row in VARIANTS if target.name in row.targets}
        assert set(target.variants) == (set() if target.needs_engine else made)


def test_what_this_version_does_not_know_is_refused(config: ModelConfig) -> None:
    with pytest.raises(VariantNotFoundError, match="variant q3: this version knows fp32, q4"):
        gate_of(entry("q3"), config)
    with pytest.raises(PackageError, match="variant bf16: its weights are not quantised"):
        gate_of(entry("bf16"), config)
    with pytest.raises(UsageError, match="precision 'int3': expected one of bf16, fp16"):
        catalog.static_row("int3")
    with pytest.raises(UsageError, match="KV cache int2: this version writes float32, int8, int4"):
        catalog.kv_caches(["int8", "int2"])
    assert not catalog.is_for_devices("q3")


@pytest.mark.parametrize(
    ("name", "small", "large"),
    [
        ("q4", (0.01, 0.08, 0.93, 0.01), (0.03, None, 0.91, 0.02)),
        ("q4f16", (0.01, 0.08, 0.93, 0.01), (0.03, None, 0.91, 0.02)),
        ("q8", (2e-4, None, 0.99, 0.001), (0.003, None, 0.97, 0.003)),
        ("trt_int4", (0.01, 0.08, 0.93, 0.01), (0.03, None, 0.91, 0.02)),
        ("trt_int8", (4e-4, None, 0.975, 0.003), (0.0035, None, 0.955, 0.005)),
        ("trt_fp8", (0.0025, 0.02, 0.96, 0.004), (0.008, None, 0.945, 0.01)),
    ],
)
def test_the_gates_are_what_they_were(
    name: str, small: tuple[Any, ...], large: tuple[Any, ...], config: ModelConfig
) -> None:
    assert gate_of(entry(name), config) == QualityGate(*small)
    wide = dataclasses.replace(config, vocab_size=49_000_000 // SHAPE["hidden_size"])
    assert gate_of(entry(name), wide) == QualityGate(*small)  # 100 M and a bit less
    assert gate_of(entry(name), dataclasses.replace(config, vocab_size=520_009)) == QualityGate(*large)  # attentions
    assert gate_of(entry(name), dataclasses.replace(config, vocab_size=2_000_000)) == QualityGate(*large)


GATE = QualityGate(0.5, None, 0.5, 0.5)
Q2 = VariantRow(
    name="q2",
    graph="blocks",
    targets=("cpu",),
    form="shared",
    dtype="float32",
    weights=dataclasses.replace(INT4_BLOCKS, precision="int2", bits=2, gates=(GATE, GATE)),
    colour="#123456",
    defaults=catalog.find("q4").defaults,
    prefill_graph=True,
    quantized_cache=True,
    peers={"llama.cpp": "Q2_K"},
)
Q2F16 = dataclasses.replace(
    Q2,
    name="q2f16",
    graph="device",
    targets=("cuda",),
    dtype="float16",
    colour="#234567",
    prefill_graph=False,
    quantized_cache=False,
)
NVFP4 = VariantRow(
    name="trt_nvfp4",
    graph="static",
    targets=("trt_rtx", "trt"),
    form="static",
    dtype="bfloat16",
    weights=dataclasses.replace(TRT_INT8, precision="nvfp4", bits=4, on_older="fp8"),
    colour="#345678",
)


Q4S = dataclasses.replace(
    catalog.find("q4"),
    name="q4s",
    weights=dataclasses.replace(INT4_BLOCKS, gates=(QualityGate(9.0, None, 0.0, 9.0),) * 2),
    colour="#456789",
    defaults=catalog.QuantizationDefaults(
        "rtn", BlockFormat(4, 32, False), BlockFormat(8, 32, True), BlockFormat(8, 32, True), 6.5
    ),
    prefill_graph=False,
    quantized_cache=False,
)
"""of a precision that is there, so that its package can be read: other blocks, no int8 graph, gates that never fail"""


@pytest.fixture
def more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three variants that are not there, as another author would add them."""
    monkeypatch.setattr(catalog, "VARIANTS", (*VARIANTS, Q2, Q2F16, NVFP4))
    fastest = {"cpu": ("q2", *TARGETS[0].variants), "cuda": (*TARGETS[1].variants, "q2f16")}
    rows = [dataclasses.replace(t, variants=fastest.get(t.name, t.variants)) for t in TARGETS]
    monkeypatch.setattr(targets, "TARGETS", tuple(rows))
    monkeypatch.setitem(OLDEST_GPU, "nvfp4", "10.0")  # type: ignore[misc]


@pytest.mark.usefixtures("more")
def test_a_new_variant_is_offered(capsys: pytest.CaptureFixture[str], config: ModelConfig) -> None:
    with pytest.raises(SystemExit):
        parse_args(["export", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "fp32 (the default); q4, q8, q2 for CPUs; fp16, bf16, q4f16, q2f16 for --device cuda" in said
    assert "q4, q8 and q2: leave the int8 prefill graph out" in said
    assert parse_args(["build", "p", "--precision", "nvfp4"]).precision == "nvfp4"
    assert parse_args(["fp16", "demo", "--variant", "q2f16"]).variant == ["q2f16"]
    with pytest.raises(UsageError, match="invalid choice: 'q2'"):
        parse_args(["fp16", "demo", "--variant", "q2"])
    check_variants(["q2", "q2f16"], config, Options(kv_caches=("int8",), fp16_islands=True))
    with pytest.raises(UsageError, match="KV cache and prefill graph are for q4, q8 and q2"):
        check_variants(["q2f16"], config, Options(kv_caches=("int8",)))
    with pytest.raises(UsageError, match=r"variant q5: this version writes fp32, .*q4f16, q2, q2f16"):
        check_variants(["q5"], config, Options())
    with pytest.raises(UsageError, match="variant trt_nvfp4: this version writes"):
        check_variants(["trt_nvfp4"], config, Options())
    assert _backend_and_variant("trt:nvfp4") == ("trt", "trt_nvfp4")


@pytest.mark.usefixtures("more")
def test_a_new_variant_is_gated_drawn_and_compared(config: ModelConfig) -> None:
    assert gate_of(entry("q2"), config) == GATE
    assert [colour(label) for label in ("q2", "ours q2f16", "trt_nvfp4")] == ["#123456", "#234567", "#345678"]
    assert colour("q3") not in {row.colour for row in catalog.VARIANTS}
    assert sorted(["trt_nvfp4", "x", "q2", "trt_fp8", "fp32"], key=_order) == [
        "fp32",
        "trt_fp8",
        "q2",
        "trt_nvfp4",
        "x",
    ]
    assert catalog.like_peer("llama.cpp", "Q2_K") == ("q2", "q2f16")
    assert catalog.like_peer("llama.cpp", "Q4_K_M") == ("q4", "q4f16")
    assert catalog.is_for_devices("q2f16")
    assert not catalog.is_for_devices("q2")


@pytest.mark.usefixtures("more")
def test_a_new_variant_is_chosen_where_it_runs() -> None:
    whole = package(
        entry("fp32", "concat"),
        entry("q4"),
        entry("q2"),
        entry("fp16", dtype="float16"),
        entry("q2f16", dtype="float16"),
    )
    assert runnable(whole, find_target()) == ["q2", "q4", "fp32", "fp16", "q2f16"]
    assert runnable(whole, find_target("ort", "cuda")) == ["fp16", "q2f16"]
    assert runnable(whole, find_target("ort", "nv-rtx")) == ["fp16"]
    assert default_variant(whole, "cpu") == "q2"
    assert default_variant(whole, "cuda") == "fp16"


def test_a_new_variant_is_predicted_written_run_and_verified(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From its row alone: sizes before it is made, counts, choice at opening, views and both verdicts."""
    monkeypatch.setattr(catalog, "VARIANTS", (*VARIANTS, Q4S))
    first = dataclasses.replace(TARGETS[0], variants=("q4s", *TARGETS[0].variants))
    monkeypatch.setattr(targets, "TARGETS", (first, *TARGETS[1:]))
    monkeypatch.setattr(quality, "_MOST_TOKENS", 64)
    monkeypatch.setattr(quality, "_LENGTH", 64)
    checkpoint, out = open_checkpoint(str(tiny_checkpoint)), tmp_path / "package"
    (predicted,) = plan_export(checkpoint, variants=["q4s"]).variants
    export(checkpoint, out, variants=["fp32", "q4s"])
    package = open_package(out)
    made = package.variant("q4s")
    assert predicted.graphs.keys() == {made.graph} == {"onnx/model_q4s_shared.onnx"}
    assert made.portable is not None
    assert predicted.portable.keys() == {made.portable.graph} == {"onnx/model_q4s.onnx"}
    said, size = predicted.portable[made.portable.graph], package.manifest.files[made.portable.graph].size
    assert said == pytest.approx(size, rel=0.05)
    assert predicted.graphs[made.graph].data == sum(package.manifest.files[name].size for name in made.data)
    assert made.op_counts["com.microsoft::MatMulNBits"] == 7 * SHAPE["num_hidden_layers"] + 1
    assert made.op_counts["com.microsoft::GatherBlockQuantized"] == 1
    assert made.quantization is not None
    assert predicted.bits_per_weight == pytest.approx(made.quantization.bits_per_weight)
    with open_runner(out) as runner:
        assert runner.variant.name == "q4s"
    report = measure_variant(package, "q4s", checkpoint, longest=24)
    assert report.passed
    assert {case.mode.split()[0] for case in report.cases} == {
        *("kernels", "prefill", "decode", "chunked", "prefix", "portable")
    }
    strict = dataclasses.replace(Q4S, weights=INT4_BLOCKS)
    monkeypatch.setattr(catalog, "VARIANTS", (*VARIANTS, strict))
    report = measure_variant(package, "q4s", checkpoint, longest=24)
    assert report.verdicts == {KERNEL_PARITY: True, QUALITY: False}


def test_a_new_target_is_offered_by_the_verbs(monkeypatch: pytest.MonkeyPatch) -> None:
    row = dataclasses.replace(
        TARGETS[1], name="npu", backend="npu", device="npu", backend_words="a made-up runtime", variants=("q4f16",)
    )
    monkeypatch.setattr(targets, "TARGETS", (*TARGETS, row))
    where = ["--backend", "npu", "--device", "npu"]
    for verb in (["verify", "p", "--reference", "demo"], ["evaluate", "p"], ["bench", "p"]):
        args = parse_args([*verb, *where])
        assert (args.backend, args.device) == ("npu", "npu")
        assert find_target(args.backend, args.device) == row
    with pytest.raises(UsageError, match="invalid choice: 'npu'"):
        parse_args(["build", "p", "--backend", "npu"])  # it needs no engine
    assert _backend_and_variant("npu:q4f16") == ("npu", "q4f16")
    whole = package(entry("fp32", "concat"), entry("fp16", dtype="float16"), entry("q4f16", dtype="float16"))
    assert default_variants(whole, row) == ["q4f16"]
    assert default_variants(package(entry("fp32", "concat")), row) == []
    engines = dataclasses.replace(row, needs_engine=True)
    monkeypatch.setattr(targets, "TARGETS", (*TARGETS, engines))
    assert parse_args(["build", "p", "--backend", "npu"]).backend == "npu"


@pytest.mark.usefixtures("more")
def test_a_new_precision_of_engines_has_its_oldest_gpu(config: ModelConfig) -> None:
    options: Any = {"precision": "nvfp4", "compute_capabilities": ["8.9"]}
    with pytest.raises(UsageError, match=r"compute capability 8\.9: nvfp4 needs 10\.0 or newer; use --precision fp8"):
        resolve_options(EngineOptions(**options), config.spec)
    assert TrtOptions("nvfp4", 8).precision == "nvfp4"  # type: ignore[arg-type]
