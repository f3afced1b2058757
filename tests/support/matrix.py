"""The support matrix: what a run of the tests has seen of each model, variant and backend; the docs have no other.

    pytest --support check       fails where README.md or docs/support.md say something else than the run
    pytest --support part        the same for a run without the slow tests: what it has seen must be on the page
    pytest --support write       writes both anew

A test that has seen something says so with `seen`; only what passed counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import pytest

State = Literal["refused", "same table", "compiled", "verified"]
"""from what says least to what says most. verified: all cases of `verify` passed; compiled: TensorRT built an engine,
which no GPU has run; same table: of RoPE, bit for bit that of transformers; refused: by name, with a reason"""
PROPERTY = "support"
PAGES = ("README.md", "docs/support.md")
MODELS = {"olmo": "OLMo 1", "olmo2": "OLMo 2", "olmo3": "Olmo 3, 3.1"}
OUTPUTS = {
    "olmo score": "OLMo 1, classifier",
    "olmo2 score": "OLMo 2, classifier",
    "olmo3 score": "Olmo 3, classifier",
    "olmo hidden": "OLMo 1, hidden states",
    "olmo2 hidden": "OLMo 2, hidden states",
    "olmo3 hidden": "Olmo 3, hidden states",
    "olmo vectors": "OLMo 1, `inputs_embeds`",
    "olmo2 vectors": "OLMo 2, `inputs_embeds`",
    "olmo3 vectors": "Olmo 3, `inputs_embeds`",
}
"""what graphs give or take beside; on the page of docs alone"""
COLUMNS = {
    "onnxruntime": ("fp32", "q4", "q8", "bf16", "fp16", "q4f16"),
    "graph for TensorRT": ("bf16", "fp16", "fp32", "int4", "int8", "fp8"),
    "TensorRT for RTX": ("bf16", "fp16", "fp32", "int4", "int8", "fp8"),
}
"""backend -> precisions or variants, in the order of the page"""
ROPE = "RoPE"
"""the backend of cells whose model is a kind of RoPE, and their variant a model"""
ROPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "partial_rotary_factor")
_PLACE = re.compile(r"^(olmo2-export: error: )?(\S*/\S*: |config\.json: )?(config\.json: )?")
_BAR = re.compile(r"(?<!\\)\|")
_MARK = re.compile(r"(<!-- support -->\n)(.*?)(<!-- end of support -->)", re.DOTALL)


@dataclass(frozen=True, order=True)
class Seen:
    """One cell, or where `backend` is empty what is refused and in no table."""

    model: str
    backend: str
    variant: str
    state: str
    reason: str = ""
    """of a refusal"""


def seen(
    request: pytest.FixtureRequest, model: str, backend: str, variant: str, state: State, reason: str = ""
) -> None:
    """Say what a test has seen; to be called at its end."""
    assert state in get_args(State)
    cell = Seen(model, backend, variant, state, reason)
    request.node.user_properties.append((PROPERTY, [cell.model, cell.backend, cell.variant, cell.state, cell.reason]))


def seen_rope(request: pytest.FixtureRequest, config: Mapping[str, Any], state: State) -> None:
    """Say of each RoPE that a config.json names what a test has seen of it."""
    table = config.get("rope_parameters") or config.get("rope_scaling") or {}
    for one in [t for t in table.values() if isinstance(t, dict)] or [table]:
        seen(request, one.get("rope_type", "default"), ROPE, config["model_type"], state)


def refused(
    request: pytest.FixtureRequest, what: str, error: object, *, backend: str = "", variants: Iterable[str] = ("",)
) -> None:
    """Say what a test has seen refused, and with which error; the place that this begins with is left out."""
    for variant in variants:
        seen(request, what, backend, variant, "refused", _PLACE.sub("", str(error).strip()))


class Matrix:
    """A plugin that collects the cells of all tests that passed, and compares the pages with them at the end."""

    def __init__(self, mode: str, root: Path) -> None:
        self._mode, self._root = mode, root
        self._cells: set[Seen] = set()
        self.stale: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self._cells |= {Seen(*value) for name, value in report.user_properties if name == PROPERTY}

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        cells = self._cells
        if self._mode == "part":
            cells = cells | written((self._root / "docs/support.md").read_text(encoding="utf-8"))
        tables = {"README.md": overview(cells), "docs/support.md": whole(cells)}
        for page, table in tables.items():
            path = self._root / page
            text = path.read_text(encoding="utf-8")
            fresh = _MARK.sub(lambda found, t=table: found[1] + t + found[3], text)  # type: ignore[misc]
            if fresh == text:
                continue
            if self._mode == "write":
                path.write_text(fresh, encoding="utf-8")
            else:
                self.stale.append(page)
        if self.stale:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.stale:
            terminalreporter.write_line(
                f"support matrix: {', '.join(self.stale)} differ from what this run has seen: look why, or write them "
                "anew with: make support",
                red=True,
            )


def overview(cells: Iterable[Seen]) -> str:
    """Return the table of the README: models, and per backend the precisions."""
    cells = [cell for cell in cells if cell.state != "refused"]
    lines = [f"| | {' | '.join(COLUMNS)} |", "|---|" + "---|" * len(COLUMNS)]
    for model, title in MODELS.items():
        parts = []
        for backend, variants in COLUMNS.items():
            states = {c.variant: c.state for c in cells if (c.model, c.backend) == (model, backend)}
            found = [v for v in variants if v in states]
            word = "compiled" if backend == "TensorRT for RTX" else "verified"
            parts.append(f"{word}: {', '.join(f'`{v}`' for v in found)}" if found else "-")
        lines.append(f"| {title} | {' | '.join(parts)} |")
    return "\n".join(lines) + "\n"


def whole(cells: Iterable[Seen]) -> str:
    """Return the tables of docs/support.md: each model, variant and backend, and what is refused."""
    ranks = get_args(State)
    cells = sorted(cells, key=lambda cell: (ranks.index(cell.state), cell))
    states = {(c.model, c.backend, c.variant): c.state for c in cells}
    lines: list[str] = []
    for backend, variants in COLUMNS.items():
        heads = [f"`{variant}`" for variant in variants]
        lines += _table(backend, heads, MODELS | OUTPUTS, [(backend, v) for v in variants], states)
    titles = {kind: f"`{kind}`" for kind in ROPES}
    lines += _table(ROPE, [*MODELS.values()], titles, [(ROPE, model) for model in MODELS], states)
    reasons: dict[str, set[str]] = {}
    for cell in cells:
        if cell.state == "refused" and cell.reason:
            reasons.setdefault(cell.reason.replace("|", "\\|"), set()).add(_title(cell))
    if reasons:
        rows = sorted(("; ".join(sorted(titles)), reason) for reason, titles in reasons.items())
        lines += [
            "| refused | with the words |",
            "|---|---|",
            *(f"| {title} | {reason} |" for title, reason in rows),
            "",
        ]
    return "\n".join(lines)


def written(page: str) -> set[Seen]:
    """Return the cells that docs/support.md has: `whole` of them is what stands there."""
    found = _MARK.search(page)
    titles = {title: model for model, title in (MODELS | OUTPUTS).items()} | {f"`{kind}`": kind for kind in ROPES}
    cells: set[Seen] = set()
    backend, variants = "", [""]
    for line in found[2].splitlines() if found else ():
        first, *others = (part.strip() for part in _BAR.split(line.strip("|"))) if line else ("",)
        if first in (*COLUMNS, ROPE):
            backend, variants = first, [titles.get(head, head.strip("`")) for head in others]
        elif first == "refused":
            backend = ""
        elif backend and first in titles:
            cells |= {
                Seen(titles[first], backend, variant, state)
                for variant, state in zip(variants, others, strict=True)
                if state in get_args(State)
            }
        elif others and not first.startswith("---"):
            cells |= {Seen(title, "", "", "refused", others[0].replace("\\|", "|")) for title in first.split("; ")}
    return cells


def _table(
    name: str,
    heads: Iterable[str],
    rows: Mapping[str, str],
    columns: Iterable[tuple[str, str]],
    states: Mapping[tuple[str, str, str], str],
) -> list[str]:
    """Return the lines of a table and an empty one; a column is a backend and a variant."""
    columns = list(columns)
    lines = [f"| {name} | {' | '.join(heads)} |", "|---|" + "---|" * len(columns)]
    lines += [f"| {title} | {' | '.join(states.get((row, *c), '-') for c in columns)} |" for row, title in rows.items()]
    return [*lines, ""]


def _title(cell: Seen) -> str:
    if cell.backend == ROPE:
        return f"`{cell.model}`"
    what = (MODELS | OUTPUTS).get(cell.model, cell.model)
    return f"{what}, {cell.backend}, `{cell.variant}`" if cell.backend else what
