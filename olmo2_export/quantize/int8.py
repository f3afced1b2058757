"""Weights of the W8A8 graph: 7 bits with one scale per output channel, and the input columns that 8 bits cannot hold.

Codes stay within -63..63, because the u8 x s8 kernels of processors without VNNI add two products in 16 bits:
2 x 255 x 63 fits, 2 x 255 x 127 saturates.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from olmo2_export.quantize.encode import extremes, over_rows, usable

LARGEST_CODE = 63
OUTLIER_THRESHOLD = 6.0
"""times the root mean square of the whole input"""

_STRETCH = (1.0, 1.04, 1.08, 1.13, 1.19, 1.26)  # of the range over the codes; above 1 clips


def quantize_int8(weight: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Quantise a matrix per output channel, clipping only where that lowers the channel's squared error.

    Args:
        weight: [N, K], float32, bfloat16 or float16.

    Returns:
        codes int8 [K, N], as MatMulInteger wants them, and scales float32 [N]: weight = (codes * scales).T.

    Raises:
        CheckpointError: a weight is NaN, Inf or beyond 1e36.
    """
    rows, columns = weight.shape
    codes = torch.empty(columns, rows, dtype=torch.int8)
    scales = torch.empty(rows)

    def work(start: int, stop: int) -> None:
        part, scales[start:stop] = _quantize_channels(weight[start:stop].float())
        codes[:, start:stop] = part.T.contiguous()  # transposed in the cache, then written along rows

    over_rows(work, rows, columns)
    return codes.numpy(), scales.numpy()


def outlier_columns(peak: Tensor, mean_square: Tensor, threshold: float = OUTLIER_THRESHOLD) -> np.ndarray:
    """Return the input columns of a linear that deserve a float32 side path.

    A row of activations shares one 8-bit scale, so that a column far above the rest takes its resolution away.

    Args:
        peak: float32 [K], the largest magnitude of each input on the calibration tokens (`InputStatistics.peak`).
        mean_square: float32 [K], of each input on the same tokens.
        threshold: an outlier's peak in multiples of the root mean square of the whole input. (The source has 6.0 in
            absolute terms, behind a LayerNorm; OLMo 2 has no norm there.)

    Returns:
        int64, ascending.

    Source: Dettmers et al., "LLM.int8()", arXiv:2208.07339, section 3.2.
    """
    found: np.ndarray = torch.nonzero(peak > threshold * mean_square.mean().sqrt())[:, 0].numpy()
    return found


def _quantize_channels(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [n, K] -> int8 [n, K], float32 [n]; scale = <w, q> / <q, q> for the best of a few clippings q."""
    low, high = extremes(weight)
    size = usable(torch.maximum(-low, high))
    x = weight / size
    gain = torch.full_like(size, -1.0)
    best = torch.zeros_like(size)
    for stretch in _STRETCH:
        q = (x * (LARGEST_CODE * stretch)).round_().clamp_(-LARGEST_CODE, LARGEST_CODE)
        along = (q * x).sum(1, keepdim=True)
        scale = along / q.square_().sum(1, keepdim=True).clamp_(min=1e-30)
        better = along * scale > gain
        gain, best = torch.where(better, along * scale, gain), torch.where(better, scale, best)
    scale = usable(best * size)
    codes = (weight / scale).round_().clamp_(-LARGEST_CODE, LARGEST_CODE)
    return codes.to(torch.int8), scale[:, 0]
