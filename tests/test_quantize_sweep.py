"""The layer-by-layer sweep is the model itself, and its memory is one layer's."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint

from olmo2_export.checkpoint import open_checkpoint
from olmo2_export.config import ModelConfig
from olmo2_export.quantize.calibration import calibration_tokens
from olmo2_export.quantize.int8 import outlier_columns
from olmo2_export.quantize.names import GROUPS, linear_names, weight_name, weight_shapes
from olmo2_export.quantize.statistics import input_statistics
from olmo2_export.quantize.sweep import embed, reference_logits, staged_layers
from olmo2_export.reference import open_reference
from runtimes.errors import CheckpointError, UsageError

NMSE = 1e-12
"""float32 rounding of another order of summation"""


def random_ids(config: ModelConfig, *lengths: int) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, config.vocab_size, length, dtype=np.int64) for length in lengths]


@pytest.mark.parametrize(
    "fields", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "head_dim": 24}], ids=str
)
def test_sweep_equals_transformers(tmp_path: Path, fields: dict[str, object]) -> None:
    checkpoint = open_checkpoint(str(make_checkpoint(tmp_path, dtype=torch.bfloat16, **fields)))
    config = ModelConfig.from_json(tmp_path / "config.json")
    sequences = random_ids(config, 1, 37, 256)
    with open_reference(checkpoint, "fp32") as reference:
        truth = reference.logits(sequences)
    for got, wanted in zip(reference_logits(checkpoint, config, sequences), truth, strict=True):
        assert got.dtype == np.float32
        assert got.shape == wanted.shape
        assert np.square(got - wanted).mean() <= NMSE * wanted.var()


def test_one_layer_in_memory_at_a_time(tiny_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    config = ModelConfig.from_json(tiny_checkpoint / "config.json")
    alive: list[weakref.ref[object]] = []
    for layer in staged_layers(checkpoint, config):
        gc.collect()
        # The loop variable still holds the one before while the next is made, as it would in any loop.
        assert sum(reference() is not None for reference in alive) <= 1
        alive.append(weakref.ref(layer.module))
    assert len(alive) == config.num_hidden_layers


def test_names_and_shapes_are_the_checkpoints(tiny_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    config = ModelConfig.from_json(tiny_checkpoint / "config.json")
    matrices = {name: info.shape for name, info in checkpoint.tensors.items() if len(info.shape) == 2}
    assert weight_shapes(config) == matrices
    assert len(linear_names(config)) == 7 * config.num_hidden_layers


def test_statistics_find_the_loud_column(tiny_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    config = ModelConfig.from_json(tiny_checkpoint / "config.json")
    sequences = random_ids(config, 50, 31)
    statistics = input_statistics(checkpoint, config, sequences)
    assert set(statistics) == set(linear_names(config))
    first = statistics[weight_name(0, GROUPS[0][0])]
    inputs = torch.cat(embed(checkpoint, sequences), dim=1)[0]
    torch.testing.assert_close(first.peak, inputs.abs().amax(0))
    torch.testing.assert_close(first.mean_square, inputs.square().mean(0))
    assert len(outlier_columns(first.peak, first.mean_square)) == 0
    loud = first.peak.clone()
    loud[[5, 77]] *= 30
    np.testing.assert_array_equal(outlier_columns(loud, first.mean_square), [5, 77])


def test_calibration_of_the_demo() -> None:
    checkpoint = open_checkpoint("demo")
    config = ModelConfig.from_json(checkpoint.folder / "config.json")
    sequences = calibration_tokens(checkpoint, config, None, sequences=5, length=100)
    assert [s.shape for s in sequences] == [(100,)] * 5
    assert len({s.tobytes() for s in sequences}) == 5
    held_out = (checkpoint.folder / "heldout.txt").read_text(encoding="utf-8")
    for piece in (checkpoint.folder / "calibration.txt").read_text(encoding="utf-8").rstrip().split("\n\n"):
        assert piece not in held_out


def test_calibration_without_a_tokenizer(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    config = ModelConfig.from_json(tiny_checkpoint / "config.json")
    first, again = (calibration_tokens(checkpoint, config, None, sequences=3, length=900) for _ in range(2))
    assert [s.shape for s in first] == [(config.max_position_embeddings,)] * 3
    np.testing.assert_array_equal(first, again)
    text = tmp_path / "text.txt"
    text.write_text("word " * 1000)
    with pytest.raises(UsageError, match=r"tokenizer\.json: not there"):
        calibration_tokens(checkpoint, config, text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"In the beginning", r"tokens, calibration needs 256"),
        (b"", r"0 tokens"),
        (b"In the \xff beginning" * 100, r"byte 7 is not UTF-8"),
        (None, r"cannot read the calibration text"),
    ],
)
def test_bad_calibration_texts(tmp_path: Path, content: bytes | None, message: str) -> None:
    checkpoint = open_checkpoint("demo")
    config = ModelConfig.from_json(checkpoint.folder / "config.json")
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        calibration_tokens(checkpoint, config, text)
    with pytest.raises(UsageError, match="cannot read"):
        calibration_tokens(checkpoint, config, tmp_path)


def test_a_tokenizer_needs_a_text_or_an_error(tmp_path: Path, tiny_checkpoint: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint")
    (folder / "tokenizer.json").write_text("{}")
    checkpoint = open_checkpoint(str(folder))
    config = ModelConfig.from_json(tiny_checkpoint / "config.json")
    with pytest.raises(UsageError, match="give a calibration text"):
        calibration_tokens(checkpoint, config, None)
    (tmp_path / "text.txt").write_text("word " * 1000)
    with pytest.raises(CheckpointError, match="does not work"):
        calibration_tokens(checkpoint, config, tmp_path / "text.txt")
    demo = open_checkpoint("demo").folder / "tokenizer.json"
    (folder / "tokenizer.json").write_bytes(demo.read_bytes())
    with pytest.raises(CheckpointError, match="wrong tokenizer"):
        calibration_tokens(checkpoint, config, tmp_path / "text.txt")
