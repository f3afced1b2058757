"""What a package costs and how fast it is, beside what a user would take instead: `olmo2-export bench`.

See `verbs/bench.py` for what prefill and decode are. Every figure of every contender comes from the same function
(`workers.common.text_seconds`), in a process that loads the model once and is measured at each context length and
batch size. Contenders take turns, repeat by repeat.

Every point is, over the repeats: medians of the time to first token and of the speeds; the 50th and 99th percentile of
all times between tokens. Decode tokens/s is rows / the median step of a repeat, prefill tokens/s is prompt tokens /
time to first token.
"""

from __future__ import annotations

import hashlib
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from olmo2_export.bench.arguments import CONTEXTS
from olmo2_export.bench.contenders import Workshop
from olmo2_export.bench.entries import POINTS, Entry, default_variants, our_entries, peer_entries
from olmo2_export.bench.machine import device_limits, memory_bandwidth, processor
from olmo2_export.bench.report import report
from olmo2_export.bench.turns import take_turns
from olmo2_export.config import ModelConfig
from olmo2_export.weights.checkpoint import Checkpoint
from runtimes.errors import ConfigError, ContextLengthError, UsageError, VariantNotFoundError
from runtimes.ort.devices import find_device
from runtimes.package import AnyPackage, Package, open_package
from runtimes.targets import Target, find_target

METRICS = ("decode_tokens_per_s", "prefill_tokens_per_s")
"""what ratios are given of"""


@dataclass(frozen=True)
class Setting:
    """What is measured."""

    contexts: tuple[int, ...] = CONTEXTS
    """tokens of a prompt"""
    batch_sizes: tuple[int, ...] = (1, 4)
    new_tokens: int = 32
    """per row, the first included"""
    repeats: int = 5
    threads: int = 1
    backend: str = "ort"
    device: str | None = None
    """None: the backend's first"""
    minutes: float | None = None
    """for measuring; see `take_turns`"""

    @property
    def hardware(self) -> str:
        """PyTorch's name of what computes."""
        return "cuda" if self.target.on_gpu else "cpu"

    @property
    def target(self) -> Target:
        """Where ours run."""
        return find_target(self.backend, self.device)

    def check(self) -> None:
        """Refuse what cannot be measured.

        Raises:
            UsageError: a number out of range, or a device that the backend does not have.
        """
        for name in ("contexts", "batch_sizes"):
            values = getattr(self, name)
            if not values or min(values) < 1 or len(set(values)) != len(values):
                raise UsageError(f"{name.replace('_', ' ')} {list(values)}: expected different integers from 1")
        for name, least in (("new_tokens", 2), ("repeats", 1), ("threads", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"{name.replace('_', ' ')} {getattr(self, name)}: expected an integer from {least}")
        if self.threads > (os.cpu_count() or 1):
            raise UsageError(f"threads {self.threads}: this machine runs {os.cpu_count()} at a time")
        if self.minutes is not None and not self.minutes > 0:
            raise UsageError(f"minutes {self.minutes}: expected more than 0")

    def task(self, vocab_size: int) -> dict[str, Any]:
        """Return this as the workers take it."""
        return {
            "kind": "points",
            "contexts": self.contexts,
            "batch_sizes": self.batch_sizes,
            "new_tokens": self.new_tokens,
            "threads": self.threads,
            "vocab_size": vocab_size,
        }


def compare(
    package: AnyPackage,
    variants: Sequence[str],
    setting: Setting,
    *,
    work: Path,
    peers: Sequence[str] = (),
    reference: Checkpoint | None = None,
    peers_folder: Path,
) -> tuple[dict[str, Any], str]:
    """Measure variants of a package, and peers on the checkpoint that it was made from.

    Args:
        package: the package folder, or one that is open.
        variants: of it; none: all that the backend runs on the device.
        setting: what is measured.
        work: where the peers' models are made; what is there already is used.
        peers: who else.
        reference: the checkpoint, for the peers.
        peers_folder: where `make peers` put its venvs.

    Returns:
        What the last line of stdout says, and the report for people, in markdown.

    Raises:
        UsageError: a number out of range, peers without a reference.
        ContextLengthError: a context and the new tokens do not fit into a variant's KV cache.
        IntegrityError: a file of a variant changed.
        VariantNotFoundError: the package has no such variant, or none for that backend and device.
        ConfigError: package and reference are not of one shape.
    """
    setting.check()
    opened = open_package(package)
    opened.check_logits("bench")
    folder, model = opened.folder, opened.model
    target = setting.target
    if target.on_gpu and not target.needs_engine:
        find_device(target.device)
    names = list(dict.fromkeys(variants)) or default_variants(opened, target)
    if not names:
        raise VariantNotFoundError(f"{folder}: no variant for backend {target.backend} on device {target.device}")
    for name in names:
        _check_room(opened, name, setting)
        opened.check(opened.variant(name).files)
    found_peers = None
    if peers:
        if reference is None:
            raise UsageError("--vs: --reference says which checkpoint the peers shall run")
        weights = reference.folder.resolve()
        if ModelConfig.from_json(weights / "config.json").spec != model:
            raise ConfigError(f"{folder}: not of the shape of the reference {reference.model}")
        workshop = Workshop(work, f"of-{hashlib.sha256(str(weights).encode()).hexdigest()[:8]}", weights)
        found_peers = peer_entries(peers, names, workshop, peers_folder, setting.threads, setting.hardware)
    entries = [entry for name in names for entry in our_entries(opened, name, target)]
    entries += found_peers.entries if found_peers else ()

    busy = os.getloadavg()[0]
    limits = [_limits(setting)]
    samples, failures = take_turns(
        [entry.contender for entry in entries],
        {POINTS: setting.task(model.vocab_size)},
        setting.repeats,
        give_up=True,
        minutes=setting.minutes,
    )
    limits.append(_limits(setting))
    bandwidth, source = max(memory_bandwidth(found) for found in limits)
    found = samples[POINTS]
    document = {
        "machine": {
            "cpu": processor(),
            "cores": os.cpu_count(),
            "threads": setting.threads,
            "device": limits[0]["device"],
            "memory_bandwidth_bytes_per_s": bandwidth,
            "memory_bandwidth_from": source,
            "load_average_before": round(busy, 1),
        },
        "package": str(folder),
        "backend": setting.backend,
        "new_tokens": setting.new_tokens,
        "repeats": max(map(len, found.values())),
        "contenders": {
            entry.name: contender_document(entry, found[entry.contender.key], bandwidth) for entry in entries
        },
        "ratios": ratios(entries, found),
        "left_out": list(found_peers.left_out) if found_peers else [],
        "failures": [*(found_peers.failures if found_peers else ()), *failures],
    }
    return document, report(document)


def ours_failed(document: Mapping[str, Any]) -> bool:
    """Tell whether a variant of the package failed in any repeat; a peer that fails is a result."""
    return any(entry["ours"] and entry["repeats"] < document["repeats"] for entry in document["contenders"].values())


def _check_room(package: Package, name: str, setting: Setting) -> None:
    variant = package.variant(name)
    most, longest = variant.kv_cache.max_cache_length, max(setting.contexts)
    if longest + setting.new_tokens > most:
        raise ContextLengthError(
            f"variant {name}: a context of {longest} and {setting.new_tokens} new tokens; its KV cache holds {most}: "
            "choose smaller --contexts"
        )
    if setting.target.needs_engine:
        engines = [e for e in package.trt.engines.values() if e.variant == name] if package.trt is not None else []
        rows = min((engine.max_batch_size for engine in engines), default=max(setting.batch_sizes))
        if max(setting.batch_sizes) > rows:
            raise UsageError(f"batch size {max(setting.batch_sizes)}: the engine of {name} was built for {rows}")


def _limits(setting: Setting) -> dict[str, Any]:
    return device_limits(setting.hardware, setting.threads)


def contender_document(entry: Entry, samples: Sequence[Mapping[str, Any]], bandwidth: float) -> dict[str, Any]:
    """Return a contender's part of the JSON.

    Args:
        entry: the contender.
        samples: one a repeat, as the task `points` gives them; empty where it failed.
        bandwidth: of the memory, in bytes per second.
    """
    good = [sample for sample in samples if sample]
    made = entry.contender.made
    return {
        "ours": entry.ours,
        "like": list(entry.like),
        "note": entry.note,
        "make_s": made.get("seconds"),
        "make_peak_memory_bytes": made["peak_memory_mb"] * 1_000_000 if "peak_memory_mb" in made else None,
        "repeats": len(good),
        "load_s": statistics.median(sample["load_s"] for sample in good) if good else None,
        "peak_memory_bytes": max(sample["peak_memory_bytes"] for sample in good) if good else None,
        "disk_bytes": entry.disk_bytes,
        "bytes_per_token_from": entry.traffic.source,
        "points": [
            point_document(entry, [sample["points"][index] for sample in good], bandwidth)
            for index in range(len(good[0]["points"]) if good else 0)
        ],
    }


def point_document(entry: Entry, points: Sequence[Mapping[str, Any]], bandwidth: float) -> dict[str, Any]:
    """Return one context length and batch size of a contender, over all repeats."""
    context, rows = points[0]["context_tokens"], points[0]["batch_size"]
    between = [seconds for point in points for seconds in point["itl_s"]]
    speeds = {metric: [speed(point, metric) for point in points] for metric in METRICS}
    decode = statistics.median(speeds["decode_tokens_per_s"])
    moved = entry.traffic.bytes_per_token(context, rows)
    return {
        "context_tokens": context,
        "batch_size": rows,
        "ttft_s": statistics.median(point["ttft_s"] for point in points),
        "itl_p50_s": float(np.quantile(between, 0.5)),
        "itl_p99_s": float(np.quantile(between, 0.99)),
        "decode_tokens_per_s": decode,
        "prefill_tokens_per_s": statistics.median(speeds["prefill_tokens_per_s"]),
        "bytes_per_token": moved,
        "achieved_bytes_per_s": moved * decode,
        "bandwidth_share": moved * decode / bandwidth,
        "per_repeat": speeds,
    }


def speed(point: Mapping[str, Any], metric: str) -> float:
    """Return tokens per second of one repeat, of all rows together."""
    rows = int(point["batch_size"])
    if metric == "prefill_tokens_per_s":
        return rows * int(point["context_tokens"]) / float(point["ttft_s"])
    return rows / float(statistics.median(point["itl_s"]))


def ratios(entries: Sequence[Entry], samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Return ours / peer of every pair at every point.

    Args:
        entries: all contenders.
        samples: key of a contender -> a sample a repeat, empty where it failed.

    Returns:
        The quotient of the medians, between the least and the largest quotient of one repeat; repeats in which either
        side failed do not count. `like_for_like`: the weights of both have as many bits.
    """
    found = []
    for ours in (entry for entry in entries if entry.ours):
        for peer in (entry for entry in entries if not entry.ours):
            pairs = zip(samples[ours.contender.key], samples[peer.contender.key], strict=True)
            both = [(a["points"], b["points"]) for a, b in pairs if a and b]
            for index, first in enumerate(both[0][0] if both else ()):
                for metric in METRICS:
                    mine, others = ([speed(pair[side][index], metric) for pair in both] for side in (0, 1))
                    each = [a / b for a, b in zip(mine, others, strict=True)]
                    found.append(
                        {
                            "peer": peer.name,
                            "ours": ours.name,
                            "like_for_like": bool(set(ours.like) & set(peer.like)),
                            "metric": metric,
                            "context_tokens": first["context_tokens"],
                            "batch_size": first["batch_size"],
                            "ratio_median": statistics.median(mine) / statistics.median(others),
                            "ratio_low": min(each),
                            "ratio_high": max(each),
                        }
                    )
    return found
