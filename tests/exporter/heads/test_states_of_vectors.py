"""Hidden states of vectors in the place of tokens: those of transformers; one that ignores the vectors is red."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from support.bugs import hidden, vectors
from support.bugs.edits import Bug
from support.bugs.quantized import attention_scale_wrong
from support.rebuilt_packages import rebuilt, rebuilt_trt
from transformers import AutoModel

from olmo2_export.locate.hidden_states import STATE
from olmo2_export.locate.locate import format_location, locate
from olmo2_export.measure.parity import KERNEL_PARITY
from olmo2_export.verify.verify import verify
from olmo2_export.weights.checkpoint import open_checkpoint
from runtimes import open_package, open_runner
from runtimes.errors import InputError, UsageError

GRAPHS = {"fp32": "onnx/model.onnx", "q4": "onnx/model_q4_shared.onnx", "trt_fp32": ""}
PORTABLE = "onnx/model_q4.onnx"
BEFORE = [[5, 17], [11, 2, 60], [1]]

pytestmark = pytest.mark.usefixtures("short_rows", "little_text")


@torch.inference_mode()
def theirs(folder: Path, given: list[np.ndarray]) -> list[list[np.ndarray]]:
    """transformers' hidden states of BEFORE and vectors behind it, each row alone, by number."""
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    table, found = model.get_input_embeddings(), []
    for ids, rows in zip(BEFORE, given, strict=True):
        whole = torch.cat([table(torch.tensor(ids)), torch.from_numpy(rows)])[None]
        states = model(inputs_embeds=whole, output_hidden_states=True).hidden_states
        found.append([state[0].numpy() for state in states])
    return found


def test_they_are_those_of_transformers(hidden_checkpoint: Callable[[str], Path], both_package: Path) -> None:
    random = np.random.default_rng(0)
    given = [random.normal(0, 0.1, (n, 96)).astype(np.float32) for n in (7, 3, 1)]
    wanted = theirs(hidden_checkpoint("olmo2"), given)
    with open_runner(both_package, variant="fp32") as runner:
        runner.prefill(BEFORE)
        found = runner.prefill_embeds_hidden(given)
        assert runner.cache_lengths == (9, 6, 2)
        with pytest.raises(InputError, match="2 rows, but the cache holds 3"):
            runner.prefill_embeds_hidden(given[:2])
        assert runner.cache_lengths == (9, 6, 2)
    for ids, row, states in zip(BEFORE, found, wanted, strict=True):
        assert list(row) == [0, 1, 3]
        for number, array in row.items():
            np.testing.assert_allclose(array, states[number][len(ids) :], atol=2e-5)


@pytest.mark.parametrize("variant", ["fp32", "q4"])
def test_a_graph_without_hidden_states_refuses(variant: str, tiny_package: Path, q4_package: Path) -> None:
    package = tiny_package if variant == "fp32" else q4_package
    words = "export the package with --hidden-states"
    with open_runner(package, variant=variant) as runner, pytest.raises(UsageError, match=words):
        runner.prefill_embeds_hidden([np.zeros((1, 96), np.float32)])


def test_every_form_is_compared_on_vectors(
    hidden_checkpoint: Callable[[str], Path], both_package: Path, tmp_path: Path
) -> None:
    checkpoint, out = open_checkpoint(str(hidden_checkpoint("olmo2"))), tmp_path / "parity.json"
    for report in verify(both_package, checkpoint, longest=16, out=out):
        assert report.verdicts[KERNEL_PARITY], [case for case in report.cases if not case.passed]
        modes = {case.mode for case in report.cases}
        for fed in ("vectors", "vectors among tokens"):
            for number in (0, 1, 3):
                assert f"hidden state {number}, {fed}" in modes
                assert {f"embedding {number}, {pooling}, {fed}" for pooling in ("mean", "last")} <= modes
        if report.variant != "q4":
            continue
        for view, side in product(("portable exact", "portable"), ("left padded", "right padded")):
            assert {f"{view} vectors, {side}", f"{view} vectors among tokens, {side}"} <= modes
            for fed in ("", "vectors, ", "vectors among tokens, "):
                assert {f"{view} hidden state {number}, {fed}{side}" for number in (0, 1, 3)} <= modes


@pytest.mark.parametrize("variant", GRAPHS)
def test_a_state_that_ignores_vectors_is_red_and_named(
    variant: str, hidden_checkpoint: Callable[[str], Path], both_package: Path, tmp_path: Path
) -> None:
    (bug,) = vectors.STATE_BUGS
    if GRAPHS[variant]:
        bad = rebuilt(both_package, tmp_path / "p", bug, GRAPHS[variant])
    else:
        bad = rebuilt_trt(both_package, tmp_path / "p", bug)
    checkpoint = open_checkpoint(str(hidden_checkpoint("olmo2")))
    (report,) = verify(bad, checkpoint, variants=[variant], longest=16, out=tmp_path / "parity.json")
    failed = [case.mode.removeprefix("kernels ") for case in report.cases if not case.passed]
    assert not report.verdicts[KERNEL_PARITY]
    assert {"hidden state 0, vectors", "embedding 0, mean, vectors among tokens"} <= set(failed)
    assert all(" 0, " in mode and "vectors" in mode for mode in failed), failed
    location = locate(bad, checkpoint, variant)
    assert location.first is not None
    assert (location.first.name, location.first.operation) == ("hidden_states.0", STATE), format_location(location)


def vectors_and_last_norm_ignored(model: ir.Model) -> None:
    vectors.vectors_ignored(model)
    hidden.last_state_without_its_norm(model)


def test_a_portable_graph_that_ignores_vectors_is_red(
    hidden_checkpoint: Callable[[str], Path], both_package: Path, tmp_path: Path
) -> None:
    """Only its logits of tokens were compared."""
    bad = rebuilt(both_package, tmp_path / "p", vectors_and_last_norm_ignored, PORTABLE)
    checkpoint = open_checkpoint(str(hidden_checkpoint("olmo2")))
    (report,) = verify(bad, checkpoint, variants=["q4"], longest=16, out=tmp_path / "parity.json")
    failed = {case.mode for case in report.cases if not case.passed}
    sides, of_vectors = ("left padded", "right padded"), ("vectors", "vectors among tokens")
    wrong = {f"hidden state 3, {fed}" for fed in ("alone", *sides)}
    for fed, side in product(of_vectors, sides):
        wrong |= {f"{fed}, {side}", *(f"hidden state {number}, {fed}, {side}" for number in (0, 1, 3))}
    assert failed == {f"{view} {mode}" for view, mode in product(("portable exact", "portable"), wrong)}


@pytest.mark.parametrize(
    ("bug", "name", "words"),
    [
        (vectors.vectors_ignored, "model.embed_tokens", "In the portable exact view, the embedding lookup"),
        (attention_scale_wrong, "model.layers.1.self_attn.attention", "In the portable exact view, the attention of l"),
        (vectors.state_ignores_vectors, "hidden_states.0", f"In {PORTABLE}, the output hidden_states.0 is another"),
    ],
)
def test_a_wrong_portable_graph_is_located_in(
    bug: Bug, name: str, words: str, hidden_checkpoint: Callable[[str], Path], both_package: Path, tmp_path: Path
) -> None:
    """`locate` did not open it."""
    bad = rebuilt(both_package, tmp_path / "p", bug, PORTABLE)
    location = locate(bad, open_checkpoint(str(hidden_checkpoint("olmo2"))), "q4")
    assert location.first is not None
    assert location.first.name == name, format_location(location)
    assert location.explanation.startswith(words)


@pytest.mark.parametrize("variant", ["fp32", "trt_fp32"])
def test_layers_one_at_a_time_name_what_is_not_covered(
    variant: str, hidden_checkpoint: Callable[[str], Path], both_package: Path, tmp_path: Path
) -> None:
    checkpoint, package = open_checkpoint(str(hidden_checkpoint("olmo2"))), open_package(both_package)
    out = tmp_path / "parity.json"
    (report,) = verify(package, checkpoint, variants=[variant], longest=16, low_memory=True, out=out)
    assert report.verdicts[KERNEL_PARITY], [case for case in report.cases if not case.passed]
    modes = {case.mode for case in report.cases}
    assert {"vectors", "vectors among tokens"} <= modes
    if variant == "fp32":
        assert report.coverage.endswith("greedy decoding, hidden states and embeddings")
    else:
        whole = "PyTorch's layers one at a time, as --low-memory asks; the graph whole; not run: greedy decoding"
        assert report.coverage == whole
        assert "hidden state 0, vectors" in modes
