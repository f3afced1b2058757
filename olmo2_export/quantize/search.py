"""Scale and zero point of least squared error, block by block, without calibration.

Candidates clip the extremes by a little or a lot; each is rounded, gets its scale anew in closed form

    scale = <w, q> / <q, q>,   error = <w, w> - <w, q>^2 / <q, q>,   q = code - zero point

and the best of each block is kept.

Source: ggml's make_qx_quants (llama.cpp k-quants), with the zero point searched as in HQQ (Badri and Shaji, "Half-
Quadratic Quantization of Large Machine Learning Models", 2023), but for the squared error and over whole zero points.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from olmo2_export.catalog import BlockFormat
from olmo2_export.quantize.blocks import QuantizedMatrix
from olmo2_export.quantize.encode import dots, extremes, quantize_rows, usable

# Codes that the whole range of a block is stretched over, as a multiple of those there are: above 1 clips.
_STRETCH_SYMMETRIC = {4: (0.9, 0.95, 1.0, 1.06, 1.12, 1.19, 1.27, 1.36, 1.46), 8: (0.99, 1.0, 1.03, 1.06)}
_STRETCH = {4: (0.94, 1.0, 1.06, 1.13, 1.21, 1.31), 8: (1.0, 1.03)}
_SHIFTS = {4: (-1, 1), 8: ()}


def search(weight: Tensor, form: BlockFormat, importance: Tensor | None = None) -> QuantizedMatrix:
    """Quantise a matrix.

    Args:
        weight: [N, K], float32, bfloat16 or float16.
        form: the format.
        importance: float32 [K], weights of the squared error, such as the mean square of each input; None: all alike.

    Raises:
        CheckpointError: a weight is NaN, Inf or beyond 1e36.
    """
    if importance is None:
        return quantize_rows(weight, form, choose_best)
    pad = form.blocks(weight.shape[1]) * form.block_size - weight.shape[1]
    table = torch.nn.functional.pad(importance.float(), (0, pad)).view(-1, form.block_size)
    return quantize_rows(weight, form, partial(choose_best, importance=table))


def choose_best(blocks: Tensor, form: BlockFormat, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Choose by squared error; see `Choose`.

    Args:
        blocks: float32 [n, block_size].
        form: the format.
        importance: float32 [blocks of a row, block_size]; n is a multiple of its length.
    """
    low, high = extremes(blocks)
    size = usable(torch.maximum(-low, high))
    x = blocks / size  # so that no square overflows or vanishes
    y = x if importance is None else (x.view(-1, *importance.shape) * importance).view_as(x)
    best = _Best(x, y, importance)
    if form.symmetric:
        # The largest magnitude is negative, where there is one code more.
        sign = torch.ones_like(high) if form.positive else torch.where(high > -low, -1.0, 1.0)
        for stretch in _STRETCH_SYMMETRIC[form.bits]:
            best.offer(sign * (form.middle * stretch), form.middle, form)
        best.offer((sign if form.positive else -sign) * (form.middle - 1), form.middle, form)
    else:
        span = usable((high - low) / size)
        zero = (low / size / span * -form.top).round_()
        for stretch in _STRETCH[form.bits]:
            best.offer(form.top * stretch / span, zero, form)
        inverse = 1 / usable(best.scale)
        for shift in _SHIFTS[form.bits]:
            best.offer(inverse, (zero + shift).clamp_(0, form.top), form)
    return usable(best.scale * size), best.zero


class _Best:
    """The best candidate so far of each block."""

    def __init__(self, x: Tensor, y: Tensor, importance: Tensor | None) -> None:
        self.x, self.y, self.importance = x, y, importance
        self.gain = x.new_full((len(x), 1), -1.0)  # <w, q>^2 / <q, q>
        self.scale = torch.zeros_like(self.gain)
        self.zero = torch.zeros_like(self.gain)
        self._q = torch.empty_like(x)
        self._product = self._q if importance is None else torch.empty_like(x)

    def offer(self, inverse: Tensor, zero: Tensor | int, form: BlockFormat) -> None:
        """Round with the scale 1 / inverse, fit the scale to the codes, keep it where it is the best."""
        q = torch.mul(self.x, inverse, out=self._q).round_()
        q = q.clamp_(-zero, form.top - zero) if isinstance(zero, int) else q.add_(zero).clamp_(0, form.top).sub_(zero)
        along = dots(q, self.y)
        weighted = q
        if self.importance is not None:
            weighted = self._product.copy_(q)
            weighted.view(-1, *self.importance.shape).mul_(self.importance)
        length = dots(q, weighted)
        scale = along / length.clamp_(min=1e-30)
        gain = along * scale
        better = gain > self.gain
        self.gain = torch.where(better, gain, self.gain)
        self.scale = torch.where(better, scale, self.scale)
        self.zero = torch.where(better, torch.as_tensor(zero, dtype=gain.dtype), self.zero)
