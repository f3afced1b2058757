"""What is off is compared again with several draws, and PyTorch is asked the same once in a run of tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.remembered import remember

from olmo2_export.measure.parity import GATES
from olmo2_export.truth import reference
from olmo2_export.verify import measure
from olmo2_export.verify.beside import NOTHING
from olmo2_export.verify.feeds import ModeResult
from olmo2_export.weights.checkpoint import open_checkpoint

RANDOM = np.random.default_rng(0)
EXACT = RANDOM.normal(size=(30, 11))
OWN = (EXACT + RANDOM.normal(size=EXACT.shape) * 1e-7).astype(np.float32)
OFF = (EXACT + RANDOM.normal(size=EXACT.shape) * 1e-3).astype(np.float32)


@pytest.mark.parametrize(("most", "runs"), [(measure._KEPT, 1), (OFF.nbytes - 1, 2)])
def test_a_graph_that_is_off_runs_again_only_where_its_logits_are_large(
    most: int, runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def feed_all(*_: object) -> Any:
        asked.append("run")
        yield ModeResult("prefill", (30,), (np.arange(30),), (OFF,), "")

    monkeypatch.setattr(measure, "feed_all", feed_all)
    monkeypatch.setattr(measure, "_KEPT", most)
    truth: Any = measure.Truth([], [np.arange(30)], 64, "", NOTHING, [EXACT], {}, [], lambda: [[OWN], [OWN]])
    (case,) = measure.feed(None, truth, [EXACT], [OWN], GATES["fp32"], truth.draws)  # type: ignore[arg-type]
    assert (len(asked), case.passed, case.draws) == (runs, False, 3)


def test_pytorch_is_asked_the_same_once(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    real = reference.open_reference

    def counted(checkpoint: Any, precision: str, *others: Any) -> Any:
        opened.append(precision)
        return real(checkpoint, precision, *others)

    monkeypatch.setattr(reference, "open_reference", counted)
    remember(monkeypatch)
    checkpoint, ids = open_checkpoint(str(tiny_checkpoint)), [np.arange(9)]

    def logits(ids: list[np.ndarray], **weights: torch.Tensor) -> np.ndarray:
        with measure.open_reference(checkpoint, "fp32", {k.replace("_", "."): v for k, v in weights.items()}) as model:
            return model.logits(ids)[0]

    first = logits(ids)
    assert np.array_equal(first, logits([np.arange(9)]))
    norm = checkpoint.tensor("model.norm.weight")
    assert np.array_equal(logits(ids, model_norm_weight=norm * 2), first * 2)
    assert not np.array_equal(logits([np.arange(1, 10)]), first)
    assert len(opened) == 3
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 0
