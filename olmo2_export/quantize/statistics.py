"""What the inputs of every linear look like on calibration tokens: peak and mean square per column."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from olmo2_export.checkpoint import Checkpoint
from olmo2_export.config import ModelConfig
from olmo2_export.quantize.names import GROUPS, weight_name
from olmo2_export.quantize.sweep import embed, staged_layers


@dataclass(frozen=True, eq=False)
class InputStatistics:
    """The inputs of one linear."""

    peak: Tensor
    """float32 [K], the largest magnitude of each column"""
    mean_square: Tensor
    """float32 [K]"""


@torch.no_grad()
def input_statistics(
    checkpoint: Checkpoint, config: ModelConfig, sequences: Sequence[np.ndarray]
) -> dict[str, InputStatistics]:
    """Run the original model over the sequences and look at the inputs of the layers' linears.

    Args:
        checkpoint: the weights.
        config: their shape.
        sequences: int64 [S] each.

    Returns:
        Weight name -> statistics; linears that share an input share them.
    """
    result: dict[str, InputStatistics] = {}
    hidden = embed(checkpoint, sequences)
    qkv, o, gate_up, down = GROUPS
    for layer in staged_layers(checkpoint, config):

        def keep(group: Sequence[str], inputs: Iterable[Tensor], index: int = layer.index) -> None:
            result.update(dict.fromkeys((weight_name(index, linear) for linear in group), _measure(inputs)))

        keep(qkv, hidden)
        keep(o, map(layer.attended, hidden))
        hidden = [layer.after_attention(x, layer.attended(x)) for x in hidden]
        keep(gate_up, hidden)
        keep(down, map(layer.gated, hidden))
        hidden = [layer.after_mlp(h, layer.gated(h)) for h in hidden]
    return result


def _measure(inputs: Iterable[Tensor]) -> InputStatistics:
    peak, square, count = torch.zeros(1), torch.zeros(1), 0
    for x in inputs:
        rows = x.flatten(0, -2)
        peak = torch.maximum(peak, rows.abs().amax(0))
        square = square + rows.square().sum(0)
        count += len(rows)
    return InputStatistics(peak, square / max(count, 1))
