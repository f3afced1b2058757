"""Mixed precision: measure what 4 bits cost in each tensor, then buy 8 bits where a byte saves the most.

The sensitivity of a tensor is the KL divergence, at the final logits, of the model in which it alone is quantised.
One walk measures all: beside the hidden states of the original model runs one stream of hidden states per tensor,
each starting at the layer of its tensor. Memory holds one layer and the streams: (7 layers + 2) x tokens x hidden x 4
bytes, and time is that of about half as many forwards, so a few hundred tokens are the measure.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from olmo2_export.catalog import BlockFormat
from olmo2_export.config import ModelConfig
from olmo2_export.quantize.blocks import QuantizedMatrix
from olmo2_export.quantize.walk import Head, WalkedLayer, embed, walked_layers
from olmo2_export.weights.source import WeightSource
from olmo2_export.weights.stored_names import EMBEDDING, HEAD, naming, weight_shapes
from runtimes.errors import UsageError

logger = logging.getLogger(__name__)

Quantizer = Callable[[Tensor, BlockFormat], QuantizedMatrix]


@torch.no_grad()
def measure_sensitivity(
    checkpoint: WeightSource,
    config: ModelConfig,
    sequences: Sequence[np.ndarray],
    formats: Mapping[str, BlockFormat],
    quantizer: Quantizer,
) -> dict[str, float]:
    """Measure each tensor alone.

    Args:
        checkpoint: the weights.
        config: their shape.
        sequences: int64 [S] each, all of one length.
        formats: name -> format of the tensors to measure.
        quantizer: makes a quantised matrix of a weight, such as `search`.

    Returns:
        Name -> mean KL(original || that tensor quantised) in nats per token.
    """

    def quantized(name: str, weight: Tensor) -> Tensor:
        with naming(name):
            return quantizer(weight, formats[name]).dequantize()

    original = torch.cat(embed(checkpoint, sequences))  # (B, S, hidden)
    streams: dict[str, Tensor] = {}
    if EMBEDDING in formats:
        ids, places = np.unique(np.stack(sequences), return_inverse=True)
        rows = quantized(EMBEDDING, checkpoint.picked(EMBEDDING, torch.from_numpy(ids)))  # blocks lie within rows
        streams[EMBEDDING] = rows[torch.from_numpy(places.reshape(original.shape[:2]))]
    for layer in walked_layers(checkpoint, config):
        streams = {name: layer(x) for name, x in streams.items()}
        for name in layer.weights:
            if name in formats:
                streams[name] = _with_weight(layer, name, quantized(name, layer.weights[name]), original)
        original = layer(original)
    head = Head(checkpoint, config)
    result = {name: _divergence(head, original, x, None) for name, x in streams.items()}
    if HEAD in formats:
        result[HEAD] = _divergence(head, original, original, quantized(HEAD, head.weight))
    return {name: result[name] for name in formats}


def choose_formats(
    config: ModelConfig,
    formats: Mapping[str, BlockFormat],
    sensitivity: Mapping[str, float],
    size_budget: float,
    better: BlockFormat,
) -> dict[str, BlockFormat]:
    """Give the better format to the tensors where it saves the most divergence per byte, while the budget lasts.

    Args:
        config: the shapes.
        formats: name -> the format of each tensor if nothing is bought.
        sensitivity: name -> divergence of that format; what remains in the better one is neglected.
        size_budget: bits per weight over all tensors of `formats`, scales and zero points included.
        better: the format to buy, of 8 bits.

    Raises:
        UsageError: the budget does not even pay for `formats`.
    """
    shapes = weight_shapes(config)
    weights = sum(shapes[name][0] * shapes[name][1] for name in formats)
    spent = sum(form.nbytes(*shapes[name]) for name, form in formats.items())
    left = int(size_budget * weights / 8) - spent
    if left < 0:
        raise UsageError(
            f"size budget {size_budget:g} bits per weight: the smallest choice takes {spent * 8 / weights:.3f}; "
            "raise the budget or choose larger blocks"
        )
    price = {name: better.nbytes(*shapes[name]) - form.nbytes(*shapes[name]) for name, form in formats.items()}
    offered = [name for name, form in formats.items() if form.bits < better.bits]
    offered.sort(key=lambda name: sensitivity[name] / price[name], reverse=True)

    def shop(first: list[str]) -> tuple[float, set[str]]:
        basket, rest = set(), left
        for name in [*first, *offered]:
            if name not in basket and price[name] <= rest:
                basket.add(name)
                rest -= price[name]
        return sum(sensitivity[name] for name in basket), basket

    # Many small bargains can leave no room for one large one, such as the head: try each tensor as the first.
    _, basket = max((shop(first) for first in [[], *([name] for name in offered)]), key=lambda found: found[0])
    chosen = {name: better if name in basket else form for name, form in formats.items()}
    bought = [name for name in formats if chosen[name] != formats[name]]
    logger.info("%d of %d tensors get %d bits: %s", len(bought), len(formats), better.bits, ", ".join(bought))
    return chosen


def _with_weight(layer: WalkedLayer, name: str, weight: Tensor, x: Tensor) -> Tensor:
    kept = layer.weights[name]
    layer.replace(name, weight)
    y = layer(x)
    layer.replace(name, kept)
    return y


def _divergence(head: Head, original: Tensor, test: Tensor, weight: Tensor | None) -> float:
    """Mean KL over all positions, a sequence at a time: logits are large. Of scores, which are no distribution over
    tokens: mean squared error / variance."""
    total = 0.0
    if head.scores:
        a, b = head.logits(original), head.logits(test, weight)
        return float((a - b).square().mean() / a.var().clamp_min(1e-30))
    for a, b in zip(original, test, strict=True):
        log_p = torch.log_softmax(head.logits(a), dim=-1)
        log_q = torch.log_softmax(head.logits(b, weight), dim=-1)
        total += float((log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64))
    return total / (original.shape[0] * original.shape[1])
