"""Write the package folder: stream the weights beside the graph, hash everything, swap it in atomically.

    config.json generation_config.json genai_config.json tokenizer*.json ... manifest.json
    onnx/model.onnx  onnx/model.onnx_data  [onnx/model_q4.onnx  onnx/model_q4_shared.onnx  onnx/model_q4.onnx_data ...]

The folder is built under a hidden name beside its target and exchanged with it in one step, so that at every moment
the target is the old package or the new one, whole. Two exports of the same input are byte-identical.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from olmo2_export.architecture import operations, tensor_shapes
from olmo2_export.atomic import replace_folder
from olmo2_export.config import ModelConfig
from olmo2_export.graphs.lora_inputs import adapted_linears, lora_tensors
from olmo2_export.package.imported import check_import
from olmo2_export.package.plan import check_room
from olmo2_export.package.texts import write_texts
from olmo2_export.package.variants import SPOOL, VariantWriter, check_takes_adapters, check_variants
from olmo2_export.package.weight_choice import Options
from olmo2_export.weights.checkpoint import Checkpoint
from olmo2_export.weights.merged import adapter_sources, switchable_adapters
from olmo2_export.weights.stored_names import EMBEDDING, HEAD
from runtimes.manifest import MANIFEST_NAME, Manifest, Source, SwitchableAdapter
from runtimes.manifest_file import to_document
from runtimes.ort.adapters import write_adapter
from runtimes.sealed import FORMAT_VERSION, hash_files, seal

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
    default_variant: str | None = None,
) -> Manifest:
    """Export a checkpoint to a package folder.

    Args:
        checkpoint: what `open_checkpoint` or `open_merged` found.
        out: the folder to write; it must not exist, or be empty, unless `force`.
        variants: names out of `VARIANTS`.
        options: how quantised variants are made; None: the defaults.
        force: replace the package that is there.
        graphs_of: a package of another revision of the model, of the same variants and options: its graph files are
            taken as they are and only the weights are written, with the same result.
        default_variant: what onnxruntime-genai and transformers.js open where none is named; None: fp32, or the first.

    Raises:
        ConfigError, CheckpointError: the checkpoint cannot be exported; nothing was written.
        UsageError: unknown variant or hidden state, or a folder that must not be replaced.
        ResourceError: the disk cannot hold the package, said before anything is written, or another export holds the
            folder.
        FusionError: the traced graph is not the expected one.
    """
    options = options or Options()
    config = ModelConfig.from_json(checkpoint.folder / "config.json").giving(
        options.hidden_states, inputs_embeds=options.inputs_embeds
    )
    check_variants(variants, config, options)
    adapters = switchable_adapters(checkpoint)
    if adapters:
        check_takes_adapters(config)
    linears = adapted_linears(adapters, operations(config))
    check_import(checkpoint, variants, options)
    with replace_folder(out, force=force) as staging, ThreadPoolExecutor(max_workers=1) as pool:
        check_room(checkpoint, config, out, variants, options)
        check_weights(checkpoint, config)
        sources = pool.submit(hash_files, checkpoint.folder, checkpoint.files)  # meanwhile, the trace
        write_texts(checkpoint.folder, config, staging, list(dict.fromkeys(variants)), default_variant)
        writer = VariantWriter(checkpoint, config, staging, options, graphs_of, linears)
        written = {name: writer.write(name) for name in dict.fromkeys(variants)}
        shutil.rmtree(staging / SPOOL, ignore_errors=True)
        for adapter in adapters:
            write_adapter(staging / _adapter_file(adapter.name), lora_tensors(adapter))
        files = sorted(p.relative_to(staging).as_posix() for p in staging.rglob("*") if p.is_file())
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            exporter_version=importlib.metadata.version("olmo2-export"),
            source=Source(
                checkpoint.model,
                checkpoint.kind,
                checkpoint.revision,
                sources.result(),
                adapter_sources(checkpoint),
                checkpoint.quantized.title if checkpoint.quantized else None,
            ),
            model=config.spec,
            variants=written,
            libraries=_libraries(),
            files=hash_files(staging, files),
            adapters={
                adapter.name: SwitchableAdapter(_adapter_file(adapter.name), adapter.source) for adapter in adapters
            },
        )
        (staging / MANIFEST_NAME).write_bytes(seal(to_document(manifest)))
    return manifest


def _adapter_file(name: str) -> str:
    return f"adapters/{name}.onnx_adapter"


def check_weights(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Check that the checkpoint holds exactly the tensors of the model, of the right shapes, all finite.

    Raises:
        CheckpointError: naming every tensor that is not as it must be.
    """
    expected = tensor_shapes(operations(config))
    if config.tie_word_embeddings:  # never of a classifier
        del expected[HEAD]
        checkpoint.validate(expected, aliases={HEAD: EMBEDDING})
    else:
        checkpoint.validate(expected)


def _libraries() -> dict[str, str]:
    """Return the versions of what makes a package; of the two builds of onnxruntime, what is there."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
