"""The integers of a quantised checkpoint in blocks, as the kernels want them, with nothing rounded.

Columns of one group must be neighbours: where the checkpoint has them in another order (act-order), the matrix has
`order`, and its input is gathered in that order; that of down_proj is folded into the rows of what gives it, as a
gather costs 18 ns for each number. A group that is no block of the kernels is several of them with one
scale. Codes of fewer bits than asked for are moved to the middle of the wider range, and stay the same numbers.

TensorRT's codes have 4 bits, no zero points, positive scales in bfloat16, and no order. What has zero points or an
order is refused; scales of float16 are rounded, which changes no weight by more than 1 / 257 of it, and no code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from olmo2_export.catalog import BLOCK_SIZES, HELD_BLOCKS, BlockFormat
from olmo2_export.config import ModelConfig
from olmo2_export.quantize.blocks import QuantizedMatrix, pack
from olmo2_export.weights.checkpoint import Checkpoint
from olmo2_export.weights.quantized.codes import Codes, StoredLinear
from olmo2_export.weights.stored_names import linear_names
from runtimes.errors import UsageError

GIVES_DOWN = ("gate_proj", "up_proj")
"""the linears whose outputs, multiplied element by element, are the inputs of down_proj"""

IMPORTED = "imported"
"""what the manifest says in the place of a recipe"""


class FoldedOrders:
    """A checkpoint whose down_proj needs no order: its columns are in it, and the rows of gate_proj and up_proj."""

    def __init__(self, checkpoint: Checkpoint, orders: Mapping[str, np.ndarray]) -> None:
        """Read nothing yet; `orders` are by the weight of down_proj, int64 [K]."""
        self.folder, self.kind, self.quantized = checkpoint.folder, checkpoint.kind, checkpoint.quantized
        self._checkpoint = checkpoint
        self._columns = orders
        self._rows = {down.replace("down_proj", part): o for down, o in orders.items() for part in GIVES_DOWN}

    def tensor(self, name: str) -> torch.Tensor:
        """Return one weight; see `WeightSource`."""
        weight = self._checkpoint.tensor(name)
        if name in self._rows:
            return weight[torch.from_numpy(self._rows[name])]
        return weight[:, torch.from_numpy(self._columns[name])] if name in self._columns else weight

    def picked(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Return some rows of one weight; see `WeightSource`."""
        moved = name in self._rows or name in self._columns
        return self.tensor(name)[rows] if moved else self._checkpoint.picked(name, rows)

    def codes(self, name: str) -> Codes | None:
        """Return the integers of a linear; see `Checkpoint.codes`."""
        codes = self._checkpoint.codes(name)
        if codes is not None and (rows := self._rows.get(name)) is not None:
            parts = {part: getattr(codes, part)[rows] for part in ("codes", "scales", "zero_points")}
            return replace(codes, **parts)
        if codes is not None and (columns := self._columns.get(name)) is not None:
            return replace(codes, codes=codes.codes[:, columns], groups=codes.groups[columns])
        return codes


def foldable_orders(checkpoint: Checkpoint, config: ModelConfig) -> dict[str, np.ndarray]:
    """Return the orders of the inputs of down_proj, by its weight, where it and what gives them are in codes."""
    found: dict[str, np.ndarray] = {}
    linears = checkpoint.quantized.linears if checkpoint.quantized is not None else {}
    for name in linear_names(config):
        needed = [name, *(name.replace("down_proj", part) for part in GIVES_DOWN)]
        codes = checkpoint.codes(name) if "down_proj" in name and all(part in linears for part in needed) else None
        if codes is not None and (order := codes.order) is not None:
            found[name] = order
    return found


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
