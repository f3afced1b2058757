"""The integers of a quantised checkpoint in blocks, as the kernels want them, with nothing rounded.

Columns of one group must be neighbours: where the checkpoint has them in another order (act-order), the matrix has
`order`, and its input is gathered in that order. A group that is no block of the kernels is several of them with one
scale. Codes of fewer bits than asked for are moved to the middle of the wider range, and stay the same numbers.

TensorRT's codes have 4 bits, no zero points, positive scales in bfloat16, and no order. What has zero points or an
order is refused; scales of float16 are rounded, which changes no weight by more than 1 / 257 of it, and no code.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from olmo2_export.catalog import BLOCK_SIZES, HELD_BLOCKS, BlockFormat
from olmo2_export.quantize.blocks import QuantizedMatrix, pack
from olmo2_export.weights.quantized.codes import Codes, StoredLinear
from runtimes.errors import UsageError

IMPORTED = "imported"
"""what the manifest says in the place of a recipe"""


def held_form(codes: Codes, default: BlockFormat) -> BlockFormat:
    """Return the format that holds a linear's codes exactly.

    Args:
        codes: of the linear.
        default: its bits, and its block size where a scale is a whole row's.

    Raises:
        UsageError: codes of more bits, or groups that blocks do not divide.
    """
    columns = int((codes.groups == 0).sum()) if codes.scales.shape[1] > 1 else 0
    return _held(codes.bits, columns, default, symmetric=codes.symmetric)


def likely_form(linear: StoredLinear, default: BlockFormat) -> BlockFormat:
    """Return the same as far as headers tell; they do not know of zero points that all are in the middle.

    Raises:
        UsageError: as `held_form`.
    """
    return _held(linear.bits or 0, linear.group, default, symmetric=linear.symmetric)


def _held(bits: int, columns: int, default: BlockFormat, *, symmetric: bool) -> BlockFormat:
    if bits > default.bits:
        raise UsageError(f"codes of {bits} bits, {default.bits} hold {default.bits}")
    size = default.block_size
    if columns:
        size = next((block for block in reversed(HELD_BLOCKS) if columns % block == 0), 0)
        if not size:
            sizes = ", ".join(map(str, HELD_BLOCKS))
            raise UsageError(f"groups of {columns} columns: blocks of {sizes} do not divide them; use --variant fp32")
    return replace(default, block_size=size, symmetric=symmetric, positive=False)


def in_blocks(codes: Codes, form: BlockFormat) -> QuantizedMatrix:
    """Lay codes out in blocks; `form` is what `held_form` gave."""
    order = codes.order
    integers, groups = codes.codes, codes.groups
    if order is not None:
        integers, groups = integers[:, order], groups[order]
    of_block = groups[:: form.block_size]
    moved = form.middle - (1 << (codes.bits - 1))
    zeros = np.ascontiguousarray(codes.zero_points[:, of_block]) + np.uint8(moved)
    matrix = pack(
        torch.from_numpy(integers + np.uint8(moved)),
        torch.from_numpy(np.ascontiguousarray(codes.scales[:, of_block])),
        None if form.symmetric else torch.from_numpy(zeros),
        form,
    )
    return replace(matrix, order=order)


def static_block(form: BlockFormat, columns: int) -> int:
    """Return the largest block of TensorRT's that holds imported codes, their scales repeated where that is smaller.

    Args:
        form: that holds them for onnxruntime.
        columns: of the weight.

    Raises:
        UsageError: other bits, zero points, or groups that no block divides.
    """
    if form.bits != 4:
        raise UsageError(f"codes of {form.bits} bits, expected 4")
    if not form.symmetric:
        raise UsageError("zero points, and TensorRT's codes have none")
    sizes = [size for size in BLOCK_SIZES if form.block_size % size == 0 and columns % size == 0]
    if not sizes:
        expected = ", ".join(map(str, BLOCK_SIZES))
        raise UsageError(f"blocks of {form.block_size} in {columns} columns, expected whole ones of {expected}")
    return max(sizes)


def in_static_blocks(matrix: QuantizedMatrix, size: int) -> QuantizedMatrix:
    """Lay an imported matrix out in smaller blocks, its scales rounded to bfloat16; `size` divides its own.

    Raises:
        UsageError: act-order, or a scale that is not positive.
    """
    if matrix.order is not None:
        raise UsageError("act-order, and no graph for TensorRT gathers the columns of an input")
    if (least := float(matrix.scales.min())) <= 0:
        raise UsageError(f"a scale of {least:g}, and TensorRT's are positive")
    blocks = torch.arange(0, matrix.columns, size) // matrix.form.block_size
    scales = torch.from_numpy(matrix.scales)[:, blocks].to(torch.bfloat16).float()
    codes = matrix.codes().flatten(1)[:, : matrix.columns]
    return pack(codes, scales, None, replace(matrix.form, block_size=size, positive=True))
