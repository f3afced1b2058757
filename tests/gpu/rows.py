"""Rows as pytest reports them, and a file of them that outlives the process. Imports nothing heavy."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from checklist import recorded

LATE = 124
"""exit code after a row that took too long, as timeout(1) has it"""


def row_name(nodeid: str) -> str:
    """Return what CHECKLIST.md calls a test."""
    return nodeid.rpartition("::test_")[2]


def row_of(report: Any, outcome: str) -> dict[str, Any]:
    """Return what a report says of a row."""
    figure = " ".join(str(value) for name, value in report.user_properties if name == "figure")
    why = ""
    if outcome == "skipped":
        why = str(report.longrepr[2]).removeprefix("Skipped: ")
    elif outcome != "passed":
        why = str(report.longrepr).strip().splitlines()[-1]
    seconds = round(report.duration, 1)
    return {"row": row_name(report.nodeid), "outcome": outcome, "seconds": seconds, "figure": figure, "why": why}


class RowsFile:
    """A plugin that keeps rows on disk: a line of JSON for the machine, then one when a row begins and when it ends.

    So a run that is cut off has shown something, and the next one goes on where it ended: a GPU that one row brought
    into disorder is of no use to the rest of its process.
    """

    def __init__(self, path: Path, seconds: int | None, machine: Mapping[str, str]) -> None:
        """Go on with a file, or begin one.

        Args:
            path: the file.
            seconds: end the process of a row that takes longer; None: no row does.
            machine: the first line.
        """
        self._path = path
        self._seconds = seconds
        if path.exists():
            for row in recorded(path):
                if row["outcome"] == "begun":
                    self._add(row | {"outcome": "failed", "why": "it ended its process"})
        else:
            self._add(machine)

    def _add(self, line: Mapping[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        done = {row["row"] for row in recorded(self._path)}
        config.hook.pytest_deselected(items=[item for item in items if row_name(item.nodeid) in done])
        items[:] = [item for item in items if row_name(item.nodeid) not in done]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        row = {"row": row_name(item.nodeid), "outcome": "begun", "seconds": 0.0, "figure": "", "why": ""}
        self._add(row)
        if self._seconds is None:
            return (yield)

        def late() -> None:  # in a thread: a call that hangs in a library never comes back to take a signal
            self._add(row | {"outcome": "failed", "why": f"took longer than {self._seconds} s"})
            os._exit(LATE)

        timer = threading.Timer(self._seconds, late)
        timer.start()
        try:
            return (yield)
        finally:
            timer.cancel()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self._add(row_of(report, report.outcome))
