"""int8 weights with one scale per output channel.

On CPUs codes stay within -63..63, because the u8 x s8 kernels of processors without VNNI add two products in 16 bits:
2 x 255 x 63 fits, 2 x 255 x 127 saturates. GPUs take the full range, -127..127.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from olmo2_export.quantize.encode import dots, extremes, over_rows, usable

LARGEST_CODE = 63
"""of the graphs for CPUs"""

_STRETCH = (1.0, 1.04, 1.08, 1.13, 1.19, 1.26)  # of the range over the codes; above 1 clips


def quantize_int8(
    weight: Tensor, largest_code: int = LARGEST_CODE, scale_dtype: torch.dtype = torch.float32
) -> tuple[np.ndarray, np.ndarray]:
    """Quantise a matrix per output channel, clipping only where that lowers the channel's squared error.

    Args:
        weight: [N, K], float32, bfloat16 or float16.
        largest_code: 63, or 127 for the full range.
        scale_dtype: what scales are rounded to, before the codes that go with them are chosen.

    Returns:
        codes int8 [K, N], as MatMulInteger and MatMul want them, and scales float32 [N]: weight = (codes * scales).T.

    Raises:
        CheckpointError: a weight is NaN, Inf or beyond 1e36.
    """
    rows, columns = weight.shape
    codes = torch.empty(columns, rows, dtype=torch.int8)
    scales = torch.empty(rows)

    def work(start: int, stop: int) -> None:
        part, scales[start:stop] = _quantize_channels(weight[start:stop].float(), largest_code, scale_dtype)
        codes[:, start:stop] = part.T.contiguous()  # transposed in the cache, then written along rows

    over_rows(work, rows, columns)
    return codes.numpy(), scales.numpy()


def _quantize_channels(weight: Tensor, largest: int, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """float32 [n, K] -> int8 [n, K], float32 [n]; scale = <w, q> / <q, q> for the best of a few clippings q."""
    low, high = extremes(weight)
    size = usable(torch.maximum(-low, high))
    x = weight / size
    gain = torch.full_like(size, -1.0)
    best = torch.zeros_like(size)
    q = torch.empty_like(x)
    for stretch in _STRETCH:
        torch.mul(x, largest * stretch, out=q).round_().clamp_(-largest, largest)
        along = dots(q, x)
        scale = along / dots(q, q).clamp_(min=1e-30)
        better = along * scale > gain
        gain, best = torch.where(better, along * scale, gain), torch.where(better, scale, best)
    scale = usable(best * size).to(scale_dtype).float()
    codes = torch.div(weight, scale, out=q).round_().clamp_(-largest, largest)
    return codes.to(torch.int8), scale[:, 0]
