"""Read what `bench` wrote: throughput, memory and ratios of each contender. A report draws it."""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runtimes.errors import UsageError

_MOST_BYTES = 64 << 20
_MOST_COUNT = 1 << 31
_MOST = 1e18  # of any other number: far beyond what a machine has


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
    note: str
    """what a reader must know to judge its figures; empty: nothing"""


@dataclass(frozen=True)
class Ratio:
    """Ours / peer at one point; NaN: not measured."""

    metric: str
    ours: str
    peer: str
    like_for_like: bool
    """the weights of both have as many bits"""
    context_tokens: int
    batch_size: int
    median: float
    low: float
    """of one repeat"""
    high: float


@dataclass(frozen=True)
class Bench:
    """A benchmark's results."""

    machine: dict[str, Any] = field(hash=False)
    package: str
    contenders: dict[str, Contender] = field(hash=False)
    ratios: tuple[Ratio, ...]
    left_out: tuple[str, ...]
    """a line for each peer that was not there"""
    failures: tuple[str, ...]
    """a line for each that failed"""


def read_bench(path: Path) -> Bench:
    """Read a file of `bench`: the JSON document, or all that it printed, whose last line that is.

    Raises:
        UsageError: there is no such file, it is something else or large, or a number in it cannot be.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise OSError("not a regular file")
        if found.st_size > _MOST_BYTES:
            raise OSError(f"{found.st_size:,} bytes, at most {_MOST_BYTES:,}")
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
        return Bench(
            machine=_machine(document.get("machine") or {}),
            package=str(document.get("package", "")),
            contenders=contenders,
            ratios=tuple(_ratio(entry) for entry in document.get("ratios") or ()),
            left_out=_lines(document, "left_out"),
            failures=_lines(document, "failures"),
        )
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        said = f"{type(error).__name__}: {error}"
        raise UsageError(f"{path}: not a benchmark ({said}); --bench takes the JSON of olmo2-export bench") from error


def _machine(entry: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in entry.items():
        if name.endswith("bytes_per_s") or isinstance(value, float | int):
            _number(entry, name)
    return dict(entry)


def _lines(document: Mapping[str, Any], name: str) -> tuple[str, ...]:
    value = document.get(name) or []
    if not isinstance(value, list):
        raise TypeError(f"{name} is {_short(value)}")
    return tuple(_text({name: line}, name) for line in value)


def _contender(entry: Mapping[str, Any]) -> Contender:
    points = sorted((_point(point) for point in entry["points"]), key=lambda p: (p.batch_size, p.context_tokens))
    return Contender(
        load_s=_number(entry, "load_s"),
        peak_memory_bytes=_number(entry, "peak_memory_bytes"),
        disk_bytes=_number(entry, "disk_bytes"),
        points=tuple(points),
        note=_text(entry, "note") if entry.get("note") is not None else "",
    )


def _ratio(entry: Mapping[str, Any]) -> Ratio:
    return Ratio(
        metric=_text(entry, "metric"),
        ours=_text(entry, "ours"),
        peer=_text(entry, "peer"),
        like_for_like=bool(entry.get("like_for_like")),
        context_tokens=_count(entry["context_tokens"], "context_tokens"),
        batch_size=_count(entry.get("batch_size", 1), "batch_size"),
        median=_number(entry, "ratio_median"),
        low=_number(entry, "ratio_low"),
        high=_number(entry, "ratio_high"),
    )


def _point(point: Mapping[str, Any]) -> BenchPoint:
    names = [name for name in BenchPoint.__dataclass_fields__ if name not in ("context_tokens", "batch_size")]
    return BenchPoint(
        context_tokens=_count(point["context_tokens"], "context_tokens"),
        batch_size=_count(point.get("batch_size", 1), "batch_size"),
        **{name: _number(point, name) for name in names},
    )


def _number(entry: Mapping[str, Any], name: str) -> float:
    value = entry.get(name)
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {_short(value)}")
    if not 0 <= value < _MOST:  # NaN as well
        raise ValueError(f"{name} is {_short(value)}: expected a number from 0, below {_MOST:g}")
    return float(value)


def _count(value: object, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {_short(value)}")
    if not 0 < value < _MOST_COUNT:
        raise ValueError(f"{name} is {_short(value)}: expected an integer from 1, below {_MOST_COUNT:,}")
    return value


def _text(entry: Mapping[str, Any], name: str) -> str:
    """Return words, on one line."""
    value = entry[name]
    if not isinstance(value, str):
        raise TypeError(f"{name} is {_short(value)}")
    return " ".join(value.split())


def _short(value: object) -> str:
    said = repr(value)
    return said if len(said) <= 60 else f"{said[:57]}..."
