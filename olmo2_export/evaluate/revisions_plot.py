"""Draw a sweep: perplexity, distance to PyTorch and change between revisions, over training steps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from olmo2_export.evaluate.revisions import RevisionResult

_BLUE, _ORANGE, _GREEN = "#0072b2", "#d55e00", "#009e73"  # told apart by the colour-blind
_STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "svg.hashsalt": "olmo2-export",  # two drawings of the same sweep are byte-identical
    "svg.fonttype": "path",
}


def draw(results: Sequence[RevisionResult], title: str, variant: str, out: Path) -> list[Path]:
    """Draw a sweep as PNG and SVG.

    Args:
        results: in order, at least one.
        title: what was swept, for the heading.
        variant: the name of what was evaluated.
        out: the file to write, without its ending.

    Returns:
        The files.
    """
    by_step = _by_step(results)
    positions = np.array([r.step for r in results] if by_step else range(len(results)), float)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(8, 9), layout="constrained")
        FigureCanvasAgg(figure)
        perplexity, distance, change = figure.subplots(3, 1, sharex=True, height_ratios=[3, 2, 2])

        torch_line = [(r.pytorch_perplexity, r.pytorch_perplexity_se) for r in results]
        _points(perplexity, positions, torch_line, _ORANGE, "PyTorch float32", marker="s", size=9, hollow=True)
        _points(perplexity, positions, [(r.perplexity, r.perplexity_se) for r in results], _BLUE, variant)
        _label(perplexity, f"{title}\n± one standard error over blocks of text", "perplexity")
        perplexity.legend(frameon=False)
        if results[0].perplexity > 3 * results[-1].perplexity:  # early steps would flatten the rest
            perplexity.set_yscale("log")

        _points(distance, positions, [(r.kl_mean_nats, r.kl_mean_se_nats) for r in results], _BLUE, variant)
        _label(distance, f"How far {variant} is from PyTorch at each step", "KL(PyTorch ‖ variant)\nnats per token")
        distance.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
        distance.set_ylim(bottom=0)

        changed = [(x, r) for x, r in zip(positions, results, strict=True) if r.change_kl_mean_nats is not None]
        values = [(r.change_kl_mean_nats or 0.0, r.change_kl_mean_se_nats) for _, r in changed]
        _points(change, np.array([x for x, _ in changed]), values, _GREEN, variant)
        _label(change, "How much the model changed since the revision before", "KL(before ‖ this)\nnats per token")
        change.set_ylim(bottom=0)
        if not changed:
            change.text(0.5, 0.5, "one revision: nothing to compare", transform=change.transAxes, ha="center")

        if by_step:
            change.set_xlabel("training steps")
            change.xaxis.set_major_formatter(EngFormatter(sep=""))
        else:
            change.set_xlabel("revision")
            change.set_xticks(positions, [r.revision for r in results], rotation=30, ha="right")
        files = [out.with_suffix(".png"), out.with_suffix(".svg")]
        figure.savefig(files[0], dpi=150, metadata={"Software": None})
        figure.savefig(files[1], metadata={"Date": None, "Creator": None})
    return files


def _by_step(results: Sequence[RevisionResult]) -> bool:
    """Tell whether the revisions have steps that rise: then they are the axis."""
    steps = [r.step for r in results]
    return None not in steps and all((a or 0) < (b or 0) for a, b in pairwise(steps))


def _points(
    axes: Axes,
    positions: np.ndarray,
    values: Sequence[tuple[float, float | None]],
    colour: str,
    label: str,
    *,
    marker: str = "o",
    size: float = 5,
    hollow: bool = False,
) -> None:
    if not len(positions):
        return
    axes.errorbar(
        positions,
        [value for value, _ in values],
        yerr=[error or 0.0 for _, error in values],
        color=colour,
        label=label,
        marker=marker,
        markersize=size,
        markerfacecolor="none" if hollow else colour,
        capsize=3,
        linewidth=1.5,
    )


def _label(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_ylabel(unit)
