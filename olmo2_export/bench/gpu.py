"""The table of targets on a GPU: ours, transformers' static cache, and what the hardware allows, in one run.

Two walls. A decode step reads every weight once, and the KV cache: bytes over the memory's bandwidth. A prefill
multiplies every weight with every token: operations over the rate of large bfloat16 products. Bandwidth is the data
sheet's where the GPU is in the table below, otherwise that of a copy; the rate of products is measured.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from olmo2_export.architecture import LOGITS, operations
from olmo2_export.bench.checkpoint import SIZES, model_config, shape_of
from olmo2_export.bench.claims import Claim, Quantity, claims_table, judge, samples_table, to_document
from olmo2_export.bench.contenders import Contender, Workshop
from olmo2_export.bench.machine import BANDWIDTH, device_limits
from olmo2_export.bench.turns import take_turns
from olmo2_export.catalog import find, static_row
from runtimes.errors import UsageError, VariantNotFoundError
from runtimes.package import Package, open_package
from runtimes.targets import backends, find_target

TASKS = ("decode_128", "decode_2048", "prefill_2048", "streams_8")
"""what nothing is claimed of comes last, should the time be over before"""
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
    config = model_config(SIZES[size])
    layers, query = config.num_hidden_layers, config.num_attention_heads * config.head_dim
    weights = {row.name: math.prod(row.shape) for row in operations(config) if row.kind == "linear"}
    head = weights.pop(LOGITS)
    linears = sum(weights.values())
    name = str(device["device"])
    bandwidth = next((rate for part, rate in BANDWIDTH.items() if part in name), device["copied_bytes_per_second"])

    def decode(context: int) -> dict[str, float]:
        cache = 2 * layers * config.num_key_value_heads * config.head_dim * context
        return {"tokens_per_second": bandwidth / (_BF16 * (linears + head + cache))}

    def prefill(length: int) -> dict[str, float]:
        attention = 2 * layers * query * length  # causal: half of q k^T and of p v
        flops = 2 * linears + attention + 2 * head / length  # a token; the head sees one
        return {"tokens_per_second": device["bf16_flops_per_second"] / flops}

    return {"decode_128": decode(128), "decode_2048": decode(2048), "prefill_2048": prefill(2048)}


def check(
    size: str,
    *,
    wanted: Sequence[str],
    rounds: int,
    steps: int,
    baseline: bool,
    packages: Sequence[Path] = (),
    reference: Path | None = None,
    keep: Path | None = None,
    minutes: float | None = None,
) -> list[Package]:
    """Refuse what cannot be measured, or would be measured of something else, before anything is made.

    Returns:
        The packages, opened.

    Raises:
        UsageError: a contender of no backend, a number too small, a folder of another shape, or one that nothing uses.
        PackageNotFoundError: a package is none.
    """
    kinds = [_backend_and_variant(text) for text in wanted]
    for name, number in (("rounds", rounds), ("steps", steps)):
        if number < 1:
            raise UsageError(f"--{name} {number}: expected at least 1")
    if minutes is not None and not minutes > 0:
        raise UsageError(f"--minutes {minutes:g}: expected more than 0; without it all is measured")
    opened = {folder: open_package(folder) for folder in packages}
    for folder in (*packages, *([] if reference is None else [reference])):
        try:
            found = shape_of(folder)
        except (OSError, KeyError, ValueError) as error:
            raise UsageError(f"{folder}: no config.json with a shape ({error}); expected a model's folder") from error
        if found != SIZES[size]:
            sizes = [name for name, shape in SIZES.items() if shape == found]
            raise UsageError(f"{folder}: its shape is {' or '.join(sizes) or found}, expected {size}; give --size")
    used = {folder: [variant for _, variant in kinds if _has(package, variant)] for folder, package in opened.items()}
    for folder, variants in used.items():
        if not variants:
            raise UsageError(f"--package {folder}: it has none of {', '.join(wanted)}; name a variant of it in --with")
    made = [
        text for text, (_, variant) in zip(wanted, kinds, strict=True) if all(variant not in v for v in used.values())
    ]
    if packages and made:
        raise UsageError(f"--with {', '.join(made)}: in none of the packages; leave --package out to have them made")
    if packages and reference is not None and not baseline:
        raise UsageError(f"--reference {reference}: nothing uses it, with --package and --no-baseline")
    if packages and keep is not None and (reference is not None or not baseline):
        raise UsageError(
            f"--keep {keep}: nothing is made, with --package and {'--reference' if baseline else '--no-baseline'}"
        )
    return list(opened.values())


def _backend_and_variant(text: str) -> tuple[str, str]:
    """Return the backend of a contender, and its variant as packages name it.

    Raises:
        UsageError: it has another form.
    """
    backend, _, name = text.partition(":")
    if backend not in backends() or not name:
        *others, last = [f"{b}:{'PRECISION' if b in backends(engines=True) else 'VARIANT'}" for b in backends()]
        raise UsageError(f"contender {text!r}: expected {', '.join(others)} or {last}")
    return backend, static_row(name).name if find_target(backend).needs_engine else name


def _has(package: Package, variant: str) -> bool:
    try:
        package.variant(variant)
    except VariantNotFoundError:
        return False
    return True


def contenders(
    workshop: Workshop, wanted: Sequence[str], device: str, baseline: bool, packages: Sequence[Package] = ()
) -> list[Contender]:
    """Return ours, made where they are not there, and the baseline, second.

    Args:
        workshop: where to make the packages.
        wanted: as `ort:bf16`, `trt_rtx:bf16`, `trt:int4`: backend and variant, or precision of an engine.
        device: of the backend ort, and of the baseline.
        baseline: whether to measure transformers.
        packages: take the first of these that has a variant, instead of making one.

    Raises:
        UsageError: not of that form.
    """
    found = []
    for number, text in enumerate(wanted):
        backend, variant = _backend_and_variant(text)
        key = "ours" if number == 0 else f"{backend}_{text.partition(':')[2]}"
        package, made = next((given.folder for given in packages if _has(given, variant)), None), dict[str, float]()
        target = find_target(backend, device if backend in backends(engines=False) else None)
        if package is None and not target.needs_engine:
            package, made = workshop.package("gpu", workshop.checkpoint("olmo2"), variant)
        elif package is None:
            package, made = workshop.engine(workshop.checkpoint("olmo2"), find(variant).weights.precision, backend)
        arguments = (str(package), variant, *target.flags)
        found.append(Contender(key, f"ours, {text}", Path(sys.executable), "ours", arguments, TASKS, made))
    if baseline:
        label = f"transformers {version('transformers')}, static cache"
        paths = (str(workshop.checkpoint("olmo2")), device)
        found.insert(1, Contender(STATIC, label, Path(sys.executable), "static_cache", paths, TASKS, {}))
    return found


def _say(task: str, contender: Contender, sample: Mapping[str, Any]) -> None:
    """Say on stderr what was measured, so that a run that is cut off has said something."""
    numbers = ", ".join(f"{value:,.1f} {key}" for key, value in sample.items())
    tqdm.write(f"{task} of {contender.name}: {numbers}", file=sys.stderr)


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
    packages: Sequence[Package] = (),
    reference: Path | None = None,
    minutes: float | None = None,
) -> tuple[dict[str, Any], str]:
    """Make what is missing in `work`, measure, and judge.

    Args:
        size: of `SIZES`.
        work: where models are made.
        wanted, device, baseline, packages: as `contenders`.
        rounds: samples of each task and contender.
        steps: of decoding that are timed.
        only: of `TASKS`.
        reference: the checkpoint of that shape, instead of making one.
        minutes: end after that, with what was measured till then.

    Returns:
        What the last line of stdout says, and the report for people, in markdown.
    """
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    found = device_limits(device, 1)
    all_contenders = contenders(Workshop(work, size, reference), wanted, device, baseline, packages)
    chosen = {name: task for name, task in tasks(size, steps).items() if name in only}
    samples, failures = take_turns(all_contenders, chosen, rounds, deadline=deadline, on_sample=_say)
    left_out = [
        f"{task} of {contender.name}: {taken.count({})} of {rounds} samples"
        for task in chosen
        for contender in all_contenders
        if {} in (taken := samples[task][contender.key])
        and not any(failure.startswith(f"{contender.name}, {task}:") for failure in failures)
    ]
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
        *([f"NOT MEASURED, as {minutes:g} minutes were over: {'; '.join(left_out)}"] if left_out else []),
    ]
    return {
        "size": size,
        **found,
        "rounds": rounds,
        "contenders": names,
        "failures": failures,
        "left_out": left_out,
        "claims": to_document(results),
        "samples": samples,
    }, "\n\n".join(said)
