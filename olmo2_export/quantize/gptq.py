"""GPTQ: round one column after the other, and let the columns still to come make good each rounding error.

With H = X^T X of the inputs X, the error in the outputs is tr((W - Q) H (W - Q)^T). Rounding column j adds the error
e = (w_j - q_j) / U_jj, and the best correction of the later columns is -e U_j, where H^-1 = U^T U (U upper).

Scales and zero points are chosen beforehand on the original blocks ("static groups"), so that the columns can be
rounded in any order - the largest diagonal of H first - and still be stored in their own.

Source: Frantar et al., "GPTQ", arXiv:2210.17323; order and static groups as in github.com/IST-DASLab/gptq.
"""

from __future__ import annotations

import torch
from torch import Tensor

from olmo2_export.catalog import BlockFormat
from olmo2_export.quantize.blocks import QuantizedMatrix, pack
from olmo2_export.quantize.search import search
from runtimes.errors import NumericError

_STEP = 128  # columns corrected at once; the rest of the matrix follows in one product
_DAMPING = 0.01  # of the mean diagonal
_ROWS = 1 << 14  # of the matrix at a time: rows do not see each other


class Hessian:
    """The sum of x x^T over a linear's inputs x."""

    def __init__(self, columns: int) -> None:
        self.sum = torch.zeros(columns, columns)
        self.count = 0

    def add(self, x: Tensor) -> None:
        """Add inputs, float32 [..., K]."""
        rows = x.reshape(-1, x.shape[-1])
        self.sum.addmm_(rows.T, rows)
        self.count += len(rows)

    @property
    def mean(self) -> Tensor:
        """float32 [K, K]"""
        return self.sum / max(self.count, 1)


def gptq(weight: Tensor, hessian: Tensor, form: BlockFormat, *, damping: float = _DAMPING) -> QuantizedMatrix:
    """Quantise a matrix for the inputs it was seen to have.

    Args:
        weight: [N, K], float32, bfloat16 or float16.
        hessian: float32 [K, K], of the inputs: `Hessian.mean`.
        form: the format.
        damping: added to the diagonal, as a share of its mean.

    Raises:
        CheckpointError: a weight is NaN, Inf or beyond 1e36.
        NumericError: the inputs are not finite, too large to square, or too dependent for the damping.
    """
    return gptq_factored(weight, factor(hessian, damping), form)


class Factored:
    """A Hessian made ready, to be shared by the linears that see the same input."""

    def __init__(self, order: Tensor, upper: Tensor, importance: Tensor) -> None:
        self.order = order
        """int64 [K], the columns in the order in which they are rounded"""
        self.upper = upper
        """float32 [K, K], U of that order"""
        self.importance = importance
        """float32 [K], the mean square of each input"""


def factor(hessian: Tensor, damping: float = _DAMPING) -> Factored:
    """Order, damp, invert and factor a Hessian; see `gptq`."""
    diagonal = hessian.diagonal().clone()
    if not bool(torch.isfinite(hessian).all()):
        raise NumericError("GPTQ: inputs of a linear are NaN, Inf or too large on the calibration tokens")
    order = torch.argsort(diagonal, descending=True, stable=True)
    ordered = hessian[order][:, order]
    mean = float(diagonal.mean())
    ordered.diagonal().add_(damping * mean if mean > 0 else 1.0)  # inputs that are always 0: no correction at all
    # H = R R^T with R upper, by reversing both axes; then U = R^-1. No inverse of H: nine times as fast.
    lower, failed = torch.linalg.cholesky_ex(ordered.flip(0, 1))
    if int(failed):
        raise NumericError(f"GPTQ: inputs too dependent for a damping of {damping:g}; give more calibration text")
    reverse = lower.flip(0, 1)
    upper = torch.linalg.solve_triangular(reverse, torch.eye(len(ordered)), upper=True)
    importance = diagonal + damping * mean if mean > 0 else torch.ones_like(diagonal)
    return Factored(order, upper, importance)


def gptq_factored(weight: Tensor, factored: Factored, form: BlockFormat) -> QuantizedMatrix:
    """Quantise a matrix with a Hessian that is already factored; see `gptq`."""
    start = search(weight, form, factored.importance)
    scales, zeros = torch.from_numpy(start.scales), start.zeros()
    codes = torch.cat(
        [
            _round_columns(weight[i : i + _ROWS].float(), scales[i : i + _ROWS], zeros[i : i + _ROWS], factored, form)
            for i in range(0, len(weight), _ROWS)
        ]
    )
    return pack(codes, scales, None if form.symmetric else zeros, form)


def _round_columns(weight: Tensor, scales: Tensor, zeros: Tensor, factored: Factored, form: BlockFormat) -> Tensor:
    """float32 [n, K], scales and zero points [n, blocks] -> codes uint8 [n, K]; inside, columns are rows."""
    order, upper = factored.order, factored.upper
    rest = weight.T[order].contiguous()  # (K, n)
    block = order // form.block_size
    scale, zero = scales.T.contiguous(), zeros.T.float()
    codes = torch.empty(rest.shape, dtype=torch.uint8)
    for start in range(0, len(rest), _STEP):
        stop = min(start + _STEP, len(rest))
        errors = torch.empty_like(rest[start:stop])
        for i in range(start, stop):
            s, z = scale[block[i]], zero[block[i]]
            code = (rest[i] / s).add_(z).round_().clamp_(0, form.top)
            codes[i] = code.to(torch.uint8)
            error = (rest[i] - code.sub_(z).mul_(s)) / upper[i, i]
            errors[i - start] = error
            rest[i + 1 : stop].addr_(upper[i, i + 1 : stop], error, alpha=-1)
        rest[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    result = torch.empty_like(codes)
    result[order] = codes
    return result.T.contiguous()
