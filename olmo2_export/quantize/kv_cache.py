"""Scales of a quantised KV cache, one per head and channel.

Keys are stored after the rotation, which turns a channel and its partner half a head away into each other; so both get
one scale, from the length of the pair, and no position can reach beyond what was calibrated. Values get the largest
magnitude of their channel. A margin covers tokens that calibration did not see; what lies beyond it is clipped.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from olmo2_export.config import ModelConfig
from olmo2_export.quantize.encode import usable
from olmo2_export.quantize.walk import embed, walked_layers
from olmo2_export.weights.source import WeightSource

LARGEST_CODE = {8: 127, 4: 7}
MARGIN = {8: 1.25, 4: 1.0}
"""times the largest magnitude seen; 4 bits have no room to give away"""


@torch.no_grad()
def kv_cache_scales(
    checkpoint: WeightSource, config: ModelConfig, sequences: Sequence[np.ndarray], bits: int
) -> dict[str, np.ndarray]:
    """Calibrate, in one walk over the layers.

    Args:
        checkpoint: the weights.
        config: their shape.
        sequences: int64 [S] each.
        bits: of the cache, 8 or 4.

    Returns:
        `N.key` and `N.value` for each layer N: float32 [kv_heads, 1, head_dim].
    """
    heads, size = config.num_key_value_heads, config.head_dim
    scales: dict[str, np.ndarray] = {}
    hidden = embed(checkpoint, sequences)
    for layer in walked_layers(checkpoint, config):
        attention = next(row for row in layer.rows if row.kind == "attention")
        before_rotation = {row.name: row.reads[0] for row in layer.rows if row.kind == "rotary"}
        _, keys, values = (before_rotation.get(name, name) for name in attention.reads)
        pair, value = torch.zeros(heads, size // 2), torch.zeros(heads, size)
        for index, x in enumerate(hidden):
            found = layer.run(x, [keys, values, layer.writes])
            hidden[index] = found[layer.writes]
            k = found[keys].view(-1, heads, 2, size // 2)
            pair = torch.maximum(pair, k.square().sum(2).amax(0).sqrt())  # (kv_heads, head_dim / 2)
            value = torch.maximum(value, found[values].view(-1, heads, size).abs().amax(0))
        for kind, peak in (("key", pair.repeat(1, 2)), ("value", value)):
            scale = usable(peak * (MARGIN[bits] / LARGEST_CODE[bits]))
            scales[f"{layer.index}.{kind}"] = scale[:, None].numpy()
    return scales
