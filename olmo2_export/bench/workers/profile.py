"""This project: where the time of one prefill and one decode step goes, by operator.

    python -m olmo2_export.bench.workers.profile PACKAGE VARIANT '{"context": 128, "steps": 16, "rows": [1, 2], ...}'

The runner is the public one. Its sessions are made by onnxruntime's own class with profiling turned on, so that every
other option is the runner's. Profiling makes operators a few percent slower. `(rest)` is what a session does outside
its operators, `(Python)` what the runner does outside the session.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime as ort  # type: ignore[import-untyped]

from olmo2_export.bench.workers.common import finish, prompt
from runtimes import open_runner


class Session(ort.InferenceSession):  # type: ignore[misc]  # untyped
    """A session that profiles itself and notes during which phase each of its runs was."""

    made: list[Session] = []  # noqa: RUF012  # of this process
    phase = "warm"

    def __init__(self, graph: Any, options: ort.SessionOptions, **others: Any) -> None:
        options.enable_profiling = True
        options.profile_file_prefix = f"session{len(Session.made)}"
        super().__init__(graph, options, **others)
        self.phases: list[str] = []
        Session.made.append(self)

    def run_with_iobinding(self, *arguments: Any) -> None:
        self.phases.append(Session.phase)
        super().run_with_iobinding(*arguments)


def operator_times(events: list[dict[str, Any]], phases: list[str]) -> dict[str, Counter[str]]:
    """Sum a session's profile.

    Args:
        events: of onnxruntime's profile.
        phases: of each run, in order.

    Returns:
        phase -> operator -> microseconds; `(rest)` is the time of the runs outside all operators.
    """
    runs = sorted((e for e in events if e["name"] == "model_run"), key=lambda e: e["ts"])
    nodes = sorted((e for e in events if e["name"].endswith("_kernel_time")), key=lambda e: e["ts"])
    sums: dict[str, Counter[str]] = {phase: Counter() for phase in phases}
    at = 0
    for run, phase in zip(runs, phases, strict=True):
        inside = 0
        while at < len(nodes) and nodes[at]["ts"] < run["ts"] + run["dur"]:
            sums[phase][nodes[at]["args"]["op_name"]] += nodes[at]["dur"]
            inside += nodes[at]["dur"]
            at += 1
        sums[phase]["(rest)"] += run["dur"] - inside
    return sums


def profile(package: Path, variant: str, task: Mapping[str, Any]) -> dict[str, Any]:
    """Return milliseconds by operator: of a prefill, and of decode steps of so many rows behind it, the mean of all."""
    prompts = [prompt(task["context"], task["vocab_size"], row) for row in range(max(task["rows"]))]
    ids, seconds = [tokens[0] for tokens in prompts], dict[str, float]()

    def timed(phase: str, call: Callable[[], object], times: int = 1) -> None:
        Session.phase, started = phase, time.perf_counter()
        for _ in range(times):
            call()
        Session.phase, seconds[phase] = "warm", time.perf_counter() - started

    with open_runner(package, variant=variant, threads=task["threads"]) as runner:
        runner.prefill(prompts[:1])
        runner.reset()
        timed("prefill", lambda: runner.prefill(prompts[:1]))
        for rows in task["rows"]:
            runner.reset()
            runner.prefill(prompts[:rows])
            runner.decode(ids[:rows])
            timed(f"decode_{rows}", partial(runner.decode, ids[:rows]), task["steps"])
    totals: dict[str, Counter[str]] = {phase: Counter() for phase in seconds}
    for session in Session.made:
        path = Path(session.end_profiling())
        for phase, sums in operator_times(json.loads(path.read_text()), session.phases).items():
            totals.setdefault(phase, Counter()).update(sums)
    for phase, taken in seconds.items():
        totals[phase]["(Python)"] = round(1e6 * taken - totals[phase].total())
    calls = {phase: 1 if phase == "prefill" else task["steps"] for phase in seconds}
    return {
        f"{phase}_ms": {name: round(time / 1000 / calls[phase], 3) for name, time in totals[phase].most_common()}
        for phase in calls
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("package", type=Path)
    parser.add_argument("variant")
    parser.add_argument("task", type=json.loads)
    args = parser.parse_args()
    package = args.package.resolve()
    with tempfile.TemporaryDirectory(prefix="olmo2-bench-") as folder:
        os.chdir(folder)  # the profiles are written to the current folder
        ort.InferenceSession = Session
        finish(profile(package, args.variant, args.task))


if __name__ == "__main__":
    main()
