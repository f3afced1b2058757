"""Hidden states and embeddings against transformers: every variant, every generation, numbers, pooling, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.bugs import hidden
from support.bugs.edits import Bug
from support.matrix import seen
from support.rebuilt_packages import rebuilt, rebuilt_trt
from transformers import AutoModel

from olmo2_export import cli
from olmo2_export.config import ModelConfig
from olmo2_export.locate.hidden_states import STATE
from olmo2_export.locate.locate import format_location, locate
from olmo2_export.measure.parity import KERNEL_PARITY
from olmo2_export.package.plan import plan_export
from olmo2_export.package.weight_choice import Options
from olmo2_export.verify.verify import format_reports, verify
from olmo2_export.weights.checkpoint import open_checkpoint
from runtimes import open_package, open_runner
from runtimes.cli import main
from runtimes.errors import InputError, UsageError
from runtimes.runners.embeddings import embed, normalized

pytestmark = pytest.mark.usefixtures("little_text")  # what few bits cost random weights is not asked here

ROWS = [[5, 17, 99, 3, 42, 8, 77], [11, 2, 60], [1]]
LAYERS = {"olmo": 3, "olmo2": 3, "olmo3": 4}


@torch.inference_mode()
def theirs(folder: Path) -> list[list[np.ndarray]]:
    """transformers' hidden states of ROWS, each row alone: all of them, by number."""
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    return [
        [states[0].numpy() for states in model(torch.tensor([row]), output_hidden_states=True).hidden_states]
        for row in ROWS
    ]


@pytest.mark.parametrize("name", ["olmo", "olmo2", "olmo3"])
def test_fp32_gives_what_transformers_does(
    name: str, hidden_checkpoint: Callable[[str], Path], hidden_package: Callable[[str], Path]
) -> None:
    wanted = theirs(hidden_checkpoint(name))
    assert len(wanted[0]) == LAYERS[name] + 1
    package = open_package(hidden_package(name))
    assert package.model.hidden_states == (0, 1, 2, LAYERS[name])
    with open_runner(package, variant="fp32") as runner:
        found = runner.prefill_hidden(ROWS)
        assert runner.cache_lengths == (7, 3, 1)
        for row, states in zip(found, wanted, strict=True):
            assert list(row) == [0, 1, 2, LAYERS[name]]
            for number, array in row.items():
                assert array.dtype == np.float32
                np.testing.assert_allclose(array, states[number], atol=2e-5)


@pytest.mark.parametrize("variant", ["fp32", "q4"])
def test_the_cache_goes_on_behind_them(variant: str, hidden_package: Callable[[str], Path]) -> None:
    with open_runner(hidden_package("olmo2"), variant=variant) as runner:
        runner.prefill(ROWS[:1])
        wanted = runner.decode([9])
        runner.reset()
        runner.prefill_hidden(ROWS[:1])
        np.testing.assert_allclose(runner.decode([9]), wanted, atol=1e-5)


@pytest.mark.usefixtures("short_rows")
@pytest.mark.parametrize("name", ["olmo", "olmo2", "olmo3"])
def test_every_variant_passes_its_gates(
    request: pytest.FixtureRequest,
    name: str,
    hidden_checkpoint: Callable[[str], Path],
    hidden_package: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    checkpoint = open_checkpoint(str(hidden_checkpoint(name)))
    reports = verify(hidden_package(name), checkpoint, longest=64, out=tmp_path / "parity.json")
    for report in reports:
        cases = [case for case in report.cases if "hidden" in case.mode or "embedding" in case.mode]
        failed = [(case.mode, case.failures) for case in cases if not case.passed]
        assert not failed, report.variant
        assert report.verdicts[KERNEL_PARITY], report.checks
        modes = {case.mode for case in cases}
        for number in (0, 1, 2, LAYERS[name]):
            ways = ("", ", in pieces")
            assert {f"hidden state {number}{way}" for way in ways} <= modes
            assert {f"embedding {number}, {pooling}" for pooling in ("mean", "last")} <= modes
        checks = [check for check in report.checks if check.name.startswith("quality of hidden state")]
        assert len(checks) == 4
        assert all(check.passed for check in checks) or report.precision in ("int4", "int8"), checks
        location = locate(hidden_package(name), checkpoint, report.variant)
        assert location.first is None, format_location(location)
        seen(request, f"{name} hidden", "onnxruntime", report.variant, "verified")
    assert "nan" not in format_reports(reports)


@pytest.mark.usefixtures("short_rows")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_graphs_for_tensorrt_give_them(
    request: pytest.FixtureRequest,
    precision: str,
    hidden_checkpoint: Callable[[str], Path],
    hidden_trt: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    checkpoint, name = open_checkpoint(str(hidden_checkpoint("olmo2"))), f"trt_{precision}"
    (report,) = verify(hidden_trt(precision), checkpoint, variants=[name], out=tmp_path / "parity.json")
    assert report.verdicts[KERNEL_PARITY], report.cases
    passed = [check.passed for check in report.checks if "hidden state" in check.name]
    assert len(passed) == 4
    assert all(passed) or precision == "int8"  # what few bits cost random weights says nothing
    assert "hidden state 3, in pieces" in {case.mode for case in report.cases}
    location = locate(hidden_trt(precision), checkpoint, name)
    assert location.first is None, format_location(location)
    seen(request, "olmo2 hidden", "graph for TensorRT", precision, "verified")


NAMED: list[tuple[Bug, str, str]] = [
    (hidden.state_of_the_next_layer, "hidden_states.1", "it is what layer 2 of 3 gives"),
    (hidden.last_state_without_its_norm, "hidden_states.3", "it is what the last layer gives, without the last norm"),
]
GRAPHS = {"fp32": "onnx/model.onnx", "q4": "onnx/model_q4_shared.onnx", "bf16": "onnx/model_bf16.onnx", "trt_fp32": ""}


def test_every_bug_is_located() -> None:
    assert [row[0] for row in NAMED] == hidden.HIDDEN_BUGS


@pytest.mark.usefixtures("short_rows")
@pytest.mark.parametrize("row", NAMED, ids=lambda row: row[0].__name__)
@pytest.mark.parametrize("variant", GRAPHS)
def test_another_hidden_state_is_red_and_named(
    variant: str,
    row: tuple[Bug, str, str],
    hidden_checkpoint: Callable[[str], Path],
    hidden_package: Callable[[str], Path],
    hidden_trt: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    bug, name, words = row
    if GRAPHS[variant]:
        bad = rebuilt(hidden_package("olmo2"), tmp_path / "p", bug, GRAPHS[variant])
    else:
        bad = rebuilt_trt(hidden_trt("fp32"), tmp_path / "p", bug)
    checkpoint = open_checkpoint(str(hidden_checkpoint("olmo2")))
    (report,) = verify(bad, checkpoint, variants=[variant], longest=64, out=tmp_path / "parity.json")
    assert not report.verdicts[KERNEL_PARITY]
    location = locate(bad, checkpoint, variant)
    assert location.first is not None
    assert (location.first.name, location.first.operation) == (name, STATE), format_location(location)
    assert words in location.explanation


@pytest.mark.parametrize("name", ["olmo2", "olmo3"])
def test_the_files_are_predicted_to_the_byte(
    name: str, hidden_checkpoint: Callable[[str], Path], hidden_package: Callable[[str], Path]
) -> None:
    manifest = open_package(hidden_package(name)).manifest
    options = Options(hidden_states=(0, 1, 2, -1))
    said = plan_export(open_checkpoint(str(hidden_checkpoint(name))), variants=list(manifest.variants), options=options)
    for variant in said.variants:
        entry = manifest.variants[variant.name]
        assert variant.graphs[entry.graph].data == manifest.files[entry.data[0]].size, entry.graph


def test_embeddings_are_pooled_over_the_tokens_alone(
    hidden_checkpoint: Callable[[str], Path], hidden_package: Callable[[str], Path]
) -> None:
    wanted = theirs(hidden_checkpoint("olmo2"))
    with open_runner(hidden_package("olmo2"), variant="fp32") as runner:
        runner.prefill([[1, 2]])
        mean, last = (embed(runner, ROWS, pooling=pooling) for pooling in ("mean", "last"))  # type: ignore[arg-type]
        assert runner.cache_lengths == ()
        second = embed(runner, ROWS, hidden_state=1, normalize=True)
    np.testing.assert_allclose(mean, [row[3].mean(0) for row in wanted], atol=2e-5)
    np.testing.assert_allclose(last, [row[3][-1] for row in wanted], atol=2e-5)
    np.testing.assert_allclose(second, normalized(np.stack([row[1].mean(0) for row in wanted])), atol=2e-5)
    np.testing.assert_allclose(np.linalg.norm(second, axis=1), 1.0, rtol=1e-6)
    assert normalized(np.zeros((1, 4), np.float32)).tolist() == [[0.0] * 4]


@pytest.mark.parametrize(("name", "variant"), [("olmo2", "fp32"), ("olmo2", "q4"), ("olmo3", "q4")])
def test_texts_that_are_embedded_together_are_embedded_as_each_alone(
    name: str, variant: str, hidden_package: Callable[[str], Path]
) -> None:
    """On a shared cache each came to the graph by itself. Those of few tokens have the decode graph, together too."""
    rows = [list(range(n, 2 * n)) for n in (9, 40, 3, 17, 21, 2, 60, 5)]
    with open_runner(hidden_package(name), variant=variant) as runner:
        for number, pooling in ((0, "mean"), (2, "last"), (LAYERS[name], "mean")):
            found = {
                size: embed(runner, rows, pooling=pooling, hidden_state=number, batch_size=size)  # type: ignore[arg-type]
                for size in (1, 3, 8)
            }
            for size in (3, 8):
                np.testing.assert_allclose(found[size], found[1], atol=2e-5)


def test_what_is_not_given_is_refused_by_name(hidden_package: Callable[[str], Path], tiny_package: Path) -> None:
    with open_runner(hidden_package("olmo2"), variant="fp32") as runner:
        with pytest.raises(UsageError, match="hidden state 7: variant fp32 gives 0, 1, 2, 3"):
            embed(runner, ROWS, hidden_state=7)
        with pytest.raises(UsageError, match="pooling 'max': expected mean or last"):
            embed(runner, ROWS, pooling="max")  # type: ignore[arg-type]
        with pytest.raises(InputError, match="at least one row"):
            embed(runner, [])
    with open_runner(tiny_package, variant="fp32") as runner:
        for call in (runner.prefill_hidden, lambda rows: embed(runner, rows)):
            with pytest.raises(UsageError, match="export the package with --hidden-states"):
                call(ROWS)
    assert main(["embed", str(tiny_package)]) != 0


def test_numbers_are_those_of_transformers() -> None:
    config = ModelConfig.from_dict(
        {
            "model_type": "olmo2",
            "vocab_size": 131,
            "hidden_size": 96,
            "intermediate_size": 160,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
        }
    )
    assert config.giving([-1, 0, 3, 1]).hidden_states == (0, 1, 3)
    assert config.giving([]) == config
    for wrong in (4, -5):
        with pytest.raises(UsageError, match="the model has 0 to 3"):
            config.giving([wrong])


def test_the_command_line_takes_numbers_and_last(
    hidden_checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = str(hidden_checkpoint("olmo2"))
    assert cli.main(["export", checkpoint, "--dry-run", "--json", "--hidden-states", "1,last"]) == 0
    assert json.loads(capsys.readouterr().out)["variants"][0]["name"] == "fp32"
    assert cli.main(["export", checkpoint, "--dry-run", "--hidden-states", "4"]) != 0
    assert "hidden state 4: the model has 0 to 3, or last" in capsys.readouterr().err
    assert cli.main(["export", checkpoint, "--dry-run", "--hidden-states", "first"]) != 0
