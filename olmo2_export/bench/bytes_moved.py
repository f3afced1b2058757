"""How many bytes a decode step must read: every weight once, and the KV cache of every row.

Weights are counted from the graph: an initializer counts as a whole, but where operators only pick rows of it (the
embedding, the tables of RoPE) one row for each sequence counts. The cache counts at the length of the prompt; what the
graph writes, and activations, are small and left out. Divided by the rows of the step that is bytes per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from olmo2_export.stored_graph import load_graph
from runtimes.dtypes import find_dtype
from runtimes.manifest import Variant

_PICKED = {
    "Gather": {0},
    "GatherBlockQuantized": {0, 2, 3},
    "RotaryEmbedding": {1, 2},
    "GroupQueryAttention": {7, 8},
}
"""operator -> its inputs of which it reads a row per token"""


@dataclass(frozen=True)
class WeightBytes:
    """What the weights cost a decode step."""

    per_step: float
    """read once, for however many rows"""
    per_row: float
    """read for each row"""


@dataclass(frozen=True)
class Traffic:
    """What a contender reads."""

    weights: tuple[tuple[int, WeightBytes], ...]
    """of the graphs it has: the rows of a step from which it takes each; the first from 1"""
    cache_bytes_per_token: float
    """of one row"""
    cache_capacity: int | None
    """tokens of the cache that are read, filled or not; None: those that are held"""
    source: str
    """how this was found, for people"""

    def bytes_per_token(self, context: int, rows: int) -> float:
        """Return what one new token costs.

        Args:
            context: tokens that every row holds.
            rows: of the step.
        """
        weights = [found for least, found in self.weights if rows >= least][-1]
        length = context if self.cache_capacity is None else self.cache_capacity
        return weights.per_step / rows + weights.per_row + self.cache_bytes_per_token * length


def graph_weight_bytes(path: Path) -> WeightBytes:
    """Count the weights of an ONNX file, without reading them."""
    per_step = per_row = 0.0
    for value in load_graph(path).graph.initializers.values():
        tensor, uses = value.const_value, list(value.uses())
        if tensor is None or not uses:  # nothing to read
            continue
        if len(tensor.shape) > 1 and all(index in _PICKED.get(node.op_type, ()) for node, index in uses):
            per_row += tensor.nbytes / tensor.shape.numpy()[0]
        else:
            per_step += tensor.nbytes
    return WeightBytes(per_step, per_row)


def package_traffic(package: Path, variant: Variant) -> Traffic:
    """Count what a variant of a package reads."""
    cache = variant.kv_cache
    weights = [(1, graph_weight_bytes(package / variant.graph))]
    if variant.prefill is not None:
        weights.append((variant.prefill.min_rows, graph_weight_bytes(package / variant.prefill.graph)))
    size = 2 * cache.num_layers * cache.num_key_value_heads * cache.stored_head_dim * find_dtype(cache.dtype).size
    return Traffic(
        tuple(weights),
        size,
        cache.max_cache_length if cache.form == "static" else None,
        "initializers of the ONNX graph, KV cache of the manifest",
    )
