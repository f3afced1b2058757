"""Write the package folder: stream the weights beside the graph, hash everything, swap it in atomically.

    config.json generation_config.json genai_config.json tokenizer*.json ... manifest.json
    onnx/model.onnx  onnx/model.onnx_data

The folder is built under a hidden name beside its target and exchanged with it in one step, so that at every moment
the target is the old package or the new one, whole. Two exports of the same input are byte-identical.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import platform
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tokenizers
import torch

from olmo2_export.atomic import replace_folder
from olmo2_export.checkpoint import TEXT_FILES, Checkpoint
from olmo2_export.config import ModelConfig, check_token_ids, read_json_object
from olmo2_export.device_graph import DTYPES
from olmo2_export.model import Olmo2ForCausalLM
from olmo2_export.variants import SPOOL, VARIANTS, Options, VariantWriter, check_variants
from runtimes.errors import CheckpointError, ConfigError
from runtimes.manifest import MANIFEST_NAME, Manifest, Source, to_document
from runtimes.sealed import FORMAT_VERSION, hash_files, seal

logger = logging.getLogger(__name__)

_LIBRARIES = (
    *("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-gpu"),
    *("safetensors", "tokenizers", "numpy"),
)


def export(
    checkpoint: Checkpoint,
    out: Path,
    *,
    variants: Sequence[str] = ("fp32",),
    options: Options | None = None,
    force: bool = False,
    graphs_of: Path | None = None,
) -> Manifest:
    """Export a checkpoint to a package folder.

    Args:
        checkpoint: what `open_checkpoint` found.
        out: the folder to write; it must not exist, or be empty, unless `force`.
        variants: names out of `VARIANTS`.
        options: how quantised variants are made; None: the defaults.
        force: replace the package that is there.
        graphs_of: a package of another revision of the model, of the same variants and options: its graph files are
            taken as they are and only the weights are written, with the same result.

    Raises:
        ConfigError, CheckpointError: the checkpoint cannot be exported; nothing was written.
        UsageError: unknown variant, or a folder that must not be replaced.
        ResourceError: disk full, or another export holds the folder.
        FusionError: the traced graph is not the expected one.
    """
    options = options or Options()
    config = ModelConfig.from_json(checkpoint.folder / "config.json")
    check_variants(variants, config, options)
    with replace_folder(out, force=force) as staging, ThreadPoolExecutor(max_workers=1) as pool:
        check_weights(checkpoint, config)
        sources = pool.submit(hash_files, checkpoint.folder, checkpoint.files)  # meanwhile, the trace
        _write_text_files(checkpoint, config, staging, list(dict.fromkeys(variants)))
        writer = VariantWriter(checkpoint, config, staging, options, graphs_of)
        written = {name: writer.write(name) for name in dict.fromkeys(variants)}
        shutil.rmtree(staging / SPOOL, ignore_errors=True)
        files = sorted(p.relative_to(staging).as_posix() for p in staging.rglob("*") if p.is_file())
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            exporter_version=importlib.metadata.version("olmo2-export"),
            source=Source(checkpoint.model, checkpoint.kind, checkpoint.revision, sources.result()),
            model=config.spec,
            variants=written,
            libraries=_libraries(),
            files=hash_files(staging, files),
        )
        (staging / MANIFEST_NAME).write_bytes(seal(to_document(manifest)))
    return manifest


def check_weights(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Check that the checkpoint holds exactly the tensors of the model, of the right shapes, all finite.

    Raises:
        CheckpointError: naming every tensor that is not as it must be.
    """
    with torch.device("meta"):
        expected = {name: tuple(w.shape) for name, w in Olmo2ForCausalLM(config).state_dict().items()}
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
        checkpoint.validate(expected, aliases={"lm_head.weight": "model.embed_tokens.weight"})
    else:
        checkpoint.validate(expected)


def _libraries() -> dict[str, str]:
    """Return the versions of what makes a package; of the two builds of onnxruntime, what is there."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _write_text_files(checkpoint: Checkpoint, config: ModelConfig, staging: Path, variants: list[str]) -> None:
    """Copy the tokenizer and write the three JSON files that other runtimes read."""
    for name in TEXT_FILES:
        if (checkpoint.folder / name).is_file():
            shutil.copyfile(checkpoint.folder / name, staging / name)
    raw = read_json_object(checkpoint.folder / "config.json")
    javascript = raw.get("transformers.js_config") or {}
    if not isinstance(javascript, dict):
        raise ConfigError(f"{checkpoint.folder}/config.json: transformers.js_config is no object")
    ids = {k: raw[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if raw.get(k) is not None}
    source = checkpoint.folder / "generation_config.json"
    generation = read_json_object(source) if source.exists() else ids
    problems: list[str] = []
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        check_token_ids(generation, name, config.vocab_size, problems)
    if problems:
        raise ConfigError(f"{source}: {'; '.join(problems)}")
    if not source.exists():
        (staging / source.name).write_text(_json(ids))
    _test_tokenizer(staging / "tokenizer.json", config)
    javascript = {**javascript, "use_external_data_format": {Path(VARIANTS[name]).name: 1 for name in variants}}
    (staging / "config.json").write_text(_json({**raw, "transformers.js_config": javascript}))
    (staging / "genai_config.json").write_text(_json(_genai_config(config, {**raw, **generation}, variants)))


def _test_tokenizer(path: Path, config: ModelConfig) -> None:
    """Encode and decode once, so that a broken tokenizer fails the export and not the user."""
    if not path.exists():
        logger.warning("the checkpoint has no tokenizer.json: the package can be verified but not prompted with text")
        return
    text = "In the beginning"
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        decoded = tokenizer.decode(ids)
    except BaseException as error:  # a bad regex panics: a BaseException of a module that cannot be imported
        if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit)):
            raise
        raise CheckpointError(f"{path.name}: does not work: {str(error).strip().splitlines()[0][:200]}") from error
    if decoded.strip() != text or max(ids) >= config.vocab_size:
        raise CheckpointError(f"{path.name}: {text!r} becomes {ids}, which decodes to {decoded!r}; wrong tokenizer?")


def _genai_config(config: ModelConfig, ids: dict[str, Any], variants: list[str]) -> dict[str, Any]:
    """Return genai_config.json, for onnxruntime-genai; it knows no olmo2, so the type is `decoder`.

    It names one graph: the portable one where the package has it.
    """
    variant = "fp32" if "fp32" in variants else variants[0]
    shared = variant != "fp32"
    providers: list[dict[str, Any]] = [{"cuda": {}}] if variant in DTYPES else []
    eos = ids.get("eos_token_id")
    first_eos = eos[0] if isinstance(eos, list) and eos else eos
    tokens = {
        "bos_token_id": ids.get("bos_token_id", first_eos),
        "eos_token_id": eos,
        "pad_token_id": ids.get("pad_token_id", first_eos),
    }
    return {
        "model": {
            "type": "decoder",
            **{name: value for name, value in tokens.items() if value is not None},
            "context_length": config.max_position_embeddings,
            "vocab_size": config.vocab_size,
            "decoder": {
                "filename": VARIANTS[variant],
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
