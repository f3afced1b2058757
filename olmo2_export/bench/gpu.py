"""The table of targets on a GPU: ours, transformers' static cache, and what the hardware allows, in one run.

Two walls. A decode step reads every weight once, and the KV cache: bytes over the memory's bandwidth. A prefill
multiplies every weight with every token: operations over the rate of large bfloat16 products. Bandwidth is the data
sheet's where the GPU is in the table below, otherwise that of a copy; the rate of products is measured.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from olmo2_export.bench.checkpoint import SIZES, shape_of
from olmo2_export.bench.claims import Claim, Quantity, claims_table, judge, samples_table, to_document
from olmo2_export.bench.contenders import Contender, Workshop
from olmo2_export.bench.machine import BANDWIDTH, device_limits
from olmo2_export.bench.turns import take_turns
from runtimes.errors import UsageError
from runtimes.manifest import find_variant

TASKS = ("decode_128", "decode_2048", "streams_8", "prefill_2048")
WALL, STATIC = "wall", "static_cache"
_BF16 = 2  # bytes


def _speed(task: str, contender: str) -> Quantity:
    return Quantity(task, contender, "tokens_per_second")


CLAIMS = (
    Claim("decode, 128-token context", _speed("decode_128", "ours"), _speed("decode_128", WALL), "x", 0.6, 0.85),
    Claim("decode, 128-token context", _speed("decode_128", "ours"), _speed("decode_128", STATIC), "x", 2.0),
    Claim("decode, 2048-token context", _speed("decode_2048", "ours"), _speed("decode_2048", WALL), "x", 0.6, 0.85),
    Claim("decode, 2048-token context", _speed("decode_2048", "ours"), _speed("decode_2048", STATIC), "x", 2.0),
    Claim("prefill, 2048 tokens", _speed("prefill_2048", "ours"), _speed("prefill_2048", WALL), "x", 0.5),
)
"""`ours` is the first of those asked for"""


def tasks(size: str, steps: int) -> dict[str, dict[str, Any]]:
    """Return `TASKS` as the workers take them."""
    common = {"threads": 1, "vocab_size": SIZES[size]["vocab_size"]}
    kinds: dict[str, dict[str, Any]] = {
        "decode_128": {"kind": "decode", "context": 128, "steps": steps},
        "decode_2048": {"kind": "decode", "context": 2048, "steps": steps},
        "streams_8": {"kind": "streams", "context": 128, "steps": steps, "rows": 8},
        "prefill_2048": {"kind": "prefill", "length": 2048, "repeats": 5},
    }
    return {name: {**kinds[name], **common} for name in TASKS}


def walls(size: str, device: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return the most tokens per second that the device allows one bfloat16 stream, by task.

    Args:
        size: of `SIZES`.
        device: what the worker `device` found.
    """
    shape = SIZES[size]
    layers, hidden = shape["num_hidden_layers"], shape["hidden_size"]
    kv_size = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    linears = layers * hidden * (2 * hidden + 2 * kv_size + 3 * shape["intermediate_size"])
    head = hidden * shape["vocab_size"]
    name = str(device["device"])
    bandwidth = next((rate for part, rate in BANDWIDTH.items() if part in name), device["copied_bytes_per_second"])

    def decode(context: int) -> dict[str, float]:
        cache = 2 * layers * kv_size * context
        return {"tokens_per_second": bandwidth / (_BF16 * (linears + head + cache))}

    def prefill(length: int) -> dict[str, float]:
        attention = 2 * layers * hidden * length  # causal: half of q k^T and of p v
        flops = 2 * linears + attention + 2 * head / length  # a token; the head sees one
        return {"tokens_per_second": device["bf16_flops_per_second"] / flops}

    return {"decode_128": decode(128), "decode_2048": decode(2048), "prefill_2048": prefill(2048)}


def contenders(
    workshop: Workshop, wanted: Sequence[str], device: str, baseline: bool, package: Path | None = None
) -> list[Contender]:
    """Return ours, made where they are not there, and the baseline.

    Args:
        workshop: where to make the packages.
        wanted: as `ort:bf16`, `trt_rtx:bf16`, `trt:int4`: backend and variant, or precision of an engine.
        device: of the backend ort, and of the baseline.
        baseline: whether to measure transformers.
        package: take these variants of a package that is there, instead of making some.

    Raises:
        UsageError: not of that form, or engines of a package that is there.
        PackageError: the package has no such variant, or is of another shape.
    """
    found = []
    for number, text in enumerate(wanted):
        backend, _, name = text.partition(":")
        if backend not in ("ort", "trt_rtx", "trt") or not name:
            raise UsageError(f"contender {text!r}: expected ort:VARIANT, trt_rtx:PRECISION or trt:PRECISION")
        key = "ours" if number == 0 else f"{backend}_{name}"
        flags = ["--backend", backend]
        if package is not None:
            if backend != "ort":
                raise UsageError(f"contender {text!r}: of a package that is there, only ort:VARIANT is measured")
            find_variant(package, name)
            folder, made = package, dict[str, float]()
            variant, flags = name, [*flags, "--device", device]
        elif backend == "ort":
            folder, made = workshop.package("gpu", workshop.checkpoint("olmo2"), name)
            variant, flags = name, [*flags, "--device", device]
        else:
            folder, made = workshop.engine(workshop.checkpoint("olmo2"), name, backend)
            variant = f"trt_{name}"
        arguments = (str(folder), variant, *flags)
        found.append(Contender(key, f"ours, {text}", Path(sys.executable), "ours", arguments, TASKS, made))
    if baseline:
        label = f"transformers {version('transformers')}, static cache"
        paths = (str(workshop.checkpoint("olmo2")), device)
        found.append(Contender(STATIC, label, Path(sys.executable), "static_cache", paths, TASKS, {}))
    return found


def run(
    size: str,
    work: Path,
    *,
    wanted: Sequence[str],
    device: str,
    rounds: int,
    steps: int,
    only: Sequence[str] = TASKS,
    baseline: bool = True,
    package: Path | None = None,
    reference: Path | None = None,
    minutes: float | None = None,
) -> tuple[dict[str, Any], str]:
    """Make what is missing in `work`, measure, and judge.

    Args:
        size: of `SIZES`.
        work: where models are made.
        wanted, device, baseline, package: as `contenders`.
        rounds: samples of each task and contender.
        steps: of decoding that are timed.
        only: of `TASKS`.
        reference: the checkpoint of that shape, for transformers, instead of making one.
        minutes: begin no measurement after that; what is missing is said.

    Returns:
        What the last line of stdout says, and the report for people, in markdown.
    """
    for folder in (package, reference):
        if folder is not None and shape_of(folder) != {name: SIZES[size][name] for name in SIZES["1B"]}:
            raise UsageError(f"{folder}: not of the {size} shape; give its --size, or another folder")
    found = device_limits(device, 1)
    all_contenders = contenders(Workshop(work, size, reference), wanted, device, baseline, package)
    chosen = {name: task for name, task in tasks(size, steps).items() if name in only}
    samples, failures = take_turns(all_contenders, chosen, rounds, stop_after=None if minutes is None else 60 * minutes)
    samples["export"] = {contender.key: [contender.made] for contender in all_contenders}
    for name, sample in walls(size, found).items():
        if name in chosen:
            samples[name][WALL] = [sample] * rounds
    names = {c.key: c.name for c in all_contenders} | {WALL: "wall"}
    names.setdefault(STATIC, "transformers")
    results = judge(samples, CLAIMS)
    said = [
        f"{found['device']}: copies {found['copied_bytes_per_second'] / 1e12:.2f} TB/s, multiplies "
        f"{found['bf16_flops_per_second'] / 1e12:.0f} TFLOP/s in bf16; {size} shape, {rounds} rounds",
        claims_table(results, names, samples),
        "Medians of all samples, ± (largest - smallest) / median:",
        samples_table(samples, names),
        *(f"FAILED: {failure}" for failure in failures),
    ]
    return {
        "size": size,
        **found,
        "rounds": rounds,
        "contenders": names,
        "failures": failures,
        "claims": to_document(results),
        "samples": samples,
    }, "\n\n".join(said)
