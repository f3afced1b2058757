"""The texts of a package: tokenizer, chat templates, and the JSON files that other runtimes read.

One rule for the ids that begin, end and pad a text: generation_config.json says them; what is absent or null there,
config.json says. `runtimes.text.tokenizer` reads them by the same rule.

What other runtimes read is written so that each finds it where it looks: RoPE in both forms of config.json, the chat
template as a file and in tokenizer_config.json, and there that the model takes no token_type_ids.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from olmo2_export.catalog import VariantRow, find
from olmo2_export.config import LFS_POINTER, TOKEN_ID_FIELDS, ModelConfig, check_token_ids, read_json_object, token_ids
from olmo2_export.rope import both_forms
from olmo2_export.tokenizer_file import tested_tokenizer
from olmo2_export.weights.hub import TEMPLATES, TEXT_FILES
from runtimes.errors import CheckpointError, ConfigError, UsageError, broken_link

logger = logging.getLogger(__name__)

_GENERATION = "generation_config.json"
_TOKENIZER = "tokenizer_config.json"
_TEMPLATE = "chat_template.jinja"
# What changes no logits, and is of no use or harm beside weights that are plain numbers.
_DROPPED = {"quantization_config", "auto_map", "_name_or_path"}
_LOCAL = {"name_or_path", "_name_or_path", "tokenizer_file", "special_tokens_map_file", "vocab_file", "merges_file"}
"""of tokenizer_config.json: where its files lay once"""


def write_texts(
    folder: Path, config: ModelConfig, staging: Path, variants: Sequence[str], default: str | None = None
) -> None:
    """Copy a checkpoint's texts and write the JSON files of the package.

    Args:
        folder: the checkpoint's.
        config: the model's.
        staging: the folder to write to.
        variants: of the package, in order.
        default: the one that onnxruntime-genai and transformers.js open where none is named; None: fp32, or the first.

    Raises:
        UsageError: the default is none of them.
        ConfigError: a value that means nothing in config.json or generation_config.json.
        CheckpointError: a tokenizer that does not work, or is another model's.
    """
    opened = _opened(variants, default)
    for path in _texts(folder):
        target = staging / path.relative_to(folder)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
    _write_tokenizer_config(staging)
    raw = read_json_object(folder / "config.json")
    javascript = raw.get("transformers.js_config") or {}
    if not isinstance(javascript, dict):
        raise ConfigError(f"{folder}/config.json: transformers.js_config is no object")
    generation = _generation_config(folder / _GENERATION)
    if generation is None:
        generation = {name: raw[name] for name in TOKEN_ID_FIELDS if raw.get(name) is not None}
        (staging / _GENERATION).write_text(_json(generation), encoding="utf-8")
    said = {name: value for name, value in generation.items() if value is not None}
    ids = {name: _in_vocabulary({**raw, **said}, name, config) for name in TOKEN_ID_FIELDS}
    tokenizer = tested_tokenizer(folder / "tokenizer.json", config)
    if tokenizer is not None:
        _compare_ends(folder, tokenizer, ids["eos_token_id"])
    external = {Path(find(name).portable_path).name: 1 for name in variants}
    javascript = {**javascript, "use_external_data_format": external}
    if opened.graph != "portable" and opened.dtype != "bfloat16":  # which transformers.js does not have
        javascript["dtype"] = opened.name
    ropes = both_forms(raw, by_layer_type=config.model_type == "olmo3")
    kept = {name: value for name, value in raw.items() if name not in _DROPPED} | ropes
    (staging / "config.json").write_text(_json({**kept, "transformers.js_config": javascript}), encoding="utf-8")
    if not config.labels:  # onnxruntime-genai generates text alone
        (staging / "genai_config.json").write_text(_json(_genai_config(config, ids, opened)), encoding="utf-8")


def _texts(folder: Path) -> Iterator[Path]:
    for path in (folder / name for name in TEXT_FILES):
        if lost := broken_link(path):
            raise CheckpointError(f"{path}: {lost}")
        if path.is_file():
            yield path
    yield from sorted(path for path in (folder / TEMPLATES).glob("*.jinja") if path.is_file())


def _opened(variants: Sequence[str], default: str | None) -> VariantRow:
    """Return the variant that other runtimes open where none is named."""
    if default is not None and default not in variants:
        raise UsageError(f"default variant {default}: not among those of this export, {', '.join(variants)}")
    rows = [find(name) for name in variants]
    named = [row for row in rows if row.name == default]
    return (named or [row for row in rows if row.graph == "portable"] or rows)[0]


def _write_tokenizer_config(staging: Path) -> None:
    """Say in tokenizer_config.json what other runtimes look for there, and the chat template in both places, equal.

    As in transformers, the template in a file of its own goes before the other. A file that is no JSON stays as it is.
    """
    path, template = staging / _TOKENIZER, staging / _TEMPLATE
    if not path.is_file():
        return
    try:
        raw = read_json_object(path)
    except ConfigError:  # whoever reads it is told by `_compare_ends`
        return
    config = {name: value for name, value in raw.items() if name not in _LOCAL}
    config.setdefault("model_input_names", ["input_ids", "attention_mask"])
    if template.is_file():
        config["chat_template"] = template.read_text(encoding="utf-8")
    else:
        said = config.get("chat_template")
        if isinstance(said, list):  # several, by name
            named = {entry.get("name"): entry.get("template") for entry in said if isinstance(entry, dict)}
            said = named.get("default")
        if isinstance(said, str):
            template.write_text(said, encoding="utf-8")
    path.write_text(_json(config), encoding="utf-8")


def _generation_config(path: Path) -> dict[str, Any] | None:
    """Read generation_config.json; None where there is none, or one that transformers passes over."""
    if not path.exists():
        return None
    text = path.read_bytes()
    if text.startswith(LFS_POINTER.encode()):
        read_json_object(path)  # says so
    try:
        json.loads(text.decode())
    except (ValueError, RecursionError):  # an empty file, a comma too many
        logger.warning("%s: not valid JSON, left out, as in transformers; config.json says the special tokens", path)
        return None
    generation = read_json_object(path)
    problems: list[str] = []
    for name in TOKEN_ID_FIELDS:
        check_token_ids(generation, name, problems)
    if problems:
        raise ConfigError(f"{path}: expected other values: {'; '.join(problems)}; correct them, or leave them out")
    return generation


def _in_vocabulary(raw: Mapping[str, Any], name: str, config: ModelConfig) -> list[int]:
    """Return a field's ids that the model has."""
    found = token_ids(raw, name)
    known = [i for i in found if 0 <= i < config.vocab_size]
    if found and not known and name == "eos_token_id":
        logger.warning("eos_token_id %s is not in the vocabulary: a text ends only where it is cut off", raw[name])
    return known


def _compare_ends(folder: Path, tokenizer: tokenizers.Tokenizer, ends: Sequence[int]) -> None:
    """Warn where the tokenizer's own end of a text is none of the ids that end one."""
    path = folder / "tokenizer_config.json"
    try:
        token = read_json_object(path).get("eos_token") if path.is_file() else None
    except ConfigError as error:  # what reads it fails, as transformers; the graphs and tokenizer.json do not need it
        logger.warning("%s; it is copied as it is", error)
        return
    text = token.get("content") if isinstance(token, dict) else token
    own = tokenizer.token_to_id(text) if isinstance(text, str) else None
    if own is not None and own not in ends:
        logger.warning(
            "%s: the tokenizer's eos_token %r is id %d, but what ends a text is %s (%s, then config.json); a chat may "
            "run on", folder, text, own, ", ".join(map(str, ends)) or "nothing", _GENERATION,
        )  # fmt: skip


def _genai_config(config: ModelConfig, ids: Mapping[str, list[int]], row: VariantRow) -> dict[str, Any]:
    """Return genai_config.json, for onnxruntime-genai; it knows no olmo2, so the type is `decoder`.

    It names one graph: of the variant `row`.
    """
    shared = row.form == "shared"
    providers: list[dict[str, Any]] = [{"cuda": {}}] if "cuda" in row.targets else []
    ends = ids["eos_token_id"]
    tokens = {
        "bos_token_id": [*ids["bos_token_id"], *ends][:1],
        "eos_token_id": ends,
        "pad_token_id": [*ids["pad_token_id"], *ends][:1],
    }
    return {
        "model": {
            "type": "decoder",
            **{name: found[0] if len(found) == 1 else found for name, found in tokens.items() if found},
            "context_length": config.max_position_embeddings,
            "vocab_size": config.vocab_size,
            "decoder": {
                "filename": row.portable_path,
                "session_options": {"provider_options": providers},
                "head_size": config.head_dim,
                "hidden_size": config.hidden_size,
                "num_attention_heads": config.num_attention_heads,
                "num_key_value_heads": config.num_key_value_heads,
                "num_hidden_layers": config.num_hidden_layers,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    **({} if shared else {"position_ids": "position_ids"}),
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": config.max_position_embeddings,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "temperature": 1.0,
            "top_k": 50,
            "top_p": 1.0,
            "repetition_penalty": 1.0,
            "no_repeat_ngram_size": 0,
            "length_penalty": 1.0,
            "diversity_penalty": 0.0,
            "early_stopping": True,
            "past_present_share_buffer": shared,
        },
    }


def _json(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"
