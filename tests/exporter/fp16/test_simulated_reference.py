"""What float16 with islands is measured in units of: this project's rounded walk, which errs as transformers does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from olmo2_export.config import ModelConfig
from olmo2_export.fp16.simulate import simulated_answers
from olmo2_export.fp16.values import islands_of
from olmo2_export.measure.quality import quality_tokens
from olmo2_export.truth.reference import open_reference
from olmo2_export.weights.checkpoint import open_checkpoint


def error(found: list[np.ndarray], exact: list[np.ndarray]) -> float:
    return float(np.sqrt(np.mean((np.concatenate(found).astype(np.float64) - np.concatenate(exact)) ** 2)))


@pytest.mark.parametrize("model", ["tiny", "demo"])
def test_without_islands_its_error_is_that_of_transformers_in_float16(model: str, tiny_checkpoint: Path) -> None:
    """Not its bits: transformers rounds inside its norms and its rotary embedding too."""
    checkpoint = open_checkpoint("demo" if model == "demo" else str(tiny_checkpoint))
    config = ModelConfig.from_json(checkpoint.folder / "config.json")
    sequences, _ = quality_tokens(checkpoint, config, length=64, most=128)
    with open_reference(checkpoint, "fp64") as reference:
        exact = reference.logits(sequences)
    with open_reference(checkpoint, "fp16") as reference:
        theirs = error(reference.logits(sequences), exact)
    ours = error(simulated_answers(checkpoint, config, sequences, islands_of({}))[0], exact)
    assert 0.8 * theirs < ours < 1.25 * theirs, (ours, theirs)
