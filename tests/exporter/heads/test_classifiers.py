"""Classifiers and reward models against transformers: scores, the token that is scored, every variant, and refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from support.checkpoints import make_checkpoint
from support.matrix import seen
from transformers import AutoModelForSequenceClassification

from olmo2_export.architecture import SCORE, operations, quantizable
from olmo2_export.catalog import precisions
from olmo2_export.config import ModelConfig
from olmo2_export.engine.build import build
from olmo2_export.engine.options import EngineOptions
from olmo2_export.locate.locate import format_location, locate
from olmo2_export.measure.parity import KERNEL_PARITY, ParityReport
from olmo2_export.package.export import export
from olmo2_export.package.plan import plan_export
from olmo2_export.verify.verify import verify
from olmo2_export.weights.checkpoint import open_checkpoint
from runtimes import open_package, open_runner
from runtimes.errors import CheckpointError, ConfigError, UsageError
from runtimes.generation.generate import generate_tokens
from runtimes.text.sampling import Sampler

PAD = 129
PADDING = ["alone", "right padded", "left padded", "trailing padding id", "padding alone"]
ROWS = [[5, 17, 99, 3, 42, 8, 77], [11, 2, 60], [1, 64, 7, 9, 30, PAD, PAD], [PAD, PAD, PAD, PAD], [PAD, 4, PAD, 50]]


def assert_good(report: ParityReport) -> None:
    failed = [(c.mode, c.batch_size, c.length, c.failures) for c in report.cases if not c.passed]
    assert report.verdicts[KERNEL_PARITY], (report.variant, failed, report.checks)
    if report.precision in ("fp32", "bf16", "fp16"):  # what few bits cost random weights says nothing
        assert report.passed, (report.variant, report.checks)


@torch.inference_mode()
def theirs(folder: Path, rows: list[list[int]]) -> np.ndarray:
    """transformers' scores, each sequence alone."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    return np.concatenate([model(torch.tensor([row])).logits.numpy() for row in rows])


@pytest.mark.parametrize("name", ["olmo", "olmo2", "olmo2_reward", "olmo3"])
def test_fp32_scores_what_transformers_does(
    name: str, classifier: Callable[[str], Path], classifier_package: Callable[[str], Path]
) -> None:
    expected = theirs(classifier(name), ROWS)
    with open_runner(classifier_package(name), variant="fp32") as runner:
        scores = runner.score(ROWS)
        assert runner.cache_lengths == ()
    assert scores.dtype == np.float32
    assert scores.shape == (len(ROWS), 1 if name == "olmo2_reward" else 3)
    np.testing.assert_allclose(scores, expected, atol=2e-5)


@pytest.mark.parametrize("variant", ["fp32", "q4"])
def test_texts_that_are_scored_together_are_scored_as_each_alone(
    variant: str, classifier_package: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each came to the graph by itself; one of padding alone still does, where padding is on the left."""
    rows = [list(range(n, 2 * n)) for n in (9, 40, 3, 17, 21, 2, 60, 5)] + [[PAD, PAD], [4, PAD]]
    calls: list[tuple[int, ...]] = []
    with open_runner(classifier_package("olmo2"), variant=variant) as runner:
        alone = np.concatenate([runner.score([row]) for row in rows])
        name = "_call_one" if variant == "fp32" else "_run_rows"
        real = getattr(type(runner), name)

        def counted(self: object, *given: object, **named: object) -> object:
            ids = given[0]["input_ids"] if variant == "fp32" else given[2]  # type: ignore[index]  # what it is given
            calls.append(ids.shape)  # type: ignore[attr-defined]
            return real(self, *given, **named)

        monkeypatch.setattr(type(runner), name, counted)
        together = runner.score(rows)
    np.testing.assert_allclose(together, alone, atol=2e-5)
    assert calls == [(1, 1), (5, 9), (2, 21), (2, 60)]


@torch.inference_mode()
@pytest.mark.parametrize("left", [False, True])
def test_the_portable_graph_pools_padded_batches_as_transformers_does(
    left: bool, classifier: Callable[[str], Path], classifier_package: Callable[[str], Path]
) -> None:
    rows, width = ROWS[:3], 9
    ids, mask = np.full((3, width), PAD), np.zeros((3, width), np.int64)
    for b, row in enumerate(rows):
        at = slice(width - len(row), None) if left else slice(len(row))
        ids[b, at], mask[b, at] = row, 1
    folder = classifier_package("olmo2")
    session = ort.InferenceSession(folder / "onnx" / "model.onnx")
    empty = {v.name: np.zeros((3, 2, 0, 16), np.float32) for v in session.get_inputs() if "past" in v.name}
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    (found,) = session.run(["score"], {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **empty})
    model = AutoModelForSequenceClassification.from_pretrained(classifier("olmo2"), dtype=torch.float32)
    expected = model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).logits.numpy()
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("name", ["olmo", "olmo2", "olmo3"])
def test_every_variant_passes_its_gates(
    request: pytest.FixtureRequest,
    name: str,
    classifier: Callable[[str], Path],
    classifier_package: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    checkpoint = open_checkpoint(str(classifier(name)))
    reports = verify(classifier_package(name), checkpoint, longest=64, out=tmp_path / "parity.json")
    for report in reports:
        assert_good(report)
        modes = {case.mode for case in report.cases}
        assert {f"score, {padding}" for padding in PADDING} <= modes
        graph = [padding for padding in PADDING if report.variant == "fp32" or padding != "left padded"]
        assert {f"graph, {padding}" for padding in graph} <= modes
        location = locate(classifier_package(name), checkpoint, report.variant)
        assert location.first is None, format_location(location)
        seen(request, f"{name} score", "onnxruntime", report.variant, "verified")


@pytest.mark.parametrize("variant", ["fp32", "q4"])
def test_layers_one_at_a_time_score_the_same_tokens(
    variant: str, classifier: Callable[[str], Path], classifier_package: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint, out = open_checkpoint(str(classifier("olmo2"))), tmp_path / "parity.json"
    (report,) = verify(
        classifier_package("olmo2"), checkpoint, variants=[variant], longest=64, low_memory=True, out=out
    )
    assert_good(report)
    assert {f"score, {padding}" for padding in PADDING} <= {case.mode for case in report.cases}
    assert "as --low-memory asks" in report.coverage
    assert [check.name for check in report.checks if check.verdict == "quality"] == ["quality"]


@pytest.mark.parametrize("name", ["olmo2", "olmo3"])
def test_the_files_are_predicted_to_the_byte(
    name: str, classifier: Callable[[str], Path], classifier_package: Callable[[str], Path]
) -> None:
    manifest = open_package(classifier_package(name)).manifest
    said = plan_export(open_checkpoint(str(classifier(name))), variants=list(manifest.variants))
    assert [variant.name for variant in said.variants] == list(manifest.variants)
    for variant in said.variants:
        assert list(variant.graphs) == [manifest.variants[variant.name].graph]  # no prefill graph
        (data,) = manifest.variants[variant.name].data
        for path, files in variant.graphs.items():
            assert files.data == manifest.files[data].size, path
            assert abs(files.graph - manifest.files[path].size) < 0.04 * manifest.files[path].size, path


def test_the_head_stays_float(classifier_package: Callable[[str], Path]) -> None:
    package = open_package(classifier_package("olmo2"))
    assert package.model.task == "sequence-classification"
    assert package.model.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    for variant in package.manifest.variants.values():
        assert variant.answer == "score"
        assert variant.results["score"].shape == ("batch_size", 3)
        assert [spec.role for spec in variant.outputs if spec.role != "present"] == ["score"]
        assert variant.prefill is None
        assert "score.weight" not in (variant.quantization.tensors if variant.quantization else {})
    assert package.manifest.variants["q4"].op_counts["com.microsoft::MatMulNBits"] == 7 * 3
    assert package.manifest.variants["q4"].op_counts["MatMul"] == 1
    assert not (package.folder / "genai_config.json").exists()
    config = ModelConfig.from_json(package.folder / "config.json")
    rows = operations(config)
    assert (rows[-1].name, rows[-1].shape) == (SCORE, (3, 96))
    assert rows[-1] not in quantizable(rows)


@pytest.mark.parametrize("precision", precisions())
def test_every_graph_for_tensorrt_passes_its_gates(
    request: pytest.FixtureRequest,
    precision: str,
    classifier: Callable[[str], Path],
    classifier_trt: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    checkpoint = open_checkpoint(str(classifier("olmo2")))
    name = f"trt_{precision}"
    (report,) = verify(classifier_trt(precision), checkpoint, variants=[name], out=tmp_path / "parity.json")
    assert_good(report)
    assert {f"score, {padding}" for padding in PADDING} <= {case.mode for case in report.cases}
    location = locate(classifier_trt(precision), checkpoint, name)
    assert location.first is None, format_location(location)
    seen(request, "olmo2 score", "graph for TensorRT", precision, "verified")


def test_tensorrt_compiles_it(
    request: pytest.FixtureRequest, classifier_package: Callable[[str], Path], tmp_path: Path
) -> None:
    package = Path(shutil.copytree(classifier_package("olmo2"), tmp_path / "p"))
    report = build(package, EngineOptions("bf16", compute_capabilities=["8.9"], max_cache_length=64), progress=False)
    assert report.engine.layer_counts["KV_CACHE_UPDATE"] == 2 * 3
    (variant,) = open_package(package).trt.variants.values()  # type: ignore[union-attr]  # it was built
    assert (variant.answer, variant.top_k) == ("score", 0)
    seen(request, "olmo2 score", "TensorRT for RTX", "bf16", "compiled")


def test_a_model_without_padding_scores_one_sequence_at_a_time(
    classifier: Callable[[str], Path], classifier_package: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = classifier("olmo2_null")
    assert json.loads((folder / "config.json").read_text())["pad_token_id"] is None
    package = classifier_package("olmo2_null")
    with open_runner(package, variant="fp32") as runner:
        scores = np.concatenate([runner.score([row]) for row in ROWS])
        with pytest.raises(UsageError, match="pad_token_id is null, where transformers scores one at a time"):
            runner.score(ROWS[:2])
    np.testing.assert_allclose(scores, theirs(folder, ROWS), atol=2e-5)
    (report,) = verify(package, open_checkpoint(str(folder)), longest=64, out=tmp_path / "parity.json")
    assert_good(report)
    assert "score, right padded" not in {case.mode for case in report.cases}


def config(**fields: Any) -> ModelConfig:
    raw = {
        "model_type": "olmo2",
        "architectures": ["Olmo2ForSequenceClassification"],
        "vocab_size": 131,
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        **fields,
    }
    return ModelConfig.from_dict(raw)


def test_labels_and_padding_are_read_as_transformers_reads_them() -> None:
    assert config().labels == ("LABEL_0", "LABEL_1")
    assert config(id2label={"0": "LABEL_0"}).labels == ("LABEL_0",)
    assert config(id2label={"1": "good", "0": "bad"}, tie_word_embeddings=True).labels == ("bad", "good")
    assert config(num_labels=3, id2label={"0": "x"}).labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert [config(pad_token_id=7).pad_token_id, config().pad_token_id, config(pad_token_id=None).pad_token_id] == [
        7,
        1,
        None,
    ]
    assert not config(tie_word_embeddings=True).tie_word_embeddings
    assert config(architectures=["Olmo2ForCausalLM"]).task == "language-model"
    with pytest.raises(ConfigError, match="id2label"):
        config(id2label={"0": "a", "2": "b"})
    with pytest.raises(ConfigError, match="pad_token_id -1"):
        config(pad_token_id=-1)


@pytest.mark.parametrize(("told", "words"), [("Olmo2ForCausalLM", "score.weight is there"), (None, "has lm_head")])
def test_a_head_that_config_does_not_tell_of_is_refused(told: str | None, words: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c", num_hidden_layers=1, **({"num_labels": 2} if told else {}))
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"architectures": [told or "Olmo2ForSequenceClassification"]}))
    with pytest.raises(CheckpointError, match=words):
        export(open_checkpoint(str(folder)), tmp_path / "p")


def test_what_needs_logits_refuses_a_classifier_by_name(classifier_package: Callable[[str], Path]) -> None:
    package = open_package(classifier_package("olmo2"))
    with open_runner(package, variant="fp32") as runner:
        with pytest.raises(UsageError, match="a classifier, which gives scores and no logits"):
            generate_tokens(runner, [1, 2], sampler=Sampler())
        with pytest.raises(UsageError, match="scores one token of a row"):
            runner.prefill([[1, 2]], all_positions=True)
    with pytest.raises(UsageError, match="evaluate needs a language model, and olmo2-run score"):
        package.check_logits("evaluate")


def test_a_language_model_has_no_scores(tiny_package: Path) -> None:
    with open_runner(tiny_package) as runner, pytest.raises(UsageError, match="a language model, which gives logits"):
        runner.score([[1, 2]])
