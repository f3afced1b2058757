"""Write what was seen on a GPU into CHECKLIST.md: the columns `last seen` and `figure` of the rows that ran.

    make gpu-test | tee gpu.txt; python tests/gpu/checklist.py gpu.txt

Takes that output, a file of `--rows-to`, or what `python -m olmo2_export.bench gpu --out FILE` wrote.
"""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CHECKLIST = Path(__file__).with_name("CHECKLIST.md")


def cells(line: str) -> list[str]:
    """Return the cells of a line of the table."""
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def rows(text: str) -> dict[str, list[str]]:
    """Return row -> its cells."""
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    return {cells(line)[0].strip("`"): cells(line) for line in lines}


def updated(text: str, result: dict[str, Any], date: str) -> str:
    """Return the checklist with the rows that passed or failed on a GPU brought up to date.

    Raises:
        ValueError: the result is of a rehearsal, or has a row that the checklist has not.
    """
    if result["rehearsal"] or result["gpu"] == "none":
        raise ValueError("not the result of a GPU")
    known = rows(text)
    for row in result["rows"]:
        if row["row"] not in known:
            raise ValueError(f"row {row['row']}: not in {CHECKLIST.name}")
        if row["outcome"] in ("skipped", "begun"):
            continue
        seen = [f"{result['gpu']}, {date}: {row['outcome']}", (row["figure"] or row["why"]).replace("|", "/")]
        old = known[row["row"]]
        line = next(line for line in text.splitlines() if line.startswith("| `") and cells(line) == old)
        text = text.replace(line, f"| {' | '.join([*old[:3], *seen])} |")
    return text


def recorded(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file of `--rows-to`, each as its last line says."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return list({line["row"]: line for line in lines if "row" in line}.values())


def figure_of(claims: Sequence[Mapping[str, Any]]) -> str:
    """Return what a benchmark's claims came to, those that were measured."""
    measured = [claim for claim in claims if claim["median_ratio"] is not None]
    return "; ".join(f"{c['what']} {c['median_ratio']} x {c['against']} ({c['verdict']})" for c in measured)


def of_bench(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the result of `bench gpu` as that of the row `bench_cuda`."""
    missed = [claim["what"] for claim in result["claims"] if "missed" in claim["verdict"]]
    short = result["size"] != "1B" or result["device"] == "cpu"
    wrong = bool(result["failures"] or result["left_out"] or missed)
    figure = "; ".join([figure_of(result["claims"]), *result["failures"], *(f"no {x}" for x in result["left_out"])])
    row = {"row": "bench_cuda", "outcome": "failed" if wrong else "passed", "figure": figure, "why": ""}
    return {"gpu": result["device"], "rehearsal": short, "rows": [row]}


def read(path: Path) -> dict[str, Any]:
    """Return the result in a file of any of the three kinds.

    Raises:
        ValueError: there is none.
    """
    for line in reversed(path.read_text().splitlines()):
        if line.startswith('{"gpu"'):
            result: dict[str, Any] = json.loads(line)
            return result if "rows" in result else {**result, "rows": recorded(path)}
        if line.startswith('{"size"'):
            return of_bench(json.loads(line))
    raise ValueError(f"{path}: no line of JSON with rows; expected the output of make gpu-test")


def main(path: Path) -> None:
    """Update the checklist from the output of a run."""
    CHECKLIST.write_text(updated(CHECKLIST.read_text(), read(path), datetime.date.today().isoformat()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
