"""One variant with several KV caches: small graphs over one file of weights each, and which of them is the default."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from support.bugs.edits import Bug, change, scaled
from support.bugs.quantized import (
    GRAPH,
    INT8_CACHE,
    INT8_CACHE_PREFILL,
    attention_scale_wrong,
    key_and_value_cache_swapped,
    q_norm_ignored,
)
from support.checkpoints import make_checkpoint
from support.rebuilt_packages import rebuilt

import olmo2_export.catalog as catalog
from olmo2_export.catalog import QualityGate
from olmo2_export.config import ModelConfig
from olmo2_export.locate.locate import locate
from olmo2_export.measure.parity import ParityReport
from olmo2_export.measure.quality import top1_error
from olmo2_export.package import kv_caches, variants
from olmo2_export.package.export import export
from olmo2_export.package.kv_caches import with_default, written_caches
from olmo2_export.package.plan import plan_export
from olmo2_export.package.weight_choice import Options
from olmo2_export.summary.package import describe
from olmo2_export.summary.text import plain, quantization_lines
from olmo2_export.verify.variant import measure_variant
from olmo2_export.weights.checkpoint import open_checkpoint
from runtimes.errors import CheckpointError
from runtimes.manifest import Quality, Variant
from runtimes.package import open_package

pytestmark = pytest.mark.usefixtures("remembered")

CAPACITY = 64


@pytest.fixture(scope="module")
def package(package_of: Callable[[str], Path]) -> Path:
    """q4 of the random model with a float32 and an int8 cache; both miss the gate, so that float32 is the default."""
    return package_of("tiny_q4_caches")


@pytest.fixture
def q4(package: Path) -> Variant:
    return open_package(package).manifest.variants["q4"]


@pytest.mark.usefixtures("hardly_judged", "traces")
def test_the_files_of_weights_are_the_same_whichever_caches_are_written(
    package: Path, q4_package: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    options = Options(kv_caches=("int8",))
    export(open_checkpoint(str(tiny_checkpoint)), tmp_path / "int8", variants=["q4"], options=options)
    both, whole, int8 = (
        {name: entry for name, entry in open_package(folder).manifest.files.items() if "onnx/" in name}
        for folder in (package, q4_package, tmp_path / "int8")
    )
    assert whole.keys() | int8.keys() == both.keys()
    assert both == whole | int8
    graphs = {name for name in both if name.endswith(".onnx")}
    assert both.keys() - graphs == {"onnx/model_q4.onnx_data", "onnx/model_q4_prefill.onnx_data"}
    assert int8.keys() - whole.keys() == {INT8_CACHE, INT8_CACHE_PREFILL}


def test_a_dry_run_says_each_graph(package: Path, tiny_checkpoint: Path) -> None:
    manifest = open_package(package).manifest
    plan = plan_export(open_checkpoint(str(tiny_checkpoint)), variants=["q4"])
    (said,) = plan.variants
    assert said.other_caches.keys() == {INT8_CACHE, INT8_CACHE_PREFILL}
    for path, size in said.other_caches.items():
        assert size == pytest.approx(manifest.files[path].size, rel=0.05)
    texts = sum(entry.size for name, entry in manifest.files.items() if not name.startswith("onnx/"))
    assert plan.texts == pytest.approx(texts + (package / "manifest.json").stat().st_size, rel=0.1)


GOOD, BAD = Quality(4096, "text", 0.008, 0.03, 0.9320, 10.05, 10.0), Quality(4096, "text", 0.008, 0.03, 0.9277, 10, 10)
GATE = QualityGate(kl_mean=0.01, kl_p99=0.08, top1=0.93, perplexity_rise=0.01)


def test_int8_is_the_default_where_it_passes_the_gate_and_float32_where_not(
    q4: Variant, caplog: pytest.LogCaptureFixture
) -> None:
    whole, int8 = (dataclasses.replace(own, quality=GOOD) for own in q4.each_cache)
    found = with_default([whole, int8], GATE)
    assert [own.kv_cache.name for own in found.each_cache] == ["int8", "float32"]
    assert found.each_cache == (int8, whole)
    assert [other.missed for other in found.other_caches] == [()]
    assert caplog.messages == []
    bad = dataclasses.replace(int8, quality=BAD)
    found = with_default([whole, bad], GATE)
    assert found.each_cache == (whole, bad)
    missed = "top-1 92.77% ± 0.40%, the gate is 93.00%"
    assert [other.missed for other in found.other_caches] == [(missed,)]
    assert caplog.messages == [
        f"q4: its KV cache is float32 where none is named, as int8 misses the quality gate: {missed}"
    ]


def test_int8_without_a_graph_for_prompts_or_not_measured_is_no_default(q4: Variant) -> None:
    whole, int8 = (dataclasses.replace(own, quality=GOOD) for own in q4.each_cache)
    found = with_default([whole, dataclasses.replace(int8, prefill=None)], GATE)
    assert found.kv_cache.name == "float32"
    assert found.other_caches[0].missed == ("no prefill graph",)
    unknown = [dataclasses.replace(own, quality=None) for own in (whole, int8)]
    assert with_default(unknown, None).kv_cache.name == "float32"
    int4 = dataclasses.replace(int8.kv_cache, quantization=dataclasses.replace(int8.kv_cache.quantization, bits=4))
    found = with_default([whole, dataclasses.replace(int8, kv_cache=int4)], GATE)
    assert [own.kv_cache.name for own in found.each_cache] == ["float32", "int4"]  # on request alone


def test_the_standard_error_of_a_share() -> None:
    assert top1_error(BAD) == pytest.approx((0.9277 * 0.0723 / 4096) ** 0.5)
    assert top1_error(dataclasses.replace(BAD, top1=1.0)) == 0


def test_what_is_written_where_nothing_is_named(tiny_checkpoint: Path) -> None:
    config = ModelConfig.from_json(tiny_checkpoint / "config.json")
    classifier = dataclasses.replace(config, labels=("a", "b"))

    def names(variant: str, config: ModelConfig, *asked: str) -> list[str]:
        return [cache.name for cache in written_caches(catalog.find(variant), config, Options(kv_caches=asked))]

    assert names("q4", config) == ["float32", "int8"]
    assert names("q4", config, "int4", "float32") == ["float32", "int4"]
    assert names("q8", classifier) == names("fp32", config) == names("q4f16", config) == ["float32"]
    assert names("q8", classifier, "int8") == ["int8"]


@pytest.mark.usefixtures("hardly_judged", "traces")
def test_a_cache_that_cannot_be_calibrated_is_left_out_unless_it_was_asked_for(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise CheckpointError("tokenizer.json: does not work")

    monkeypatch.setattr(variants, "calibration_tokens", fail)
    checkpoint, options = open_checkpoint(str(tiny_checkpoint)), Options(prefill_graph=False)
    with caplog.at_level(logging.WARNING):
        entry = export(checkpoint, tmp_path / "p", variants=["q4"], options=options).variants["q4"]
    assert entry.kv_cache.name == "float32"
    assert entry.other_caches == ()
    assert "q4: no int8 KV cache, which cannot be calibrated: tokenizer.json: does not work" in caplog.messages
    asked = dataclasses.replace(options, kv_caches=("float32", "int8"))
    with pytest.raises(CheckpointError, match="does not work"):
        export(checkpoint, tmp_path / "q", variants=["q4"], options=asked)


@pytest.mark.usefixtures("hardly_judged", "traces")
def test_one_that_passes_is_the_default_of_the_package_and_both_are_measured_on_the_same_text(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    anything = QualityGate(kl_mean=9.0, kl_p99=None, top1=0.0, perplexity_rise=9.0)
    monkeypatch.setattr(variants, "gate_of", lambda *_: anything)
    asked: list[int] = []
    original = kv_caches.with_default
    monkeypatch.setattr(variants, "with_default", lambda *args: asked.append(len(args[0])) or original(*args))
    options = Options(prefill_graph=False)
    entry = export(open_checkpoint(str(tiny_checkpoint)), tmp_path / "p", variants=["q8"], options=options).variants[
        "q8"
    ]
    assert asked == [2]
    assert [own.kv_cache.name for own in entry.each_cache] == ["int8", "float32"]
    assert entry.graph == "onnx/model_q8_shared_kv_int8.onnx"
    assert entry.portable is not None
    assert entry.portable.graph == "onnx/model_quantized.onnx"
    assert open_package(tmp_path / "p").manifest.variants["q8"] == entry


def test_inspect_says_which_there_are_and_why_one_is_not_the_default(package: Path, q4: Variant) -> None:
    lines = quantization_lines(q4)
    assert [line.split(":")[0] for line in lines[1:5]] == [graph.graph for graph in q4.each_graph]
    assert lines[5] == "KV cache float32 where none is named, of float32, int8"
    assert lines[6].startswith("KV cache int8 misses the quality gate: KL mean 0.1")
    assert lines[6].endswith("%, the gate is 93.00%")
    summary = describe(package, "q4")
    said = " ".join(plain(summary).split())
    assert f"or int8 {INT8_CACHE}: 192 B a token, on the same weights" in said
    (other,) = summary.to_document()["variants"]["q4"]["other_caches"]
    assert (other["graph"], other["kv_cache"], other["prefill_graph"]) == (INT8_CACHE, "int8", INT8_CACHE_PREFILL)
    assert other["bytes_per_token"] == 192
    assert other["quality"]["top1"] < 0.93


def red(report: ParityReport) -> set[str]:
    """The graphs whose cases failed, and checks by name."""
    failed = {case.mode for case in report.cases if not case.passed}
    cached = {mode for mode in failed if mode.startswith("cache int8 ")}
    of_prefill = {mode for mode in cached if mode.startswith("cache int8 int8")}
    parts = {"decode": cached - of_prefill, "prefill": of_prefill, "float32": failed - cached}
    checks = {check.name for check in report.checks if not check.passed if "quality" not in check.name}
    return {part for part, modes in parts.items() if modes} | checks


@pytest.mark.usefixtures("little_text", "short_rows")
@pytest.mark.parametrize(
    ("bug", "graph", "part"),
    [
        (lambda _: None, INT8_CACHE, set()),
        (q_norm_ignored, INT8_CACHE, {"decode"}),
        (key_and_value_cache_swapped, INT8_CACHE, {"decode"}),
        (attention_scale_wrong, INT8_CACHE_PREFILL, {"prefill"}),
        (lambda m: change(m, "kv_cache.1.key.scale", scaled((0, 0, 0), 2.0)), INT8_CACHE, {"cache scales"}),
        (q_norm_ignored, GRAPH, {"float32"}),
    ],
    ids=["none", "decode", "swapped", "prefill", "scale", "the other"],
)
def test_a_bug_in_the_graph_of_one_cache_turns_it_red_and_no_other(
    package: Path, tiny_checkpoint: Path, tmp_path: Path, bug: Bug, graph: str, part: set[str]
) -> None:
    broken = rebuilt(package, tmp_path / "p", bug, graph)
    report = measure_variant(broken, "q4", open_checkpoint(str(tiny_checkpoint)), longest=CAPACITY)
    assert red(report) == part
    checks = {check.name: check for check in report.checks}
    other = checks["quality, int8 cache"]
    assert other.passed  # nobody gets it who does not ask: its cost is said
    assert "not the default: KL mean" in other.found


def test_locate_finds_a_bug_in_the_graph_of_another_cache(package: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    assert locate(package, checkpoint, "q4").first is None
    for graph, view in ((INT8_CACHE, "cache int8 exact"), (INT8_CACHE_PREFILL, "cache int8 int8")):
        found = locate(rebuilt(package, tmp_path / view, attention_scale_wrong, graph), checkpoint, "q4")
        assert found.first is not None
        assert found.first.name.endswith("layers.1.self_attn.attention")
        assert f"In the {view} view, " in found.explanation
        assert "its scale is 1.02 times" in found.explanation


@pytest.mark.usefixtures("traces")
def test_a_small_model_with_a_long_context_is_measured_on_rows_as_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache that passes on short rows alone would fail when it is verified, on rows of 4096 tokens."""
    lengths: dict[str, set[int]] = {}
    measured = variants.measure_quality

    def measure(runner: object, sequences: list[object], *rest: object) -> object:
        name = runner.variant.kv_cache.name  # type: ignore[attr-defined]
        lengths.setdefault(name, set()).update(map(len, sequences))  # type: ignore[arg-type]
        return measured(runner, sequences, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(variants, "measure_quality", measure)
    monkeypatch.setattr(variants, "quality_tokens", _few(variants.quality_tokens))
    checkpoint = open_checkpoint(str(make_checkpoint(tmp_path / "c", max_position_embeddings=400, num_hidden_layers=1)))
    export(checkpoint, tmp_path / "p", variants=["q4"], options=Options(prefill_graph=False))
    assert lengths == {"float32": {256}, "int8": {400}}


def _few(function: Callable[..., object]) -> Callable[..., object]:
    return lambda *args, length=None, **more: function(*args, length=length, most=length or 256, **more)
