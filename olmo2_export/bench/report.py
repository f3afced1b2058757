"""The figures of `compare` for people, in markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def report(document: Mapping[str, Any]) -> str:
    """Return the tables of a document of `compare`."""
    machine = document["machine"]
    parts = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads; {document['repeats']} repeats, "
        f"{document['new_tokens']} new tokens; load average {machine['load_average_before']} before the first; memory "
        f"{machine['memory_bandwidth_bytes_per_s'] / 1e9:.1f} GB/s ({machine['memory_bandwidth_from']})",
        _costs(document["contenders"]),
        _speeds(document["contenders"]),
    ]
    if document["ratios"]:
        parts.append(
            "Ours / peer: quotient of the medians (least to largest of one repeat); = weights of as many bits.\n\n"
            + _ratios(document["ratios"])
        )
    parts += document["left_out"]
    parts += [f"{name}: {entry['note']}" for name, entry in document["contenders"].items() if entry["note"]]
    parts += [f"FAILED: {failure}" for failure in document["failures"]]
    return "\n\n".join(parts)


def _costs(contenders: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        [
            name,
            _number(entry["make_s"], "{:.1f}"),
            _number(entry["load_s"], "{:.2f}"),
            _number(entry["peak_memory_bytes"], "{:,.0f}", 1e6),
            _number(entry["disk_bytes"], "{:,.0f}", 1e6),
        ]
        for name, entry in contenders.items()
    ]
    return _table(["", "make, s", "load, s", "peak memory, MB", "on disk, MB"], rows)


def _speeds(contenders: Mapping[str, Mapping[str, Any]]) -> str:
    heads = ["context", "batch", "", "TTFT, ms", "ITL p50, ms", "p99, ms", "decode, tokens/s", "prefill, tokens/s"]
    heads += ["MB/token", "of bandwidth"]
    rows = [
        (
            (point["context_tokens"], point["batch_size"]),
            [
                f"{point['context_tokens']}",
                f"{point['batch_size']}",
                name,
                f"{1000 * point['ttft_s']:,.1f}",
                f"{1000 * point['itl_p50_s']:,.2f}",
                f"{1000 * point['itl_p99_s']:,.2f}",
                f"{point['decode_tokens_per_s']:,.1f}",
                f"{point['prefill_tokens_per_s']:,.1f}",
                f"{point['bytes_per_token'] / 1e6:,.1f}",
                f"{point['bandwidth_share']:.0%}",
            ],
        )
        for name, entry in contenders.items()
        for point in entry["points"]
    ]
    rows.sort(key=lambda row: row[0])  # stable: contenders stay in order
    return _table(heads, [cells for _, cells in rows])


def _ratios(ratios: Sequence[Mapping[str, Any]]) -> str:
    points = list(dict.fromkeys((r["context_tokens"], r["batch_size"]) for r in ratios))
    lines: dict[tuple[str, str, str], dict[tuple[int, int], str]] = {}
    for r in ratios:
        sign = " =" if r["like_for_like"] else ""
        row = lines.setdefault((r["metric"].partition("_")[0], r["ours"], r["peer"] + sign), {})
        row[(r["context_tokens"], r["batch_size"])] = (
            f"{r['ratio_median']:.2f} ({r['ratio_low']:.2f} to {r['ratio_high']:.2f})"
        )
    heads = ["", "ours", "peer", *(f"{context} tokens, batch {rows}" for context, rows in points)]
    return _table(heads, [[*key, *(row[point] for point in points)] for key, row in lines.items()])


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _number(value: float | None, form: str, unit: float = 1.0) -> str:
    return "" if value is None else form.format(value / unit)
