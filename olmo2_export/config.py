"""config.json -> ModelConfig: the shape of an OLMo 2, and a refusal, by name, of everything else.

Both forms are read: transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 writes `rope_parameters`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from runtimes.errors import ConfigError, broken_link
from runtimes.manifest import ModelSpec

logger = logging.getLogger(__name__)

# Limits far above any OLMo, so that a hostile config is refused before anything is allocated.
_MAX_LAYERS = 1_000
_MAX_WIDTH = 1 << 20
_MAX_VOCABULARY = 1 << 24
_MAX_CONTEXT = 1 << 22
_DEFAULT_CONTEXT, _DEFAULT_THETA = 2048, 10_000.0

LFS_POINTER = "version https://git-lfs"
"""how a file begins that git did not replace by its contents"""
TOKEN_ID_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")

# Fields that do not change the logits.
_NEUTRAL = frozenset(
    "_attn_implementation_autoset _name_or_path architectures attention_dropout bos_token_id chunk_size_feed_forward "
    "dtype eos_token_id id2label initializer_range is_decoder label2id layer_norm_eps output_attentions "
    "output_hidden_states pad_token_id problem_type return_dict torch_dtype transformers.js_config "
    "transformers_version use_cache use_sliding_window".split()
)
# Fields of other models that would change them, but for the values that mean nothing; absent, null or false is fine.
_INEXPRESSIBLE: dict[str, tuple[object, ...]] = {
    "clip_qkv": (),
    "final_logit_softcapping": (0,),
    "logit_scale": (1,),
    "mlp_bias": (),
    "partial_rotary_factor": (1,),
}
_FULL_ATTENTION = "full_attention"
_ROPE_FIELDS = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
# What transformers ignores, or the weights prove wrong: said in a warning.
_IGNORED = {
    "auto_map": "code of its own, which is never run; the model is transformers' Olmo2ForCausalLM",
    "quantization_config": "left over, if the weights are plain numbers, which is checked; the package has it no more",
}
_ACTIVATIONS = ("silu", "swish")
"""two names of one function in transformers"""
_READ = frozenset(
    "model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "head_dim max_position_embeddings rms_norm_eps rope_theta rope_scaling rope_parameters hidden_act attention_bias "
    "tie_word_embeddings layer_types sliding_window".split()
)
# What is near, by its model_type -> what it is, and what to do.
_OTHER_FORMS = {
    "hf_olmo": "OLMo 1 in the form for AI2's own code; give the repository whose name ends in -hf, such as "
    "allenai/OLMo-7B-hf",
    "olmo_1124": "OLMo 2 under its preview's name; give the released repository, such as allenai/OLMo-2-1124-7B, or "
    "write olmo2 if it is one",
    "olmoe": "OLMoE, a mixture of experts, which no graph here has; transformers, vLLM and llama.cpp run it",
    "flex_olmo": "FlexOlmo, a mixture of experts, which no graph here has; transformers and vLLM run it",
    "olmo_hybrid": "OLMo Hybrid, most of whose layers are linear attention, which no graph here has; transformers and "
    "vLLM run it",
    "molmo": "Molmo, which reads pictures, and no graph here does; transformers, with the repository's own code, and "
    "vLLM run it",
    "molmo2": "Molmo 2, which reads pictures, and no graph here does; transformers and vLLM run it",
}
OLMO_CORE = (
    "a checkpoint of OLMo-core; convert it to Hugging Face format first, with OLMo-core's "
    "src/examples/huggingface/convert_checkpoint_to_hf.py"
)
"""what is said of one, by its config.json or by its files"""
_MLX = (
    "weights quantised by MLX (quantization, of group_size and bits), which have a float bias per group; give the "
    "model that they were made from, or run it with mlx-lm; if the weights are plain numbers, remove the field"
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
        refuse_other_forms(raw, where)
        fields = _Fields(raw)
        kind = raw.get("model_type")
        fields.require(kind == "olmo2", f"model_type {_short(kind)} (only olmo2)")
        activation = raw.get("hidden_act", "silu")
        fields.require(activation in _ACTIVATIONS, f"hidden_act {_short(activation)} (only 'silu')")
        for name, neutral in sorted(_INEXPRESSIBLE.items()):
            fields.require(
                any(raw.get(name) == value for value in (None, False, *neutral)),
                f"{name} {_short(raw.get(name))} (OLMo 2 does not have it; if the model was trained without it, remove "
                "the field)",
            )
        fields.full_attention()

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
        said = fields.ignored()
        for name in TOKEN_ID_FIELDS:
            check_token_ids(raw, name, fields.problems)
            if beyond := [i for i in token_ids(raw, name) if not 0 <= i < vocab_size]:
                said.append(
                    f"{name} {_short(raw[name])}: the vocabulary has {vocab_size}, {beyond[0]} is never sampled"
                )
        config = cls(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=fields.integer(
                "max_position_embeddings", 1, _MAX_CONTEXT, default=_DEFAULT_CONTEXT
            ),
            rms_norm_eps=fields.number("rms_norm_eps", default=1e-5),
            rope_theta=fields.rope_theta(),
            attention_bias=fields.boolean("attention_bias"),
            tie_word_embeddings=fields.boolean("tie_word_embeddings"),
        )
        if fields.problems:
            raise ConfigError(f"{where}: cannot express {'; '.join(fields.problems)}")
        unknown = sorted(raw.keys() - _READ - _NEUTRAL - _INEXPRESSIBLE.keys() - _IGNORED.keys())
        if unknown:
            said.append(f"unknown fields {', '.join(unknown)} are not used; verify will tell if they matter")
        for line in said:
            _warn_once(f"{where}: {line}")
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


def refuse_other_forms(raw: Mapping[str, Any], where: str) -> None:
    """Refuse what is near to a model that is read, and none; this needs config.json alone, and no weights.

    Raises:
        ConfigError: saying what it is and what to do.
    """
    kind, table = raw.get("model_type"), raw.get("quantization")
    if isinstance(kind, str) and kind in _OTHER_FORMS:
        raise ConfigError(f"{where}: model_type {kind}: {_OTHER_FORMS[kind]}")
    if is_olmo_core(raw):
        raise ConfigError(f"{where}: {OLMO_CORE}")
    if isinstance(table, Mapping) and {"group_size", "bits"} <= table.keys() and "quant_method" not in table:
        raise ConfigError(f"{where}: {_MLX}")


def is_olmo_core(raw: Mapping[str, Any]) -> bool:
    """Tell OLMo-core's own config.json: the whole of a training run, the model in a table of it."""
    if "model_type" in raw:
        return False
    return isinstance(raw.get("model"), Mapping) or any(name in str(raw)[:4000] for name in ("OlmoCore", "olmo_core"))


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
        value = self.raw.get(name)
        if value is None:
            return False
        if type(value) is not bool:
            self.problems.append(f"{name} {_short(value)} (true or false)")
            return False
        return value

    def full_attention(self) -> None:
        """Refuse sliding windows, unless they are as wide as the context or not in use."""
        types, window = self.raw.get("layer_types"), self.raw.get("sliding_window")
        full = isinstance(types, list) and all(kind == _FULL_ATTENTION for kind in types)
        self.require(types is None or full, f"layer_types {_short(types)} (only {_FULL_ATTENTION})")
        unused = window in (None, False) or full or self.raw.get("use_sliding_window") is False
        context = self.raw.get("max_position_embeddings", _DEFAULT_CONTEXT)
        wide = type(window) is int and type(context) is int and window >= context
        self.require(
            unused or wide,
            f"sliding_window {_short(window)} (OLMo 2 attends to all; if it was trained so, remove the field)",
        )

    def ignored(self) -> list[str]:
        """Return what is set and not used, with the reason."""
        found = [f"{name} is {why}" for name, why in _IGNORED.items() if self.raw.get(name) not in (None, False)]
        for name in ("rope_parameters", "rope_scaling"):
            table = self.raw.get(name)
            extra = sorted(table.keys() - _ROPE_FIELDS) if isinstance(table, Mapping) else []
            if extra:
                found.append(f"{name}: {', '.join(extra)} mean nothing for plain RoPE, here as in transformers")
        return found

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
            plain = kind == "default" or (kind == "linear" and table.get("factor") == 1)
            self.require(plain, f"{name}: rope_type {_short(kind)} (only 'default')")
            named = "rope_type" in table or "type" in table
            extra = sorted(table.keys() - _ROPE_FIELDS)
            self.require(named or not extra, f"{name}: {', '.join(extra)} (without a rope_type)")
            part = table.get("partial_rotary_factor")
            self.require(part in (None, 1), f"{name}: partial_rotary_factor {_short(part)} (only 1)")
        tables = [table for table in (scaling, parameters) if isinstance(table, Mapping) and table]
        places = [*tables[:1], self.raw]  # in transformers, rope_scaling goes before rope_parameters
        source = next((place for place in places if place.get("rope_theta") is not None), None)
        theta = _DEFAULT_THETA if source is None else self.number("rope_theta", source=source)
        for other in (self.raw, *tables):
            if other.get("rope_theta") not in (None, theta):
                self.problems.append(
                    f"rope_theta {_short(other['rope_theta'])} beside {theta:g}, which transformers takes; say one"
                )
        return theta


def token_ids(raw: Mapping[str, Any], name: str) -> list[int]:
    """Return the ids of a field of config.json or generation_config.json; none where it is absent, null or no id."""
    value = raw.get(name)
    return [i for i in (value if isinstance(value, list) else [value]) if type(i) is int]


def check_token_ids(raw: Mapping[str, Any], name: str, problems: list[str]) -> None:
    """Append a problem unless a field is absent, null, an integer, or, for eos_token_id, a list of them.

    An id that the vocabulary does not have is none: it is never sampled, and transformers loads it.
    """
    value = raw.get(name)
    ids = value if isinstance(value, list) and name == "eos_token_id" else [value]
    if value is not None and any(type(i) is not int for i in ids):
        problems.append(f"{name} {_short(value)} (a token id)")


@cache
def _warn_once(line: str) -> None:
    """Say something about a file; commands read it several times."""
    logger.warning(line)


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that must hold one object.

    Raises:
        ConfigError: missing, not UTF-8 JSON, nested beyond reason, or not an object.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if text.startswith(LFS_POINTER):
            raise ConfigError(f"{path}: a Git LFS pointer: run 'git lfs pull', or download the file itself")
        if text.startswith("\ufeff"):
            raise ConfigError(f"{path}: begins with a byte order mark; save it as UTF-8 without one")
        raw = json.loads(text)
        json.dumps(raw, ensure_ascii=False).encode()  # a lone surrogate could be read, but never written again
    except ConfigError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        if lost := broken_link(path):
            raise ConfigError(f"{path}: {lost}") from error
        reason = error.strerror if isinstance(error, OSError) else type(error).__name__
        raise ConfigError(f"{path}: not a readable JSON file ({reason})") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(raw).__name__}")
    return raw


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
