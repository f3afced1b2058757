"""The targets, and what the samples say about them.

A sample is what a worker printed: a dict of numbers whose keys carry the units. A ratio is taken within a round, where
both sides ran minutes apart on the same machine; what is reported is the median of the rounds with the least and most.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

Samples: TypeAlias = Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]]
"""task -> contender -> one sample a round, empty where it failed"""


@dataclass(frozen=True)
class Quantity:
    """One number of a contender in a task."""

    task: str
    contender: str
    key: str


@dataclass(frozen=True)
class Claim:
    """One line of the table of targets."""

    what: str
    ours: Quantity
    against: Quantity | None
    """what `ours` is divided by; None: the claim is about `ours` itself"""
    unit: Literal["x", "s", "ms", "MB"]
    target: float
    stretch: float | None = None
    at_most: bool = False
    """less is better"""


@dataclass(frozen=True)
class Result:
    """What was measured for a claim."""

    claim: Claim
    per_round: tuple[float, ...]
    """in the claim's unit; empty: a side was not measured"""

    @property
    def median(self) -> float | None:
        return statistics.median(self.per_round) if self.per_round else None

    @property
    def verdict(self) -> str:
        claim, median = self.claim, self.median
        if median is None:
            return "not measured"
        if claim.stretch is not None and _reaches(median, claim.stretch, claim.at_most):
            return "stretch"
        if _reaches(median, claim.target, claim.at_most):
            return "met"
        return f"missed by {abs(median - claim.target) / claim.target:.0%}"


def _speed(task: str, contender: str) -> Quantity:
    return Quantity(task, contender, "tokens_per_second")


CLAIMS = (
    Claim("decode, 128-token context", _speed("decode_128", "ours"), _speed("decode_128", "llama"), "x", 1.3, 1.6),
    Claim("decode, 128-token context", _speed("decode_128", "ours"), _speed("decode_128", "genai"), "x", 1.3, 1.6),
    Claim("decode, 3000-token context", _speed("decode_3000", "ours"), _speed("decode_3000", "llama"), "x", 1.5, 2.0),
    Claim(
        "decode, 3000-token context, int8 KV cache",
        _speed("decode_3000", "int8_cache"),
        _speed("decode_3000", "llama"),
        "x",
        1.5,
        2.0,
    ),
    Claim(
        "decode, 3000-token context, 8-bit KV caches",
        _speed("decode_3000", "int8_cache"),
        _speed("decode_3000", "llama_int8_cache"),
        "x",
        1.5,
        2.0,
    ),
    Claim("prefill, 512 tokens", _speed("prefill_512", "ours"), _speed("prefill_512", "llama"), "x", 1.7, 2.2),
    Claim(
        "8 streams, total",
        _speed("streams_8", "ours"),
        Quantity("streams_8", "ours", "one_stream_tokens_per_second"),
        "x",
        2.2,
        3.0,
    ),
    Claim("load, files hashed", Quantity("load", "ours", "seconds"), None, "s", 1.0, 0.5, at_most=True),
    Claim("load, files trusted", Quantity("load_trusted", "ours", "seconds"), None, "s", 1.0, 0.5, at_most=True),
    Claim(
        "peak resident memory, 1024 tokens, one graph",
        Quantity("memory_1024", "one_graph", "peak_resident_mb"),
        None,
        "MB",
        1000,
        at_most=True,
    ),
    Claim(
        "peak resident memory, 1024 tokens, two graphs",
        Quantity("memory_1024", "ours", "peak_resident_mb"),
        None,
        "MB",
        2300,
        at_most=True,
    ),
    Claim("export", Quantity("export", "ours", "seconds"), None, "s", 90, 45, at_most=True),
    Claim("export, peak memory", Quantity("export", "ours", "peak_memory_mb"), None, "MB", 2500, at_most=True),
    Claim(
        "text that repeats itself, prompt lookup",
        Quantity("lookup_repeats", "ours", "lookup_tokens_per_second"),
        Quantity("lookup_repeats", "ours", "plain_tokens_per_second"),
        "x",
        1.7,
        2.5,
    ),
    Claim(
        "text without repetition, prompt lookup",
        Quantity("lookup_new", "ours", "lookup_tokens_per_second"),
        Quantity("lookup_new", "ours", "plain_tokens_per_second"),
        "x",
        0.97,
    ),
    Claim(
        "prompt lookup gives identical text",
        Quantity("lookup_demo", "demo", "identical_texts"),
        Quantity("lookup_demo", "demo", "texts"),
        "x",
        1.0,
    ),
)
"""the table of targets; `ours` is the first variant asked for, `one_graph` the same without a graph for prefill"""

PEERS = ("llama", "genai", "openvino")


def judge(samples: Samples, claims: Sequence[Claim] = CLAIMS) -> list[Result]:
    """Return every claim whose task was done, with what the samples say."""
    return [Result(claim, _per_round(samples, claim)) for claim in claims if claim.ours.task in samples]


def claims_table(results: Sequence[Result], names: Mapping[str, str], samples: Samples) -> str:
    """Return the table of targets in markdown.

    Args:
        results: as from `judge`.
        names: contender -> what people call it.
        samples: for the medians of both sides, and where nothing is divided, of the peers.
    """
    lines = ["| what | ours | beside | measured | target | stretch | verdict |", "|---|---|---|---|---|---|---|"]
    for result in results:
        claim = result.claim
        if claim.against is None:
            beside = [Quantity(claim.ours.task, peer, claim.ours.key) for peer in PEERS]
            beside = [quantity for quantity in beside if _values(samples, quantity)]
        else:
            beside = [claim.against]
        others = ", ".join(f"{names[q.contender]}: {_show(_values(samples, q), q.key) or 'not there'}" for q in beside)
        ours = _show(_values(samples, claim.ours), claim.ours.key)
        cells = [claim.what, ours, others, _measured(result), _limit(claim, claim.target), _limit(claim, claim.stretch)]
        lines.append(f"| {' | '.join([*cells, result.verdict])} |")
    return "\n".join(lines)


def samples_table(samples: Samples, names: Mapping[str, str]) -> str:
    """Return the medians of everything in markdown, a column per contender; the spread is (max - min) / median."""
    lines = [f"| | {' | '.join(names.values())} |", f"|---|{'---|' * len(names)}"]
    for task, contenders in samples.items():
        for key in dict.fromkeys(key for rows in contenders.values() for row in rows for key in row):
            cells = [_spread(_values(samples, Quantity(task, contender, key))) for contender in names]
            lines.append(f"| {task}: {_words(key)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def to_document(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return the claims' JSON form."""
    units = {"x": "ratio", "s": "seconds", "ms": "ms", "MB": "mb"}
    return [
        {
            "what": result.claim.what,
            "against": result.claim.against.contender if result.claim.against else None,
            f"per_round_{units[result.claim.unit]}": [round(v, 3) for v in result.per_round],
            f"median_{units[result.claim.unit]}": None if result.median is None else round(result.median, 3),
            "target": result.claim.target,
            "stretch": result.claim.stretch,
            "verdict": result.verdict,
        }
        for result in results
    ]


def _reaches(value: float, limit: float, at_most: bool) -> bool:
    return value <= limit if at_most else value >= limit


def _rows(samples: Samples, quantity: Quantity) -> Sequence[Mapping[str, float]]:
    return samples.get(quantity.task, {}).get(quantity.contender, ())


def _values(samples: Samples, quantity: Quantity) -> list[float]:
    return [row[quantity.key] for row in _rows(samples, quantity) if quantity.key in row]


def _per_round(samples: Samples, claim: Claim) -> tuple[float, ...]:
    """Rounds in which either side failed do not count."""
    if claim.against is None:
        return tuple(_values(samples, claim.ours))
    ours, against = _rows(samples, claim.ours), _rows(samples, claim.against)
    return (
        tuple(
            a[claim.ours.key] / b[claim.against.key]
            for a, b in zip(ours, against, strict=True)
            if claim.ours.key in a and claim.against.key in b
        )
        if ours and against
        else ()
    )


def _measured(result: Result) -> str:
    if result.median is None:
        return ""
    least, most = min(result.per_round), max(result.per_round)
    around = "" if len(result.per_round) == 1 else f" ({_number(least)} to {_number(most)})"
    return f"{_number(result.median)}{around} {result.claim.unit}"


def _limit(claim: Claim, limit: float | None) -> str:
    return "" if limit is None else f"{'≤' if claim.at_most else '≥'} {_number(limit)} {claim.unit}"


def _show(values: Sequence[float], key: str) -> str:
    return f"{_number(statistics.median(values))} {_words(key)}" if values else ""


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    median = statistics.median(values)
    around = f" ±{(max(values) - min(values)) / median:.0%}" if len(values) > 1 and median else ""
    return f"{_number(median)}{around}"


def _words(key: str) -> str:
    return key.replace("tokens_per_second", "tokens/s").replace("_mb", "_MB").replace("_", " ")


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
