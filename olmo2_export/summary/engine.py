"""What an engine can do and what a step of it launches: from its manifest entry and the plan's text, without a GPU."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from olmo2_export.engine.plan import materialized_weights, read_kernels, reads_cache_in_place
from runtimes.errors import EngineBuildError
from runtimes.manifest import Engine, ProfileRange
from runtimes.trt.nvidia import RTX_VERSION

FLAGS = ("portable", "refit", "weight_streaming")
"""what an engine may be built with; see `runtimes.manifest.Engine.flags`"""

_PRODUCT = re.compile(r"node_(?:linear|MatMul)\w*(?: \[profile 1\])?(?:\+.*)?")
_CACHE = re.compile(r"past_key_values\.\d+\.(key|value)")


@dataclass(frozen=True)
class KernelRow:
    """Launches of a step that compute one kind of thing."""

    kind: str
    decode: int
    prefill: int


@dataclass(frozen=True)
class EngineSummary:
    """One engine."""

    name: str
    plan: str
    """path in the package"""
    nbytes: int
    variant: str
    """the graph it was compiled from"""
    backend: str
    backend_version: str
    precision: str
    compute_capabilities: tuple[str, ...]
    profile: str
    """latency | compact"""
    max_batch_size: int
    max_cache_length: int
    """tokens"""
    prefill_chunk: int
    """tokens per row and prefill call"""
    capabilities: dict[str, bool] = field(hash=False)
    """each of `FLAGS`: built with it or not"""
    profiles: dict[str, tuple[ProfileRange, ...]] = field(hash=False)
    """decode and prefill; of the layers' caches, which are alike, only one: past_key_values.N.key, .value"""
    layers: dict[str, int] = field(hash=False)
    """kind of layer of the TensorRT network -> how many were counted before the build"""
    in_place: int
    """outputs that are written to the memory of an input"""
    kernels: dict[str, int] = field(hash=False)
    """profile -> kernels that a step launches; empty where the plan does not say"""
    kernel_table: tuple[KernelRow, ...]
    """the same by what they compute, most first"""
    slow: tuple[str, ...]
    """kernels that do nothing but dequantise a weight, by the ONNX node; none is good"""


def summarize_engine(package: Path, engine: Engine, nbytes: int) -> EngineSummary:
    """Describe an engine; the plan, of gigabytes, is searched where it lies on disk.

    Args:
        package: the package folder, whose files were checked.
        engine: its entry in the manifest.
        nbytes: size of the plan.
    """
    table: tuple[KernelRow, ...] = ()
    slow: list[str] = []
    if (engine.backend, engine.backend_version) == ("trt_rtx", RTX_VERSION):
        try:
            kernels = read_kernels(package / engine.plan)
        except EngineBuildError:  # a plan without text runs as well as one with it
            kernels = {"decode": [], "prefill": []}
        counted = {p: Counter(_kind(k.name, reads_cache_in_place(k)) for k in ks) for p, ks in kernels.items()}
        decode, prefill = counted["decode"], counted["prefill"]
        rows = [KernelRow(kind, decode[kind], prefill[kind]) for kind in {**decode, **prefill}]
        table = tuple(sorted(rows, key=lambda r: (-max(r.decode, r.prefill), r.kind)))
        slow = sorted({name for listed in kernels.values() for name in materialized_weights(listed)})
    return EngineSummary(
        name=engine.name,
        plan=engine.plan,
        nbytes=nbytes,
        variant=engine.variant,
        backend=engine.backend,
        backend_version=engine.backend_version,
        precision=engine.precision,
        compute_capabilities=engine.compute_capabilities,
        profile=engine.profile,
        max_batch_size=engine.max_batch_size,
        max_cache_length=engine.max_cache_length,
        prefill_chunk=engine.prefill_chunk,
        capabilities={flag: flag in engine.flags for flag in FLAGS},
        profiles={name: _collapsed(ranges) for name, ranges in engine.profiles.items()},
        layers=dict(engine.layer_counts),
        in_place=len(engine.aliases),
        kernels=dict(engine.kernels),
        kernel_table=table,
        slow=tuple(slow),
    )


def _collapsed(ranges: tuple[ProfileRange, ...]) -> tuple[ProfileRange, ...]:
    rows: dict[tuple[object, ...], ProfileRange] = {}
    for r in ranges:
        cache = _CACHE.fullmatch(r.name)
        name = f"past_key_values.N.{cache[1]}" if cache else r.name
        rows.setdefault((name, r.min, r.opt, r.max), ProfileRange(name, r.min, r.opt, r.max))
    return tuple(rows.values())


def _kind(name: str, in_place: bool) -> str:
    """Say what a kernel computes, as far as the name that TensorRT gives it tells."""
    if "_mha" in name:
        return "attention, cache read in place" if in_place else "attention"
    if _PRODUCT.fullmatch(name):
        joined = name.count("+") + 1
        return f"{joined} matrix products in one" if joined > 1 else "matrix product"
    if "Topk" in name:
        return "likeliest tokens"
    if "Scat" in name and "Mean" not in name and len(name) > len("Scat"):
        return "norm, rotary, cache write in one"
    if "Mean" in name or "Sqrt" in name:
        return "norm, or a part of one"
    if "Silu" in name:
        return "SiLU and product"
    if name.startswith("CastGath"):
        return "embedding"
    if name.endswith("Fc"):
        return "matrix product, weights unpacked in it"
    return "other: copies, masks, reshapes"
