"""The pieces of a report: sections of words, figures and tables; how numbers are read and written, text is escaped."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from olmo2_export.summary.text import size
from runtimes.command import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PASSED, FAILED, UNKNOWN = "passed", "FAILED", "not verified"
FIGURES = ("layers", "logits", "kl", "perplexity", "throughput", "memory", "operators", "weights")
"""the names of all figures; a page has those for which there is data"""

NONE = "\N{EN DASH}"
"""stands where there is no number"""

_MARKDOWN_SIGNS = str.maketrans({c: f"\\{c}" for c in "\\`*_[]|#~"} | {"\n": " ", "\r": " "})


@dataclass(frozen=True)
class Drawing:
    """One figure."""

    name: str
    """out of `FIGURES`"""
    title: str
    caption: str
    figure: Figure


@dataclass(frozen=True)
class Table:
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
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()
    """below the tables"""


def number(value: object) -> float:
    """Return a number of `parity.json`, where one that is not finite is a string; NaN where there is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return math.nan
    try:
        return float(value)
    except ValueError:
        return math.nan


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


def percent(value: float) -> str:
    """Return a change in percent."""
    if math.isnan(value):
        return NONE
    return f"{value:+.2%}" if abs(value) >= 5e-5 else "±0.00%"


def seconds(value: float) -> str:
    """Return a time for people."""
    if math.isnan(value):
        return NONE
    return f"{value * 1e3:,.1f} ms" if value < 1 else f"{value:,.2f} s"


def rate(value: float) -> str:
    """Return tokens per second for people."""
    return NONE if math.isnan(value) else f"{value:,.1f} tokens/s" if value < 1000 else f"{value:,.0f} tokens/s"


def sized(value: float) -> str:
    """Return a size for people; a dash where it was not measured."""
    return NONE if math.isnan(value) else size(round(value))


def markdown_text(value: Any) -> Any:
    """Escape what markdown, or the HTML in it, would read as more than text."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return str(escape(printable(value.translate(_MARKDOWN_SIGNS)))).replace("&#39;", "'").replace("&#34;", '"')
