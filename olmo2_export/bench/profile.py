"""Where the time of our prefill and decode goes, by operator: onnxruntime's own profile, summed."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from olmo2_export.bench.bytes_moved import package_traffic
from olmo2_export.bench.contenders import Workshop
from olmo2_export.bench.machine import device_limits, memory_bandwidth, processor
from olmo2_export.bench.processes import worker
from runtimes.errors import UsageError
from runtimes.package import open_package


def run(
    size: str,
    work: Path,
    variants: Sequence[str],
    threads: int,
    context: int,
    steps: int,
    rows: Sequence[int],
    packages: Sequence[Path] = (),
) -> dict[str, Any]:
    """Profile each variant in a process of its own.

    Args:
        size: of `SIZES`.
        work: where the package is, or is made.
        variants: of ours.
        threads: of an operator.
        context: tokens of the prefill.
        steps: decode steps behind it.
        rows: of decode steps, each measured.
        packages: one that is there, which is profiled instead; else one is made.

    Returns:
        What the last line of stdout says.

    Raises:
        UsageError: a number of rows out of range.
    """
    if not rows or min(rows) < 1 or len(set(rows)) != len(rows):
        raise UsageError(f"--rows {list(rows)}: expected different integers from 1")
    task: dict[str, Any] = {"context": context, "steps": steps, "threads": threads, "rows": list(rows)}
    busy = os.getloadavg()[0]
    bandwidth, source = memory_bandwidth(device_limits("cpu", threads))
    found, walls = {}, {}
    for variant in variants:
        if packages:
            (package,) = packages
        else:
            workshop = Workshop(work, size)
            package, _ = workshop.package("bench", workshop.checkpoint("olmo2"), variant)
        opened = open_package(package)
        task["vocab_size"] = opened.model.vocab_size
        found[variant] = worker(sys.executable, "profile", [package, variant, json.dumps(task)])
        traffic = package_traffic(opened.folder, opened.variant(variant))
        read = {count: count * traffic.bytes_per_token(context + steps // 2, count) for count in rows}
        walls[variant] = {f"decode_{count}_ms": 1000 * moved / bandwidth for count, moved in read.items()}
    return {
        "size": size,
        "processor": processor(),
        "cores": os.cpu_count(),
        "load_average_before": round(busy, 1),
        "memory_bandwidth_bytes_per_s": bandwidth,
        "memory_bandwidth_from": source,
        **task,
        "variants": found,
        "walls": walls,
    }


def table(result: dict[str, Any]) -> str:
    """Return the result in markdown: a table per variant and phase."""
    parts = [
        f"{result['processor']}, {result['cores']} cores, load average {result['load_average_before']} before; "
        f"{result['threads']} threads; memory {result['memory_bandwidth_bytes_per_s'] / 1e9:.1f} GB/s "
        f"({result['memory_bandwidth_from']})"
    ]
    for variant, phases in result["variants"].items():
        for phase, times in phases.items():
            total = sum(times.values())
            what, wall = f"prefill of {result['context']} tokens", ""
            if phase != "prefill_ms":
                least = result["walls"][variant][phase]
                what = f"one decode step, rows {phase.split('_')[1]}"
                wall = f"; reading weights and KV cache takes {least:,.1f} ms at least, {least / total:.0%} of that"
            lines = [
                f"{variant}, {what}: {total:,.1f} ms{wall}",
                "",
                "| operator | ms | share |",
                "|---|---|---|",
                *(f"| {name} | {ms:,.2f} | {ms / total:.1%} |" for name, ms in times.items()),
            ]
            parts.append("\n".join(lines))
    return "\n\n".join(parts)
