"""The plan of an export, as people read it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from olmo2_export.catalog import find
from olmo2_export.package.plan import ExportPlan
from olmo2_export.summary.text import size


def plan_lines(plan: ExportPlan) -> Iterator[str]:
    """Yield the lines that `export --dry-run` prints."""
    at = f"@{plan.revision[:12]}" if plan.revision else ""
    read = f"{size(plan.source_bytes)} of weights" if plan.source_bytes else "headers not read"
    yield f"{plan.model}{at}: {plan.weights:,} weights, {read}"
    if plan.quantized is not None:
        yield f"quantised: {plan.quantized}"
    for variant in plan.variants:
        bits = f"{'at most ' if variant.at_most else ''}{variant.bits_per_weight:.2f} bits per weight"
        cache = f"{size(variant.cache_bytes_per_token)} per token"
        if variant.windowed:
            cache += f", {size(variant.cache_bytes)} for all, as {variant.windowed} layers keep a window alone"
        yield f"{variant.name}: {size(variant.nbytes)}, {bits}; KV cache {cache}"
        row = find(variant.name)
        for number, (path, files) in enumerate(variant.graphs.items()):
            data = f"{row.prefill_path}_data" if number else row.data
            yield f"  {_name(path)} {size(files.graph)}, {_name(data)} {files.data:,} bytes"
        for path, nbytes in variant.other_caches.items():
            yield f"  {_name(path)} {size(nbytes)}, with another KV cache, on the same"
        for path, nbytes in variant.portable.items():
            yield f"  {_name(path)} {size(nbytes)}, for other runtimes, on {_name(row.data)}"
        for note in variant.notes:
            yield f"  {note}"
    for engine in plan.engines:
        yield f"engine {engine.precision}: {size(engine.plan)} and its kernels, from a graph of {size(engine.graph)}"
    spool = f", and {size(plan.spool)} while weights are quantised" if plan.spool else ""
    yield f"package: {size(plan.package)}; tokenizer, configs and manifest {size(plan.texts)}{spool}"
    free = "" if plan.free_disk is None else f", free {size(plan.free_disk)}"
    short = plan.free_disk is not None and plan.disk > plan.free_disk
    yield f"disk: needs {size(plan.disk)}{free}{': NOT ENOUGH' if short else ''}"
    left = "" if plan.free_memory is None else f", free {size(plan.free_memory)}"
    short = plan.free_memory is not None and plan.costs.memory > plan.free_memory
    yield f"memory: about {size(plan.costs.memory)} ({plan.costs.phase}){left}{': NOT ENOUGH' if short else ''}"
    yield f"time: about {_minutes(plan.costs.seconds)} where nothing else runs"


def _name(path: str) -> str:
    return PurePosixPath(path).name


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
