"""The sections of a report that say how far the variants are from PyTorch."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence

from olmo2_export.report import plots
from olmo2_export.report.data import ReportData, VariantData
from olmo2_export.report.logit_samples import PIECE
from olmo2_export.report.parts import FAILED, NONE, PASSED, UNKNOWN, Drawing, Section, Table, figures, number, percent
from olmo2_export.summary.text import size

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


def verdicts(data: ReportData) -> Section:
    """Both verdicts of every variant, and what failed."""
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
                percent(rise),
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
    if prefilled := _prefilled(data):
        text.append(
            f"KL mean and top-1 of {', '.join(prefilled)} are those of the prefill graph, which runs at {PIECE} "
            "positions a step; perplexity and bits/weight are those of the decode graph."
        )
    if missing:
        command = ["olmo2-export", "verify", str(package.package), *data.reference_options]
        command += [word for name in missing for word in ("--variant", name)]
        stale = " (an earlier graph was)" if any(v.stale for v in data.variants) else ""
        text.append(f"Not verified yet{stale}: {', '.join(missing)}. Run: {shlex.join(command)}")
    text += [f"{v.name}: {failure}" for v in data.variants for failure in _failures(v)]
    return Section("verdicts", "Verdicts", tuple(text), (), (Table("", columns, tuple(rows)),))


def _prefilled(data: ReportData) -> list[str]:
    """Return the variants whose logits `sample_logits` took from the prefill graph."""
    step = min(PIECE, data.tokens)
    variants = [(v.name, v.summary.variant.prefill) for v in data.variants if v.sample is not None]
    return [name for name, prefill in variants if prefill is not None and prefill.min_rows <= step]


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


def layers(data: ReportData) -> Section:
    """Error over depth, and the first tensor that departs."""
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


def logits(data: ReportData) -> Section:
    """Logits and KL divergence beside PyTorch's."""
    samples = {v.name: v.sample for v in data.variants if v.sample is not None}
    if not samples:
        return Section("logits", "Logits", ("No variant could be run on this machine.",))
    points = {name: (s.truth, s.test) for name, s in samples.items()}
    prefilled = _prefilled(data)
    graph = f" Of {', '.join(prefilled)}: of the prefill graph." if prefilled else ""
    drawings = (
        Drawing(
            "logits",
            "Logits over PyTorch's",
            "Logits drawn at random over positions and vocabulary; darker: more of them. The grey line is equality."
            + graph,
            plots.scatter_figure(points),
        ),
        Drawing(
            "kl",
            "KL divergence per position",
            f"KL(PyTorch || variant) at {data.tokens:,} positions, in nats; what is below 1e-16 counts as that.{graph}",
            plots.kl_figure({name: s.kl for name, s in samples.items()}),
        ),
    )
    return Section("logits", "Logits", (), drawings)


def perplexity(data: ReportData) -> Section:
    """Perplexity beside PyTorch's."""
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
                percent(number(change.get("relative"))),
                f"{percent(low)} to {percent(high)}",
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
    return Section("perplexity", "Perplexity", (), (drawing,), (Table("", columns, tuple(lines)),))


def gates(data: ReportData) -> Section:
    """The limits, and the checks that are not cases."""
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
            f"≤ {_rise(g.perplexity_rise)}",
        )
        for v in data.variants
        if (g := v.quality_gate) is not None
    ]
    tables = []
    if rows:
        tables.append(Table("Kernel parity", ("variant", *(title for _, title, _ in limits)), tuple(rows)))
    if quality:
        tables.append(
            Table(
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
        tables.append(Table("Other checks", ("variant", "check", "found", "verdict"), tuple(checks)))
    text = ("Each limit must hold at every way of feeding the graph; one that is exceeded fails the variant.",)
    return Section("gates", "Gates", text if tables else ("Nothing was verified yet.",), (), tuple(tables))


def _limit(value: float, sign: str, key: str) -> str:
    if not math.isfinite(value) or (key == "top1" and value == 0):
        return NONE
    shown = f"{value:.1%}" if key == "top1" else _rise(value) if key == "perplexity_rise" else f"{value:g}"
    return f"{sign} {shown}".strip()


def _rise(value: float) -> str:
    """Return a limit in percent, with as many digits as it has."""
    return f"{100 * value:+.4g}%"


def cases(data: ReportData) -> Section:
    """Every metric of every case."""
    tables = []
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
        tables.append(
            Table(f"{v.name} on {v.parity.get('backend', '?')}: {len(rows)} cases", columns, tuple(rows), folded=True)
        )
    text = (
        "Errors are against PyTorch in float64; max abs against PyTorch at the gate's precision; length is that of the "
        "first row. Cases with another name before the mode ran another form of the graph, at that form's gate.",
    )
    return Section("cases", "Every parity case", text if tables else ("Nothing was verified yet.",), (), tuple(tables))


def passed_all(data: ReportData) -> tuple[int, int, int]:
    """Return how many variants passed both verdicts, how many failed one, and how many were not verified."""
    verdicts: Sequence[tuple[str, str]] = [_two_verdicts(v) for v in data.variants]
    failed = sum(FAILED in pair for pair in verdicts)
    unknown = sum(UNKNOWN in pair for pair in verdicts)
    return len(verdicts) - failed - unknown, failed, unknown
