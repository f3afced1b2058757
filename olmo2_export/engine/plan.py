"""Read from a plan's text which kernels a step launches, and what makes it slower than it could be.

TensorRT for RTX 1.7.1 writes the programs of a plan into it as text, which can be read without a GPU. A program lists,
in order, what a step launches, with the layers of the network, named after ONNX nodes, that each kernel computes:

    main {
     label bb19323:
      function={ name=__myl_CastGath ... layers="[ONNX Layer: node_embedding]" ... }
      fully_connected={ name="node_layers.0.linear_2+node_layers.0.linear_1+node_layers.0.linear" ... }

The tensors of the second profile have names that end in [profile 1]. A program with the label bb1 is the inside of a
kernel of another one. Other versions may write something else, so that only the one that was looked at is read.
"""

from __future__ import annotations

import logging
import mmap
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from runtimes.errors import EngineBuildError, first_names
from runtimes.manifest import Engine
from runtimes.trt.nvidia import RTX_VERSION

logger = logging.getLogger(__name__)

_LAUNCH = re.compile(r'\n  (?:function|fully_connected|runtime_fusion)=\{ name=(?:"([^"]*)"|(\S+))(.*)')
_LAYER = re.compile(r"\[(?:ONNX Layer: )?([^\s\]]+)")
_INSIDE_A_KERNEL = "\nmain {\n label bb1:"
_DEQUANTIZED = ".dequantized"  # ends the name of a node that dequantises a weight; see fuse/dequantize_weights.py
_IN_PLACE_ATTENTION = "_gemv_mha"  # the decode kernel that takes the lengths and reads the cache where it is


@dataclass(frozen=True)
class Kernel:
    """One launch of a step."""

    name: str
    """as TensorRT composes it from what it computes, without the prefix __myl_"""
    layers: tuple[str, ...]
    """of the network: the names of the ONNX nodes"""


def count_kernels(plan: Path, engine: Engine) -> dict[str, int]:
    """Return the number of kernels of each profile, where the plan's text can be read; warn of what slows it down.

    Raises:
        EngineBuildError: the text is not there.
    """
    if (engine.backend, engine.backend_version) != ("trt_rtx", RTX_VERSION):
        return {}
    kernels = read_kernels(plan)
    for profile, listed in kernels.items():
        if weights := materialized_weights(listed):
            logger.warning(
                "%s: %s writes dequantised weights to memory in every step: %s. It is right, but slow",
                plan.name,
                profile,
                first_names(weights),
            )
    expected = engine.layer_counts["ATTENTION_INPUT"]
    if (found := sum(map(reads_cache_in_place, kernels["decode"]))) != expected:
        logger.warning(
            "%s: %d of %d layers of decode read the cache in place. It is right, but slow", plan.name, found, expected
        )
    return {profile: len(listed) for profile, listed in kernels.items()}


def reads_cache_in_place(kernel: Kernel) -> bool:
    """Tell whether a kernel is the attention of decode that does not copy the cache."""
    return kernel.name.startswith(_IN_PLACE_ATTENTION)


def materialized_weights(kernels: Sequence[Kernel]) -> list[str]:
    """Return the nodes of kernels that do nothing but dequantise weights."""
    alone = [k for k in kernels if k.layers and all(layer.endswith(_DEQUANTIZED) for layer in k.layers)]
    return [layer for kernel in alone for layer in kernel.layers]


def read_kernels(plan: Path) -> dict[str, list[Kernel]]:
    """Return what each profile launches, in order.

    Raises:
        EngineBuildError: there is no such text in the plan.
    """
    kernels: dict[str, list[Kernel]] = {"decode": [], "prefill": []}
    for program in _programs(plan):
        if program.startswith(_INSIDE_A_KERNEL):
            continue
        listed = [Kernel((m[1] or m[2]).removeprefix("__myl_"), _layers(m[3])) for m in _LAUNCH.finditer(program)]
        kernels["prefill" if "[profile 1]" in program else "decode"] += listed
    if not all(kernels.values()):
        raise EngineBuildError(f"{plan.name}: no text of its kernels, though TensorRT {RTX_VERSION} writes it")
    return kernels


def _programs(plan: Path) -> Iterator[str]:
    """Yield the text of each program; the plan, of gigabytes, stays on disk."""
    with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        start = text.find(b"\nmain {")
        while start >= 0:
            end = text.find(b"\n}\n", start)
            yield text[start:end].decode("latin1")
            start = text.find(b"\nmain {", end)


def _layers(text: str) -> tuple[str, ...]:
    found = re.search(r'layers="([^"]*)"', text)
    return tuple(m[1] for m in _LAYER.finditer(found[1].replace(" [profile 1]", ""))) if found else ()
