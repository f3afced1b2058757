"""The dtypes of tensors that enter and leave graphs, a row each. What PyTorch has for them: `olmo2_export.dtypes`.

Looking one up needs numpy alone, which has no bfloat16 and nothing below 8 bits: there a row has a stand-in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from runtimes.errors import PackageError


@dataclass(frozen=True)
class DtypeRow:
    """One dtype."""

    name: str
    """as a manifest names it: numpy's name, or ONNX's in small letters"""
    bits: int
    """of an element"""
    onnx: int
    """ONNX's code: TensorProto.DataType"""
    numpy: str
    """numpy's name; where numpy has none, that of an unsigned integer that holds the bits of one element"""
    tensorrt: str | None = None
    """TensorRT's name, of what an engine can have as an input or output"""

    @property
    def size(self) -> int:
        """Bytes of an element."""
        return self.bits // 8

    @property
    def raw(self) -> np.dtype[Any]:
        """The unsigned integer of the same size: how the host holds what it only copies."""
        return np.dtype(f"uint{self.bits}")


DTYPES: tuple[DtypeRow, ...] = (
    DtypeRow("float64", 64, 11, "float64"),
    DtypeRow("float32", 32, 1, "float32", "FLOAT"),
    DtypeRow("float16", 16, 10, "float16", "HALF"),
    DtypeRow("bfloat16", 16, 16, "uint16", "BF16"),
    DtypeRow("float8e4m3fn", 8, 17, "uint8"),
    DtypeRow("float8e5m2", 8, 19, "uint8"),
    DtypeRow("int64", 64, 7, "int64", "INT64"),
    DtypeRow("int32", 32, 6, "int32"),
    DtypeRow("int8", 8, 3, "int8"),
    DtypeRow("uint8", 8, 2, "uint8"),
    DtypeRow("int4", 4, 22, "uint8"),
)


def find_dtype(name: str) -> DtypeRow:
    """Return the row of a dtype.

    Raises:
        PackageError: this version does not know it.
    """
    found = next((dtype for dtype in DTYPES if dtype.name == name), None)
    if found is None:
        raise PackageError(f"dtype {name!r}: this version knows {', '.join(dtype.name for dtype in DTYPES)}")
    return found


def rounded(array: npt.NDArray[np.float32], dtype: DtypeRow) -> npt.NDArray[Any]:
    """Return finite numbers in another float dtype, rounded to nearest-even; as its `numpy` holds them, contiguous."""
    array = np.ascontiguousarray(array)
    if dtype.name != "bfloat16":
        return array.astype(dtype.numpy, copy=False)
    bits = array.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(dtype.numpy)


def tensorrt_dtype(name: str) -> str:
    """Return the manifest's name of what TensorRT calls a dtype; TensorRT's own, where a manifest has none."""
    return next((dtype.name for dtype in DTYPES if dtype.tensorrt == name), name)
