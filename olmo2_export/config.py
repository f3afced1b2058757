"""config.json -> ModelConfig: the shape of an OLMo 2, and a refusal, by name, of everything else.

Both forms are read: transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 writes `rope_parameters`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtimes.errors import ConfigError
from runtimes.manifest import ModelSpec

logger = logging.getLogger(__name__)

# Limits far above any OLMo, so that a hostile config is refused before anything is allocated.
_MAX_LAYERS = 1_000
_MAX_WIDTH = 1 << 20
_MAX_VOCABULARY = 1 << 24
_MAX_CONTEXT = 1 << 22

# Fields that do not change the logits.
_NEUTRAL = frozenset(
    "_attn_implementation_autoset _name_or_path architectures attention_dropout bos_token_id chunk_size_feed_forward "
    "dtype eos_token_id id2label initializer_range is_decoder label2id layer_norm_eps output_attentions "
    "output_hidden_states pad_token_id problem_type return_dict torch_dtype transformers.js_config "
    "transformers_version use_cache".split()
)
# Fields of other models that would change them: absent, null or false is fine, anything else is refused.
_INEXPRESSIBLE = frozenset(
    "auto_map clip_qkv final_logit_softcapping layer_types logit_scale mlp_bias partial_rotary_factor "
    "quantization_config sliding_window".split()
)
_READ = frozenset(
    "model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "head_dim max_position_embeddings rms_norm_eps rope_theta rope_scaling rope_parameters hidden_act attention_bias "
    "tie_word_embeddings".split()
)


@dataclass(frozen=True)
class ModelConfig:
    """The shape of an OLMo 2, in the names of its config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    """fewer than num_attention_heads: grouped-query attention"""
    head_dim: int
    max_position_embeddings: int
    """tokens"""
    rms_norm_eps: float
    rope_theta: float
    attention_bias: bool
    """q, k, v and o projections have a bias"""
    tie_word_embeddings: bool
    """lm_head shares the embedding's weight"""

    @classmethod
    def from_json(cls, path: Path) -> ModelConfig:
        """Read a checkpoint's config.json.

        Args:
            path: the file.

        Raises:
            ConfigError: unreadable, or holding values that this version cannot express; it names all of them.
        """
        return cls.from_dict(read_json_object(path), where=str(path))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        """Build from the decoded JSON; `where` names it in messages."""
        fields = _Fields(raw)
        fields.require(raw.get("model_type") == "olmo2", f"model_type {raw.get('model_type')!r} (only 'olmo2')")
        fields.require(raw.get("hidden_act", "silu") == "silu", f"hidden_act {raw.get('hidden_act')!r} (only 'silu')")
        for name in sorted(_INEXPRESSIBLE & raw.keys()):
            fields.require(raw[name] in (None, False), f"{name} {_short(raw[name])} (no OLMo 2 has it)")

        vocab_size = fields.integer("vocab_size", 2, _MAX_VOCABULARY)
        hidden_size = fields.integer("hidden_size", 1, _MAX_WIDTH)
        intermediate_size = fields.integer("intermediate_size", 1, _MAX_WIDTH)
        layers = fields.integer("num_hidden_layers", 1, _MAX_LAYERS)
        heads = fields.integer("num_attention_heads", 1, _MAX_WIDTH)
        kv_heads = fields.integer("num_key_value_heads", 1, _MAX_WIDTH, default=heads)
        fields.require(
            heads % kv_heads == 0, f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"
        )
        if raw.get("head_dim") is None:
            fields.require(hidden_size % heads == 0, f"hidden_size {hidden_size} is no multiple of the {heads} heads")
        head_dim = fields.integer("head_dim", 1, _MAX_WIDTH, default=max(1, hidden_size // heads))
        fields.require(head_dim % 2 == 0, f"head_dim {head_dim} is odd (rotary embedding turns pairs)")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            check_token_ids(raw, name, vocab_size, fields.problems)
        config = cls(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=fields.integer("max_position_embeddings", 1, _MAX_CONTEXT, default=2048),
            rms_norm_eps=fields.number("rms_norm_eps", default=1e-5),
            rope_theta=fields.rope_theta(),
            attention_bias=fields.boolean("attention_bias"),
            tie_word_embeddings=fields.boolean("tie_word_embeddings"),
        )
        if fields.problems:
            raise ConfigError(f"{where}: cannot express {'; '.join(fields.problems)}")
        unknown = sorted(raw.keys() - _READ - _NEUTRAL - _INEXPRESSIBLE)
        if unknown:
            logger.warning(
                "%s: unknown fields %s are not used; verify will tell if they matter", where, ", ".join(unknown)
            )
        return config

    @property
    def spec(self) -> ModelSpec:
        """What runners need of it, as the manifest carries it."""
        return ModelSpec(
            model_type="olmo2",
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            max_position_embeddings=self.max_position_embeddings,
        )


class _Fields:
    """Reads typed fields and collects every problem, so that one message names them all."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw
        self.problems: list[str] = []

    def require(self, condition: bool, problem: str) -> None:
        if not condition:
            self.problems.append(problem)

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        value = self.raw.get(name)
        if value is None and default is not None:
            return default
        if type(value) is not int or not low <= value <= high:  # bool is an int to Python
            self.problems.append(f"{name} {_short(value)} (an integer from {low} to {high})")
            return low
        return value

    def number(self, name: str, default: float | None = None, source: Mapping[str, Any] | None = None) -> float:
        value: Any = (self.raw if source is None else source).get(name)
        if value is None and default is not None:
            return default
        if type(value) not in (int, float) or not 0 < value < 1e30:  # false for NaN, too
            self.problems.append(f"{name} {_short(value)} (a positive number)")
            return 1.0
        return float(value)

    def boolean(self, name: str) -> bool:
        value = self.raw.get(name, False)
        if type(value) is not bool:
            self.problems.append(f"{name} {_short(value)} (true or false)")
            return False
        return value

    def rope_theta(self) -> float:
        """Read either form; both at once must agree, and only plain RoPE can be expressed."""
        parameters, scaling = self.raw.get("rope_parameters"), self.raw.get("rope_scaling")
        for name, table in (("rope_parameters", parameters), ("rope_scaling", scaling)):
            if table is None:
                continue
            if not isinstance(table, Mapping):
                self.problems.append(f"{name} {_short(table)} (an object)")
                continue
            kind = table.get("rope_type", table.get("type", "default"))
            self.require(kind == "default", f"{name}: rope_type {kind!r} (only 'default')")
            extra = sorted(table.keys() - {"rope_type", "type", "rope_theta"})
            self.require(kind != "default" or not extra, f"{name}: {', '.join(extra)}")
        if isinstance(parameters, Mapping) and parameters.get("rope_theta") is not None:
            theta = self.number("rope_theta", source=parameters)
            if self.raw.get("rope_theta") is not None:
                other = self.number("rope_theta")
                self.require(other == theta, f"rope_theta {other:g} beside rope_parameters.rope_theta {theta:g}")
            return theta
        return self.number("rope_theta", default=10_000.0)


def check_token_ids(raw: Mapping[str, Any], name: str, vocab_size: int, problems: list[str]) -> None:
    """Append a problem unless a field is absent, null, a token id, or, for eos_token_id, a list of them."""
    value = raw.get(name)
    ids = value if isinstance(value, list) and name == "eos_token_id" else [value]
    if value is not None and any(type(i) is not int or not 0 <= i < vocab_size for i in ids):
        problems.append(f"{name} {_short(value)} (a token id below {vocab_size})")


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that must hold one object.

    Raises:
        ConfigError: missing, not UTF-8 JSON, nested beyond reason, or not an object.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(raw, ensure_ascii=False).encode()  # a lone surrogate could be read, but never written again
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else type(error).__name__
        raise ConfigError(f"{path}: not a readable JSON file ({reason})") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(raw).__name__}")
    return raw


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
