"""Say in words what a package holds, after checking every file of it against its manifests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from runtimes.errors import IntegrityError, PackageError
from runtimes.manifest import (
    PARITY_NAME,
    Engine,
    Manifest,
    TensorSpec,
    TrtManifest,
    Variant,
    load_manifest,
    load_trt_manifest,
    package_checksum,
)
from runtimes.sealed import FileEntry, check_files, read_sealed


def summarize(package: Path) -> str:
    """Check and describe a package.

    Args:
        package: the package folder.

    Returns:
        The text that the command line prints.

    Raises:
        PackageNotFoundError: it is none.
        IntegrityError: naming every file that is not the one that was written.
    """
    manifest = load_manifest(package)
    trt = load_trt_manifest(package)
    variants = manifest.variants | (trt.variants if trt else {})
    files = manifest.files | (trt.files if trt else {})
    check_files(package, manifest.files, manifest.files.keys() | _listed(manifest))
    if trt:
        check_files(package, trt.files, trt.files.keys() | _listed(trt), remedy=f"run: olmo2-export build {package}")
    sections = [_model(package, manifest), *map(_variant, variants.values())]
    sections += [engine_lines(engine, files[engine.plan].size) for engine in (trt.engines.values() if trt else ())]
    sections += [_files(files), _parity(package, {name: files[v.graph].sha256 for name, v in variants.items()})]
    return "\n\n".join("\n".join(lines) for lines in sections)


def quantization_lines(variant: Variant) -> list[str]:
    """Describe how a variant was quantised and what that costs; nothing if it was not."""
    quantization = variant.quantization
    if quantization is None or variant.quality is None:
        return []
    worst, error = max(quantization.tensors.items(), key=lambda item: item[1].nmse)
    lines = [
        f"{quantization.recipe}: {quantization.bits_per_weight:.2f} bits per weight; largest error {error.nmse:.2g} of "
        f"the mean square, in {worst}"
    ]
    graphs = {variant.graph: variant.quality}
    if variant.prefill is not None:
        graphs[variant.prefill.graph] = variant.prefill.quality
    for graph, quality in graphs.items():
        rise = quality.perplexity / quality.reference_perplexity - 1
        perplexity = f", perplexity {quality.perplexity:.3f} ({rise:+.2%})" if quality.tokens_from == "text" else ""
        lines.append(
            f"{graph}: KL {quality.kl_mean:.2g} (p99 {quality.kl_p99:.2g}), top-1 {quality.top1:.1%}{perplexity} "
            f"on {quality.tokens} tokens of {quality.tokens_from}"
        )
    return lines


def engine_lines(engine: Engine, size: int) -> list[str]:
    """Describe an engine.

    Args:
        engine: its entry in the manifest.
        size: of the plan, in bytes.
    """
    rows = "batch 1" if engine.max_batch_size == 1 else f"batch up to {engine.max_batch_size}"
    lines = [
        f"engine {engine.name}: {engine.plan}, {engine.precision}, {engine.backend} {engine.backend_version}, "
        f"{size / 1e6:,.1f} MB",
        f"  for      compute capability {', '.join(engine.compute_capabilities)}; "
        f"{', '.join(engine.flags) or 'no flags'}",
        f"  holds    profile {engine.profile}: {rows}, cache {engine.max_cache_length} tokens, "
        f"prefill of {engine.prefill_chunk} tokens",
        f"  layers   {', '.join(f'{n} {kind}' for kind, n in engine.layer_counts.items())}",
    ]
    for name, ranges in engine.profiles.items():
        ids = next(r for r in ranges if r.name == "input_ids")
        kernels = f", {engine.kernels[name]} kernels" if name in engine.kernels else ""
        lines.append(f"  {name:<8} input_ids {list(ids.min)} .. {list(ids.opt)} .. {list(ids.max)}{kernels}")
    return lines


def _listed(manifest: Manifest | TrtManifest) -> set[str]:
    """Return the files that the variants name, which the table of files must have."""
    return {name for variant in manifest.variants.values() for name in variant.files}


def _model(package: Path, manifest: Manifest) -> list[str]:
    m, source = manifest.model, manifest.source
    revision = f" @ {source.revision}" if source.revision else ""
    return [
        f"{package}: olmo2-export {manifest.exporter_version}, format {manifest.format_version}, every file intact",
        f"  source   {source.model}{revision} ({source.kind})",
        f"  model    {m.model_type}: {m.num_hidden_layers} layers, hidden {m.hidden_size}, "
        f"{m.num_attention_heads} heads ({m.num_key_value_heads} KV) of {m.head_dim}, "
        f"vocabulary {m.vocab_size}, context {m.max_position_embeddings}",
        f"  made by  {', '.join(f'{name} {version}' for name, version in manifest.libraries.items())}",
    ]


def _variant(variant: Variant) -> list[str]:
    kv = variant.kv_cache
    counts = ", ".join(f"{n} {op}" for op, n in variant.op_counts.items() if n)
    return [
        f"variant {variant.name}: {variant.graph}, {variant.precision}, opset {variant.opset}",
        f"  ops      {counts}",
        f"  KV cache {kv.form}, {kv.dtype}, {kv.num_layers} layers of 2 x [batch, {kv.num_key_value_heads}, "
        f"{kv.max_cache_length if kv.form == 'static' else 'length'}, {kv.stored_head_dim}]",
        *(f"  {'quantised' if i == 0 else '':<8} {line}" for i, line in enumerate(quantization_lines(variant))),
        *(
            f"  {'float32' if i == 0 else '':<8} {name}: {reason}"
            for i, (name, reason) in enumerate(variant.float32_islands.items())
        ),
        *_io("inputs", variant.inputs),
        *_io("outputs", variant.outputs),
    ]


def _io(title: str, specs: Iterable[TensorSpec]) -> list[str]:
    """One line per tensor; of the KV cache only the first layer."""
    shown = [s for s in specs if "." not in s.name or ".0." in s.name]
    return [f"  {title if i == 0 else '':<8} {s.name:<24} {s.dtype:<8} {list(s.shape)}" for i, s in enumerate(shown)]


def _files(files: Mapping[str, FileEntry]) -> list[str]:
    width = max(len(name) for name in files)
    rows = [f"  {name:<{width}}  {entry.size:>15,}  sha256 {entry.sha256[:16]}" for name, entry in files.items()]
    return [f"{len(files)} files, {sum(entry.size for entry in files.values()):,} bytes", *rows]


def _parity(package: Path, graphs: Mapping[str, str]) -> list[str]:
    path = package / PARITY_NAME
    if not path.is_file():
        return [f"parity: never verified; run: olmo2-export verify {package} --reference MODEL"]
    document = read_sealed(path)
    if document.get("package_checksum") != package_checksum(package):
        raise IntegrityError(f"{path}: of another export; run: olmo2-export verify {package} --reference MODEL")
    try:
        return _verdicts(document, graphs)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PackageError(f"{path}: not a parity report ({error}); verify the package again") from error


def _verdicts(document: Mapping[str, Any], graphs: Mapping[str, str]) -> list[str]:
    lines = [f"parity against {document['reference']['model']}"]
    for name, report in document["variants"].items():
        if report["graph_sha256"] != graphs.get(name):
            lines.append(f"  {name:<8} of an earlier graph; verify it again")
            continue
        worst = max((float(c["error_ratio"]) for c in report["cases"]), default=float("nan"))
        verdict = "passed" if report["passed"] else "FAILED"
        lines.append(f"  {name:<8} {verdict} on {report['backend']}: worst error {worst:.2f} x PyTorch's own")
    return lines
