"""config.json -> ModelConfig: the shape of an OLMo 1, 2 or 3, and a refusal, by name, of everything else.

| model_type | norms                                                   | q and k       | attention              |
|------------|---------------------------------------------------------|---------------|------------------------|
| olmo       | LayerNorm without weights, before attention and MLP     | clipped, or not | full                 |
| olmo2      | RMSNorm after attention and MLP                         | RMSNorm       | full                   |
| olmo3      | RMSNorm after attention and MLP                         | RMSNorm       | full, or a window, by layer |

Source: transformers, models/olmo, models/olmo2 and models/olmo3.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from olmo2_export.fields import Fields, short
from olmo2_export.rope import FULL, SLIDING, LayerType, Rope, read_ropes
from runtimes.errors import ConfigError, UsageError, broken_link
from runtimes.manifest import ModelSpec, Task

logger = logging.getLogger(__name__)

# Limits far above any OLMo, so that a hostile config is refused before anything is allocated.
_MAX_LAYERS = 1_000
_MAX_WIDTH = 1 << 20
_MAX_VOCABULARY = 1 << 24
_MAX_CONTEXT = 1 << 22
_DEFAULT_CONTEXT = 2048
_DEFAULT_WINDOW = 4096
_DEFAULT_EPS = 1e-5
_MAX_LABELS = 1 << 16
_DEFAULT_LABELS = 2
_DEFAULT_PAD = 1  # where config.json has no pad_token_id; null is none
_FULL_EVERY = 4  # layers of Olmo 3, where it does not say which

LFS_POINTER = "version https://git-lfs"
"""how a file begins that git did not replace by its contents"""
TOKEN_ID_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")

ModelType = Literal["olmo", "olmo2", "olmo3"]
TITLES: dict[ModelType, str] = {"olmo": "OLMo 1", "olmo2": "OLMo 2", "olmo3": "Olmo 3"}
_CLASSIFIER = "ForSequenceClassification"
"""the end of the name, in `architectures`, of a model with a score head and no lm_head"""

# Fields that do not change the logits.
_NEUTRAL = frozenset(
    "_attn_implementation_autoset _name_or_path architectures attention_dropout bos_token_id chunk_size_feed_forward "
    "dtype eos_token_id id2label initializer_range is_decoder label2id layer_norm_eps num_labels output_attentions "
    "output_hidden_states pad_token_id problem_type return_dict torch_dtype transformers.js_config "
    "transformers_version use_cache use_sliding_window".split()
)
# Fields of other models that would change them, but for the values that mean nothing; absent, null or false is fine.
_INEXPRESSIBLE: dict[str, tuple[object, ...]] = {
    "clip_qkv": (),
    "final_logit_softcapping": (0,),
    "logit_scale": (1,),
    "mlp_bias": (),
}
# What only some of the family have.
_ONLY_IN: dict[str, ModelType] = {"clip_qkv": "olmo"}
# What transformers ignores, or the weights prove wrong: said in a warning.
_IGNORED = {
    "auto_map": "code of its own, which is never run; the model is transformers' Olmo2ForCausalLM",
    "quantization_config": "of the checkpoint's weights, or left over beside plain numbers; the package has it not",
}
_ACTIVATIONS = ("silu", "swish")
"""two names of one function in transformers"""
_READ = frozenset(
    "model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "head_dim max_position_embeddings rms_norm_eps rope_theta rope_scaling rope_parameters partial_rotary_factor "
    "hidden_act attention_bias tie_word_embeddings layer_types sliding_window pretraining_tp "
    "original_max_position_embeddings".split()
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
    """The shape of an OLMo, in the names of its config.json."""

    model_type: ModelType
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    """fewer than num_attention_heads: grouped-query attention"""
    head_dim: int
    max_position_embeddings: int
    """tokens; fewer than in the file where the RoPE ends before, see `rope`"""
    norm_eps: float
    """rms_norm_eps; OLMo 1 has 1e-5 whatever its file says"""
    clip_qkv: float | None
    """the largest magnitude of queries, keys and values"""
    layer_types: tuple[LayerType, ...]
    sliding_window: int | None
    """tokens that a layer of sliding attention sees, the present one among them; None: no layer has a window"""
    full_rope: Rope
    sliding_rope: Rope
    """of each type of layer; the same where the model has one"""
    attention_bias: bool
    """q, k, v and o projections have a bias"""
    tie_word_embeddings: bool
    """lm_head shares the embedding's weight"""
    labels: tuple[str, ...] = ()
    """of a classifier: what each of its scores is of; (): a language model"""
    pad_token_id: int | None = None
    """of a classifier: the last token that is none of these is scored; None: the last token, of one row a batch"""
    hidden_states: tuple[int, ...] = ()
    """not of config.json but of a package: those that its graphs give beside their answer; see `giving`"""
    inputs_embeds: bool = False
    """likewise: its graphs take vectors in the place of tokens"""

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
        fields = Fields(raw)
        kind, known = raw.get("model_type"), get_args(ModelType)
        model_type: ModelType | None = next((name for name in known if name == kind), None)
        if model_type is None:  # what else it has is another model's, and no problem of an OLMo
            raise ConfigError(f"{where}: cannot express model_type {short(kind)} (only {', '.join(known)})")
        activation = raw.get("hidden_act", "silu")
        fields.require(activation in _ACTIVATIONS, f"hidden_act {short(activation)} (only 'silu')")
        for name, neutral in sorted(_INEXPRESSIBLE.items()):
            fields.require(
                _ONLY_IN.get(name) == model_type or any(raw.get(name) == value for value in (None, False, *neutral)),
                f"{name} {short(raw.get(name))} ({TITLES[model_type]} does not have it; if the model was trained "
                "without it, remove the field)",
            )

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
        fields.said += [f"{name} is {why}" for name, why in _IGNORED.items() if raw.get(name) not in (None, False)]
        context = fields.integer("max_position_embeddings", 1, _MAX_CONTEXT, default=_DEFAULT_CONTEXT)
        layer_types, window = _attention_types(fields, model_type, layers, context)
        ropes = read_ropes(fields, context, head_dim, by_layer_type=model_type == "olmo3")
        for name in TOKEN_ID_FIELDS:
            check_token_ids(raw, name, fields.problems)
            if beyond := [i for i in token_ids(raw, name) if not 0 <= i < vocab_size]:
                fields.said.append(
                    f"{name} {short(raw[name])}: the vocabulary has {vocab_size}, {beyond[0]} is never sampled"
                )
        labels, pad = _classifier(fields)
        config = cls(
            model_type=model_type,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=ropes.longest,
            norm_eps=_DEFAULT_EPS if model_type == "olmo" else fields.number("rms_norm_eps", default=_DEFAULT_EPS),
            clip_qkv=fields.number("clip_qkv") if model_type == "olmo" and raw.get("clip_qkv") is not None else None,
            layer_types=layer_types,
            sliding_window=window,
            full_rope=ropes.full,
            sliding_rope=ropes.sliding,
            attention_bias=fields.boolean("attention_bias"),
            tie_word_embeddings=fields.boolean("tie_word_embeddings") and not labels,
            labels=labels,
            pad_token_id=pad,
        )
        if fields.problems:
            raise ConfigError(f"{where}: cannot express {'; '.join(fields.problems)}")
        if assumed := _assumed(raw, config, context):
            fields.said.append(f"it does not say {', '.join(assumed)}; assumed, as transformers does")
        unknown = sorted(raw.keys() - _READ - _NEUTRAL - _INEXPRESSIBLE.keys() - _IGNORED.keys())
        if unknown:
            fields.said.append(f"unknown fields {', '.join(unknown)} are not used; verify will tell if they matter")
        for line in fields.said:
            _warn_once(f"{where}: {line}")
        return config

    def giving(self, hidden_states: Sequence[int], *, inputs_embeds: bool = False) -> ModelConfig:
        """Return the config of graphs that give hidden states, or take vectors.

        Args:
            hidden_states: numbered as transformers does: 0 is the embedding, N what layer N gives, counted from 1, and
                the last what the last norm gives; -1 is the last.
            inputs_embeds: they take vectors in the place of tokens.

        Raises:
            UsageError: the model has no such one.
        """
        last = self.num_hidden_layers
        if wrong := [n for n in hidden_states if not -last - 1 <= n <= last]:
            raise UsageError(f"hidden state {wrong[0]}: the model has 0 to {last}, or last")
        return replace(
            self, hidden_states=tuple(sorted({n % (last + 1) for n in hidden_states})), inputs_embeds=inputs_embeds
        )

    @property
    def task(self) -> Task:
        """What the model is for."""
        return "sequence-classification" if self.labels else "language-model"

    @property
    def norms_first(self) -> bool:
        """Whether a norm is before attention and MLP, not after them."""
        return self.model_type == "olmo"

    def window(self, layer: int) -> int | None:
        """Return how many tokens a layer sees; None: all."""
        return self.sliding_window if self.layer_types[layer] == SLIDING else None

    @property
    def windows(self) -> tuple[int, ...]:
        """Return how many tokens each layer sees, 0: all; empty where all see all."""
        found = tuple(self.window(layer) or 0 for layer in range(self.num_hidden_layers))
        return found if any(found) else ()

    @property
    def ropes(self) -> dict[str, Rope]:
        """Each RoPE that a layer has, by the names of its tables' last part."""
        used = dict.fromkeys(self.full_rope if kind == FULL else self.sliding_rope for kind in self.layer_types)
        return {"": next(iter(used))} if len(used) == 1 else {"": self.full_rope, "_sliding": self.sliding_rope}

    def rope_of(self, layer: int) -> str:
        """Return which of `ropes` a layer has."""
        return "_sliding" if len(self.ropes) > 1 and self.layer_types[layer] == SLIDING else ""

    @property
    def spec(self) -> ModelSpec:
        """What runners need of it, as the manifest carries it."""
        return ModelSpec(
            model_type=self.model_type,
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            max_position_embeddings=self.max_position_embeddings,
            task=self.task,
            labels=self.labels,
            pad_token_id=self.pad_token_id,
            hidden_states=self.hidden_states,
            inputs_embeds=self.inputs_embeds,
        )


def _assumed(raw: Mapping[str, Any], config: ModelConfig, context: int) -> list[str]:
    """Return the fields that decide what is computed and are not there, with what transformers takes for each."""
    tables = [table for name in ("rope_scaling", "rope_parameters") if isinstance(table := raw.get(name), Mapping)]
    nested = [inner for table in tables for inner in table.values() if isinstance(inner, Mapping)]
    windows = SLIDING in config.layer_types
    found = {
        "max_position_embeddings": f"{context}",
        "rms_norm_eps": f"{config.norm_eps:g}" if config.model_type != "olmo" else "",
        "layer_types": f"{SLIDING}, every {_FULL_EVERY}th {FULL}" if windows else "",
        "sliding_window": f"{_DEFAULT_WINDOW}" if windows else "",
    }
    said = [f"{name} ({value})" for name, value in found.items() if value and raw.get(name) is None]
    if not any(place.get("rope_theta") is not None for place in (raw, *tables, *nested)):
        said.append(f"rope_theta ({config.full_rope.theta:g})")
    return said


def config_of(folder: Path, model: ModelSpec) -> ModelConfig:
    """Return the config of a checkpoint, or of a package's copy of it, with what the package's graphs give beside.

    Raises:
        ConfigError: as `ModelConfig.from_json`.
    """
    config = ModelConfig.from_json(folder / "config.json")
    return replace(config, hidden_states=model.hidden_states, inputs_embeds=model.inputs_embeds)


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


def _classifier(fields: Fields) -> tuple[tuple[str, ...], int | None]:
    """Return the labels of a classifier and the id of padding, as transformers reads them; (), None: it is none."""
    if not is_classifier(fields.raw):
        return (), None
    count, names = fields.raw.get("num_labels"), fields.raw.get("id2label")
    named = isinstance(names, Mapping) and sorted(map(str, names)) == sorted(map(str, range(len(names))))
    fields.require(names is None or (named and len(names) > 0), f"id2label {short(names)} (a name for 0, 1, ...)")
    size = len(names) if isinstance(names, Mapping) and names else _DEFAULT_LABELS
    size = fields.integer("num_labels", 1, _MAX_LABELS, default=size)
    if isinstance(names, Mapping) and named and len(names) == size:
        by_number = {str(number): str(name) for number, name in names.items()}
        labels = tuple(by_number[str(number)] for number in range(size))
    else:  # transformers takes num_labels
        if count is not None and names is not None:
            fields.said.append(f"num_labels {short(count)}, but id2label names {short(len(names))}; they are numbered")
        labels = tuple(f"LABEL_{number}" for number in range(size))
    pad = padding_id(fields.raw)
    fields.require(pad is None or pad >= 0, f"pad_token_id {short(pad)} (an id, or null)")
    return labels, pad


def _attention_types(
    fields: Fields, model_type: ModelType, layers: int, context: int
) -> tuple[tuple[LayerType, ...], int | None]:
    """Return the type of each layer, and the window of those that have one; a window as wide as the context is none."""
    types, window = fields.raw.get("layer_types"), fields.raw.get("sliding_window")
    if model_type != "olmo3":
        full = isinstance(types, list) and all(kind == FULL for kind in types)
        title = TITLES[model_type]
        fields.require(types is None or full, f"layer_types {short(types)} (only {FULL})")
        unused = window in (None, False) or full or fields.raw.get("use_sliding_window") is False
        wide = type(window) is int and window >= context
        fields.require(
            unused or wide,
            f"sliding_window {short(window)} ({title} attends to all; if it was trained so, remove the field)",
        )
        return (FULL,) * layers, None
    if types is None:
        types = [SLIDING if (layer + 1) % _FULL_EVERY else FULL for layer in range(layers)]
    known = isinstance(types, list) and all(kind in (FULL, SLIDING) for kind in types)
    fields.require(
        known and len(types) == layers, f"layer_types {short(types)} ({layers}, of {FULL} and {SLIDING}, one a layer)"
    )
    if not known or SLIDING not in types:
        return (FULL,) * layers, None
    missing = "sliding_window" in fields.raw and window is None
    fields.require(not missing, f"sliding_window {window} (layers of {SLIDING} need a number of tokens)")
    size = fields.integer("sliding_window", 1, _MAX_CONTEXT, default=_DEFAULT_WINDOW)
    return tuple(types), size if size < context else None


def is_classifier(raw: Mapping[str, Any]) -> bool:
    """Tell a config.json of a model with a score head."""
    architectures = raw.get("architectures")
    return isinstance(architectures, list) and any(str(name).endswith(_CLASSIFIER) for name in architectures)


def padding_id(raw: Mapping[str, Any]) -> int | None:
    """Return pad_token_id as transformers reads it, which a classifier goes by; None: there is no padding."""
    pad = raw.get("pad_token_id", _DEFAULT_PAD)
    return pad if type(pad) is int else None


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
        problems.append(f"{name} {short(value)} (a token id)")


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
