"""config.json in both forms, and refusals by name."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import SHAPE
from support.matrix import ROPE, refused

from olmo2_export.config import ModelConfig
from olmo2_export.rope import Rope
from runtimes.errors import ConfigError

V5: dict[str, Any] = SHAPE | {"model_type": "olmo2", "hidden_act": "silu"}
V4: dict[str, Any] = {k: v for k, v in V5.items() if k != "rope_parameters"} | {
    "rope_theta": 500000,
    "rope_scaling": None,
}


def test_both_forms_give_the_same_config() -> None:
    config = ModelConfig.from_dict(V5)
    assert config == ModelConfig.from_dict(V4)
    assert config.full_rope == Rope(theta=500000.0)
    assert (config.head_dim, config.num_key_value_heads, config.norm_eps) == (16, 2, 1e-6)
    assert (config.attention_bias, config.tie_word_embeddings) == (False, False)


def test_defaults_are_those_of_transformers_and_are_said(caplog: pytest.LogCaptureFixture) -> None:
    raw = {
        k: v for k, v in V4.items() if k not in ("num_key_value_heads", "rms_norm_eps", "rope_theta", "rope_scaling")
    }
    config = ModelConfig.from_dict(raw, where="defaults")
    assert (config.num_key_value_heads, config.norm_eps, config.full_rope.theta) == (6, 1e-5, 10_000.0)
    said = "defaults: it does not say rms_norm_eps (1e-05), rope_theta (10000); assumed, as transformers does"
    assert [record.getMessage() for record in caplog.records] == [said]
    caplog.clear()
    windows = {"layer_types": None, "sliding_window": "absent", "model_type": "olmo3", "rope_theta": None}
    raw = {k: v for k, v in (V4 | windows | {"max_position_embeddings": None}).items() if v != "absent"}
    assert ModelConfig.from_dict(raw, where="windows").windows == ()  # no wider than the context
    assert (
        "max_position_embeddings (2048), layer_types (sliding_attention, every 4th full_attention), sliding_window "
        "(4096), rope_theta (500000)" in caplog.text
    )


def test_of_another_model_the_model_type_alone_is_a_problem() -> None:
    """A Llama was told that OLMo 2 attends to all."""
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(V4_OLMO3 | {"model_type": "llama"}, where="c")
    assert str(caught.value) == "c: cannot express model_type 'llama' (only olmo, olmo2, olmo3)"


def test_optional_fields_are_read() -> None:
    config = ModelConfig.from_dict(
        V5 | {"attention_bias": True, "tie_word_embeddings": True, "rms_norm_eps": 0.003, "head_dim": 20}
    )
    assert (config.attention_bias, config.tie_word_embeddings, config.norm_eps, config.head_dim) == (
        True,
        True,
        0.003,
        20,
    )


@pytest.mark.alone
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "olmo4"}, "model_type 'olmo4'"),
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"hidden_size": -5}, "hidden_size -5"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000"),
        ({"num_attention_heads": 5}, "no multiple of the 5 heads"),
        ({"num_key_value_heads": 4}, "no multiple of num_key_value_heads 4"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps nan"),
        ({"rms_norm_eps": 0}, "rms_norm_eps 0"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps 1000"),
        ({"rope_theta": 10**400}, "rope_theta 1000"),
        ({"eos_token_id": {"a": 1}}, "eos_token_id {'a': 1}"),
        ({"eos_token_id": [130, "x"]}, "eos_token_id [130, 'x']"),
        ({"bos_token_id": [1]}, "bos_token_id [1]"),
        ({"vocab_size": True}, "vocab_size True"),
        ({"vocab_size": "131"}, "vocab_size '131'"),
        ({"attention_bias": 1}, "attention_bias 1"),
        ({"rope_parameters": {"rope_type": "axial", "rope_theta": 1e4, "factor": 8}}, "rope_type 'axial'"),
        ({"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}}, "rope_type 'proportional'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "factor None"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0, "factor": 8.0}}, "rope_theta 1"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": float("nan")}}, "factor nan"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}}, "low_freq_factor None"),
        ({"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "short_factor"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "which olmo3 alone has"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta 0"),
        ({"rope_parameters": {"rope_theta": 1e4, "factor": 8.0}}, "factor"),
        (
            {
                "original_max_position_embeddings": 64,
                "rope_parameters": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32},
            },
            "original_max_position_embeddings 32 in rope_parameters beside 64, which transformers takes; say one",
        ),
        (
            {"original_max_position_embeddings": 64, "rope_parameters": {"rope_type": ["yarn"], "rope_theta": 5e5}},
            "rope_type ['yarn']",
        ),
        ({"rope_parameters": [1]}, "rope_parameters [1]"),
        ({"rope_theta": 1e4}, "rope_theta 10000.0 beside 500000"),
        ({"rope_scaling": {"type": "linear", "factor": 1.0}}, "rope_theta 500000.0 beside 10000"),
        ({"rope_scaling": {"type": "default", "rope_theta": 3e5}}, "rope_theta 500000.0 beside 300000"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0, "rope_theta": 5e5}},
            "rope_scaling and rope_parameters differ",
        ),
        ({"clip_qkv": 8.0}, "clip_qkv 8.0"),
        ({"sliding_window": 32}, "sliding_window 32"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"layer_types": "full_attention"}, "layer_types"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"logit_scale": 2.0}, "logit_scale 2.0"),
        ({"model_type": "hf_olmo"}, "whose name ends in -hf"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    started = time.process_time()
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(V5 | change)
    assert named in str(caught.value)
    assert time.process_time() - started < 10


@pytest.mark.parametrize("model_type", ["olmo", "olmo2", "olmo3"])
def test_a_part_of_a_head_is_rotated_in_no_generation(model_type: str, request: pytest.FixtureRequest) -> None:
    kind = "partial_rotary_factor"
    window = {"sliding_window": 8} if model_type == "olmo3" else {}
    with pytest.raises(ConfigError, match=kind) as caught:
        ModelConfig.from_dict(SHAPE | {"model_type": model_type, "rope_parameters": None, kind: 0.5} | window)
    refused(request, kind, caught.value, backend=ROPE, variants=[model_type])


def test_every_problem_is_in_one_message() -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(V5 | {"hidden_act": "relu", "vocab_size": 0, "clip_qkv": 1.0})
    assert all(name in str(caught.value) for name in ("hidden_act", "vocab_size", "clip_qkv"))


def test_null_fields_of_other_models_are_fine() -> None:
    assert ModelConfig.from_dict(V5 | {"clip_qkv": None, "sliding_window": None, "mlp_bias": False})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"auto_map": {"AutoModel": "own.Model"}}, "auto_map is code of its own"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is of the checkpoint's weights, or left over"),
        ({"layer_types": ["full_attention"] * 3, "sliding_window": 32}, ""),
        ({"sliding_window": 256}, ""),
        ({"sliding_window": 32, "use_sliding_window": False}, ""),
        ({"partial_rotary_factor": 1.0, "logit_scale": 1.0, "final_logit_softcapping": 0.0}, ""),
        ({"hidden_act": "swish"}, ""),
        ({"attention_bias": None, "tie_word_embeddings": None}, ""),
        ({"rope_scaling": {"type": "linear", "factor": 1, "rope_theta": 5e5}}, ""),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "factor": 8.0}}, "factor mean nothing"),
        ({"original_max_position_embeddings": 64}, "original_max_position_embeddings means nothing for default"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 5e5, "factor": 4.0}}, "where the package ends"),
        ({"eos_token_id": 50279}, "eos_token_id 50279: the vocabulary has 131"),
        ({"eos_token_id": [130, 131]}, "131 is never sampled"),
        ({"pad_token_id": -1}, "pad_token_id -1"),
    ],
)
def test_what_changes_no_logits_is_read_and_said(
    change: dict[str, Any], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert ModelConfig.from_dict(V5 | change, where=repr(change)) == ModelConfig.from_dict(V5)
    assert said in caplog.text
    assert bool(said) == bool(caplog.records)


def test_a_warning_is_given_once_however_often_a_file_is_read(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        ModelConfig.from_dict(V5 | {"auto_map": {"a": "b"}}, where="read three times")
    assert len(caplog.records) == 1


def test_a_byte_order_mark_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("\ufeff" + json.dumps(V5), encoding="utf-8")
    with pytest.raises(ConfigError, match="begins with a byte order mark"):
        ModelConfig.from_json(tmp_path / "config.json")


def test_unknown_fields_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        ModelConfig.from_dict(V5 | {"new_trick": 3})
    assert "new_trick" in caplog.text


@pytest.mark.parametrize(
    "text", ["", "[1]", "{", "\xff\xfe", '{"a": ' * 100_000], ids=["empty", "list", "cut", "latin", "deep"]
)
def test_unreadable_files_are_one_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"config\.json"):
        ModelConfig.from_json(path)


def test_a_lone_surrogate_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(V5 | {"_name_or_path": "\ud800"}))
    with pytest.raises(ConfigError, match="UnicodeEncodeError"):
        ModelConfig.from_json(path)


def test_missing_file_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        ModelConfig.from_json(tmp_path / "config.json")


def test_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(V4))
    assert ModelConfig.from_json(path) == ModelConfig.from_dict(V5)


OLMO1: dict[str, Any] = SHAPE | {"model_type": "olmo", "hidden_act": "silu", "rope_parameters": None}
V4_OLMO3: dict[str, Any] = {k: v for k, v in V4.items() if k != "rope_scaling"} | {
    "model_type": "olmo3",
    "num_hidden_layers": 8,
    "sliding_window": 32,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 32,
        "attention_factor": 1.2079441541679836,
        "beta_fast": 32,
        "beta_slow": 1,
    },
}
OTHERWISE = {
    "flat `rope_parameters`": "plain RoPE of theta 500000",
    "`rope_theta` of its own for full attention": "gives it to full attention alone",
}
"""what the support matrix lists of it -> words of the case"""
YARN = Rope("yarn", 5e5, factor=8.0, original_length=32, attention_factor=1.2079441541679836)


def test_an_olmo_1_has_its_own_epsilon_and_clips() -> None:
    config = ModelConfig.from_dict(OLMO1 | {"rms_norm_eps": 1e-6, "clip_qkv": 8.0, "pretraining_tp": 1})
    assert (config.norm_eps, config.clip_qkv, config.full_rope.theta) == (1e-5, 8.0, 10_000.0)
    assert (config.norms_first, config.sliding_window) == (True, None)
    assert ModelConfig.from_dict(OLMO1 | {"clip_qkv": None}).clip_qkv is None


def test_ai2s_own_form_gives_yarn_to_full_attention_alone() -> None:
    config = ModelConfig.from_dict(V4_OLMO3)
    assert (config.full_rope, config.sliding_rope) == (YARN, Rope(theta=5e5))
    assert [config.window(layer) for layer in range(8)] == [32, 32, 32, None] * 2
    assert [config.rope_of(layer) for layer in range(8)] == ["_sliding"] * 3 + [""] + ["_sliding"] * 3 + [""]
    nested = V4_OLMO3 | {
        "rope_theta": None,
        "rope_scaling": None,
        "rope_parameters": {
            "full_attention": V4_OLMO3["rope_scaling"] | {"rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
        },
    }
    assert ModelConfig.from_dict(nested) == config


def test_a_window_as_wide_as_the_context_is_none() -> None:
    config = ModelConfig.from_dict(V4_OLMO3 | {"sliding_window": 256})
    assert [config.window(layer) for layer in range(8)] == [None] * 8
    assert len(config.ropes) == 2  # each type still has its own


def test_one_rope_for_all_layers_is_one_table() -> None:
    config = ModelConfig.from_dict(V4_OLMO3 | {"rope_scaling": None})
    assert config.ropes == {"": Rope(theta=5e5)}
    assert [config.rope_of(layer) for layer in range(8)] == [""] * 8


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            {"rope_theta": None, "rope_scaling": None, "rope_parameters": {"rope_type": "yarn", "factor": 8.0}},
            "one table for all layers: for olmo3 transformers takes plain RoPE of theta 500000",
        ),
        (
            {"rope_theta": None, "rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            "one table for all layers",
        ),
        ({"rope_theta": 1e4}, "rope_theta 10000.0 (for olmo3 transformers gives it to full attention alone"),
        ({"rope_scaling": {"type": "yarn", "factor": 8.0}}, "type 'yarn' (for olmo3 transformers reads rope_type"),
        (
            {"rope_scaling": None, "rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 8.0,
             "truncate": False}}},
            "truncate false",
        ),
        ({"rope_parameters": {"sliding_attention": {"rope_type": "default"}}}, "transformers fails"),
        ({"rope_parameters": {}}, "rope_scaling beside rope_parameters {} (transformers fails"),
        (
            {"original_max_position_embeddings": 64},
            "original_max_position_embeddings 64 (for olmo3 transformers reads it in rope_scaling alone; write it",
        ),
        ({"layer_types": ["full_attention"] * 7}, "layer_types"),
        ({"layer_types": ["full_attention"] * 7 + ["linear_attention"]}, "layer_types"),
        ({"sliding_window": None}, "sliding_window None"),
        ({"sliding_window": 0}, "sliding_window 0"),
        ({"clip_qkv": 8.0}, "clip_qkv 8.0 (Olmo 3 does not have it"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor 0.25"),
    ],
)  # fmt: skip
def test_what_transformers_reads_otherwise_than_it_was_trained_is_refused(
    change: dict[str, Any], named: str, request: pytest.FixtureRequest
) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(V4_OLMO3 | change)
    assert named in str(caught.value)
    for what, part in OTHERWISE.items():
        if part in named:
            refused(request, f"Olmo 3, {what}", caught.value)


def test_longrope_ends_at_its_original_length(caplog: pytest.LogCaptureFixture) -> None:
    table = {
        "rope_type": "longrope",
        "original_max_position_embeddings": 64,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
    }
    config = ModelConfig.from_dict(V5 | {"rope_parameters": table}, where="long")
    assert config.max_position_embeddings == 64
    assert "the package ends at 64 tokens" in caplog.text
