"""Say in words what a package holds: the tables of `inspect`, and the lines that `export` and `build` print."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from itertools import groupby

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from olmo2_export.graphs.predicted import cache_bytes, cache_bytes_per_token
from olmo2_export.summary.engine import EngineSummary
from olmo2_export.summary.graph import GraphSummary, OpChange, Part
from olmo2_export.summary.package import PackageSummary, VariantSummary
from runtimes.command import printable
from runtimes.errors import first_names
from runtimes.manifest import Engine, Variant

WIDTH = 100
"""columns, where the output is no terminal"""


def plain(summary: PackageSummary, width: int = WIDTH) -> str:
    """Return what `inspect` prints where its output is no terminal: no colours, no spaces at the ends of lines."""
    buffer = io.StringIO()
    Console(file=buffer, width=width, color_system=None, highlight=False).print(render(summary))
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())


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
    for entry in variant.each_graph:
        graph, quality = entry.graph, entry.quality
        if quality is None:
            continue
        rise = quality.perplexity / quality.reference_perplexity - 1
        perplexity = f", perplexity {quality.perplexity:.3f} ({rise:+.2%})" if quality.tokens_from == "text" else ""
        lines.append(
            f"{graph}: KL {quality.kl_mean:.2g} (p99 {quality.kl_p99:.2g}), top-1 {quality.top1:.1%}{perplexity} "
            f"on {quality.tokens} tokens of {quality.tokens_from}"
        )
    return [*lines, *_cache_lines(variant)]


def _cache_lines(variant: Variant) -> list[str]:
    """Say which KV caches can be chosen from, and why one is not the default."""
    if not variant.other_caches:
        return []
    names = [own.kv_cache.name for own in variant.each_cache]
    lines = [f"KV cache {names[0]} where none is named, of {', '.join(names)}"]
    for other in variant.other_caches:
        if other.missed:
            lines.append(f"KV cache {other.kv_cache.name} misses the quality gate: {'; '.join(other.missed)}")
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


def render(summary: PackageSummary) -> RenderableType:
    """Return what `inspect` prints."""
    blocks: list[RenderableType] = [_head(summary), *_overview(summary)]
    blocks += [block for variant in summary.variants for block in _variant(variant, summary)]
    blocks += [block for engine in summary.engines for block in _engine(engine)]
    return Group(*blocks, *_files(summary), *_parity(summary))


def size(nbytes: int) -> str:
    """Return a size for people: B, kB, MB or GB of powers of ten."""
    value, unit = float(nbytes), "B"
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:,.1f} {unit}"


def short_name(name: str) -> str:
    """Return the name of a merged weight without repeating what its parts share: model.layers.0.mlp.gate+up_proj..."""
    parts = name.split("+")
    stem = parts[0].rsplit(".", 2)[0]
    leaves = [part.removeprefix(f"{stem}.").split(".", 1) for part in parts]
    if len(parts) == 1 or any(len(leaf) < 2 for leaf in leaves):
        return name
    return f"{stem}.{'+'.join(leaf[0] for leaf in leaves)}.{leaves[-1][1]}"


def _head(summary: PackageSummary) -> RenderableType:
    m, manifest = summary.model, summary.manifest
    source = manifest.source
    revision = f" @ {source.revision}" if source.revision else ""
    merged = "".join(f" + {adapter.name}" for adapter in source.adapters)
    total = sum(entry.size for entry in summary.files.values())
    rows = [
        ("source", f"{source.model}{revision}{merged} ({source.kind})"),
        *([("quantised", source.quantized)] if source.quantized else []),
        (
            "model",
            f"{m.model_type}: {m.num_hidden_layers} layers, hidden {m.hidden_size}, {m.num_attention_heads} heads "
            f"({m.num_key_value_heads} KV) of {m.head_dim}, vocabulary {m.vocab_size}, "
            f"context {m.max_position_embeddings}",
        ),
        ("made by", ", ".join(f"{name} {version}" for name, version in manifest.libraries.items())),
        ("holds", f"{len(summary.files)} files, {size(total)}, every file intact"),
    ]
    title = f"{summary.package}: olmo2-export {manifest.exporter_version}, format {manifest.format_version}"
    return Group(Text(printable(title), style="bold"), _facts(rows))


def _overview(summary: PackageSummary) -> list[RenderableType]:
    """A row per variant and per engine."""
    verified = {v.variant: v for v in summary.parity if not v.stale}
    columns = (("weights", "<"), ("nodes", ">"), ("on disk", ">"), ("bits/weight", ">"), ("KV a token", ">"))
    table = _table("variant", *columns, ("verified", "<"))
    for v in summary.variants:
        on_disk = sum(summary.files[name].size for name in v.variant.files)
        parts = v.graphs[0].parts
        bits = 8 * sum(p.nbytes for p in parts) / max(sum(p.weights for p in parts), 1)
        verdict = verified.get(v.variant.name)
        said = "no" if verdict is None else f"{'passed' if verdict.passed else 'FAILED'} on {verdict.backend}"
        nodes = " + ".join(str(graph.nodes) for graph in v.graphs)
        cells = (v.variant.name, v.variant.precision, nodes, size(on_disk), f"{bits:.2f}")
        _row(table, *cells, size(v.cache_bytes_per_token), said)
    for engine in summary.engines:
        kernels = f"{engine.kernels['decode']} kernels" if "decode" in engine.kernels else ""
        _row(table, f"engine {engine.name}", engine.precision, kernels, size(engine.nbytes), "", "", "")
    return _block(table)


def _variant(summary: VariantSummary, package: PackageSummary) -> list[RenderableType]:
    entry, kv = summary.variant, summary.variant.kv_cache
    length = kv.max_cache_length if kv.form == "static" else "length"
    bits = f", {kv.quantization.bits} bits" if kv.quantization else ""
    kept = f", as {sum(map(bool, kv.windows))} layers keep {max(kv.windows):,} tokens alone" if kv.windows else ""
    facts = [("graph", f"{entry.graph}, {entry.precision}, opset {entry.opset}")]
    if entry.prefill:
        facts.append(("prefill", f"{entry.prefill.graph}, for steps of {entry.prefill.min_rows} tokens and more"))
    if entry.portable:
        facts.append(("portable", f"{entry.portable.graph}, the same weights for other runtimes: docs/interop.md"))
    if entry.min_onnxruntime is not None:
        prefill = entry.prefill.min_onnxruntime if entry.prefill else None
        newer = f", its prefill graph {prefill}" if prefill not in (None, entry.min_onnxruntime) else ""
        facts.append(("needs", f"onnxruntime {entry.min_onnxruntime} or newer{newer}"))
    facts.append(
        (
            "KV cache",
            f"{kv.form}, {kv.dtype}{bits}: {kv.num_layers} layers of 2 x [batch, {kv.num_key_value_heads}, {length}, "
            f"{kv.stored_head_dim}]; {size(summary.cache_bytes_per_token)} a token, "
            f"{size(cache_bytes(kv, kv.max_cache_length))} for {kv.max_cache_length:,} tokens{kept}",
        )
    )
    for other in entry.each_cache[1:]:
        a_token = size(cache_bytes_per_token(other.kv_cache))
        facts.append((f"or {other.kv_cache.name}", f"{other.graph}: {a_token} a token, on the same weights"))
    facts += [("quantised" if i == 0 else "", line) for i, line in enumerate(quantization_lines(entry))]
    islands = enumerate(entry.float32_islands.items())
    facts += [("float32" if i == 0 else "", f"{name}: {reason}") for i, (name, reason) in islands]
    blocks: list[RenderableType] = [_title(f"variant {entry.name}"), _facts(facts)]
    table = _table("input / output", ("x", ">"), ("dtype", "<"), ("shape", "<"), ("meaning", "<"))
    table.columns[0].no_wrap = True
    for row in summary.io:
        name = f"{'in ' if row.direction == 'input' else 'out'} {row.name}"
        _row(table, name, row.count, row.dtype, _shape(row.shape), row.meaning)
    blocks += _block(table)
    for graph, changes in zip(summary.graphs, summary.changes, strict=True):
        blocks += _graph(graph, changes, package, several=len(summary.graphs) > 1)
    return blocks


def _graph(
    graph: GraphSummary, changes: Sequence[OpChange], package: PackageSummary, *, several: bool
) -> list[RenderableType]:
    same = graph.ops == package.portable
    if same:
        said = f"{graph.graph}: {graph.nodes} nodes; this is the portable graph, of standard operators alone"
        ops = _table("operator", ("nodes", ">"))
        for op, count in graph.ops.items():
            _row(ops, op, count)
    else:
        new = ", ".join(f"{c.after} {c.op}" for c in changes if not c.before) or "none"
        where = "" if package.portable_from.endswith(".onnx") else f" ({package.portable_from})"
        before = sum(package.portable.values())
        said = f"{graph.graph}: {before} nodes of the portable graph{where} became {graph.nodes}; new: {new}"
        ops = _table("operator", ("portable", ">"), ("this graph", ">"), ("change", ">"))
        for c in changes:
            style = "bold" if not c.before else "dim" if not c.after else ""
            _row(ops, c.op, c.before, c.after, _change(c), style=style)
    weights = _table("dtype", ("tensors", ">"), ("elements", ">"), ("bytes", ">"), ("share", ">"))
    for group in graph.weights:
        _row(
            weights,
            group.dtype,
            *(f"{n:,}" for n in (group.tensors, group.elements, group.nbytes)),
            _share(group.share),
        )
    _row(weights, "all", f"{graph.tensors:,}", "", f"{graph.nbytes:,}", "", style="bold")
    largest = _table("largest tensors", ("x", ">"), ("dtype", "<"), ("shape", "<"), ("bytes each", ">"), ("share", ">"))
    for tensor in graph.largest:
        numbers = (f"{tensor.nbytes:,}", _share(tensor.share))
        _row(largest, short_name(tensor.name), tensor.count, tensor.dtype, _shape(tensor.shape), *numbers)
    # with two graphs each says which it is; with one the facts above have said so
    title = Padding(Text(printable(said), style="italic" if several else ""), (1, 0, 0, 2))
    return [title, *_block(ops, weights, largest, _parts(graph.parts))]


def _change(change: OpChange) -> str:
    if not change.before or not change.after:
        return "gone" if change.before else "new"
    return f"{change.after - change.before:+d}" if change.after != change.before else "="


def _parts(parts: Iterable[Part]) -> Table:
    """A row per layer; neighbours that are stored alike share one."""
    columns = (("stored as", "<"), ("weights", ">"), ("bytes", ">"), ("bits/weight", ">"), ("worst NMSE", ">"))
    table = _table("matrices of", *columns)
    for _, group in groupby(parts, key=lambda p: (p.name.split()[0], p.schemes, p.nbytes, p.weights)):
        alike = list(group)
        first, last = alike[0], alike[-1]
        name = first.name if len(alike) == 1 else f"layers {first.name.split()[1]}-{last.name.split()[1]}, each"
        errors = [p.worst_nmse for p in alike if p.worst_nmse is not None]
        numbers = (f"{first.weights:,}", f"{first.nbytes:,}", f"{first.bits_per_weight:.2f}")
        _row(table, name, "\n".join(first.schemes), *numbers, f"{max(errors):.2g}" if errors else "")
    return table


def _engine(engine: EngineSummary) -> list[RenderableType]:
    rows = "batch 1" if engine.max_batch_size == 1 else f"batch up to {engine.max_batch_size}"
    can = [f"{flag.replace('_', ' ')}: {'yes' if built else 'no'}" for flag, built in engine.capabilities.items()]
    facts = [
        ("plan", f"{engine.plan}, {size(engine.nbytes)}, {engine.precision}, compiled from {engine.variant}"),
        ("runs on", f"compute capability {', '.join(engine.compute_capabilities)}"),
        ("needs", f"{engine.backend} {engine.backend_version}"),
        ("built as", ", ".join(can)),
        (
            "holds",
            f"profile {engine.profile}: {rows}, cache {engine.max_cache_length} tokens, "
            f"prefill of {engine.prefill_chunk} tokens; {engine.in_place} outputs written in place of inputs",
        ),
        ("layers", ", ".join(f"{n} {kind}" for kind, n in engine.layers.items()) or "not counted"),
    ]
    if engine.slow:
        facts.append(("slow", f"{len(engine.slow)} kernels only dequantise a weight: {first_names(engine.slow)}"))
    profiles = _table("profile", ("input", "<"), ("min", "<"), ("opt", "<"), ("max", "<"))
    for name, ranges in engine.profiles.items():
        for index, r in enumerate(ranges):
            _row(profiles, name if index == 0 else "", r.name, *(_shape(shape) for shape in (r.min, r.opt, r.max)))
    kernels = _table("kernels of a step", ("decode", ">"), ("prefill", ">"))
    for row in engine.kernel_table:
        _row(kernels, row.kind, row.decode, row.prefill)
    if engine.kernels:
        _row(kernels, "all", *(engine.kernels.get(p, 0) for p in ("decode", "prefill")), style="bold")
    else:
        _row(kernels, "plans of this version do not say", "", "")
    return [_title(f"engine {engine.name}"), _facts(facts), *_block(profiles, kernels)]


def _files(summary: PackageSummary) -> list[RenderableType]:
    total = sum(entry.size for entry in summary.files.values())
    table = _table("file", ("bytes", ">"), ("share", ">"), ("sha256", "<"))
    for name, entry in summary.files.items():
        _row(table, name, f"{entry.size:,}", _share(entry.size / max(total, 1)), entry.sha256[:16])
    _row(table, f"{len(summary.files)} files", f"{total:,}", "", "", style="bold")
    return [_title("files"), *_block(table)]


def _parity(summary: PackageSummary) -> list[RenderableType]:
    if summary.parity_reference is None:
        return [_title(f"parity: never verified; run: olmo2-export verify {summary.package} --reference MODEL")]
    lines = []
    for v in summary.parity:
        if v.stale:
            said = "of an earlier graph; verify it again"
        else:
            verdict = "passed" if v.passed else "FAILED"
            said = f"{verdict} on {v.backend}: worst error {v.worst_error_ratio:.2f} x PyTorch's own"
        lines.append(printable(f"{v.variant:<8} {said}"))
    return [_title(f"parity against {summary.parity_reference}"), Padding(Text("\n".join(lines)), (0, 0, 0, 2))]


def _title(text: str) -> RenderableType:
    return Padding(Text(printable(text), style="bold"), (1, 0, 0, 0))


def _facts(rows: Iterable[tuple[str, str]]) -> RenderableType:
    grid = Table.grid(padding=(0, 1))
    grid.add_column(style="dim", no_wrap=True, min_width=9)
    grid.add_column(overflow="fold")
    for name, value in rows:
        grid.add_row(name, Text(printable(value)))
    return Padding(grid, (0, 0, 0, 2))


def _table(first: str, *columns: tuple[str, str]) -> Table:
    """Return an empty table; `<` aligns a column left and `>` right, and those are not wrapped."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column(first, overflow="fold")
    for name, side in columns:
        table.add_column(name, justify="right" if side == ">" else "left", no_wrap=side == ">", overflow="fold")
    return table


def _row(table: Table, *cells: object, style: str = "") -> None:
    """Add a row of plain text: a `[` in a name or shape is no markup."""
    table.add_row(*(Text("\n".join(map(printable, str(cell).split("\n")))) for cell in cells), style=style)


def _share(share: float) -> str:
    return f"{share:.1%}" if share >= 5e-4 else "< 0.1%"


def _shape(shape: Sequence[int | str]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _block(*tables: Table) -> list[RenderableType]:
    return [Padding(table, (1, 0, 0, 2)) for table in tables]
