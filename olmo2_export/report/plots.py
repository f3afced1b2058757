"""The figures of a report, with matplotlib: each as SVG that takes the page's colours, and as PNG.

Lines, ticks and words are drawn in one colour, `INK`, which the SVG gives up for `currentColor`: so they are dark on a
light page and light on a dark one. Nothing is drawn behind them.
"""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, ScalarFormatter

from olmo2_export.catalog import known

INK = "#1b2027"
PYTORCH = "#7d8590"
_STYLE: dict[Any, Any] = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "figure.constrained_layout.use": True,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "grid.alpha": 0.15,
    "grid.color": INK,
    "legend.frameon": False,
    "legend.handlelength": 2.6,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
    "svg.fonttype": "none",
    "text.color": INK,
    "text.parse_math": False,  # a name may have a $
    "xtick.color": INK,
    "ytick.color": INK,
}
_OTHERS = ("#8c564b", "#17a2a2", "#9c8b1f", "#5c6bc0", "#c0504d", "#607d8b", "#6d8f3a")
_POWERS = FuncFormatter(lambda value, _: f"1e{round(math.log10(value))}" if value > 0 else "0")
_WIDTH = 7.2  # inches
_MOST_TICKS = 12


@dataclass(frozen=True)
class Depth:
    """Error over depth of one variant."""

    names: tuple[str, ...]
    """of the tensors, in order: embedding, the layers, norm, logits"""
    relative: tuple[float, ...]
    """RMS(graph - exact) / RMS(exact)"""
    expected: tuple[float, ...]
    """the same of PyTorch"""


@dataclass(frozen=True)
class PerplexityRow:
    """Perplexity of one variant."""

    label: str
    value: float
    low: float
    """of a 95 % interval; NaN: there is none"""
    high: float


@dataclass(frozen=True)
class Series:
    """Tokens per second of one contender over context lengths."""

    context: tuple[int, ...]
    """tokens"""
    decode: tuple[float, ...]
    """tokens/s; NaN where it was not measured"""
    prefill: tuple[float, ...]


@dataclass(frozen=True)
class Memory:
    """Bytes of one variant."""

    weights: int
    cache: dict[int, int] = field(hash=False)
    """tokens -> bytes of the KV cache of one row"""
    peak: int | None
    """measured, of the process"""


def colour(label: str, index: int = 0) -> str:
    """Return a variant's colour; `ours q4` of a benchmark has that of q4."""
    name = label.removeprefix("ours ").split("@")[0].split()[0] if label.split() else ""
    if (row := known(name)) is not None:
        return row.colour
    return PYTORCH if name == "PyTorch" else _OTHERS[index % len(_OTHERS)]


Drawn = TypeVar("Drawn", bound=Callable[..., Figure])


def _styled(draw: Drawn) -> Drawn:
    """Draw in the style of reports, whatever the process has set."""

    @functools.wraps(draw)
    def styled(*args: Any, **options: Any) -> Figure:
        with matplotlib.rc_context(_STYLE):
            return draw(*args, **options)

    return cast(Drawn, styled)


@_styled
def depth_figure(curves: Mapping[str, Depth]) -> Figure:
    """Relative error behind each layer, beside PyTorch's own (dashed)."""
    figure, (axes,) = _figure(1, height=3.4)
    count = 0
    for index, (label, depth) in enumerate(curves.items()):
        x = np.arange(len(depth.names))
        count = max(count, len(x))
        axes.plot(x, _positive(depth.relative), marker="o", color=colour(label, index), label=label)
        axes.plot(
            x, _positive(depth.expected), linestyle=(0, (4, 2)), linewidth=1.2, color=colour(label, index), alpha=0.75
        )
    axes.plot([], [], linestyle=(0, (4, 2)), linewidth=1.2, color=PYTORCH, label="expected: PyTorch's own")
    axes.set_yscale("log")
    _whole_decades(axes, [value for depth in curves.values() for value in (*depth.relative, *depth.expected)])
    axes.yaxis.set_major_formatter(_POWERS)
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("relative error (RMS)")
    names = max((d.names for d in curves.values()), key=len)
    step = max(1, math.ceil(count / _MOST_TICKS))
    ticks = sorted({*range(0, max(count - 2, 1), step), count - 2, count - 1} & set(range(count)))
    if len(ticks) > 2 and ticks[-3] > count - 2 - step and ticks[-3] != 0 and step > 1:
        ticks.pop(-3)  # it would touch `norm`
    axes.set_xticks(ticks, [names[i] for i in ticks])
    axes.set_xlabel("depth")
    _legend_above(figure)
    return figure


@_styled
def scatter_figure(samples: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """Logits of each variant over PyTorch's: the density of points; what is right lies on the diagonal."""
    columns = min(3, len(samples))
    rows = math.ceil(len(samples) / columns)
    figure, panels = _figure(columns, rows, height=_WIDTH / columns * rows if columns > 1 else 4.2)
    for index, (axes, (label, (truth, test))) in enumerate(zip(panels, samples.items(), strict=False)):
        low, high = float(min(truth.min(), test.min())), float(max(truth.max(), test.max()))
        margin = 0.03 * (high - low) or 1.0
        limits = (low - margin, high + margin)
        tint = colour(label, index)
        density = LinearSegmentedColormap.from_list(label, [f"{tint}38", tint])
        drawn = axes.hexbin(
            truth, test, gridsize=60, extent=(*limits, *limits), norm=LogNorm(), mincnt=1, cmap=density, linewidths=0
        )
        drawn.set_rasterized(True)
        axes.plot(limits, limits, color=PYTORCH, linewidth=0.8, zorder=0)
        axes.set(xlim=limits, ylim=limits, aspect="equal", title=label, xlabel="PyTorch, float32")
        if index % columns == 0:
            axes.set_ylabel("variant")
        correlation = float(np.corrcoef(truth, test)[0, 1]) if truth.std() and test.std() else math.nan
        rms = float(np.sqrt(np.mean((test.astype(np.float64) - truth) ** 2)))
        axes.text(
            0.04,
            0.96,
            f"RMS difference {rms:.2g}\n1 - r = {max(1 - correlation, 0):.1g}",
            transform=axes.transAxes,
            va="top",
            fontsize=8,
        )
    for axes in panels[len(samples) :]:
        axes.set_visible(False)
    return figure


@_styled
def kl_figure(divergences: Mapping[str, np.ndarray]) -> Figure:
    """How often each KL divergence occurs, per position; mean (solid) and p99 (dotted) marked."""
    figure, panels = _figure(1, len(divergences), height=0.6 + 0.95 * len(divergences), share_x=True)
    floor = 1e-16
    everything = np.concatenate([np.maximum(kl, floor) for kl in divergences.values()])
    low, high = math.floor(math.log10(everything.min())), math.ceil(math.log10(everything.max()))
    bins = np.logspace(low, max(high, low + 1), 12 * max(high - low, 1) + 1)
    for index, (axes, (label, kl)) in enumerate(zip(panels, divergences.items(), strict=True)):
        tint = colour(label, index)
        axes.hist(np.maximum(kl, floor), bins=bins.tolist(), color=tint, alpha=0.6)
        mean, p99 = float(kl.mean()), float(np.quantile(kl, 0.99))
        axes.axvline(max(mean, floor), color=INK, linewidth=1.2)
        axes.axvline(max(p99, floor), color=INK, linewidth=1.2, linestyle=":")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(_POWERS)
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(f"{label}:  mean {mean:.1e},  p99 {p99:.1e} nats", fontsize=9)
        axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        axes.grid(axis="x", visible=False)
    panels[-1].set_xlabel("KL divergence from PyTorch, nats per position (mean: solid, p99: dotted)")
    figure.supylabel("positions", fontsize=9, color=INK)
    return figure


@_styled
def perplexity_figure(reference: float, rows: Sequence[PerplexityRow]) -> Figure:
    """Perplexity of each variant with its interval; the line is PyTorch in float32."""
    figure, (axes,) = _figure(1, height=0.9 + 0.36 * len(rows))
    for index, row in enumerate(rows):
        spread = None
        if math.isfinite(row.low) and math.isfinite(row.high):
            spread = [[max(row.value - row.low, 0)], [max(row.high - row.value, 0)]]
        axes.errorbar(
            [row.value], [index], xerr=spread, fmt="o", color=colour(row.label, index), capsize=3, markersize=6
        )
    axes.axvline(reference, color=PYTORCH, linewidth=1.2, zorder=0)
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel(f"perplexity (95 % interval of the change); line: PyTorch in float32, {reference:,.4g}")
    axes.xaxis.set_major_formatter(_plain())
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.grid(axis="y", visible=False)
    return figure


@_styled
def throughput_figure(series: Mapping[str, Series]) -> Figure:
    """Decode and prefill, tokens per second over the context."""
    figure, panels = _figure(2, height=3.3)
    for axes, what in zip(panels, ("decode", "prefill"), strict=True):
        for index, (label, s) in enumerate(series.items()):
            y = s.decode if what == "decode" else s.prefill
            if any(map(math.isfinite, y)):
                line = "-" if label.startswith("ours") else (0, (5, 2))
                axes.plot(s.context, y, marker="o", linestyle=line, color=colour(label, index), label=label)
        ticks = sorted({c for s in series.values() for c in s.context})
        if len(ticks) > 1:
            axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(_spread(ticks)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(_plain())
        axes.set(title=what, xlabel="tokens in the context", ylabel="tokens/s")
    _legend_above(figure, panels[0])
    return figure


@_styled
def memory_figure(memory: Mapping[str, Memory]) -> Figure:
    """Weights and KV cache at two or three contexts, stacked; the bar is the peak that was measured."""
    figure, (axes,) = _figure(1, height=1.2 + 0.5 * len(memory))
    labels = list(memory)
    contexts = sorted({tokens for m in memory.values() for tokens in m.cache})
    for index, (label, m) in enumerate(memory.items()):
        tint = colour(label, index)
        axes.barh(index, m.weights, height=0.55, color=tint)
        left = m.weights
        before = 0
        for step, tokens in enumerate(sorted(m.cache)):
            axes.barh(
                index,
                m.cache[tokens] - before,
                left=left,
                height=0.55,
                color=tint,
                alpha=0.6 - 0.15 * step,
                edgecolor=INK,
                linewidth=0.4,
            )
            left += m.cache[tokens] - before
            before = m.cache[tokens]
        if m.peak is not None:
            axes.plot([m.peak, m.peak], [index - 0.38, index + 0.38], color=INK, linewidth=2)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.xaxis.set_major_formatter(EngFormatter(unit="B", sep=" "))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    said = " and ".join(f"{tokens:,}" for tokens in contexts)
    peak = "; black: peak of the process" if any(m.peak is not None for m in memory.values()) else ""
    axes.set_xlabel(f"weights (full colour), KV cache at {said} tokens of one row (pale){peak}")
    axes.grid(axis="y", visible=False)
    return figure


@_styled
def ops_figure(portable: Mapping[str, int], graphs: Mapping[str, Mapping[str, int]]) -> Figure:
    """Nodes of the portable graph and of each other one, by operator; the rare ones together."""
    counts = {"portable": portable, **graphs}
    most = {op: max(c.get(op, 0) for c in counts.values()) for op in {o for c in counts.values() for o in c}}
    often = [op for op in most if most[op] > 3]
    shown = sorted(often, key=lambda op: (-portable.get(op, 0), -most[op], op))[:16]
    rows = {
        label: [c.get(op, 0) for op in shown] + [sum(n for op, n in c.items() if op not in shown)]
        for label, c in counts.items()
    }
    names = [op.split("::")[-1] for op in shown] + ["all others"]
    height = 0.8 / len(rows)
    figure, (axes,) = _figure(1, height=0.9 + len(names) * (0.14 + 0.09 * len(rows)))
    for index, (label, values) in enumerate(rows.items()):
        y = np.arange(len(names)) - 0.4 + height * (index + 0.5)
        tint = PYTORCH if label == "portable" else colour(label.split(",")[0], index)
        axes.barh(
            y,
            values,
            height=height * 0.92,
            color=tint,
            label=f"{label} ({sum(counts[label].values())} nodes)",
        )
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.set_xlabel("nodes")
    axes.grid(axis="y", visible=False)
    _legend_above(figure)
    return figure


@_styled
def weights_figure(groups: Mapping[str, Mapping[str, int]]) -> Figure:
    """Bytes of each graph's tensors by dtype."""
    figure, (axes,) = _figure(1, height=0.9 + 0.36 * len(groups))
    dtypes = list(dict.fromkeys(d for g in groups.values() for d in sorted(g, key=lambda d: -g[d])))
    tints = dict(zip(dtypes, matplotlib.colormaps["tab20"].colors, strict=False))  # type: ignore[attr-defined]  # a list
    for index, group in enumerate(groups.values()):
        left = 0
        for dtype in dtypes:
            axes.barh(
                index,
                group.get(dtype, 0),
                left=left,
                height=0.6,
                color=tints.get(dtype, PYTORCH),
                label=dtype if index == 0 else None,
            )
            left += group.get(dtype, 0)
    axes.set_yticks(range(len(groups)), list(groups))
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.xaxis.set_major_formatter(EngFormatter(unit="B", sep=" "))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.grid(axis="y", visible=False)
    _legend_above(figure)
    return figure


def svg(figure: Figure, name: str) -> str:
    """Return a figure as an <svg> element for a page: no links, no metadata, ids of its own, the page's ink.

    Args:
        figure: what to draw.
        name: of the figure; goes into its ids, so that two figures of a page have none in common.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<style type="text/css">.*?</style>', "", text, flags=re.DOTALL)  # would be the whole page's
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    text = text.replace(INK, "currentColor")
    text = re.sub(r"(font: [^;\"]*?)'DejaVu Sans'[^;\"]*", r"\1inherit", text)
    head, rest = text.split(">", 1)
    return re.sub(r'\s(?:width|height)="[^"]*"', "", head) + ">" + rest  # the page says how wide


def png(figure: Figure) -> bytes:
    """Return a figure as a PNG of some 700 pixels, on white."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format="png", dpi=100, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def _figure(columns: int, rows: int = 1, *, height: float, share_x: bool = False) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, list(np.ravel(figure.subplots(rows, columns, sharex=share_x, squeeze=False)))


def _legend_above(figure: Figure, axes: Axes | None = None) -> None:
    handles, labels = (axes or figure.axes[0]).get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=min(4, max(len(labels), 1)), fontsize=8)


def _positive(values: Sequence[float]) -> np.ndarray:
    """Return what a logarithmic axis can show: a zero is left out."""
    array = np.asarray(values, dtype=np.float64)
    return np.where(array > 0, array, np.nan)


def _whole_decades(axes: Axes, values: Sequence[float]) -> None:
    """Widen a logarithmic y axis to the powers of ten around the values, so that at least two are named."""
    shown = [math.log10(value) for value in values if 0 < value < math.inf]
    low = math.floor(min(shown, default=-1))
    high = max(math.ceil(max(shown, default=0)), low + 1)
    margin = 0.04 * (high - low)
    axes.set_ylim(10 ** (low - margin), 10 ** (high + margin))


def _plain() -> ScalarFormatter:
    formatter = ScalarFormatter(useOffset=False)
    formatter.set_scientific(False)
    return formatter


def _spread(ticks: Sequence[int]) -> list[int]:
    """Return those of the ticks that are at least 1.6 times as far as the one before, so that they do not touch."""
    kept: list[int] = []
    for tick in ticks:
        if not kept or tick >= 1.6 * kept[-1]:
            kept.append(tick)
    return kept
