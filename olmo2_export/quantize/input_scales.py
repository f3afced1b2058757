"""One fixed scale for all inputs of a linear, from what they look like on calibration tokens.

Activations that are quantised with a scale known beforehand cost a kernel no search for the largest. Linears that see
the same input share its scale, so that it is quantised once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from olmo2_export.architecture import within_layer
from olmo2_export.config import ModelConfig
from olmo2_export.dtypes import float_dtype
from olmo2_export.quantize.encode import SMALLEST_SCALE
from olmo2_export.quantize.walk import embed, walked_layers
from olmo2_export.weights.source import WeightSource
from runtimes.errors import NumericError

Choose = Callable[[Tensor], float]
"""all inputs of a linear, float32 [..., K] -> their scale"""

FP8_LARGEST = float_dtype("float8e4m3fn").largest
"""of float8e4m3fn"""
_INT8_LARGEST = 127
_CLIPS = [0.93**i for i in range(32)]  # of the largest magnitude; the last keeps a tenth of it
_HOPELESS = 1.5  # times the least error: clipping more only makes it worse


@torch.no_grad()
def input_scales(
    source: WeightSource,
    config: ModelConfig,
    sequences: Sequence[np.ndarray],
    choose: Choose,
    kept: Collection[str] = (),
) -> dict[str, float]:
    """Run the original model over the sequences and choose a scale for each input of the layers' linears.

    Args:
        source: the weights.
        config: their shape.
        sequences: int64 [S] each, all of one length.
        choose: such as `int8_scale`.
        kept: linears, such as mlp.down_proj, whose inputs are not quantised.

    Returns:
        Weight name -> scale, a number that bfloat16 holds exactly.

    Raises:
        NumericError: an input is NaN or Inf.
    """
    scales: dict[str, float] = {}
    hidden = torch.cat(embed(source, sequences))  # (B, S, hidden): one call for all, or threads wait for each other
    layers = walked_layers(source, config)
    for layer in tqdm(layers, total=config.num_hidden_layers, desc="calibrating", unit="layer", leave=False):
        values = layer.run(hidden, [*(group.reads for group in layer.input_groups), layer.writes])
        for group in layer.input_groups:
            rows = [row for row in group.linears if within_layer(row) not in kept]
            names = [row.weight for row in rows if row.weight is not None]
            if not names:
                continue
            scale = choose(values[group.reads])
            if not math.isfinite(scale):
                raise NumericError(f"{names[0]}: its inputs are NaN or Inf on the calibration tokens")
            scales.update(dict.fromkeys(names, scale))
        hidden = values[layer.writes]
    return scales


def int8_scale(inputs: Tensor) -> float:
    """Return the scale of least squared error for codes of -127..127: it clips a few outliers where that pays."""
    peak = float(inputs.abs().amax())
    if not math.isfinite(peak):
        return peak

    def error(scale: float) -> float:
        rounded = (inputs / scale).round_().clamp_(-_INT8_LARGEST, _INT8_LARGEST).mul_(scale)
        return float(rounded.sub_(inputs).square_().sum(dtype=torch.float64))

    best, least = 0.0, math.inf
    for clip in _CLIPS:
        scale = _bfloat16(peak * clip / _INT8_LARGEST)
        if (found := error(scale)) < least:
            best, least = scale, found
        elif found > _HOPELESS * least:
            break
    return best


def fp8_scale(inputs: Tensor) -> float:
    """Return the scale that clips nothing: floating-point codes resolve small inputs as well as large ones."""
    return _bfloat16(float(inputs.abs().amax()) / FP8_LARGEST)


def _bfloat16(scale: float) -> float:
    return float(torch.tensor(max(scale, SMALLEST_SCALE)).to(torch.bfloat16))
