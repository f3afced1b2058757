"""The tables of dtypes are what numpy, PyTorch, onnx_ir and TensorRT say themselves."""

from __future__ import annotations

import onnx_ir as ir
import pytest
import torch

from olmo2_export.dtypes import (
    FLOATS,
    HALVES,
    FloatRow,
    dtype_name,
    float_dtype,
    ir_dtype,
    stored_dtype,
    torch_dtype,
)
from runtimes.dtypes import DTYPES, DtypeRow, find_dtype, tensorrt_dtype
from runtimes.errors import PackageError


@pytest.mark.parametrize("row", DTYPES, ids=lambda row: row.name)
def test_a_row_of_the_runners_is_what_onnx_says(row: DtypeRow) -> None:
    dtype = ir_dtype(row.name)
    assert (int(dtype), dtype.bitwidth) == (row.onnx, row.bits)
    assert dtype_name(dtype) == row.name
    assert find_dtype(row.name) is row
    if row.bits >= 8:
        assert row.raw.itemsize == row.size == find_dtype(row.name).bits // 8
    if row.numpy == row.name:
        assert dtype.numpy().name == row.name
    else:
        assert row.numpy.startswith("uint")  # numpy has none


@pytest.mark.parametrize("row", FLOATS, ids=lambda row: row.name)
def test_a_row_of_the_exporter_is_what_pytorch_says(row: FloatRow) -> None:
    assert row.torch.itemsize == row.size == find_dtype(row.name).size
    info = torch.finfo(row.torch)
    assert row.roundoff == info.eps / 2
    assert row.largest == info.max
    bits = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}[row.size]
    first = torch.tensor([row.infinity], dtype=bits).view(row.torch).double()
    below = torch.tensor([row.infinity - 1], dtype=bits).view(row.torch).double()
    assert not torch.isfinite(first).any()
    assert float(below) == info.max
    assert float_dtype(row.name) is float_dtype(row.precision) is stored_dtype(row.safetensors) is row
    assert torch_dtype(row.ir) == row.torch


def test_the_dtypes_of_16_bits() -> None:
    assert {ir.DataType.FLOAT16: torch.float16, ir.DataType.BFLOAT16: torch.bfloat16} == HALVES


def test_the_names_of_tensorrt() -> None:
    expected = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64", "FP8": "FP8"}
    assert {name: tensorrt_dtype(name) for name in expected} == expected


def test_what_is_no_dtype_is_refused() -> None:
    with pytest.raises(PackageError, match="dtype 'float7': this version knows float64, float32"):
        find_dtype("float7")
    with pytest.raises(PackageError, match="dtype 'int8': this version rounds to float64, float32"):
        float_dtype("int8")
    with pytest.raises(PackageError, match="dtype 'float': not one of ONNX"):
        ir_dtype("float")
    assert stored_dtype("I64") is None
