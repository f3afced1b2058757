"""transformers a layer at a time is transformers: every verdict may stand on it where its whole model has no room."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from support.checkpoints import make_checkpoint

from olmo2_export.config import ModelConfig, ModelType
from olmo2_export.measure.quality import quality_tokens
from olmo2_export.truth import torch_layers
from olmo2_export.truth.classes import CLASSES
from olmo2_export.truth.reference import open_reference
from olmo2_export.truth.torch_layers import TorchLayer, reference_logits
from olmo2_export.weights.checkpoint import Checkpoint, open_checkpoint


def assert_the_same_bits(checkpoint: Checkpoint, sequences: list[np.ndarray]) -> None:
    config = ModelConfig.from_json(checkpoint.folder / "config.json")
    with open_reference(checkpoint, "fp32") as reference:
        whole = reference.logits(sequences)
    layered = list(reference_logits(checkpoint, config, sequences))
    assert [x.shape for x in layered] == [(len(ids), config.vocab_size) for ids in sequences]
    for one, other in zip(layered, whole, strict=True):
        assert one.dtype == np.float32
        assert np.array_equal(one, other)


@pytest.mark.parametrize(
    "fields",
    [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "head_dim": 24}, {"num_key_value_heads": 1}],
    ids=str,
)
def test_a_layer_at_a_time_is_the_whole_model(tmp_path: Path, fields: dict[str, object]) -> None:
    checkpoint = open_checkpoint(str(make_checkpoint(tmp_path, dtype=torch.bfloat16, **fields)))
    random = np.random.default_rng(0)
    assert_the_same_bits(checkpoint, [random.integers(0, 131, n, dtype=np.int64) for n in (1, 37, 250)])


def test_every_model_type_has_its_classes() -> None:
    assert sorted(CLASSES) == sorted(get_args(ModelType))
    for name, classes in CLASSES.items():
        assert classes.config.model_type == classes.causal_lm.config_class.model_type == name


def test_of_the_demo_too() -> None:
    checkpoint = open_checkpoint("demo")
    config = ModelConfig.from_json(checkpoint.folder / "config.json")
    sequences, origin = quality_tokens(checkpoint, config, most=512)
    assert origin == "text"
    assert_the_same_bits(checkpoint, sequences)


def test_one_layer_is_in_memory_at_a_time(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: set[int] = set()
    most = []

    class Counted(TorchLayer):
        def __init__(self, *arguments: object) -> None:
            alive.add(id(self))
            most.append(len(alive))
            super().__init__(*arguments)  # type: ignore[arg-type]

        def __del__(self) -> None:
            alive.discard(id(self))

    monkeypatch.setattr(torch_layers, "TorchLayer", Counted)
    config = ModelConfig.from_json(tiny_checkpoint / "config.json")
    list(reference_logits(open_checkpoint(str(tiny_checkpoint)), config, [np.arange(5)]))
    assert most == [1, 1, 1]
