"""The stored form of a quantised matrix: codes, scales and zero points, exactly as onnxruntime's kernels read them.

weight [N, K] is cut along K into blocks; within a block  weight = (code - zero_point) * scale.

Source: com.microsoft::MatMulNBits and com.microsoft::GatherBlockQuantized, onnxruntime 1.31, docs/ContribOperators.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from olmo2_export.catalog import BlockFormat
from runtimes.errors import UsageError


@dataclass(frozen=True, eq=False)
class QuantizedMatrix:
    """One quantised weight in the layout of MatMulNBits; build it with `pack`."""

    form: BlockFormat
    rows: int
    """N, the output channels"""
    columns: int
    """K, the input channels"""
    packed: np.ndarray
    """codes, uint8 [N, blocks, block_size * bits / 8], the earlier of two 4-bit codes in the low half"""
    scales: np.ndarray
    """float32 [N, blocks]"""
    zero_points: np.ndarray | None
    """uint8 [N, ceil(blocks * bits / 8)], packed like the codes; None: symmetric"""
    order: np.ndarray | None = None
    """int64 [K]: the column of the weight that each stored one is, and the input's; None: they are in order"""

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return self.packed.nbytes + self.scales.nbytes + (0 if self.zero_points is None else self.zero_points.nbytes)

    def codes(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return the codes of some rows, unpacked: uint8 [rows, blocks, block_size]."""
        return _unpack(torch.from_numpy(self.packed[start:stop]), self.form.bits)

    def zeros(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return the zero points of some rows, unpacked: uint8 [rows, blocks]."""
        blocks = self.scales.shape[1]
        if self.zero_points is None:
            return torch.full((len(self.scales[start:stop]), blocks), self.form.middle, dtype=torch.uint8)
        return _unpack(torch.from_numpy(self.zero_points[start:stop]), self.form.bits)[:, :blocks]

    def dequantize(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return the weights of some rows, of all by default: float32 [rows, K]."""
        weight, zeros = self.codes(start, stop).float(), self.zeros(start, stop).float()
        weight.sub_(zeros[..., None]).mul_(torch.from_numpy(self.scales[start:stop])[..., None])
        stored = weight.flatten(1)[:, : self.columns].contiguous()
        if self.order is None:
            return stored
        ordered = torch.empty_like(stored)
        ordered[:, torch.from_numpy(self.order)] = stored
        return ordered

    def gather_layout(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Return the arrays for GatherBlockQuantized: gather_axis 0, quantize_axis 1, and the same bits and block_size.

        Its data has no padding; scales and zero points are the same as for MatMulNBits.

        Returns:
            data uint8 [N, K * bits / 8], scales, zero_points.

        Raises:
            UsageError: 4 bits and an odd K: its rows are whole bytes.
        """
        if self.form.bits == 4 and self.columns % 2:
            raise UsageError(f"{self.columns} columns of 4 bits are no whole number of bytes; use 8 bits")
        data = self.packed.reshape(self.rows, -1)[:, : self.columns * self.form.bits // 8]
        return np.ascontiguousarray(data), self.scales, self.zero_points


def pack(codes: Tensor, scales: Tensor, zero_points: Tensor | None, form: BlockFormat) -> QuantizedMatrix:
    """Pack codes into the stored form.

    Args:
        codes: uint8 [N, K].
        scales: float32 [N, blocks].
        zero_points: uint8 [N, blocks]; None if and only if the form is symmetric.
        form: the format.
    """
    rows, columns = codes.shape
    blocks = form.blocks(columns)
    if scales.shape != (rows, blocks) or (zero_points is None) != form.symmetric:
        raise UsageError(f"scales {list(scales.shape)}, expected {[rows, blocks]}; zero points unless symmetric")
    if pad := blocks * form.block_size - columns:
        last = torch.full((rows, 1), form.middle, dtype=torch.uint8) if zero_points is None else zero_points[:, -1:]
        codes = torch.cat([codes, last.expand(rows, pad)], dim=1)  # padding is exactly zero
    return QuantizedMatrix(
        form=form,
        rows=rows,
        columns=columns,
        packed=_pack(codes, form.bits).view(rows, blocks, -1).numpy(),
        scales=scales.contiguous().numpy(),
        zero_points=None if zero_points is None else _pack(zero_points, form.bits).numpy(),
    )


def empty_matrix(rows: int, columns: int, form: BlockFormat) -> QuantizedMatrix:
    """Return a matrix whose arrays are not yet filled in, to be written a chunk of rows at a time."""
    blocks = form.blocks(columns)
    zero_bytes = math.ceil(blocks * form.bits / 8)
    return QuantizedMatrix(
        form=form,
        rows=rows,
        columns=columns,
        packed=np.empty((rows, blocks, form.block_size * form.bits // 8), np.uint8),
        scales=np.empty((rows, blocks), np.float32),
        zero_points=None if form.symmetric else np.empty((rows, zero_bytes), np.uint8),
    )


def _pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 [N, M] -> uint8 [N, ceil(M * bits / 8)]"""
    if bits == 8:
        return codes.contiguous()
    if codes.shape[1] % 2:
        codes = F.pad(codes, (0, 1))
    pairs = codes.contiguous().view(torch.int16)  # two codes a word: four times as fast as two strided halves
    return (pairs | (pairs >> 4)).to(torch.uint8)


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """uint8 [..., M] -> uint8 [..., M * 8 / bits]"""
    if bits == 8:
        return packed
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
