"""Write what `make gpu-test` saw into CHECKLIST.md: the columns `last seen` and `figure` of the rows that ran.

make gpu-test | tee gpu.txt; python tests/gpu/checklist.py gpu.txt
"""

from __future__ import annotations

import datetime
import json
import sys
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
        if row["outcome"] == "skipped":
            continue
        seen = [f"{result['gpu']}, {date}: {row['outcome']}", (row["figure"] or row["why"]).replace("|", "/")]
        old = known[row["row"]]
        line = next(line for line in text.splitlines() if line.startswith("| `") and cells(line) == old)
        text = text.replace(line, f"| {' | '.join([*old[:3], *seen])} |")
    return text


def main(path: Path) -> None:
    """Update the checklist from the output of a run."""
    found = [line for line in path.read_text().splitlines() if line.startswith('{"gpu"')]
    CHECKLIST.write_text(updated(CHECKLIST.read_text(), json.loads(found[-1]), datetime.date.today().isoformat()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
