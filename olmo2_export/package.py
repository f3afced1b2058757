"""Write the package folder: stream the weights beside the graph, hash everything, swap it in atomically.

    config.json generation_config.json genai_config.json tokenizer*.json ... manifest.json
    onnx/model.onnx  onnx/model.onnx_data

The folder is built under a hidden name beside its target and exchanged with it in one step, so that at every moment
the target is the old package or the new one, whole. Two exports of the same input are byte-identical.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import onnx_ir as ir
import tokenizers
import torch
from tqdm import tqdm

from olmo2_export.atomic import replace_folder, resource_error
from olmo2_export.checkpoint import TEXT_FILES, Checkpoint
from olmo2_export.config import ModelConfig, check_token_ids, read_json_object
from olmo2_export.fuse import check_op_counts
from olmo2_export.fuse.fold_weight_transpose import TRANSPOSED
from olmo2_export.model import Olmo2ForCausalLM, rotary_tables
from olmo2_export.trace import (
    OPSET,
    ROTARY_TABLES,
    expected_op_counts,
    portable_inputs,
    portable_outputs,
    trace,
)
from runtimes.errors import CheckpointError, ConfigError, ResourceError, UsageError
from runtimes.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    KVCacheSpec,
    Manifest,
    Source,
    Variant,
    hash_files,
    seal,
    to_document,
)

logger = logging.getLogger(__name__)

VARIANTS = {"fp32": "onnx/model.onnx"}
"""the variants that can be exported, and the path of each graph"""

_LIBRARIES = ("torch", "onnx", "onnx-ir", "onnxscript", "safetensors", "tokenizers", "numpy")
_BLOCK_ROWS = 4096
_ALIGNMENT = 4096  # of large tensors in the data file, so that a runtime can map them


def export(checkpoint: Checkpoint, out: Path, *, variants: Sequence[str] = ("fp32",), force: bool = False) -> Manifest:
    """Export a checkpoint to a package folder.

    Args:
        checkpoint: what `open_checkpoint` found.
        out: the folder to write; it must not exist, or be empty, unless `force`.
        variants: names out of `VARIANTS`.
        force: replace the package that is there.

    Raises:
        ConfigError, CheckpointError: the checkpoint cannot be exported; nothing was written.
        UsageError: unknown variant, or a folder that must not be replaced.
        ResourceError: disk full, or another export holds the folder.
        FusionError: the traced graph is not the expected one.
    """
    unknown = [v for v in variants if v not in VARIANTS]
    if unknown or not variants:
        raise UsageError(f"variant {', '.join(unknown) or '(none)'}: this version writes {', '.join(VARIANTS)}")
    config = ModelConfig.from_json(checkpoint.folder / "config.json")
    with replace_folder(out, force=force) as staging, ThreadPoolExecutor(max_workers=1) as pool:
        check_weights(checkpoint, config)
        sources = pool.submit(hash_files, checkpoint.folder, checkpoint.files)  # meanwhile, the trace
        _write_text_files(checkpoint, config, staging)
        written = {name: _write_portable(checkpoint, config, staging, name) for name in dict.fromkeys(variants)}
        files = sorted(p.relative_to(staging).as_posix() for p in staging.rglob("*") if p.is_file())
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            exporter_version=importlib.metadata.version("olmo2-export"),
            source=Source(checkpoint.model, checkpoint.kind, checkpoint.revision, sources.result()),
            model=config.spec,
            variants=written,
            libraries={name: importlib.metadata.version(name) for name in _LIBRARIES},
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


def save_graph(model: ir.Model, path: Path) -> None:
    """Write a graph and, beside it, its weights: one lazily evaluated tensor at a time, so memory stays small.

    Args:
        model: every initializer has data, possibly lazy.
        path: the .onnx file; the weights go to the same name with `_data`.

    Raises:
        ResourceError: the disk cannot hold it; said before anything is written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    total = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    free = shutil.disk_usage(path.parent).free
    if total + (1 << 20) > free:
        raise ResourceError(f"{path.parent}: {path.name} needs {total + (1 << 20):,} bytes, {free:,} are free")
    with tqdm(total=total, desc=f"writing {path.name}", unit="B", unit_scale=True, leave=False) as bar:

        def on_tensor(tensor: ir.TensorProtocol, _: object) -> None:
            bar.update(tensor.nbytes)

        try:
            ir.save(model, path, external_data=f"{path.name}_data", alignment=_ALIGNMENT, callback=on_tensor)
        except OSError as error:
            raise resource_error(path, error) from error


def _write_portable(checkpoint: Checkpoint, config: ModelConfig, staging: Path, name: str) -> Variant:
    """Trace, attach the weights, save; return the manifest's entry."""
    with tqdm(total=1, desc="tracing", bar_format="{desc} {elapsed}", leave=False):
        model = trace(config)
    attach_weights(model, checkpoint, config)
    graph = VARIANTS[name]
    save_graph(model, staging / graph)
    return Variant(
        name=name,
        precision="fp32",
        graph=graph,
        data=(f"{graph}_data",),
        opset=OPSET,
        inputs=portable_inputs(config),
        outputs=portable_outputs(config),
        kv_cache=KVCacheSpec(
            form="concat",
            dtype="float32",
            num_layers=config.num_hidden_layers,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            max_cache_length=config.max_position_embeddings,
        ),
        op_counts=check_op_counts(model, expected_op_counts(config)),
    )


def attach_weights(model: ir.Model, checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Give each initializer that has no data yet a lazy tensor: read, cast to float32 and transposed when written."""
    tables = dict(zip(ROTARY_TABLES, rotary_tables(config), strict=True))
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            continue
        assert value.shape is not None  # the trace gave both
        assert value.dtype is not None

        def load(name: str = name, transposed: bool = value.meta.get(TRANSPOSED, False)) -> ir.TensorProtocol:
            stored = "model.embed_tokens.weight" if name == "lm_head.weight" and config.tie_word_embeddings else name
            tensor = tables[name] if name in tables else checkpoint.tensor(stored)
            return ir.Tensor((_transposed(tensor) if transposed else tensor.float()).numpy(), name=name)

        value.const_value = ir.LazyTensor(load, dtype=value.dtype, shape=value.shape, name=name)


def _transposed(matrix: torch.Tensor) -> torch.Tensor:
    """Return the transpose in float32, made in blocks: four times as fast, and never two copies of a large tensor."""
    rows, columns = matrix.shape
    result = torch.empty(columns, rows, dtype=torch.float32)
    for start in range(0, rows, _BLOCK_ROWS):
        result[:, start : start + _BLOCK_ROWS] = matrix[start : start + _BLOCK_ROWS].T.contiguous()
    return result


def _write_text_files(checkpoint: Checkpoint, config: ModelConfig, staging: Path) -> None:
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
    javascript = {**javascript, "use_external_data_format": {"model.onnx": 1}}
    (staging / "config.json").write_text(_json({**raw, "transformers.js_config": javascript}))
    (staging / "genai_config.json").write_text(_json(_genai_config(config, {**raw, **generation})))


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


def _genai_config(config: ModelConfig, ids: dict[str, Any]) -> dict[str, Any]:
    """Return genai_config.json, for onnxruntime-genai; it knows no olmo2, so the type is `decoder`."""
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
                "filename": VARIANTS["fp32"],
                "session_options": {"provider_options": []},
                "head_size": config.head_dim,
                "hidden_size": config.hidden_size,
                "num_attention_heads": config.num_attention_heads,
                "num_key_value_heads": config.num_key_value_heads,
                "num_hidden_layers": config.num_hidden_layers,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
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
            "past_present_share_buffer": False,
        },
    }


def _json(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"
