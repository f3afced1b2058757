"""The stored form is what onnxruntime's kernels read: each matrix, run by them, equals its own dequantised weights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper

from olmo2_export.catalog import BlockFormat
from olmo2_export.quantize.blocks import QuantizedMatrix, pack
from olmo2_export.quantize.round_to_nearest import round_to_nearest
from olmo2_export.quantize.search import search
from runtimes.errors import CheckpointError, UsageError

FORMATS = [
    BlockFormat(bits, size, symmetric) for bits in (4, 8) for size in (32, 64, 128) for symmetric in (True, False)
]
QUANTIZERS = [round_to_nearest, search]
SHAPES = [(7, 256), (24, 300), (33, 96)]
"""N odd; K no multiple of the block; an odd number of blocks"""

# MatMulNBits computes in float32 at level 0, and rounds the activations to 8 bits, block by block, at level 4.
KERNEL_NMSE = {0: 1e-11, 4: 5e-5}


def run_one(node: onnx.NodeProto, inputs: dict[str, np.ndarray], constants: dict[str, np.ndarray]) -> np.ndarray:
    types = {np.dtype("float32"): TensorProto.FLOAT, np.dtype("int64"): TensorProto.INT64}
    graph = helper.make_graph(
        [node],
        "kernel",
        [helper.make_tensor_value_info(name, types[a.dtype], a.shape) for name, a in inputs.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(a, name) for name, a in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, inputs)[0]
    return result


def matmul(x: np.ndarray, matrix: QuantizedMatrix, accuracy_level: int) -> np.ndarray:
    constants = {"packed": matrix.packed, "scales": matrix.scales}
    if matrix.zero_points is not None:
        constants["zero_points"] = matrix.zero_points
    node = helper.make_node(
        "MatMulNBits",
        ["x", *constants],
        ["y"],
        domain="com.microsoft",
        K=matrix.columns,
        N=matrix.rows,
        bits=matrix.form.bits,
        block_size=matrix.form.block_size,
        accuracy_level=accuracy_level,
    )
    return run_one(node, {"x": x}, constants)


def gather(ids: np.ndarray, matrix: QuantizedMatrix) -> np.ndarray:
    data, scales, zero_points = matrix.gather_layout()
    constants = {"data": data, "scales": scales}
    if zero_points is not None:
        constants["zero_points"] = zero_points
    node = helper.make_node(
        "GatherBlockQuantized",
        ["data", "ids", *list(constants)[1:]],
        ["y"],
        domain="com.microsoft",
        gather_axis=0,
        quantize_axis=1,
        bits=matrix.form.bits,
        block_size=matrix.form.block_size,
    )
    return run_one(node, {"ids": ids}, constants)


def nmse(test: np.ndarray, truth: np.ndarray) -> float:
    return float(np.square(test.astype(np.float64) - truth).sum() / np.square(truth.astype(np.float64)).sum())


def skewed(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Weights whose mean changes every 32 columns, so that zero points differ from the middle and from each other."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(rows, columns // 32 + 1, generator=generator).repeat_interleave(32, dim=1)[:, :columns]
    return 0.05 * torch.randn(rows, columns, generator=generator) + 0.05 * means


@pytest.mark.parametrize("rows_columns", SHAPES, ids=str)
@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_kernel_parity(
    quantizer: Callable[..., QuantizedMatrix], form: BlockFormat, rows_columns: tuple[int, int]
) -> None:
    matrix = quantizer(skewed(*rows_columns), form)
    x = np.random.default_rng(1).uniform(-1, 1, (32, rows_columns[1])).astype(np.float32)
    truth = x.astype(np.float64) @ matrix.dequantize().double().numpy().T
    for level, limit in KERNEL_NMSE.items():
        assert nmse(matmul(x, matrix, level), truth) <= limit, level
        single = [matmul(row[None], matrix, level) for row in x]  # M = 1 has kernels of its own
        assert nmse(np.concatenate(single), truth) <= limit, level
    ids = np.array([0, rows_columns[0] - 1, 3], np.int64)
    np.testing.assert_array_equal(gather(ids, matrix), matrix.dequantize().numpy()[ids])


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_extreme_blocks(quantizer: Callable[..., QuantizedMatrix], form: BlockFormat) -> None:
    """All zero, denormal, 1e30, one sign only, one single weight: finite scales and kernel parity."""
    weight = torch.zeros(9, 2 * form.block_size)
    weight[1] = 1e-41
    weight[2] = torch.linspace(-1e30, 1e30, weight.shape[1])
    weight[3] = 0.25
    weight[4] = -0.25
    weight[5, 3] = 7.0
    weight[6] = torch.linspace(1e-30, 1e30, weight.shape[1])
    weight[7] = torch.linspace(-1e-30, 3e-30, weight.shape[1])
    weight[8] = torch.linspace(0.9, 1.0, weight.shape[1])
    matrix = quantizer(weight, form)
    assert np.isfinite(matrix.scales).all()
    assert (matrix.scales != 0).all()
    back = matrix.dequantize()
    assert back[:2].abs().max() < 1e-30
    for row in (2, 3, 4, 5, 6, 8):
        assert nmse(back[row].numpy(), weight[row].numpy()) < 1e-2, row
    x = np.random.default_rng(1).uniform(-1, 1, (32, weight.shape[1])).astype(np.float32)
    for level, limit in KERNEL_NMSE.items():
        got = matmul(x, matrix, level).astype(np.float64)
        assert np.abs(got[:, :2]).max() < 1e-25
        for row in range(2, 9):
            products = x * back[row].double().numpy()  # (32, K); the terms may cancel, the error does not
            error = np.square(got[:, row] - products.sum(1)).sum()
            assert error <= limit * np.square(products).sum(), (level, row)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e37])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_not_finite_is_refused(quantizer: Callable[..., QuantizedMatrix], bad: float) -> None:
    weight = skewed(6, 128)
    weight[5, 77] = bad
    for form in FORMATS:
        with pytest.raises(CheckpointError, match="1 weights are NaN, Inf or beyond"):
            quantizer(weight, form)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_search_is_no_worse_than_rounding(form: BlockFormat) -> None:
    weight = skewed(64, 384).bfloat16()
    errors = [nmse(q(weight, form).dequantize().numpy(), weight.float().numpy()) for q in QUANTIZERS]
    assert errors[1] <= errors[0]
    if form.bits == 4 and form.symmetric:
        assert errors[1] <= 0.92 * errors[0]


def test_importance_moves_the_error_to_columns_that_matter_less() -> None:
    weight, form = skewed(32, 256), BlockFormat(4, 64, True)
    importance = torch.ones(256)
    importance[::4] = 50.0
    plain, weighted = ((search(weight, form, i).dequantize() - weight).square() for i in (None, importance))
    assert (weighted * importance).sum() < 0.9 * (plain * importance).sum()
    assert weighted.sum() > plain.sum()


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_pack_and_unpack(form: BlockFormat) -> None:
    rows, columns = 5, 3 * form.block_size - 6
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, form.top + 1, (rows, columns), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, form.top + 1, (rows, 3), generator=generator, dtype=torch.uint8)
    scales = torch.rand(rows, 3, generator=generator)
    matrix = pack(codes, scales, None if form.symmetric else zeros, form)
    assert torch.equal(matrix.codes().flatten(1)[:, :columns], codes)
    assert torch.equal(matrix.zeros(), torch.full_like(zeros, form.middle) if form.symmetric else zeros)
    assert matrix.nbytes == form.nbytes(rows, columns)
    middle = torch.tensor(matrix.dequantize(1, 3).numpy())
    assert torch.equal(middle, matrix.dequantize()[1:3])


def test_bits_per_weight() -> None:
    assert BlockFormat(4, 128, True).bits_per_weight == 4.25
    assert BlockFormat(4, 32, False).bits_per_weight == 5.125
    form = BlockFormat(4, 128, False)
    assert form.nbytes(256, 1024) * 8 / (256 * 1024) == form.bits_per_weight == 4.28125


def test_what_cannot_be_is_refused() -> None:
    for bits, size in ((3, 32), (4, 48)):
        with pytest.raises(UsageError, match="a format has 4 or 8 bits and blocks of 16, 32, 64, 128, 256"):
            BlockFormat(bits, size, True)
    with pytest.raises(UsageError, match="no whole number of bytes"):
        round_to_nearest(skewed(3, 97), BlockFormat(4, 32, True)).gather_layout()
    with pytest.raises(UsageError, match="scales"):
        pack(torch.zeros(2, 64, dtype=torch.uint8), torch.ones(2, 2), None, BlockFormat(4, 32, False))
