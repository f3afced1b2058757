"""q4 and q8: what the options do, what is refused before anything is written, and what the manifest says."""

from __future__ import annotations

import base64
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from support.checkpoints import make_checkpoint
from support.matrix import refused

import olmo2_export.demo
from olmo2_export.catalog import QualityGate, find
from olmo2_export.cli import main
from olmo2_export.measure.quality import broken_limits, quality_tokens
from olmo2_export.package import variants
from olmo2_export.package.export import export
from olmo2_export.package.weight_choice import Options
from olmo2_export.quantize import distill
from olmo2_export.summary.package import describe
from olmo2_export.summary.text import plain
from olmo2_export.weights.checkpoint import open_checkpoint
from runtimes import open_runner
from runtimes.errors import ConfigError, UsageError
from runtimes.manifest import Quality
from runtimes.package import open_package

pytestmark = pytest.mark.usefixtures("remembered")

HEADS, HEAD_DIM, LAYERS = 2, 16, 3
FLOAT32_CACHE = ["--kv-cache", "float32"]


def run(*arguments: object) -> int:
    return main(["export", *map(str, arguments)])


def test_one_command_makes_both_variants_of_the_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("demo", "--out", tmp_path / "p", "--variant", "q4", "--variant", "q8", *FLOAT32_CACHE) == 0
    out = capsys.readouterr().out
    assert "search: 4.60 bits per weight" in out
    assert "onnx/model_q4_prefill.onnx: KL 0.00" in out
    manifest = open_package(tmp_path / "p").manifest
    q4, q8 = manifest.variants["q4"], manifest.variants["q8"]
    assert q4.prefill is not None
    assert q4.prefill.min_rows == variants.PREFILL_MIN_ROWS
    assert q8.prefill is None  # int8 by int8 misses the gate of 8 bits on this model
    for variant in (q4, q8):
        assert variant.quality is not None
        assert variant.quality.tokens == 4096
        assert variant.quality.tokens_from == "text"
        gates = find(variant.name).weights.gates
        assert gates is not None
        assert broken_limits(variant.quality, gates[0]) == []
        assert variant.quantization is not None
        assert len(variant.quantization.tensors) == 6 * 7 + 2
        assert all(0 < t.nmse < 0.02 for t in variant.quantization.tensors.values())
    parts = ("_shared.onnx", ".onnx_data", "_prefill.onnx", "_prefill.onnx_data")  # what runners open
    assert sorted(q4.files) == sorted(f"onnx/model_q4{part}" for part in parts)
    assert "quantised search: 4.60 bits per weight" in plain(describe(tmp_path / "p"))
    with open_runner(tmp_path / "p") as runner:
        assert runner.variant.name == "q4"  # the first by name


@pytest.mark.usefixtures("hardly_judged")
@pytest.mark.parametrize(
    ("flags", "bits", "dtype", "last_axis"),
    [(["--kv-cache", "int8"], 8, "int8", HEAD_DIM), (["--kv-cache", "int4"], 4, "uint8", HEAD_DIM // 2)],
)
def test_a_quantised_cache_has_its_scales_in_the_manifest(
    tiny_checkpoint: Path, tmp_path: Path, flags: list[str], bits: int, dtype: str, last_axis: int
) -> None:
    assert run(tiny_checkpoint, "--out", tmp_path / "p", "--variant", "q8", *flags) == 0
    cache = open_package(tmp_path / "p").manifest.variants["q8"].kv_cache
    assert cache.dtype == dtype
    assert cache.quantization is not None
    assert cache.quantization.bits == bits
    assert cache.quantization.scales.keys() == {f"{n}.{kind}" for n in range(LAYERS) for kind in ("key", "value")}
    graph = ir.load(tmp_path / "p" / f"onnx/model_q8_shared_kv_int{bits}.onnx").graph
    for name, text in cache.quantization.scales.items():
        scales = np.frombuffer(base64.b64decode(text), "<f4").reshape(HEADS, 1, HEAD_DIM)
        stored = graph.initializers[f"kv_cache.{name}.scale"].const_value
        assert stored is not None
        assert np.array_equal(stored.numpy(), scales)
        if name.endswith("key"):  # the rotation mixes the halves, so they share their scales
            assert np.array_equal(scales[..., : HEAD_DIM // 2], scales[..., HEAD_DIM // 2 :])
    with open_runner(tmp_path / "p", threads=1) as runner:
        runner.prefill([[1, 2, 3]])
        assert np.isfinite(runner.decode([4])).all()
        (array,) = {a.shape[-1] for a in runner._buffer._arrays.values()}  # type: ignore[attr-defined]
        assert array == last_axis


@pytest.mark.usefixtures("hardly_judged")
def test_a_quantised_cache_costs_little(tiny_checkpoint: Path, tmp_path: Path) -> None:
    ids = np.random.default_rng(3).integers(0, 131, 200)
    logits = {}
    options = Options(kv_caches=("int4", "float32", "int8"), prefill_graph=False)
    export(open_checkpoint(str(tiny_checkpoint)), tmp_path / "p", variants=["q8"], options=options)
    for kind in ("float32", "int8", "int4"):
        with open_runner(tmp_path / "p", threads=1, kv_cache=kind) as runner:
            assert runner.variant.kv_cache.name == kind
            logits[kind] = runner.prefill([ids], all_positions=True)[0]
    whole = logits["float32"]
    errors = {k: float(np.mean((logits[k] - whole) ** 2) / whole.var()) for k in ("int8", "int4")}
    assert 0 < errors["int8"] < 2e-3
    assert errors["int8"] < errors["int4"] < 0.3


@pytest.mark.usefixtures("hardly_judged")
@pytest.mark.parametrize("recipe", ["rtn", "gptq", "mixed", "gptq-mixed", "distill"])
def test_every_recipe_by_its_flag(
    tiny_checkpoint: Path,
    tmp_path: Path,
    recipe: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a tokenizer they are calibrated on random ids. The spool of GPTQ is not in the package."""
    monkeypatch.setattr(distill, "LENGTH", 24)
    flags: list[object] = ["--recipe", recipe, "--no-prefill-graph", *FLOAT32_CACHE]
    if "mixed" in recipe:
        flags += ["--size-budget", 7]
    if recipe == "distill":
        flags += ["--distill-steps", 1]
    assert run(tiny_checkpoint, "--out", tmp_path / "p", "--variant", "q4", *flags) == 0
    variant = open_package(tmp_path / "p").manifest.variants["q4"]
    assert variant.prefill is None
    assert variant.quantization is not None
    assert variant.quantization.recipe == recipe
    assert variant.quantization.calibration is None
    assert not list((tmp_path / "p").rglob("*.npz"))
    assert f"{recipe}: " in capsys.readouterr().out
    eight = [name for name, t in variant.quantization.tensors.items() if t.bits == 8]
    assert bool(eight) == ("mixed" in recipe)
    assert variant.quantization.bits_per_weight <= (7 if eight else 5.9)


def test_a_classifier_cannot_be_distilled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_checkpoint(tmp_path / "model", num_labels=3)
    assert run(model, "--out", tmp_path / "p", "--variant", "q4", "--recipe", "distill") == 2
    assert "recipe distill: a classifier writes no text" in capsys.readouterr().err
    assert not (tmp_path / "p").exists()


def test_gptq_takes_a_text(tmp_path: Path) -> None:
    text = tmp_path / "my text.txt"
    text.write_text((Path(olmo2_export.demo.__file__).parent / "calibration.txt").read_text()[:6_000])
    flags = ["--recipe", "gptq", "--calibration", text, "--no-prefill-graph", *FLOAT32_CACHE]
    assert run("demo", "--out", tmp_path / "p", "--variant", "q4", *flags) == 0
    variant = open_package(tmp_path / "p").manifest.variants["q4"]
    assert variant.quantization is not None
    assert variant.quantization.calibration is not None
    assert len(variant.quantization.calibration) == 64
    assert variant.quality is not None
    assert variant.quality.kl_mean < 0.006  # search alone: 0.0085


@pytest.mark.usefixtures("hardly_judged")
def test_the_block_size_by_its_flag(tiny_checkpoint: Path, tmp_path: Path) -> None:
    flags = ["--variant", "q4", "--block-size", "64", "--no-prefill-graph", *FLOAT32_CACHE]
    assert run(tiny_checkpoint, "--out", tmp_path / "p", *flags) == 0
    quantization = open_package(tmp_path / "p").manifest.variants["q4"].quantization
    assert quantization is not None
    assert {t.block_size for t in quantization.tensors.values()} == {64}


REFUSED: dict[str, tuple[list[str], str]] = {
    "unknown variant": (["--variant", "q5"], "variant q5"),
    "unknown recipe": (["--variant", "q4", "--recipe", "magic"], "recipe magic"),
    "options of q4 for fp32": (["--kv-cache", "int8"], "for q4 and q8"),
    "a text for nobody": (["--variant", "q4", "--calibration", "x"], "calibration text"),
    "a budget for nobody": (["--variant", "q4", "--size-budget", "5"], "size budget"),
    "a budget that nothing meets": (["--variant", "q4", "--recipe", "mixed", "--size-budget", "2"], "size budget 2"),
    "a budget that is no number": (["--variant", "q4", "--recipe", "mixed", "--size-budget", "nan"], "size budget nan"),
    "steps for nobody": (["--variant", "q4", "--recipe", "gptq", "--distill-steps", "9"], "of recipe distill alone"),
    "no steps": (["--variant", "q4", "--recipe", "distill", "--distill-steps", "0"], "1 or more"),
    "no such text": (["--variant", "q4", "--recipe", "gptq", "--calibration", "/no/such"], "/no/such"),
    "no such block size": (["--variant", "q4", "--block-size", "48"], "block-size"),
    "no such cache": (["--variant", "q4", "--kv-cache", "fp8"], "kv-cache"),
}


@pytest.mark.parametrize(("flags", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_refused(tmp_path: Path, flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("demo", "--out", tmp_path / "p", *flags) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in error
    assert "Traceback" not in error
    assert not (tmp_path / "p").exists()
    assert list(tmp_path.iterdir()) == []


def test_a_head_size_that_the_operator_does_not_take_is_refused_at_once(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    checkpoint = open_checkpoint(str(make_checkpoint(tmp_path / "c", head_dim=20)))
    with pytest.raises(ConfigError, match=r"head_dim 20: .* multiples of 16") as caught:
        export(checkpoint, tmp_path / "p", variants=["q4"])
    refused(request, "other sizes of heads, but for `fp32`", caught.value)
    assert not (tmp_path / "p").exists()


def test_two_exports_are_byte_identical(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    first, second = (export(checkpoint, tmp_path / name, variants=["q4"]).files for name in ("a", "b"))
    assert first == second


ODD: dict[str, dict[str, Any]] = {
    "odd vocabulary and layers": {"vocab_size": 257, "num_hidden_layers": 1},
    "no multiple of a block": {
        "hidden_size": 80,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "intermediate_size": 112,
        "num_hidden_layers": 1,
    },
    "tied and biased": {"tie_word_embeddings": True, "attention_bias": True},
    "short context": {"max_position_embeddings": 16, "num_hidden_layers": 1},
}


@pytest.mark.usefixtures("little_text", "hardly_judged")
@pytest.mark.parametrize("fields", ODD.values(), ids=ODD.keys())
def test_odd_shapes_export_and_verify_exactly(tmp_path: Path, fields: dict[str, Any]) -> None:
    from olmo2_export.verify.variant import measure_variant

    checkpoint = open_checkpoint(str(make_checkpoint(tmp_path / "c", **fields)))
    export(checkpoint, tmp_path / "p", variants=["q4", "q8"], options=Options(kv_caches=("float32",)))
    for name in ("q4", "q8"):
        report = measure_variant(tmp_path / "p", name, checkpoint, longest=64)
        assert all(case.passed for case in report.cases), [c for c in report.cases if not c.passed]
        assert report.greedy.passed
        assert {check.name for check in report.checks if not check.passed if "quality" not in check.name} == set()


def test_gates_name_what_is_broken() -> None:
    quality = Quality(100, "text", 0.02, 0.05, 0.95, 10.2, 10.0)
    limits = QualityGate(kl_mean=0.01, kl_p99=0.04, top1=0.96, perplexity_rise=0.01)
    broken = broken_limits(quality, limits)
    assert [line.split(",")[0] for line in broken] == [
        "KL mean 0.02",
        "KL p99 0.05",
        "top-1 95.00% ± 2.18%",
        "perplexity +2.00%",
    ]
    assert broken_limits(dataclasses.replace(quality, tokens_from="random ids"), limits) == broken[:3]
    assert broken_limits(dataclasses.replace(quality, kl_mean=float("nan")), limits)[0].startswith("KL mean nan")


def test_quality_is_measured_on_text_where_there_is_a_tokenizer(tiny_checkpoint: Path) -> None:
    from olmo2_export.config import ModelConfig

    for name, origin in (("demo", "text"), (str(tiny_checkpoint), "random ids")):
        checkpoint = open_checkpoint(name)
        config = ModelConfig.from_json(checkpoint.folder / "config.json")
        sequences, found = quality_tokens(checkpoint, config)
        assert found == origin
        assert sum(map(len, sequences)) == 4096
        assert {len(s) for s in sequences} == {256}
    with pytest.raises(UsageError):
        variants.check_variants([], config, Options())
