"""What an export takes in memory and time: estimates, from a few products timed on this machine and the sizes.

Memory is the largest of the phases, each with one tensor or one layer of weights at a time (numbers in bytes):

| phase                         | holds                                                                             |
|-------------------------------|-----------------------------------------------------------------------------------|
| writing a graph               | the largest tensor as it is read, and as it is written                             |
| distilling                    | a layer, then the head, with their gradients; inputs of all layers; logits         |
| reference logits              | one layer in float32, a matrix as it is stored; hidden states, logits              |
| measuring quality, whole      | the graph's weights, mapped, and as the kernels keep them                          |
| measuring quality, by layer   | the same of one layer or of the head                                               |

Time takes what is read from a warm file cache; a slow disk adds its own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from olmo2_export.architecture import of_layer, operations, tensor_shapes
from olmo2_export.catalog import find
from olmo2_export.config import ModelConfig
from olmo2_export.measure.quality import quality_size
from olmo2_export.package.graph_sizes import VariantSizes
from olmo2_export.package.variants import LARGE_GRAPH
from olmo2_export.package.weight_choice import Options, choose_weights
from olmo2_export.quantize.distill import training_memory, training_products
from olmo2_export.quantize.int8 import quantize_int8
from olmo2_export.quantize.recipes import DISTILLED, QUANTIZERS, SPOOLED
from olmo2_export.quantize.search import search
from olmo2_export.weights.stored_names import linear_names, weight_shapes

BASE = 520 << 20
"""bytes of PyTorch, onnx and onnxruntime, loaded"""

_TRACE_LAYER = 3 << 20  # bytes of a traced layer, with its clones
_PIECE = 64 << 20  # bytes of what is read and written at a time
_KEPT = 400 << 20  # bytes, at most, that the allocator does not give back after the reference
_START, _TRACE = 6.0, 0.25  # seconds; seconds per layer and graph
_BYTES_PER_SECOND = 1e9  # read, hashed, checked or written, one after the other
_KERNELS = 2.0  # times the speed of the float32 product: what onnxruntime's kernels of few bits reach, with the checks
_SAMPLE = 1024
_GPTQ = 12.0  # times as long as a search


@dataclass(frozen=True)
class Costs:
    """What an export takes."""

    memory: int
    """bytes, the largest resident set; within a third"""
    phase: str
    """when that is"""
    seconds: float
    """within a factor of two, on a machine that does nothing else"""


def estimate_costs(
    config: ModelConfig, variants: Sequence[VariantSizes], options: Options, *, source_bytes: int
) -> Costs:
    """Estimate.

    Args:
        config: the model's shape.
        variants: what is written.
        options: how.
        source_bytes: of the checkpoint.
    """
    phases = dict(_phases(config, variants, options, source_bytes))
    phase = max(phases, key=phases.__getitem__)
    return Costs(phases[phase], phase, _seconds(config, variants, options, source_bytes))


def _phases(
    config: ModelConfig, variants: Sequence[VariantSizes], options: Options, source_bytes: int
) -> list[tuple[str, int]]:
    shapes = weight_shapes(config)
    width = max(
        1.0, source_bytes / max(1, sum(math.prod(shape) for shape in tensor_shapes(operations(config)).values()))
    )
    largest = max(rows * columns for rows, columns in shapes.values())
    base = BASE + _TRACE_LAYER * config.num_hidden_layers + _PIECE
    layer = sum(math.prod(shape) for shape in tensor_shapes(of_layer(operations(config), 0)).values())
    in_layer = max(shapes[name][0] * shapes[name][1] for name in linear_names(config))
    kept = min(_KEPT, 4 * layer)
    found = [("checking weights", base)]
    for variant in variants:
        row = find(variant.name)
        for number, (path, files) in enumerate(variant.graphs.items()):
            # In blocks: the matrix, and the one before. In 16 bits: joined, then rounded.
            read = 0 if row.graph == "portable" else width * largest if row.graph == "blocks" else 2 * files.largest
            found.append((f"writing {path}", base + kept * number + round(files.largest + read)))
        if row.defaults is not None:
            tokens = quality_size(config)
            logits = 4 * tokens * config.vocab_size
            states = 4 * tokens * (6 * config.hidden_size + 3 * config.intermediate_size)
            if choose_weights(row, options, operations(config)).recipe == DISTILLED:
                found.append(("distilling", base + training_memory(config)))
            found.append(("reference logits", base + logits + states + round(4 * layer + width * in_layer)))
            for path, files in variant.graphs.items():
                part = files.data
                if files.data > LARGE_GRAPH:  # a layer, or the head, at a time
                    part = max(files.data // config.num_hidden_layers, files.largest)
                found.append((f"quality of {path}", base + kept + 2 * logits + states + 2 * part))
    return found


def _seconds(config: ModelConfig, variants: Sequence[VariantSizes], options: Options, source_bytes: int) -> float:
    shapes = weight_shapes(config)
    weights = sum(rows * columns for rows, columns in shapes.values())
    written = sum(files.data for variant in variants for files in variant.graphs.values())
    graphs = sum(len(variant.graphs) + len(variant.other_caches) for variant in variants)
    total = _START + _TRACE * config.num_hidden_layers * (1 + graphs)
    total += (2 * source_bytes + 2 * written) / _BYTES_PER_SECOND
    tokens = quality_size(config)
    sample = torch.randn(_SAMPLE, _SAMPLE, generator=torch.Generator().manual_seed(0))
    states = torch.randn(256, _SAMPLE, generator=torch.Generator().manual_seed(1))
    product = _timed(lambda: states @ sample) / (256 * _SAMPLE * _SAMPLE)  # seconds of one weight and token
    judged = False
    for variant in variants:
        row = find(variant.name)
        if row.defaults is None:
            continue
        choice = choose_weights(row, options, operations(config))
        quantizer = QUANTIZERS.get(choice.recipe, search)
        per_weight = _timed(lambda q=quantizer, f=choice.form: q(sample, f)) / _SAMPLE**2  # type: ignore[misc]
        total += weights * per_weight * (_GPTQ if choice.recipe in SPOOLED else 1)
        if choice.recipe == DISTILLED:
            total += training_products(choice.steps) * weights * product
        if len(variant.graphs) > 1:
            inner = sum(shapes[name][0] * shapes[name][1] for name in linear_names(config))
            total += inner * _timed(lambda: quantize_int8(sample)) / _SAMPLE**2
        total += (len(variant.graphs) + len(variant.other_caches)) * tokens * weights * product / _KERNELS
        judged = True
    if judged:
        total += tokens * weights * product + source_bytes / _BYTES_PER_SECOND
    return total


def _timed(work: Callable[[], object]) -> float:
    """Return the seconds of one call, the quicker of two after a first one."""
    work()
    found = []
    for _ in range(2):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)
