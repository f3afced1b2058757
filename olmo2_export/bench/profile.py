"""Where the time of our prefill and decode goes, by operator: onnxruntime's own profile, summed."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from olmo2_export.bench.checkpoint import SIZES
from olmo2_export.bench.contenders import Workshop
from olmo2_export.bench.processes import worker


def run(size: str, work: Path, variants: Sequence[str], threads: int, context: int, steps: int) -> dict[str, Any]:
    """Profile each variant in a process of its own.

    Args:
        size: of `SIZES`.
        work: where the package is, or is made.
        variants: of ours.
        threads: of an operator.
        context: tokens of the prefill.
        steps: decode steps behind it.

    Returns:
        What the last line of stdout says.
    """
    task = {"context": context, "steps": steps, "threads": threads, "vocab_size": SIZES[size]["vocab_size"]}
    found = {}
    for variant in variants:
        workshop = Workshop(work, size)
        package, _ = workshop.package("bench", workshop.checkpoint("olmo2"), variant)
        found[variant] = worker(sys.executable, "profile", [package, variant, json.dumps(task)])
    return {"size": size, **task, "variants": found}


def table(result: dict[str, Any]) -> str:
    """Return the result in markdown: a table per variant and phase."""
    parts = []
    for variant, phases in result["variants"].items():
        for phase, times in phases.items():
            total = sum(times.values())
            what = f"prefill of {result['context']} tokens" if phase == "prefill_ms" else "one decode step"
            lines = [
                f"{variant}, {what}: {total:,.1f} ms",
                "",
                "| operator | ms | share |",
                "|---|---|---|",
                *(f"| {name} | {ms:,.2f} | {ms / total:.1%} |" for name, ms in times.items()),
            ]
            parts.append("\n".join(lines))
    return "\n\n".join(parts)
