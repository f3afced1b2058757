"""Seconds and peak memory of `export` and `build`, each as a process of its own, as a user runs it.

Of a shape too large to be measured whole some layers are: what one of them takes is the difference between exports of
that many and of half as many, and the whole follows from it. Beside each export stands what `--dry-run` had said.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from olmo2_export.bench.checkpoint import SIZES, write_checkpoint
from olmo2_export.bench.processes import stage
from olmo2_export.package.plan import plan_export
from olmo2_export.package.weight_choice import Options
from olmo2_export.weights.checkpoint import open_headers


def run(
    size: str,
    work: Path,
    precisions: Sequence[str],
    *,
    variants: Sequence[str] = ("fp32",),
    layers: int | None = None,
    prefill_graph: bool = True,
) -> dict[str, Any]:
    """Measure an export of each variant, and the build of an engine of each precision, in an empty folder.

    Args:
        size: out of `SIZES`.
        work: the folder.
        precisions: of engines, which are built of fp32, and of no model that is cut to some layers.
        variants: of the packages; each is exported alone.
        layers: measure so many instead of the model's, and half of them; None: all.
        prefill_graph: of variants that have one.

    Returns:
        What the last line of stdout says.
    """
    shape = SIZES[size]
    whole = shape["num_hidden_layers"]
    counts = [whole] if layers is None else sorted({max(1, layers // 2), layers})
    rows: list[dict[str, Any]] = []
    package = work / "package"
    stored = 0
    for count in counts:
        checkpoint = work / f"checkpoint-{count}"
        checkpoint.mkdir(parents=True)
        stored = write_checkpoint(checkpoint, shape | {"num_hidden_layers": count})
        for variant in variants:
            flags = [] if prefill_graph else ["--no-prefill-graph"]
            said = plan_export(
                open_headers(str(checkpoint)), variants=[variant], options=Options(prefill_graph=prefill_graph)
            )
            shutil.rmtree(package, ignore_errors=True)
            cost = stage("export", [checkpoint, "--out", package, "--variant", variant, *flags])
            rows.append(
                {
                    **cost,
                    "stage": f"export {variant}",
                    "layers": count,
                    "package_mb": round(sum(p.stat().st_size for p in package.rglob("*") if p.is_file()) / 1e6),
                    "said_seconds": round(said.costs.seconds, 1),
                    "said_peak_memory_mb": round(said.costs.memory / 1e6),
                    "said_package_mb": round(said.package / 1e6),
                }
            )
    result = {"size": size, "cores": os.cpu_count(), "checkpoint_mb": round(stored / 1e6), "stages": rows}
    if len(counts) == 2:
        result["per_layer"] = [_per_layer(variant, rows, whole) for variant in variants]
    if precisions and layers is None:
        if "fp32" not in variants[-1:]:
            shutil.rmtree(package, ignore_errors=True)
            rows.append({**stage("export", [work / f"checkpoint-{whole}", "--out", package]), "layers": whole})
        for precision in precisions:
            cost = stage("build", [package, "--compute-capability", "8.9", "--precision", precision])
            rows.append({**cost, "stage": f"build {precision}", "layers": whole})
    result["package_mb"] = round(sum(p.stat().st_size for p in package.rglob("*") if p.is_file()) / 1e6)
    return result


def _per_layer(variant: str, rows: Sequence[dict[str, Any]], whole: int) -> dict[str, Any]:
    """Return what a layer of a variant takes, and the whole model by that."""
    few, many = (row for row in rows if row["stage"] == f"export {variant}")
    layers = many["layers"] - few["layers"]
    found: dict[str, Any] = {"variant": variant}
    for name in ("seconds", "peak_memory_mb", "package_mb"):
        found[name] = round((many[name] - few[name]) / layers, 2)
    found["whole_seconds"] = round(many["seconds"] + (whole - many["layers"]) * found["seconds"])
    found["whole_package_mb"] = round(many["package_mb"] + (whole - many["layers"]) * found["package_mb"])
    return found


def table(result: dict[str, Any]) -> str:
    """Return the result for people."""
    lines = []
    for row in result["stages"]:
        said = ""
        if "said_seconds" in row:
            said = f"; said before: {row['said_seconds']:.0f} s, {row['said_peak_memory_mb']:,} MB"
        layers = f"{row['layers']:>3} layers"
        lines.append(f"{row['stage']:<12} {layers} {row['seconds']:>8.1f} s {row['peak_memory_mb']:>8,} MB peak{said}")
    for row in result.get("per_layer", ()):
        lines.append(
            f"{row['variant']}: a layer {row['seconds']:.1f} s, {row['peak_memory_mb']:,} MB of peak memory, "
            f"{row['package_mb']:,} MB; so the whole model {row['whole_seconds']:,} s, {row['whole_package_mb']:,} MB"
        )
    sizes = f"checkpoint {result['checkpoint_mb']:,} MB, package {result['package_mb']:,} MB, {result['cores']} cores"
    return "\n".join([*lines, sizes])
