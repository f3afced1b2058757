"""The layer-by-layer sweep is the model itself, and its memory is one layer's."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from support.checkpoints import make_checkpoint

from olmo2_export.config import ModelConfig
from olmo2_export.quantize.calibration import calibration_tokens
from olmo2_export.quantize.input_scales import fp8_scale, input_scales, int8_scale
from olmo2_export.quantize.walk import Head, embed, walked_layers
from olmo2_export.truth.reference import open_reference
from olmo2_export.weights.checkpoint import open_checkpoint
from olmo2_export.weights.stored_names import linear_names, weight_shapes
from runtimes.errors import CheckpointError, NumericError, UsageError

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
    hidden = embed(checkpoint, sequences)
    for layer in walked_layers(checkpoint, config):
        hidden = [layer(x) for x in hidden]
    head = Head(checkpoint, config)
    for got, wanted in zip((head.logits(x)[0].numpy() for x in hidden), truth, strict=True):
        assert got.dtype == np.float32
        assert got.shape == wanted.shape
        assert np.square(got - wanted).mean() <= NMSE * wanted.var()


def test_one_layer_in_memory_at_a_time(tiny_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    config = ModelConfig.from_json(tiny_checkpoint / "config.json")
    alive: list[weakref.ref[object]] = []
    for layer in walked_layers(checkpoint, config):
        gc.collect()
        # The loop variable still holds the one before while the next is made, as it would in any loop.
        assert sum(reference() is not None for reference in alive) <= 1
        alive.append(weakref.ref(layer.weights[f"model.layers.{layer.index}.mlp.up_proj.weight"]))
    assert len(alive) == config.num_hidden_layers


def test_names_and_shapes_are_the_checkpoints(tiny_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    config = ModelConfig.from_json(tiny_checkpoint / "config.json")
    matrices = {name: info.shape for name, info in checkpoint.tensors.items() if len(info.shape) == 2}
    assert weight_shapes(config) == matrices
    assert len(linear_names(config)) == 7 * config.num_hidden_layers


def test_each_input_gets_one_scale_that_the_linears_share(tiny_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    config = ModelConfig.from_json(tiny_checkpoint / "config.json")
    sequences = random_ids(config, 50, 50)
    scales = input_scales(checkpoint, config, sequences, fp8_scale, kept=("mlp.down_proj",))
    assert set(scales) == {name for name in linear_names(config) if "down_proj" not in name}
    assert len(set(scales.values())) == 9  # three inputs in each of three layers
    peak = torch.cat(embed(checkpoint, sequences), dim=1).abs().max()
    for linear in "qkv":
        assert scales[f"model.layers.0.self_attn.{linear}_proj.weight"] == float((peak / 448).bfloat16())


def test_the_int8_scale_clips_outliers_and_no_others() -> None:
    x = torch.linspace(-2, 2, 400_001)
    assert int8_scale(x) == pytest.approx(2 / 127, rel=2**-8)
    loud = x.clone()
    loud[7] = 60
    assert 2 / 127 < int8_scale(loud) < 40 / 127
    assert int8_scale(torch.zeros(5)) > 0


def test_inputs_that_are_not_finite_are_refused(tiny_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    config = ModelConfig.from_json(tiny_checkpoint / "config.json")
    for choose in (int8_scale, fp8_scale):
        with pytest.raises(NumericError, match=r"q_proj\.weight: its inputs are NaN or Inf"):
            input_scales(checkpoint, config, random_ids(config, 9), lambda x, choose=choose: choose(x / 0))


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


def test_calibration_reads_the_same_tokens_whatever_editor_wrote_the_text(tmp_path: Path) -> None:
    checkpoint = open_checkpoint("demo")
    config = ModelConfig.from_json(checkpoint.folder / "config.json")
    text = tmp_path / "text.txt"
    found = []
    for content in ("And it came to pass\n" * 200, "\ufeff" + "And it came to pass\r\n" * 200):
        text.write_bytes(content.encode())
        found.append(calibration_tokens(checkpoint, config, text))
    np.testing.assert_array_equal(*found)
    text.write_bytes(("And it came to pass\n" * 200).encode("utf-16"))
    with pytest.raises(UsageError, match="begins as UTF-16 does"):
        calibration_tokens(checkpoint, config, text)


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
