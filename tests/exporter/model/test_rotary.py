"""The tables of every kind of RoPE are transformers' own numbers, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import OLMO1, OLMO3, SHAPE
from support.matrix import seen_rope

from olmo2_export.config import ModelConfig
from olmo2_export.model.rotary import model_tables, table_names
from olmo2_export.truth.torch_layers import rotary_tables

OLMO2 = {"model_type": "olmo2"}
KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 5e5},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 32},
    "yarn, every number": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "attention_factor": 1.3,
        "truncate": False,
    },
    "yarn, two scales": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "mscale": 1.2,
        "mscale_all_dim": 0.7,
    },
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "original_max_position_embeddings": 64,
        "short_factor": [1.0, 1.05, 1.1, 1.3, 1.7, 2.0, 2.5, 3.0],
        "long_factor": [float(n) for n in range(1, 9)],
    },
}
SHAPES = {name: OLMO2 | {"rope_parameters": table} for name, table in KINDS.items()}
SHAPES |= {f"OLMo 1, {name}": OLMO1 | {"rope_parameters": table} for name, table in KINDS.items()}
SHAPES["Olmo 3"] = OLMO3
SHAPES |= {
    f"Olmo 3, {name}": OLMO3
    | {"rope_parameters": {"full_attention": table, "sliding_attention": {"rope_type": "default", "rope_theta": 5e5}}}
    for name, table in KINDS.items()
    if name not in ("default", "yarn") and "truncate" not in table  # which Olmo 3 has by default, or is refused
}
V4 = {"rope_theta": 500000, "rope_parameters": None}
OUTSIDE = {"original_max_position_embeddings": 32}
SHAPES |= {
    f"{kind}, its original length outside": OLMO2
    | OUTSIDE
    | {"rope_parameters": {field: value for field, value in KINDS[kind].items() if field not in OUTSIDE}}
    for kind in ("llama3", "yarn", "longrope")
}
SHAPES["OLMo 2, transformers 4"] = OLMO2 | V4 | {"rope_scaling": {"type": "linear", "factor": 2.0}}
SHAPES["Olmo 3 7B, as AI2 writes it"] = (
    OLMO3
    | V4
    | {
        "head_dim": 128,
        "max_position_embeddings": 65536,
        "sliding_window": 4096,
        "rope_scaling": {
            "attention_factor": 1.2079441541679836,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 8.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "yarn",
        },
    }
)


@pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES)
def test_tables_are_bit_identical_to_those_of_transformers(
    fields: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE | fields))
    config = ModelConfig.from_json(tmp_path / "config.json")
    ours = model_tables(config)
    for layer in range(config.num_hidden_layers):
        theirs = rotary_tables(tmp_path, layer, config.max_position_embeddings)
        names = table_names(config)[config.rope_of(layer)]
        for name, table in zip(names, theirs, strict=True):
            assert ours[name].shape == (config.max_position_embeddings, config.head_dim // 2)
            assert torch.equal(ours[name], table), name
    assert len(ours) == (4 if fields["model_type"] == "olmo3" else 2)
    seen_rope(request, SHAPE | fields, "same table")
