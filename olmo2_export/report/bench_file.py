"""Read what `bench` wrote: throughput, memory and ratios of each contender. A report draws it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runtimes.errors import UsageError


@dataclass(frozen=True)
class BenchPoint:
    """One context length of a contender; NaN: not measured."""

    context_tokens: int
    batch_size: int
    ttft_s: float
    itl_p50_s: float
    itl_p99_s: float
    decode_tokens_per_s: float
    prefill_tokens_per_s: float
    bytes_per_token: float
    bandwidth_share: float
    """bytes per token x tokens per second / the machine's measured bandwidth"""


@dataclass(frozen=True)
class Contender:
    """What was measured of one contender."""

    load_s: float
    peak_memory_bytes: float
    disk_bytes: float
    points: tuple[BenchPoint, ...]


@dataclass(frozen=True)
class Bench:
    """A benchmark's results."""

    machine: dict[str, Any] = field(hash=False)
    package: str
    contenders: dict[str, Contender] = field(hash=False)
    ratios: tuple[Any, ...] = field(hash=False)


def read_bench(path: Path) -> Bench:
    """Read a file of `bench`: the JSON document, or all that it printed, whose last line that is.

    Raises:
        UsageError: there is no such file, or it is something else.
    """
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read ({error}); --bench takes the JSON of olmo2-export bench") from error
    try:
        try:
            document = json.loads(text)
        except ValueError:
            document = json.loads(text.splitlines()[-1] if text else "")
        contenders = {str(name): _contender(entry) for name, entry in document["contenders"].items()}
        if not contenders:
            raise ValueError("no contenders")
        machine = document.get("machine") or {}
        return Bench(dict(machine), str(document.get("package", "")), contenders, tuple(document.get("ratios") or ()))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        said = f"{type(error).__name__}: {error}"
        raise UsageError(f"{path}: not a benchmark ({said}); --bench takes the JSON of olmo2-export bench") from error


def _contender(entry: Mapping[str, Any]) -> Contender:
    points = sorted((_point(point) for point in entry["points"]), key=lambda p: (p.batch_size, p.context_tokens))
    return Contender(
        load_s=_number(entry, "load_s"),
        peak_memory_bytes=_number(entry, "peak_memory_bytes"),
        disk_bytes=_number(entry, "disk_bytes"),
        points=tuple(points),
    )


def _point(point: Mapping[str, Any]) -> BenchPoint:
    names = [name for name in BenchPoint.__dataclass_fields__ if name not in ("context_tokens", "batch_size")]
    return BenchPoint(
        context_tokens=int(point["context_tokens"]),
        batch_size=int(point.get("batch_size", 1)),
        **{name: _number(point, name) for name in names},
    )


def _number(entry: Mapping[str, Any], name: str) -> float:
    value = entry.get(name)
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r}")
    return float(value)
