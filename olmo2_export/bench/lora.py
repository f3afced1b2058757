"""What a LoRA adapter that is chosen at run time costs a decode step: without inputs for one, with inputs, with one."""

from __future__ import annotations

import json
import math
import os
import statistics
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np

from olmo2_export.architecture import operations
from olmo2_export.bench.checkpoint import SIZES, model_config
from olmo2_export.bench.claims import samples_table
from olmo2_export.bench.contenders import Contender, Workshop
from olmo2_export.bench.cpu import task
from olmo2_export.bench.machine import processor
from olmo2_export.bench.turns import take_turns

_TASK = "decode_128"
_FLAGS = ("--recipe", "rtn", "--no-prefill-graph")
"""a step costs what it costs, whatever its weights are; the export takes a quarter of the time"""


def run(
    size: str, work: Path, variant: str, *, rank: int, rounds: int, threads: int, steps: int
) -> tuple[dict[str, Any], str]:
    """Make what is missing in `work`, and measure in turns.

    Args:
        size: of `SIZES`.
        work: where the packages are, or are made.
        variant: of ours.
        rank: of the adapter, which changes every linear of every layer.
        rounds: samples of each contender, each in a fresh process.
        threads: of an operator.
        steps: decode steps of a sample; it is their median.

    Returns:
        What the last line of stdout says, and the report for people, in markdown.
    """
    workshop = Workshop(work, size)
    checkpoint, flags = workshop.checkpoint("olmo2"), _FLAGS if variant in ("q4", "q8") else ()
    plain, made = workshop.package("plain", checkpoint, variant, flags)
    adapter = write_random_adapter(work / f"adapter-{size}-{rank}", size, rank)
    both, cost = workshop.package(
        f"lora-{rank}", checkpoint, variant, [*flags, "--lora-inputs", f"{adapter}={adapter.name}"]
    )
    columns = (
        ("plain", "no inputs", plain, (), made),
        ("idle", "inputs, no adapter", both, (), cost),
        ("adapter", f"rank {rank}", both, ("--adapter", adapter.name), cost),
    )
    contenders = [
        Contender(key, name, Path(sys.executable), "ours", (str(package), variant, *more), (_TASK,), spent)
        for key, name, package, more, spent in columns
    ]
    busy = os.getloadavg()[0]
    samples, failures = take_turns(contenders, {_TASK: task(_TASK, SIZES[size]["vocab_size"], threads, steps)}, rounds)
    step_ms = {key: 1000 / statistics.median(rates) for key, rates in _rates(samples[_TASK]).items()}
    machine = f"{processor()}, {os.cpu_count()} cores, load average {busy:.1f} before the first sample"
    numbers = sum(map(math.prod, _shapes(size, rank).values()))
    report = "\n\n".join(
        [
            f"{machine}; {size} shape, {variant}, {threads} threads, {rounds} rounds",
            f"An adapter of rank {rank} for every linear of a layer: {numbers / 1e6:.1f} million numbers.",
            samples_table(samples, {contender.key: contender.name for contender in contenders}),
            *(
                f"{contender.name}: {step_ms[contender.key]:.2f} ms a step"
                for contender in contenders
                if contender.key in step_ms
            ),
            *(f"FAILED: {failure}" for failure in failures),
        ]
    )
    return {
        "size": size,
        "variant": variant,
        "rank": rank,
        "adapter_numbers": numbers,
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "rounds": rounds,
        "load_average_before": round(busy, 1),
        "step_ms": {key: round(value, 3) for key, value in step_ms.items()},
        "failures": failures,
        "samples": samples,
    }, report


def write_random_adapter(folder: Path, size: str, rank: int) -> Path:
    """Write an adapter of every linear of a layer as PEFT does, random numbers; return its folder."""
    if not (folder / "adapter_config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        shapes, random = _shapes(size, rank), np.random.default_rng(0)
        ends = np.cumsum([4 * math.prod(shape) for shape in shapes.values()]).tolist()
        header = {
            name: {"dtype": "F32", "shape": shape, "data_offsets": [end - 4 * math.prod(shape), end]}
            for (name, shape), end in zip(shapes.items(), ends, strict=True)
        }
        encoded = json.dumps(header).encode()
        with (folder / "adapter_model.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(encoded)) + encoded)
            for shape in shapes.values():
                file.write((random.standard_normal(shape, np.float32) * np.float32(0.01)).tobytes())
        modules = sorted({name.split(".")[-3] for name in shapes})
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": modules}
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def _shapes(size: str, rank: int) -> dict[str, tuple[int, int]]:
    """Return the shapes of A and B, by PEFT's names."""
    found = {}
    for row in operations(model_config(SIZES[size])):
        if row.kind == "linear" and row.layer is not None:
            out, into = row.shape
            found[f"base_model.model.{row.name}.lora_A.weight"] = (rank, into)
            found[f"base_model.model.{row.name}.lora_B.weight"] = (out, rank)
    return found


def _rates(samples: dict[str, list[dict[str, Any]]]) -> dict[str, list[float]]:
    """Return the tokens/s of each contender, of those that have some."""
    key = "tokens_per_second"
    rates = {name: [sample[key] for sample in found if key in sample] for name, found in samples.items()}
    return {name: found for name, found in rates.items() if found}
