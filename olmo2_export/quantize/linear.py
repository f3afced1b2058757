"""The stored form of a quantised linear for DequantizeLinear and MatMul: codes [K, N], and scales without zero points.

weight[n, k] = codes[k, n] * scale        a scale per output channel n, or per block of block_size k's of a channel

| precision | codes            | scales, bfloat16 and positive          |
|-----------|------------------|----------------------------------------|
| int4      | int4, -8..7      | [K / block_size, N]                    |
| int8      | int8, -127..127  | [N]                                    |
| fp8       | float8e4m3fn     | [N]                                    |

Source: onnx, DequantizeLinear-24; TensorRT, IDequantizeLayer: no zero points, "strictly positive" scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from olmo2_export.quantize.blocks import QuantizedMatrix
from olmo2_export.quantize.encode import extremes, over_rows, usable
from olmo2_export.quantize.input_scales import FP8_LARGEST
from olmo2_export.quantize.int8 import quantize_int8
from runtimes.errors import UsageError

_ROWS = 4096
_INT8_LARGEST = 127


@dataclass(frozen=True, eq=False)
class QuantizedLinear:
    """One quantised weight."""

    codes: np.ndarray
    """ml_dtypes.int4, int8 or ml_dtypes.float8_e4m3fn [K, N]"""
    scales: np.ndarray
    """ml_dtypes.bfloat16 [N] or [K / block_size, N]"""

    @property
    def block_size(self) -> int:
        """Weights that share a scale; 0: a whole output channel."""
        return 0 if self.scales.ndim == 1 else len(self.codes) // len(self.scales)

    def dequantize(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return the weights of some output channels, of all by default: float32 [rows, K]."""
        codes = torch.from_numpy(self.codes[:, start:stop].astype(np.float32))
        scales = torch.from_numpy(self.scales[..., start:stop].astype(np.float32))
        if size := self.block_size:
            scales = scales.repeat_interleave(size, dim=0)
        return (codes * scales).T.contiguous()

    def channels(self, start: int, stop: int) -> QuantizedLinear:
        """Return the part that gives some of the output channels."""
        return QuantizedLinear(self.codes[:, start:stop], self.scales[..., start:stop])


def side_by_side(parts: Sequence[QuantizedLinear]) -> QuantizedLinear:
    """Return the linear that gives the outputs of all parts; their blocks and channels stay as they are."""
    codes, scales = [part.codes for part in parts], [part.scales for part in parts]
    return parts[0] if len(parts) == 1 else QuantizedLinear(np.concatenate(codes, 1), np.concatenate(scales, -1))


def int4_linear(matrix: QuantizedMatrix) -> QuantizedLinear:
    """Lay out a matrix of 4-bit blocks; its scales are rounded to bfloat16.

    Raises:
        UsageError: not 4 bits, zero points, negative scales, or a last block that is partly padding.
    """
    form, (rows, columns) = matrix.form, (matrix.rows, matrix.columns)
    if form.bits != 4 or not form.symmetric or not form.positive or columns % form.block_size:
        raise UsageError(
            f"{form} of {columns} columns: TensorRT takes 4 bits, symmetric, with positive scales, in whole blocks"
        )
    codes = np.empty((columns, rows), ml_dtypes.int4)

    def work(start: int, stop: int) -> None:
        signed = matrix.codes(start, stop).to(torch.int8).flatten(1) - form.middle
        codes[:, start:stop] = signed.T.contiguous().numpy().astype(ml_dtypes.int4)

    over_rows(work, rows, columns)
    return QuantizedLinear(codes, np.ascontiguousarray(matrix.scales.T).astype(ml_dtypes.bfloat16))


def int8_linear(weight: Tensor) -> QuantizedLinear:
    """Quantise to int8, clipping only where that lowers a channel's squared error: [N, K] -> [K, N].

    Raises:
        CheckpointError: a weight is NaN, Inf or beyond 1e36.
    """
    codes, scales = quantize_int8(weight, _INT8_LARGEST, torch.bfloat16)
    return QuantizedLinear(codes, scales.astype(ml_dtypes.bfloat16))


def fp8_linear(weight: Tensor) -> QuantizedLinear:
    """Quantise to float8e4m3fn, the largest magnitude of a channel becoming 448: [N, K] -> [K, N].

    Raises:
        CheckpointError: a weight is NaN, Inf or beyond 1e36.
    """
    rows, columns = weight.shape
    codes = torch.empty(columns, rows, dtype=torch.float8_e4m3fn)
    scales = torch.empty(rows)

    def work(start: int, stop: int) -> None:
        part = weight[start:stop].float()
        low, high = extremes(part)
        scale = usable(torch.maximum(-low, high) / FP8_LARGEST).to(torch.bfloat16).float()
        scales[start:stop] = scale[:, 0]
        # The scale may have been rounded down, and a cast beyond the range gives NaN.
        rounded = (part / scale).clamp_(-FP8_LARGEST, FP8_LARGEST).to(torch.float8_e4m3fn)
        codes.view(torch.uint8)[:, start:stop] = rounded.view(torch.uint8).T.contiguous()

    over_rows(work, rows, columns)
    return QuantizedLinear(
        codes.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn), scales.numpy().astype(ml_dtypes.bfloat16)
    )


def squared_error(linear: QuantizedLinear, weight: Tensor) -> float:
    """Return squared error / squared weights, the weights as the checkpoint has them, [N, K]."""
    error = energy = 0.0
    for start in range(0, len(weight), _ROWS):
        truth = weight[start : start + _ROWS].float()
        energy += float(truth.square().sum(dtype=torch.float64))
        error += float((linear.dequantize(start, start + _ROWS) - truth).square().sum(dtype=torch.float64))
    return error / max(energy, 1e-300)
