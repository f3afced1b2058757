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
        "By tokens of context and rows of the batch. ITL: the median. Decode and prefill: tokens/s of all rows. "
        "MB/token: what decoding must read for one token; bandwidth: that times tokens/s, of the memory's.\n\n"
        + _speeds(document["contenders"]),
    ]
    if document["ratios"]:
        parts.append(
            "Ours / peer: quotient of the medians (least-largest of one repeat); = weights of as many bits; columns: "
            "tokens of context x batch size.\n\n" + _ratios(document["ratios"])
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
    heads = ["tokens", "rows", "", "TTFT, ms", "ITL, ms", "p99, ms", "decode/s", "prefill/s", "MB/token", "bandwidth"]
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
            f"{r['ratio_median']:.2f} ({r['ratio_low']:.2f}-{r['ratio_high']:.2f})"
        )
    heads = ["", "ours", "peer", *(f"{context} x {rows}" for context, rows in points)]
    return _table(heads, [[*key, *(row[point] for point in points)] for key, row in lines.items()])


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(heads, *rows, strict=True)]
    texts = [all(not cell[:1].isdigit() for cell in column) for column in zip(*rows, strict=True)] or [True] * len(
        heads
    )
    rule = [
        "-" * max(3, width) if text else "-" * max(2, width - 1) + ":"
        for width, text in zip(widths, texts, strict=True)
    ]
    lines = [
        [
            cell.ljust(width) if text else cell.rjust(width)
            for cell, width, text in zip(cells, widths, texts, strict=True)
        ]
        for cells in (heads, *rows)
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (lines[0], rule, *lines[1:]))


def _number(value: float | None, form: str, unit: float = 1.0) -> str:
    return "" if value is None else form.format(value / unit)
