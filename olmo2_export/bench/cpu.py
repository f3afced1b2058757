"""The table of targets: ours and the peers on one machine in one run, measured in turns.

For each task of each round every contender gets a fresh process, one after the other (task 1: A B C, task 2: A B C,
...), so that the two sides of a ratio ran within minutes of each other.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from olmo2_export.bench.checkpoint import SIZES, echo_successor
from olmo2_export.bench.claims import claims_table, judge, samples_table, to_document
from olmo2_export.bench.contenders import DEMO, Contender, Workshop, ours, peers
from runtimes.errors import FailedError

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


def measure(
    contenders: Sequence[Contender], tasks: Mapping[str, dict[str, Any]], rounds: int
) -> tuple[dict[str, dict[str, list[dict[str, float]]]], list[str]]:
    """Measure in turns; a contender that fails does not take the others' samples with it.

    Args:
        contenders: each with the tasks it is measured in.
        tasks: name -> the task as the workers take it.
        rounds: how often.

    Returns:
        task -> contender -> a sample a round, empty where it failed; under `export`, what making each model cost, once.
        And what failed.
    """
    failures = []
    plan = [(name, c) for _ in range(rounds) for name in tasks for c in contenders if name in c.tasks]
    samples: dict[str, dict[str, list[dict[str, float]]]] = {name: {} for name in tasks}
    with tqdm(plan, desc="measuring", leave=False) as progress:
        for name, contender in progress:
            progress.set_postfix_str(f"{name} of {contender.name}")
            sample: dict[str, float] = {}
            try:
                sample = contender.sample(tasks[name])
            except FailedError as error:
                failures.append(f"{contender.name}, {name}: {error}")
            samples[name].setdefault(contender.key, []).append(sample)
    samples["export"] = {contender.key: [contender.made] for contender in contenders}
    return samples, failures


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
    samples, failures = measure(contenders, details, rounds)
    results = judge(samples)
    names = {contender.key: contender.name for contender in contenders}
    for key, name in (("llama", f"llama.cpp {llama_types[0]}"), ("genai", "onnxruntime-genai int4")):
        names.setdefault(key, name)  # claims are about them, there or not
    machine = f"{_processor()}, {os.cpu_count()} cores, load average {busy:.1f} before the first sample"
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
        "processor": _processor(),
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


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown processor"
    )
