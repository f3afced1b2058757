"""Round to nearest: scale and zero point from the extremes of each block."""

from __future__ import annotations

import torch
from torch import Tensor

from olmo2_export.catalog import BlockFormat
from olmo2_export.quantize.blocks import QuantizedMatrix
from olmo2_export.quantize.encode import extremes, quantize_rows, usable


def round_to_nearest(weight: Tensor, form: BlockFormat) -> QuantizedMatrix:
    """Quantise a matrix.

    Args:
        weight: [N, K], float32, bfloat16 or float16.
        form: the format.

    Raises:
        CheckpointError: a weight is NaN, Inf or beyond 1e36.
    """
    return quantize_rows(weight, form, choose_extremes)


def choose_extremes(blocks: Tensor, form: BlockFormat) -> tuple[Tensor, Tensor]:
    """Choose so that nothing is clipped; see `Choose`.

    Positive: the scale that the code of either extreme can reach.
    Symmetric: the weight of largest magnitude becomes code 0, so that all codes are of use; the scale carries its sign.
    Asymmetric: least and greatest weight become the first and the last code; zero is exact.

    Source: ggml's quantize_row_q4_0_ref; onnxruntime's MlasQuantizeBlockwise does the same.
    """
    low, high = extremes(blocks)
    if form.positive:
        scale = usable(torch.maximum(high / (form.middle - 1), -low / form.middle))
        return scale, torch.full_like(scale, form.middle)
    if form.symmetric:
        scale = usable(torch.where(high > -low, high, low) / -form.middle)
        return scale, torch.full_like(scale, form.middle)
    scale = usable((high - low) / form.top)
    return scale, (-low / scale).round_()
