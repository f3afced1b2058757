"""Arrange what was gathered as a page: sections of words, figures and tables, for HTML and markdown alike."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from matplotlib.figure import Figure

from olmo2_export import plots
from olmo2_export.bench_file import Bench
from olmo2_export.report_data import ReportData, VariantData, number
from olmo2_export.summary import short_name, size

PASSED, FAILED, UNKNOWN = "passed", "FAILED", "not verified"
FIGURES = ("layers", "logits", "kl", "perplexity", "throughput", "memory", "operators", "weights")
"""the names of all figures; a page has those for which there is data"""

NONE = "\N{EN DASH}"
"""stands where there is no number"""

_MOST_GRAPHS = 4  # in one figure
_CONTEXTS = (1024, 4096)  # tokens
_METRICS = (
    ("max_abs", "max abs", ".1e"),
    ("nmse", "NMSE", ".1e"),
    ("relative_error", "rel. error", ".1e"),
    ("error_ratio", "err / PyTorch", ".2f"),
    ("top1", "top-1", ".1%"),
    ("top5", "top-5", ".1%"),
    ("top10", "top-10", ".1%"),
    ("kl_mean", "KL mean", ".1e"),
    ("kl_p99", "KL p99", ".1e"),
    ("kl_max", "KL max", ".1e"),
)


@dataclass(frozen=True)
class Drawing:
    """One figure."""

    name: str
    """out of `FIGURES`"""
    title: str
    caption: str
    figure: Figure


@dataclass(frozen=True)
class Grid:
    """One table."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    folded: bool = False
    """long, so that the page shows it when asked"""


@dataclass(frozen=True)
class Section:
    """One part of the page."""

    name: str
    """its anchor"""
    title: str
    text: tuple[str, ...] = ()
    drawings: tuple[Drawing, ...] = ()
    grids: tuple[Grid, ...] = ()


def sections(data: ReportData) -> tuple[Section, ...]:
    """Return the page, in its order."""
    return (
        _verdicts(data),
        _layers(data),
        _logits(data),
        _perplexity(data),
        _throughput(data),
        _memory(data),
        _operators(data),
        _package(data),
        _gates(data),
        _cases(data),
    )


def figures(value: float, form: str) -> str:
    """Return a number in a format; a dash where there is none."""
    if math.isnan(value):
        return NONE
    if form.endswith("e"):
        if value == 0:
            return "0"
        mantissa, _, exponent = f"{value:{form}}".partition("e")
        return f"{mantissa}e{int(exponent)}" if exponent else mantissa
    return f"{value:{form}}"


def _verdicts(data: ReportData) -> Section:
    package = data.package
    columns = (
        "variant",
        "backend",
        "kernel parity",
        "quality",
        "worst error / PyTorch",
        "KL mean",
        "top-1",
        "perplexity",
        "bits/weight",
        "on disk",
    )
    rows, missing = [], []
    for v in data.variants:
        parts = v.summary.graphs[0].parts
        bits = 8 * sum(p.nbytes for p in parts) / max(sum(p.weights for p in parts), 1)
        on_disk = sum(package.files[name].size for name in v.summary.variant.files)
        change = (v.parity or {}).get("perplexity") or {}
        rise = number(change.get("relative"))
        rows.append(
            (
                v.name,
                str((v.parity or {}).get("backend", "")),
                *_two_verdicts(v),
                figures(_worst(v, "error_ratio"), ".2f"),
                figures(float(v.sample.kl.mean()) if v.sample else math.nan, ".1e"),
                figures(v.sample.top1 if v.sample else math.nan, ".1%"),
                _percent(rise),
                f"{bits:.2f}",
                size(on_disk),
            )
        )
        if v.parity is None:
            missing.append(v.name)
    text = [
        "Kernel parity: the graph computes what its weights say. Quality: those weights say what the checkpoint's do. "
        f"KL divergence and top-1 agreement were measured for this page against PyTorch in float32, at {data.tokens:,} "
        f"positions of {'held-out text' if data.tokens_from == 'text' else data.tokens_from}, on the CPU.",
    ]
    if missing:
        flags = " ".join(f"--variant {name}" for name in missing)
        stale = " (an earlier graph was)" if any(v.stale for v in data.variants) else ""
        text.append(
            f"Not verified yet{stale}: {', '.join(missing)}. Run: olmo2-export verify {package.package} "
            f"--reference {data.reference.split('@')[0]} {flags}"
        )
    text += [f"{v.name}: {failure}" for v in data.variants for failure in _failures(v)]
    return Section("verdicts", "Verdicts", tuple(text), (), (Grid("", columns, tuple(rows)),))


def _two_verdicts(v: VariantData) -> tuple[str, str]:
    if v.parity is None:
        return UNKNOWN, UNKNOWN
    whole = bool(v.parity.get("passed"))
    verdicts = v.parity.get("verdicts")
    verdicts = verdicts if isinstance(verdicts, dict) else {}
    kernel, quality = (bool(verdicts.get(name, whole)) for name in ("kernel parity", "quality"))
    return PASSED if kernel else FAILED, PASSED if quality else FAILED


def _failures(v: VariantData) -> list[str]:
    """Return what did not hold, at most five of it."""
    said = []
    for case in (v.parity or {}).get("cases", ()):
        said += [f"{case['mode']}, batch {case['batch_size']}: {failure}" for failure in case.get("failures", ())]
    greedy = (v.parity or {}).get("greedy") or {}
    said += [f"greedy: {failure}" for failure in greedy.get("failures", ())]
    for check in (v.parity or {}).get("checks", ()):
        said += [f"{check['name']}: {failure}" for failure in check.get("failures", ())]
    return [*said[:5], f"and {len(said) - 5} more"] if len(said) > 5 else said


def _worst(v: VariantData, metric: str) -> float:
    values = [number(case.get(metric)) for case in (v.parity or {}).get("cases", ())]
    return max(values, default=math.nan)


def _layers(data: ReportData) -> Section:
    curves, text = {}, []
    for v in data.variants:
        if v.location is None:
            continue
        layers = v.location.layers
        if layers[0].relative == 0 == layers[0].expected:
            layers = layers[1:]  # a lookup is exact, and a logarithm has no 0
        names = tuple(_depth_name(tensor.name, tensor.layer) for tensor in layers)
        curves[v.name] = plots.Depth(names, tuple(t.relative for t in layers), tuple(t.expected for t in layers))
        text.append(f"{v.name}: {v.location.explanation}")
    text += [f"{v.name}: not run: {v.problem}" for v in data.variants if v.problem]
    if not curves:
        return Section("layers", "Parity per layer", tuple(text))
    caption = (
        "RMS error against exact arithmetic on the same weights, over the RMS of the tensor, behind each layer; "
        "dashed: the error that PyTorch makes there at the same precision. A wrong layer lifts its line off that."
    )
    drawing = Drawing("layers", "Relative error over depth", caption, plots.depth_figure(curves))
    return Section("layers", "Parity per layer", tuple(text), (drawing,))


def _depth_name(name: str, layer: int | None) -> str:
    if layer is not None:
        return str(layer)
    return {"model.embed_tokens": "embed", "model.norm": "norm", "logits": "logits"}.get(name, name)


def _logits(data: ReportData) -> Section:
    samples = {v.name: v.sample for v in data.variants if v.sample is not None}
    if not samples:
        return Section("logits", "Logits", ("No variant could be run on this machine.",))
    points = {name: (s.truth, s.test) for name, s in samples.items()}
    drawings = (
        Drawing(
            "logits",
            "Logits over PyTorch's",
            "Logits drawn at random over positions and vocabulary; darker: more of them. The grey line is equality.",
            plots.scatter_figure(points),
        ),
        Drawing(
            "kl",
            "KL divergence per position",
            f"KL(PyTorch || variant) at {data.tokens:,} positions, in nats; what is below 1e-16 counts as that.",
            plots.kl_figure({name: s.kl for name, s in samples.items()}),
        ),
    )
    return Section("logits", "Logits", (), drawings)


def _perplexity(data: ReportData) -> Section:
    rows, lines, reference = [], [], math.nan
    for v in data.variants:
        change = (v.parity or {}).get("perplexity")
        if not isinstance(change, dict):
            continue
        reference, test = number(change.get("reference")), number(change.get("test"))
        low, high = number(change.get("low")), number(change.get("high"))
        rows.append(plots.PerplexityRow(v.name, test, reference * (1 + low), reference * (1 + high)))
        lines.append(
            (
                v.name,
                figures(test, ".3f"),
                _percent(number(change.get("relative"))),
                f"{_percent(low)} to {_percent(high)}",
                f"{change.get('tokens', 0):,}",
                str(change.get("tokens_from", "")),
            )
        )
    rows = [row for row in rows if math.isfinite(row.value)]
    if not rows or not math.isfinite(reference):
        return Section(
            "perplexity", "Perplexity", ("Measured by olmo2-export verify, which has not been run on these variants.",)
        )
    caption = "On the same tokens as PyTorch; the interval is of the change, by paired bootstrap over blocks of tokens."
    drawing = Drawing("perplexity", "Perplexity beside PyTorch", caption, plots.perplexity_figure(reference, rows))
    columns = ("variant", "perplexity", "change", "95 % interval", "tokens", "of")
    lines.insert(0, ("PyTorch float32", figures(reference, ".3f"), "", "", "", ""))
    return Section("perplexity", "Perplexity", (), (drawing,), (Grid("", columns, tuple(lines)),))


def _throughput(data: ReportData) -> Section:
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
            _seconds(p.ttft_s),
            _seconds(p.itl_p50_s),
            _seconds(p.itl_p99_s),
            _rate(p.decode_tokens_per_s),
            _rate(p.prefill_tokens_per_s),
            _bytes(p.bytes_per_token),
            figures(p.bandwidth_share, ".0%"),
        )
        for name, contender in bench.contenders.items()
        for p in contender.points
    ]
    whole = [
        (name, _seconds(c.load_s), _bytes(c.peak_memory_bytes), _bytes(c.disk_bytes))
        for name, c in bench.contenders.items()
    ]
    machine = ", ".join(_machine(bench))
    text = (f"Package {bench.package}; {machine}.",)
    drawings: tuple[Drawing, ...] = ()
    if series:
        caption = f"Tokens per second at batch {batch}, over the tokens in the context. Dashed: peers."
        drawings = (Drawing("throughput", "Throughput against context", caption, plots.throughput_figure(series)),)
    grids = (
        Grid("Per contender", ("contender", "load", "peak memory", "on disk"), tuple(whole)),
        *_ratios(bench),
        Grid("Per context", columns, tuple(rows), folded=len(rows) > 12),
    )
    return Section("throughput", "Throughput", text, drawings, grids)


def _points(bench: Bench) -> int:
    return sum(len(c.points) for c in bench.contenders.values())


def _machine(bench: Bench) -> Iterable[str]:
    for name, value in ((n, v) for n, v in bench.machine.items() if v is not None):
        if name.endswith("bytes_per_s"):
            yield f"{name.removesuffix('_bytes_per_s').replace('_', ' ')} {_bytes(number(value))}/s"
        else:
            yield f"{name.replace('_', ' ')} {value}"


def _ratios(bench: Bench) -> list[Grid]:
    """Return the ratios as a table, whatever their fields are called."""
    ratios = [ratio if isinstance(ratio, dict) else {"ratio": ratio} for ratio in bench.ratios]
    columns = tuple(dict.fromkeys(str(name) for ratio in ratios for name in ratio))
    rows = [tuple(_cell(ratio.get(name, NONE)) for name in columns) for ratio in ratios]
    titles = tuple(name.replace("_", " ") for name in columns)
    return [Grid("Ratios", titles, tuple(rows), folded=len(rows) > 12)] if rows else []


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _memory(data: ReportData) -> Section:
    peaks = {}
    if data.bench is not None and PurePath(data.bench.package).name == data.package.package.resolve().name:
        peaks = {name: contender.peak_memory_bytes for name, contender in data.bench.contenders.items()}
    bars, rows = {}, []
    for v in data.variants:
        cache = v.summary.variant.kv_cache
        contexts = sorted({min(c, cache.max_cache_length) for c in _CONTEXTS})
        weights = sum(graph.nbytes for graph in v.summary.graphs)
        held = {tokens: tokens * v.summary.cache_bytes_per_token for tokens in contexts}
        peak = peaks.get(f"ours {v.name}", math.nan)
        bars[v.name] = plots.Memory(weights, held, None if math.isnan(peak) else round(peak))
        rows.append(
            (
                v.name,
                size(weights),
                cache.form,
                size(v.summary.cache_bytes_per_token),
                "; ".join(f"{n:,}: {size(b)}" for n, b in held.items()),
                _bytes(peak),
            )
        )
    caption = (
        "From the graphs: the bytes of their tensors, and of keys and values of one row. A peak is from a benchmark "
        "of this package."
    )
    drawing = Drawing("memory", "Memory", caption, plots.memory_figure(bars))
    columns = ("variant", "weights", "KV cache", "a token", "a row of so many tokens", "peak measured")
    return Section("memory", "Memory", (), (drawing,), (Grid("", columns, tuple(rows)),))


def _operators(data: ReportData) -> Section:
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
    return Section("operators", "The graphs", text, drawings, (Grid("", columns, tuple(rows)),))


def _package(data: ReportData) -> Section:
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
    grids = [
        Grid("Files", ("file", "bytes", "share", "dtypes", "sha256"), tuple(files)),
        Grid("Largest tensors", ("variant", "tensor", "dtype", "shape", "bytes each"), tuple(largest), folded=True),
    ]
    if bits:
        grids.append(
            Grid(
                "Quantisation per layer",
                ("variant", "part", "stored as", "bytes", "bits/weight", "worst NMSE"),
                tuple(bits),
                folded=True,
            )
        )
    if engines:
        grids.append(
            Grid(
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
        tuple(grids),
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


def _gates(data: ReportData) -> Section:
    limits = (
        ("error_ratio", "error / PyTorch", "≤"),
        ("nmse", "NMSE", "≤"),
        ("max_abs", "max abs", "≤"),
        ("kl_mean", "KL mean", "≤"),
        ("top1", "top-1", "≥"),
        ("near_tie", "near-tie", ""),
        ("perplexity_rise", "perplexity", "≤"),
    )
    rows = []
    for v in data.variants:
        gate = (v.parity or {}).get("gate")
        if isinstance(gate, dict):
            rows.append((v.name, *(_limit(number(gate.get(key)), sign, key) for key, _, sign in limits)))
    quality = [
        (
            v.name,
            f"≤ {g.kl_mean:g}",
            f"≤ {g.kl_p99:g}" if g.kl_p99 is not None else NONE,
            f"≥ {g.top1:.1%}",
            f"≤ {g.perplexity_rise:+.1%}",
        )
        for v in data.variants
        if (g := v.quality_gate) is not None
    ]
    grids = []
    if rows:
        grids.append(Grid("Kernel parity", ("variant", *(title for _, title, _ in limits)), tuple(rows)))
    if quality:
        grids.append(
            Grid(
                "Quality of quantised weights", ("variant", "KL mean", "KL p99", "top-1", "perplexity"), tuple(quality)
            )
        )
    checks = [
        (v.name, str(check["name"]), str(check["found"]), FAILED if check.get("failures") else PASSED)
        for v in data.variants
        for check in (v.parity or {}).get("checks", ())
    ]
    for v in data.variants:
        if g := (v.parity or {}).get("greedy"):
            ties = f", {g['near_ties']} part at a near-tie" if g.get("near_ties") else ""
            checks.append(
                (
                    v.name,
                    "greedy",
                    f"{g['equal']} of {g['tokens']} tokens equal over {g['prompts']} prompts{ties}",
                    FAILED if g.get("failures") else PASSED,
                )
            )
    if checks:
        grids.append(Grid("Other checks", ("variant", "check", "found", "verdict"), tuple(checks)))
    text = ("Each limit must hold at every way of feeding the graph; one that is exceeded fails the variant.",)
    return Section("gates", "Gates", text if grids else ("Nothing was verified yet.",), (), tuple(grids))


def _limit(value: float, sign: str, key: str) -> str:
    if not math.isfinite(value) or (key == "top1" and value == 0):
        return NONE
    shown = f"{value:.1%}" if key == "top1" else f"{value:+.2%}" if key == "perplexity_rise" else f"{value:g}"
    return f"{sign} {shown}".strip()


def _cases(data: ReportData) -> Section:
    grids = []
    for v in data.variants:
        if v.parity is None:
            continue
        rows = []
        for case in v.parity.get("cases", ()):
            numbers = (figures(number(case.get(key)), form) for key, _, form in _METRICS)
            where = (
                str(case.get("mode", "")),
                *(str(case.get(k, NONE)) for k in ("batch_size", "length", "positions")),
            )
            rows.append((*where, *numbers, FAILED if case.get("failures") else PASSED))
        columns = ("mode", "batch", "length", "positions", *(title for _, title, _ in _METRICS), "verdict")
        grids.append(
            Grid(f"{v.name} on {v.parity.get('backend', '?')}: {len(rows)} cases", columns, tuple(rows), folded=True)
        )
    text = (
        "Errors are against PyTorch in float64; max abs against PyTorch at the gate's precision; length is that of the "
        "first row. Cases with another name before the mode ran another form of the graph, at that form's gate.",
    )
    return Section("cases", "Every parity case", text if grids else ("Nothing was verified yet.",), (), tuple(grids))


def _percent(value: float) -> str:
    if math.isnan(value):
        return NONE
    return f"{value:+.2%}" if abs(value) >= 5e-5 else "±0.00%"


def _seconds(value: float) -> str:
    if math.isnan(value):
        return NONE
    return f"{value * 1e3:,.1f} ms" if value < 1 else f"{value:,.2f} s"


def _rate(value: float) -> str:
    return NONE if math.isnan(value) else f"{value:,.1f} tokens/s" if value < 1000 else f"{value:,.0f} tokens/s"


def _bytes(value: float) -> str:
    return NONE if math.isnan(value) else size(round(value))


def passed_all(data: ReportData) -> tuple[int, int, int]:
    """Return how many variants passed both verdicts, how many failed one, and how many were not verified."""
    verdicts: Sequence[tuple[str, str]] = [_two_verdicts(v) for v in data.variants]
    failed = sum(FAILED in pair for pair in verdicts)
    unknown = sum(UNKNOWN in pair for pair in verdicts)
    return len(verdicts) - failed - unknown, failed, unknown
