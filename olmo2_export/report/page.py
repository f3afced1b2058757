"""Write a report: report.html, one file that needs nothing else, and report.md with its pictures beside it."""

from __future__ import annotations

import datetime
import importlib.metadata
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from olmo2_export.atomic import check_replaceable, replace_folder
from olmo2_export.report import plots
from olmo2_export.report.data import ReportData
from olmo2_export.report.parity import passed_all
from olmo2_export.report.parts import FAILED, FIGURES, NONE, PASSED, UNKNOWN, markdown_text
from olmo2_export.report.sections import sections
from olmo2_export.summary.text import size
from runtimes.command import printable

HTML, MARKDOWN = "report.html", "report.md"
_TEMPLATES = Path(__file__).parent
_GENERATOR = '<meta name="generator" content="olmo2-export report">'
_NUMBER = re.compile(r"[≤≥]? ?[+±-]?[\d.,]+(e[+-]?\d+)?( ?(%|[kMG]?B|m?s|tokens/s))?")


@dataclass(frozen=True)
class Written:
    """What was written."""

    folder: Path
    html_bytes: int
    pictures: int
    passed: int
    """variants that passed both verdicts"""
    failed: int
    unverified: int


def check_out(out: Path) -> None:
    """Refuse a folder that holds something else than a report, before anything is run.

    Raises:
        UsageError: it does.
    """
    check_replaceable(Path.cwd() / out, True, "report", _foreign_files)


def write_report(data: ReportData, out: Path) -> Written:
    """Write a report to a folder, which is replaced in one step.

    Args:
        data: what `data.gather` found.
        out: the folder; it must not exist, be empty, or hold a report and nothing else.

    Raises:
        UsageError: it holds something else.
        ResourceError: the disk is full, or another process writes there.
    """
    context = _context(data)
    with replace_folder(out, force=True, kind="report", foreign=_foreign_files) as staging:
        page = _html().render(context)
        (staging / HTML).write_text(page, encoding="utf-8")
        (staging / MARKDOWN).write_text(_markdown().render(context), encoding="utf-8")
        drawings = [drawing for section in context["sections"] for drawing in section.drawings]
        for drawing in drawings:
            (staging / f"{drawing.name}.png").write_bytes(plots.png(drawing.figure))
    passed, failed, unverified = passed_all(data)
    return Written(out, len(page.encode()), len(drawings), passed, failed, unverified)


def _context(data: ReportData) -> dict[str, Any]:
    manifest, model = data.package.manifest, data.package.model
    passed, failed, unknown = passed_all(data)
    source = manifest.source
    revision = f" @ {source.revision}" if source.revision else ""
    merged = "".join(f" + {adapter.name}" for adapter in source.adapters)
    facts = (
        ("model", f"{source.model}{revision}{merged}"),
        (
            "shape",
            f"{model.num_hidden_layers} layers, hidden {model.hidden_size:,}, {model.num_attention_heads} heads "
            f"({model.num_key_value_heads} KV), vocabulary {model.vocab_size:,}, "
            f"context {model.max_position_embeddings:,}",
        ),
        ("reference", f"{data.reference}, PyTorch"),
        ("package", f"{data.package.package.name}, {size(sum(f.size for f in data.package.files.values()))}"),
        (
            "made by",
            f"olmo2-export {manifest.exporter_version}; "
            + ", ".join(f"{n} {v}" for n, v in manifest.libraries.items()),
        ),
        (
            "date",
            f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}; "
            f"page by olmo2-export {importlib.metadata.version('olmo2-export')}",
        ),
    )
    parts = [(passed, "passed"), (failed, "failed"), (unknown, "not verified yet")]
    return {
        "generator": Markup(_GENERATOR),
        "title": f"{source.model}: parity, quality and speed",
        "facts": facts,
        "headline": ", ".join(f"{n} {word}" for n, word in parts if n) or "no variants",
        "state": "bad" if failed else "open" if unknown else "good",
        "sections": sections(data),
        "classes": {PASSED: "good", FAILED: "bad", UNKNOWN: "open"},
        "colours": {v.name: plots.colour(v.name, index) for index, v in enumerate(data.variants)},
    }


def _html() -> Any:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_html_text,
    )
    environment.filters["svg"] = lambda drawing: Markup(plots.svg(drawing.figure, drawing.name))  # it escapes text
    environment.filters["numeric"] = _numeric
    return environment.get_template("page.html.j2")


def _html_text(value: Any) -> Any:
    """Show what steers a terminal or a line of text as its code; jinja2 escapes the rest."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _markdown() -> Any:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=False,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=markdown_text,
    )
    environment.filters["numeric"] = _numeric
    return environment.get_template("page.md.j2")


def _numeric(cells: list[str]) -> bool:
    """Tell whether a column is of numbers, to be aligned on the right."""
    shown = [cell for cell in cells if cell not in ("", NONE)]
    return bool(shown) and all(map(_NUMBER.fullmatch, shown))


def _foreign_files(folder: Path) -> list[str]:
    """Return the files of a folder that are not a report's: all of them, unless a page of ours is there."""
    found = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_symlink() or not p.is_dir())
    page = folder / HTML
    if not page.is_file() or page.is_symlink() or _GENERATOR.encode() not in page.read_bytes()[:4096]:
        return found or [p.name for p in folder.iterdir()]
    own = {HTML, MARKDOWN, *(f"{name}.png" for name in FIGURES)}
    return [name for name in found if name not in own]
