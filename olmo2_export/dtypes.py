"""What PyTorch, onnx_ir and safetensors call each dtype, and how it rounds; bytes and codes: `runtimes.dtypes`."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
import torch

from runtimes.errors import PackageError


@dataclass(frozen=True)
class FloatRow:
    """One dtype that numbers are rounded to."""

    name: str
    """as a manifest names it"""
    precision: str
    """short, as variants and gates are named; of 8 bits there are two, and no arithmetic"""
    ir: ir.DataType
    torch: torch.dtype
    roundoff: float
    """unit roundoff: most that rounding to nearest changes a number by, of that number"""
    safetensors: str
    infinity: int
    """the bits of +Inf, or of the first NaN where there is no Inf"""

    @property
    def size(self) -> int:
        """Bytes of an element."""
        return self.torch.itemsize

    @property
    def largest(self) -> float:
        """The largest finite number."""
        return torch.finfo(self.torch).max


FLOATS: tuple[FloatRow, ...] = (
    FloatRow("float64", "fp64", ir.DataType.DOUBLE, torch.float64, 2.0**-53, "F64", 0x7FF << 52),
    FloatRow("float32", "fp32", ir.DataType.FLOAT, torch.float32, 2.0**-24, "F32", 0x7F800000),
    FloatRow("float16", "fp16", ir.DataType.FLOAT16, torch.float16, 2.0**-11, "F16", 0x7C00),
    FloatRow("bfloat16", "bf16", ir.DataType.BFLOAT16, torch.bfloat16, 2.0**-8, "BF16", 0x7F80),
    FloatRow("float8e4m3fn", "fp8", ir.DataType.FLOAT8E4M3FN, torch.float8_e4m3fn, 2.0**-4, "F8_E4M3", 0x7F),
    FloatRow("float8e5m2", "fp8_e5m2", ir.DataType.FLOAT8E5M2, torch.float8_e5m2, 2.0**-3, "F8_E5M2", 0x7C),
)

STORED: tuple[str, ...] = tuple(row.safetensors for row in FLOATS)
"""safetensors' names of what weights can have; each is read into float32 as it is, without a scale"""

HALVES: dict[ir.DataType, torch.dtype] = {row.ir: row.torch for row in FLOATS if row.size == 2}
"""the dtypes of 16 bits, in which a CPU does not compute"""


def float_dtype(name: str) -> FloatRow:
    """Return a row by the manifest's name, or the short one of its precision.

    Raises:
        PackageError: there is none.
    """
    found = next((row for row in FLOATS if name in (row.name, row.precision)), None)
    if found is None:
        raise PackageError(f"dtype {name!r}: this version rounds to {', '.join(row.name for row in FLOATS)}")
    return found


def torch_dtype(dtype: ir.DataType) -> torch.dtype:
    """Return PyTorch's dtype of a tensor in a graph.

    Raises:
        PackageError: it is none that numbers are rounded to.
    """
    return float_dtype(dtype_name(dtype)).torch


def dtype_name(dtype: ir.DataType) -> str:
    """Return a dtype as the manifest spells it: float32, bfloat16, int4."""
    return next((row.name for row in FLOATS if row.ir == dtype), dtype.name.lower())


def ir_dtype(name: str) -> ir.DataType:
    """Return the dtype that a manifest names: what `dtype_name` was given.

    Raises:
        PackageError: there is none.
    """
    found = next((dtype for dtype in ir.DataType if dtype_name(dtype) == name), None)
    if found is None:
        raise PackageError(f"dtype {name!r}: not one of ONNX")
    return found


def stored_dtype(name: str) -> FloatRow | None:
    """Return the dtype of a weight that safetensors names; None: weights cannot have it."""
    return next((row for row in FLOATS if row.safetensors == name), None)
