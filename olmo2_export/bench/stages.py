"""Seconds and peak memory of `export` and `build`, each as a process of its own, as a user runs it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from olmo2_export.bench.checkpoint import SIZES, write_checkpoint
from olmo2_export.bench.processes import stage


def run(size: str, work: Path, precisions: Sequence[str]) -> dict[str, Any]:
    """Measure export to fp32, and the build of an engine of each precision, in an empty folder.

    Returns:
        What the last line of stdout says.
    """
    checkpoint, package = work / "checkpoint", work / "package"
    checkpoint.mkdir(parents=True)
    stored = write_checkpoint(checkpoint, SIZES[size])
    rows = [stage("export", [checkpoint, "--out", package])]
    for precision in precisions:
        cost = stage("build", [package, "--compute-capability", "8.9", "--precision", precision])
        rows.append({**cost, "stage": f"build {precision}"})
    package_bytes = sum(p.stat().st_size for p in package.rglob("*") if p.is_file())
    return {
        "size": size,
        "cores": os.cpu_count(),
        "checkpoint_mb": round(stored / 1e6),
        "package_mb": round(package_bytes / 1e6),
        "stages": rows,
    }


def table(result: dict[str, Any]) -> str:
    """Return the result for people."""
    lines = [f"{r['stage']:<10} {r['seconds']:>8.1f} s {r['peak_memory_mb']:>8,} MB peak" for r in result["stages"]]
    sizes = f"checkpoint {result['checkpoint_mb']:,} MB, package {result['package_mb']:,} MB, {result['cores']} cores"
    return "\n".join([*lines, sizes])
