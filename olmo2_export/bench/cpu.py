"""The table of targets: ours and the peers on one machine in one run, measured in turns.

How turns are taken is in `turns.py`. What a package costs on its own, and beside any peer, is `compare.py`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from olmo2_export.bench.checkpoint import SIZES, echo_successor
from olmo2_export.bench.claims import claims_table, judge, samples_table, to_document
from olmo2_export.bench.contenders import DEMO, Workshop, ours, peers
from olmo2_export.bench.machine import processor
from olmo2_export.bench.turns import take_turns

TASKS = (
    "decode_128",
    "decode_3000",
    "prefill_512",
    "streams_8",
    "load",
    "load_trusted",
    "memory_1024",
    "lookup_repeats",
    "lookup_new",
    "lookup_demo",
)


def task(name: str, vocab_size: int, threads: int, steps: int) -> dict[str, Any]:
    """Return a task of `TASKS` as the workers take it; see `workers/common.py` and `workers/ours.py`."""
    details: dict[str, dict[str, Any]] = {
        "decode_128": {"kind": "decode", "context": 128, "steps": steps},
        "decode_3000": {"kind": "decode", "context": 3000, "steps": steps},
        "prefill_512": {"kind": "prefill", "length": 512, "repeats": 3},
        "streams_8": {"kind": "streams", "context": 128, "rows": 8, "steps": steps},
        "load": {"kind": "load"},
        "load_trusted": {"kind": "load", "trusted": True},
        "memory_1024": {"kind": "memory", "context": 1024},
        "lookup_repeats": _lookup(64, vocab_size, steps),
        "lookup_new": _lookup(vocab_size // 2 + 1, vocab_size, steps),
        "lookup_demo": {
            "kind": "lookup_text",
            "text": str(DEMO / "heldout.txt"),
            "texts": 8,
            "prompt_tokens": 200,
            "new_tokens": 3 * steps,
        },
    }
    return {**details[name], "threads": threads, "vocab_size": vocab_size}


def _lookup(first: int, vocab_size: int, steps: int) -> dict[str, Any]:
    """The prompt begins the text that the checkpoint goes on with, see `echo_successor`."""
    ids = [first]
    while len(ids) < 192:
        ids.append(echo_successor(ids[-1], vocab_size))
    return {"kind": "lookup", "prompt_ids": ids, "new_tokens": 4 * steps, "repeats": 2}


def run(
    size: str,
    work: Path,
    peers_folder: Path,
    *,
    variants: Sequence[str],
    llama_types: Sequence[str],
    tasks: Sequence[str],
    rounds: int,
    threads: int,
    steps: int,
) -> tuple[dict[str, Any], str]:
    """Make what is missing in `work`, measure, and judge.

    Returns:
        What the last line of stdout says, and the report for people, in markdown.
    """
    workshop = Workshop(work, size)
    rivals, missing = peers(workshop, peers_folder, threads, llama_types)
    contenders = [*ours(workshop, variants), *rivals]
    busy = os.getloadavg()[0]  # of others; what was just made is in it too
    vocab_size = SIZES[size]["vocab_size"]
    details = {name: task(name, vocab_size, threads, steps) for name in tasks}
    samples, failures = take_turns(contenders, details, rounds)
    samples["export"] = {contender.key: [contender.made] for contender in contenders}
    results = judge(samples)
    names = {contender.key: contender.name for contender in contenders}
    absent = (
        ("llama", f"llama.cpp {llama_types[0]}"),
        ("llama_int8_cache", f"llama.cpp {llama_types[0]}, q8_0 KV cache"),
        ("genai", "onnxruntime-genai int4"),
    )
    for key, name in absent:
        names.setdefault(key, name)  # claims are about them, there or not
    machine = f"{processor()}, {os.cpu_count()} cores, load average {busy:.1f} before the first sample"
    setting = f"{size} shape, {threads} threads, {rounds} rounds"
    report = "\n\n".join(
        [
            f"{machine}; {setting}",
            *missing,
            claims_table(results, names, samples),
            "Medians of all samples, ± (largest - smallest) / median:",
            samples_table(samples, names),
            *(f"FAILED: {failure}" for failure in failures),
        ]
    )
    return {
        "size": size,
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "rounds": rounds,
        "load_average_before": round(busy, 1),
        "onnxruntime": version("onnxruntime"),
        "contenders": names,
        "left_out": missing,
        "failures": failures,
        "claims": to_document(results),
        "samples": samples,
    }, report
