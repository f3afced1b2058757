"""The sections of a report that say how fast and large a package is, and what it is made of."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import PurePath

from olmo2_export.graphs.predicted import cache_bytes
from olmo2_export.report import plots
from olmo2_export.report.bench_file import Bench, Ratio
from olmo2_export.report.data import ReportData
from olmo2_export.report.parts import FAILED, NONE, Drawing, Section, Table, figures, number, rate, seconds, sized
from olmo2_export.summary.text import short_name, size

_MOST_GRAPHS = 4  # in one figure
_CONTEXTS = (1024, 4096)  # tokens


def throughput(data: ReportData) -> Section:
    """What a benchmark measured."""
    bench = data.bench
    if bench is None:
        said = "Not measured: give the JSON of olmo2-export bench with --bench."
        return Section("throughput", "Throughput", (said,))
    batch = min(p.batch_size for c in bench.contenders.values() for p in c.points) if _points(bench) else 1
    series = {}
    for name, contender in bench.contenders.items():
        points = [p for p in contender.points if p.batch_size == batch]
        if points:
            series[name] = plots.Series(
                tuple(p.context_tokens for p in points),
                tuple(p.decode_tokens_per_s for p in points),
                tuple(p.prefill_tokens_per_s for p in points),
            )
    columns = (
        "contender",
        "context",
        "batch",
        "TTFT",
        "ITL p50",
        "ITL p99",
        "decode",
        "prefill",
        "moved per token",
        "of bandwidth",
    )
    rows = [
        (
            name,
            f"{p.context_tokens:,}",
            str(p.batch_size),
            seconds(p.ttft_s),
            seconds(p.itl_p50_s),
            seconds(p.itl_p99_s),
            rate(p.decode_tokens_per_s),
            rate(p.prefill_tokens_per_s),
            sized(p.bytes_per_token),
            figures(p.bandwidth_share, ".0%"),
        )
        for name, contender in bench.contenders.items()
        for p in contender.points
    ]
    whole = [
        (name, seconds(c.load_s), sized(c.peak_memory_bytes), sized(c.disk_bytes))
        for name, c in bench.contenders.items()
    ]
    machine = ", ".join(_machine(bench))
    text = (f"Package {bench.package}; {machine}.",)
    drawings: tuple[Drawing, ...] = ()
    if series:
        caption = f"Tokens per second at batch {batch}, over the tokens in the context. Dashed: peers."
        drawings = (Drawing("throughput", "Throughput against context", caption, plots.throughput_figure(series)),)
    tables = (
        Table("Per contender", ("contender", "load", "peak memory", "on disk"), tuple(whole)),
        *_ratios(bench),
        Table("Per context", columns, tuple(rows), folded=len(rows) > 12),
    )
    return Section("throughput", "Throughput", text, drawings, tables, _notes(bench))


def _notes(bench: Bench) -> tuple[str, ...]:
    """Return what a reader must know of the contenders, and who is missing."""
    said = [f"{name}: {contender.note}" for name, contender in bench.contenders.items() if contender.note]
    return (*bench.left_out, *said, *(f"{FAILED}: {failure}" for failure in bench.failures))


def _points(bench: Bench) -> int:
    return sum(len(c.points) for c in bench.contenders.values())


def _machine(bench: Bench) -> Iterable[str]:
    known = {name: value for name, value in bench.machine.items() if value is not None}
    for name, value in known.items():
        if name.endswith("_bytes_per_s"):
            what = name.removesuffix("_bytes_per_s")
            source = f" ({known[f'{what}_from']})" if f"{what}_from" in known else ""
            yield f"{what.replace('_', ' ')} {sized(number(value))}/s{source}"
        elif f"{name.removesuffix('_from')}_bytes_per_s" not in known:
            yield f"{name.replace('_', ' ')} {value}"


def _ratios(bench: Bench) -> list[Table]:
    """Return the ratios as a table: a row of each pair and phase, a column of each context and batch size."""
    points = sorted({(r.context_tokens, r.batch_size) for r in bench.ratios})
    lines: dict[tuple[str, str, str], dict[tuple[int, int], str]] = {}
    for r in bench.ratios:
        sign = " =" if r.like_for_like else ""
        row = lines.setdefault((r.metric.partition("_")[0], r.ours, r.peer + sign), {})
        row[r.context_tokens, r.batch_size] = _quotient(r)
    columns = ("phase", "ours", "peer", *(f"{context:,} tokens, batch {batch}" for context, batch in points))
    rows = tuple((*key, *(row.get(point, NONE) for point in points)) for key, row in lines.items())
    title = "Ours / peer: quotient of the medians (least to largest of one repeat); = weights of as many bits"
    return [Table(title, columns, rows, folded=len(rows) > 12)] if rows else []


def _quotient(ratio: Ratio) -> str:
    spread = f" ({ratio.low:.2f} to {ratio.high:.2f})" if not math.isnan(ratio.low + ratio.high) else ""
    return f"{figures(ratio.median, '.2f')}{spread}"


def memory(data: ReportData) -> Section:
    """Weights, KV cache and peak."""
    peaks = {}
    if data.bench is not None and PurePath(data.bench.package).name == data.package.package.resolve().name:
        peaks = {name: contender.peak_memory_bytes for name, contender in data.bench.contenders.items()}
    bars, rows = {}, []
    for v in data.variants:
        cache = v.summary.variant.kv_cache
        contexts = sorted({min(c, cache.max_cache_length) for c in _CONTEXTS})
        weights = sum(graph.nbytes for graph in v.summary.graphs)
        held = {tokens: cache_bytes(cache, tokens) for tokens in contexts}
        peak = peaks.get(f"ours {v.name}", math.nan)
        bars[v.name] = plots.Memory(weights, held, None if math.isnan(peak) else round(peak))
        rows.append(
            (
                v.name,
                size(weights),
                cache.form,
                size(v.summary.cache_bytes_per_token),
                "; ".join(f"{n:,}: {size(b)}" for n, b in held.items()),
                sized(peak),
            )
        )
    caption = (
        "From the graphs: the bytes of their tensors, and of keys and values of one row. A peak is from a benchmark "
        "of this package."
    )
    drawing = Drawing("memory", "Memory", caption, plots.memory_figure(bars))
    columns = ("variant", "weights", "KV cache", "a token", "a row of so many tokens", "peak measured")
    return Section("memory", "Memory", (), (drawing,), (Table("", columns, tuple(rows)),))


def operators(data: ReportData) -> Section:
    """Operators before and after fusion."""
    package = data.package
    graphs, rows = [], []
    for v in data.variants:
        for index, (graph, changes) in enumerate(zip(v.summary.graphs, v.summary.changes, strict=True)):
            label = f"{v.name} prefill" if index else v.name
            if graph.ops != package.portable and not index:
                graphs.append((label, graph.ops))
            new = ", ".join(f"{c.after} {c.op.split('::')[-1]}" for c in changes if not c.before) or NONE
            gone = ", ".join(f"{c.before} {c.op}" for c in changes if not c.after) or NONE
            rows.append((label, graph.graph, f"{sum(package.portable.values())}", f"{graph.nodes}", new, gone))
    text = (
        f"Every graph begins as the portable one, of standard operators ({package.portable_from}); fusion replaces "
        "groups of them by one. A prefill graph, which quantises its inputs itself, is in the table alone.",
    )
    drawings: tuple[Drawing, ...] = ()
    if graphs:
        alike: dict[tuple[tuple[str, int], ...], list[str]] = {}
        for label, ops in graphs:
            alike.setdefault(tuple(sorted(ops.items())), []).append(label)
        shown = {", ".join(labels): dict(ops) for ops, labels in list(alike.items())[:_MOST_GRAPHS]}
        caption = "Before fusion (grey) and after; what occurs three times or less is under all others."
        drawings = (
            Drawing(
                "operators", "Operators before and after fusion", caption, plots.ops_figure(package.portable, shown)
            ),
        )
    columns = ("graph", "file", "nodes before", "nodes after", "new operators", "gone")
    return Section("operators", "The graphs", text, drawings, (Table("", columns, tuple(rows)),))


def package(data: ReportData) -> Section:
    """Files, dtypes, bits and engines."""
    package = data.package
    groups = {
        (f"{v.name} prefill" if index else v.name): {g.dtype: g.nbytes for g in graph.weights}
        for v in data.variants
        for index, graph in enumerate(v.summary.graphs)
    }
    total = sum(entry.size for entry in package.files.values())
    dtypes = _dtypes_of_files(data)
    files = [
        (name, f"{entry.size:,}", f"{entry.size / max(total, 1):.1%}", dtypes.get(name, ""), entry.sha256[:16])
        for name, entry in package.files.items()
    ]
    files.append(("all", f"{total:,}", "", "", ""))
    largest = [
        (
            v.name,
            f"{short_name(t.name)}{f' x {t.count}' if t.count > 1 else ''}",
            t.dtype,
            "x".join(map(str, t.shape)),
            f"{t.nbytes:,}",
        )
        for v in data.variants
        for t in v.summary.graphs[0].largest[:3]
    ]
    bits = [
        (
            v.name,
            p.name,
            "; ".join(p.schemes),
            f"{p.nbytes:,}",
            f"{p.bits_per_weight:.2f}",
            figures(p.worst_nmse if p.worst_nmse is not None else math.nan, ".1e"),
        )
        for v in data.variants
        if v.summary.variant.quantization is not None
        for p in v.summary.graphs[0].parts
    ]
    engines = [
        (
            e.name,
            e.plan,
            size(e.nbytes),
            f"{e.backend} {e.backend_version}",
            ", ".join(e.compute_capabilities),
            f"{e.max_batch_size} x {e.max_cache_length:,}",
            " / ".join(str(e.kernels.get(p, NONE)) for p in ("decode", "prefill")),
        )
        for e in package.engines
    ]
    drawing = Drawing(
        "weights",
        "Tensors by dtype",
        "Bytes of each graph's tensors: codes, scales, norms, tables.",
        plots.weights_figure(groups),
    )
    tables = [
        Table("Files", ("file", "bytes", "share", "dtypes", "sha256"), tuple(files)),
        Table("Largest tensors", ("variant", "tensor", "dtype", "shape", "bytes each"), tuple(largest), folded=True),
    ]
    if bits:
        tables.append(
            Table(
                "Quantisation per layer",
                ("variant", "part", "stored as", "bytes", "bits/weight", "worst NMSE"),
                tuple(bits),
                folded=True,
            )
        )
    if engines:
        tables.append(
            Table(
                "Engines",
                ("engine", "plan", "size", "needs", "compute capability", "rows x cache", "kernels: decode / prefill"),
                tuple(engines),
            )
        )
    return Section(
        "package",
        "Package contents",
        (f"{len(package.files)} files, {size(total)}, each as the manifest says.",),
        (drawing,),
        tuple(tables),
    )


def _dtypes_of_files(data: ReportData) -> dict[str, str]:
    """Return for each data file of a graph the dtypes in it, largest first."""
    found = {}
    for v in data.variants:
        entry = v.summary.variant
        data_files = [entry.data, *([entry.prefill.data] if entry.prefill else [])]
        for graph, names in zip(v.summary.graphs, data_files, strict=True):
            for name in names:
                found[name] = ", ".join(g.dtype for g in graph.weights if g.share >= 1e-3)
    return found
