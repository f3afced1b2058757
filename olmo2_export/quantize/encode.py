"""Weights -> codes, in chunks of rows."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from olmo2_export.catalog import BlockFormat
from olmo2_export.quantize.blocks import QuantizedMatrix, empty_matrix, pack
from runtimes.errors import CheckpointError

Choose = Callable[[Tensor, BlockFormat], tuple[Tensor, Tensor]]
"""blocks float32 [n, block_size] -> scale float32 [n, 1] and zero point [n, 1], an integer in float32"""

SMALLEST_SCALE = 2.0**-100
"""a block of zeros or denormals gets it: codes equal to the zero point, and no division by zero anywhere"""

_LARGEST = 1e36  # a larger weight would overflow float32 in the kernels' sums
_CHUNK = 1 << 20  # weights: 4 MB in float32; of smaller ones much of the time is Python's, and threads wait for it


def quantize_rows(weight: Tensor, form: BlockFormat, choose: Choose) -> QuantizedMatrix:
    """Quantise a matrix whose scales and zero points are chosen block by block.

    Args:
        weight: [N, K], float32, bfloat16 or float16.
        form: the format.
        choose: gets the blocks and returns their scales and zero points.

    Raises:
        CheckpointError: a weight is NaN, Inf or beyond 1e36.
    """
    rows, columns = weight.shape
    result = empty_matrix(rows, columns, form)
    blocks = form.blocks(columns)

    def work(start: int, stop: int) -> None:
        chunk = cut(weight[start:stop], form)
        scale, zero = choose(chunk, form)
        part = pack(
            encode(chunk, scale, zero, form).view(stop - start, -1),
            scale.view(stop - start, blocks),
            None if form.symmetric else zero.view(stop - start, blocks).to(torch.uint8),
            form,
        )
        result.packed[start:stop] = part.packed
        result.scales[start:stop] = part.scales
        if result.zero_points is not None:
            result.zero_points[start:stop] = part.zero_points

    over_rows(work, rows, blocks * form.block_size)
    return result


def over_rows(work: Callable[[int, int], None], rows: int, columns: int) -> None:
    """Call `work(start, stop)` for chunks of rows, in as many threads as torch uses, each with one thread of its own.

    Operators that share out so little work among threads spend their time waiting for each other: with other programs
    on the machine, a hundred times as long as the work takes.
    """
    threads = torch.get_num_threads()
    step = max(1, min(_CHUNK // columns, -(-rows // threads)))
    spans = [(start, min(start + step, rows)) for start in range(0, rows, step)]
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(work, *zip(*spans, strict=True)))
    finally:
        torch.set_num_threads(threads)  # this thread never had another number, but new ones would


def cut(weight: Tensor, form: BlockFormat) -> Tensor:
    """Cut rows into blocks, padded with zeros: [N, K] -> float32 [N * blocks, block_size]."""
    _, columns = weight.shape
    chunk = weight.float()
    if pad := form.blocks(columns) * form.block_size - columns:
        chunk = F.pad(chunk, (0, pad))
    return chunk.reshape(-1, form.block_size)


def extremes(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least and the greatest weight of each block, zero included: float32 [n, 1] each.

    Raises:
        CheckpointError: a weight is NaN, Inf or beyond 1e36.
    """
    low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
    if not bool(((low >= -_LARGEST) & (high <= _LARGEST)).all()):  # NaN fails, too
        bad = int((~(blocks.abs() <= _LARGEST)).sum())
        raise CheckpointError(f"{bad} weights are NaN, Inf or beyond {_LARGEST:g} and cannot be quantised")
    return low.clamp_(max=0), high.clamp_(min=0)


def usable(scale: Tensor) -> Tensor:
    """Return scales whose inverse is finite."""
    return torch.where(scale.abs() < SMALLEST_SCALE, SMALLEST_SCALE, scale)


def encode(blocks: Tensor, scale: Tensor, zero: Tensor, form: BlockFormat) -> Tensor:
    """Round to the nearest code: uint8 [n, block_size]."""
    return (blocks * (1 / scale)).add_(zero).round_().clamp_(0, form.top).to(torch.uint8)  # addcmul is slow on columns


def dots(a: Tensor, b: Tensor) -> Tensor:
    """Return the dot product of each row with its like, in one pass: float32 [n, k], [n, k] -> [n, 1].

    numpy's, as PyTorch's writes the products to memory first.
    """
    return torch.from_numpy(np.vecdot(a.numpy(), b.numpy()))[:, None]
