"""Vectors in the place of tokens against transformers: every variant, tokens around them, the cache, refusals."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from support.bugs import vectors
from support.matrix import seen
from support.rebuilt_packages import rebuilt, rebuilt_trt
from transformers import AutoModelForCausalLM

from olmo2_export import cli
from olmo2_export.engine.build import build
from olmo2_export.engine.options import EngineOptions
from olmo2_export.locate.locate import format_location, locate
from olmo2_export.measure.parity import KERNEL_PARITY
from olmo2_export.package.export import export
from olmo2_export.package.weight_choice import Options
from olmo2_export.verify.verify import verify
from olmo2_export.weights.checkpoint import open_checkpoint
from runtimes import open_package, open_runner
from runtimes.errors import ContextLengthError, InputError, UsageError

pytestmark = pytest.mark.usefixtures("little_text")  # what few bits cost random weights is not asked here

BEFORE = [[5, 17], [11, 2, 60], [1]]
GRAPHS = {"fp32": "onnx/model.onnx", "q4": "onnx/model_q4_shared.onnx", "trt_fp32": ""}


def given() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.normal(0, 0.1, (n, 96)).astype(np.float32) for n in (7, 3, 1)]


@torch.inference_mode()
def theirs(folder: Path, behind: int) -> list[np.ndarray]:
    """transformers' logits of tokens, vectors and one token, at all positions."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    table = model.get_input_embeddings()
    found = []
    for ids, rows in zip(BEFORE, given(), strict=True):
        parts = [table(torch.tensor(ids)), torch.from_numpy(rows), table(torch.tensor([behind]))]
        found.append(model(inputs_embeds=torch.cat(parts)[None]).logits[0].numpy())
    return found


@pytest.mark.parametrize("name", ["olmo", "olmo2", "olmo3"])
def test_tokens_vectors_and_tokens_give_what_transformers_does(
    name: str, hidden_checkpoint: Callable[[str], Path], vector_package: Callable[[str], Path]
) -> None:
    wanted = theirs(hidden_checkpoint(name), 9)
    with open_runner(vector_package(name), variant="fp32") as runner:
        runner.prefill(BEFORE)
        middle = runner.prefill_embeds(given(), all_positions=True)
        last = runner.decode([9, 9, 9])
        assert runner.cache_lengths == (10, 7, 3)
        assert runner.cached_tokens[1].tolist() == [11, 2, 60, -8, -9, -10, 9]
        for before, one, end, logits in zip(BEFORE, middle, last, wanted, strict=True):
            np.testing.assert_allclose(one, logits[len(before) : -1], atol=2e-5)
            np.testing.assert_allclose(end, logits[-1], atol=2e-5)
        runner.truncate([4, 4, 1])
        again = runner.prefill_embeds([rows[kept:] for kept, rows in zip((2, 1, 0), given(), strict=True)])
        np.testing.assert_allclose(again[0][-1], wanted[0][-2], atol=2e-5)
        runner.reset()
        tokens = runner.prefill(BEFORE)
    with open_runner(vector_package(name), variant="fp32") as other:
        np.testing.assert_array_equal(np.stack(tokens), np.stack(other.prefill(BEFORE)))


@pytest.mark.usefixtures("short_rows")
@pytest.mark.parametrize("name", ["olmo", "olmo2", "olmo3"])
def test_every_variant_passes_its_gates(
    request: pytest.FixtureRequest,
    name: str,
    hidden_checkpoint: Callable[[str], Path],
    vector_package: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    checkpoint = open_checkpoint(str(hidden_checkpoint(name)))
    for report in verify(vector_package(name), checkpoint, longest=64, out=tmp_path / "parity.json"):
        assert report.verdicts[KERNEL_PARITY], [case for case in report.cases if not case.passed]
        assert {"vectors", "vectors among tokens"} <= {case.mode for case in report.cases}
        location = locate(vector_package(name), checkpoint, report.variant)
        assert location.first is None, format_location(location)
        seen(request, f"{name} vectors", "onnxruntime", report.variant, "verified")


@pytest.mark.usefixtures("short_rows")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int4"])
def test_graphs_for_tensorrt_take_them(
    request: pytest.FixtureRequest,
    precision: str,
    hidden_checkpoint: Callable[[str], Path],
    vector_trt: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    checkpoint, name = open_checkpoint(str(hidden_checkpoint("olmo2"))), f"trt_{precision}"
    (report,) = verify(vector_trt(precision), checkpoint, variants=[name], out=tmp_path / "parity.json")
    assert report.verdicts[KERNEL_PARITY], [case for case in report.cases if not case.passed]
    assert {"vectors", "vectors among tokens"} <= {case.mode for case in report.cases}
    location = locate(vector_trt(precision), checkpoint, name)
    assert location.first is None, format_location(location)
    seen(request, "olmo2 vectors", "graph for TensorRT", precision, "verified")


def test_tensorrt_compiles_it_with_hidden_states(
    request: pytest.FixtureRequest, hidden_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    package = tmp_path / "p"
    export(
        open_checkpoint(str(hidden_checkpoint("olmo2"))),
        package,
        options=Options(inputs_embeds=True, hidden_states=(1, -1)),
    )
    report = build(package, EngineOptions("bf16", compute_capabilities=["8.9"], max_cache_length=64), progress=False)
    assert report.engine.layer_counts["KV_CACHE_UPDATE"] == 2 * 3
    (variant,) = open_package(package).trt.variants.values()  # type: ignore[union-attr]  # it was built
    assert list(variant.hidden_states) == [1, 3]
    assert variant.name_of("embeddings") == "inputs_embeds"
    for what in ("hidden", "vectors"):
        seen(request, f"olmo2 {what}", "TensorRT for RTX", "bf16", "compiled")


@pytest.mark.usefixtures("short_rows")
@pytest.mark.parametrize("variant", GRAPHS)
def test_vectors_that_are_ignored_are_red_and_named(
    variant: str,
    hidden_checkpoint: Callable[[str], Path],
    vector_package: Callable[[str], Path],
    vector_trt: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    (bug,) = vectors.VECTOR_BUGS
    if GRAPHS[variant]:
        bad = rebuilt(vector_package("olmo2"), tmp_path / "p", bug, GRAPHS[variant])
    else:
        bad = rebuilt_trt(vector_trt("fp32"), tmp_path / "p", bug)
    checkpoint = open_checkpoint(str(hidden_checkpoint("olmo2")))
    (report,) = verify(bad, checkpoint, variants=[variant], longest=64, out=tmp_path / "parity.json")
    assert not report.verdicts[KERNEL_PARITY]
    assert all("vectors" in case.mode for case in report.cases if not case.passed)
    location = locate(bad, checkpoint, variant)
    assert location.first is not None
    assert location.first.name == "model.embed_tokens", format_location(location)
    assert "it takes token 0 in the place of each vector" in location.explanation


def test_a_runtime_that_knows_nothing_of_vectors_leaves_them_out(vector_package: Callable[[str], Path]) -> None:
    folder = vector_package("olmo2")
    session = ort.InferenceSession(folder / "onnx" / "model.onnx")
    assert "inputs_embeds" not in [value.name for value in session.get_inputs()]
    empty = {v.name: np.zeros((1, 2, 0, 16), np.float32) for v in session.get_inputs() if "past" in v.name}
    ids = np.array([[5, 17, 99]])
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(3)[None], **empty}
    (logits,) = session.run(["logits"], feeds)
    with open_runner(folder, variant="fp32") as runner:
        np.testing.assert_allclose(logits[0], runner.prefill(ids.tolist(), all_positions=True)[0], atol=1e-6)


def test_what_is_no_vector_is_refused(vector_package: Callable[[str], Path], tiny_package: Path) -> None:
    good = given()
    for variant in ("fp32", "q4"):
        with open_runner(vector_package("olmo2"), variant=variant) as runner:
            runner.prefill(BEFORE)
            held = runner.cached_tokens
            for rows, words in (
                (good[:2], "2 rows, but the cache holds 3"),
                ([*good[:2], good[2][:, :5]], r"row 2: vectors of shape \(1, 5\), expected \[1 or more, 96\]"),
                ([*good[:2], np.full((1, 96), np.nan, np.float32)], "row 2: vectors that are not finite"),
                ([*good[:2], np.array([3])], "row 2: expected a 2-d array of floats, found 1-d int64"),
                ([], "at least one row of vectors"),
            ):
                with pytest.raises(InputError, match=words):
                    runner.prefill_embeds(rows)
            with pytest.raises(ContextLengthError, match="row 0: 2 tokens in the cache and"):
                runner.prefill_embeds([np.zeros((5000, 96), np.float32), *good[1:]])
            with pytest.raises(InputError, match="the vocabulary has 0 to"):
                runner.prefill([[-1]] * 3)
            assert all(a is b for a, b in zip(held, runner.cached_tokens, strict=True))
    with open_runner(tiny_package, variant="fp32") as runner, pytest.raises(UsageError, match="--inputs-embeds"):
        runner.prefill_embeds(good)


@pytest.mark.usefixtures("short_rows")
def test_a_classifier_scores_the_last_vector(classifier: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(classifier("olmo2")))
    options = Options(inputs_embeds=True, hidden_states=(1,))
    export(checkpoint, tmp_path / "p", variants=["fp32", "q4"], options=options)
    fp32, q4 = verify(tmp_path / "p", checkpoint, longest=64)
    assert fp32.passed, [case for case in fp32.cases if not case.passed]
    assert q4.verdicts[KERNEL_PARITY], [case for case in q4.cases if not case.passed]
    for report in (fp32, q4):
        assert {"vectors", "vectors among tokens"} <= {case.mode for case in report.cases}
    padded = {f"vectors, {side} padded" for side in ("left", "right")} | {"hidden state 1, left padded"}
    assert {f"portable exact {mode}" for mode in padded} <= {case.mode for case in q4.cases}


def test_layers_one_at_a_time_take_them(
    hidden_checkpoint: Callable[[str], Path], vector_package: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(hidden_checkpoint("olmo2")))
    package = Path(shutil.copytree(vector_package("olmo2"), tmp_path / "p"))
    (report,) = verify(package, checkpoint, variants=["fp32"], longest=64, low_memory=True)
    assert report.passed
    assert {"vectors", "vectors among tokens"} <= {case.mode for case in report.cases}
    assert report.coverage.endswith("greedy decoding")


def test_the_command_line_has_the_flag(hidden_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "p"
    assert cli.main(["export", str(hidden_checkpoint("olmo2")), "--inputs-embeds", "--out", str(out)]) == 0
    assert open_package(out).model.inputs_embeds
