"""safetensors files: headers read with limits, and data read in pieces, never mapped.

The safetensors library maps a file privately, which the kernel refuses where it is larger than memory. Here one range
of a file is read at a time, into memory that the caller then owns.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from olmo2_export.dtypes import STORED, FloatRow, stored_dtype
from runtimes.errors import CheckpointError

_MAX_HEADER = 16 << 20
_MAX_TENSORS = 100_000
_PIECE = 1 << 18  # bytes looked at at a time: they stay in the processor's cache
_ROWS = 16 << 20  # bytes of whole rows that are read at a time
_TILE = 64  # rows: a product with a part has the bits of one with all if it begins at a multiple of this
_CODES = (("U8", "u1"), ("I8", "i1"), ("I32", "<i4"), ("I64", "<i8"))
_INTEGERS: dict[str, np.dtype[Any]] = {name: np.dtype(code) for name, code in _CODES}
"""of quantised weights: safetensors' name -> numpy's"""
_FOREIGN = {
    b"version ": "a Git LFS pointer: run 'git lfs pull', or download the file itself",
    b"<!DOCTYP": "a web page: download the file itself",
    b"<html": "a web page: download the file itself",
    b"PK\x03\x04": "a pickle archive: convert it to safetensors",
    b"GGUF": "a GGUF file: give the checkpoint that it was made from",
    b"\x1f\x8b": "a gzip archive: unpack it",
    b"\x80": "a pickle: convert it to safetensors",
}


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors header says of one tensor."""

    file: str
    dtype: str
    """safetensors' name: F32, F16, BF16, I64, ..."""
    shape: tuple[int, ...]
    start: int = field(repr=False, default=0)
    """byte of the file at which the data begins"""
    size: int = field(repr=False, default=0)
    """bytes of data"""


def read_header(path: Path, name: str) -> dict[str, TensorInfo]:
    """Read a safetensors header with limits, refusing what the library accepts: bombs and duplicate keys.

    The file is judged by its own structure first, a length and an object behind it: any byte can be the first of a
    valid file, also one with which another format begins.

    Args:
        path: the file.
        name: of the file, for the result.

    Raises:
        CheckpointError: damaged, disguised or beyond the limits.

    Source: https://huggingface.co/docs/safetensors, "Format".
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(9)
        length = struct.unpack("<Q", start[:8])[0] if len(start) == 9 else 0
        if start[8:] not in (b"{", b" ", b"\t", b"\r", b"\n"):  # space before an object is JSON too
            for magic, hint in _FOREIGN.items():
                if start.startswith(magic):
                    raise CheckpointError(f"{path}: not safetensors but {hint}")
        if not 2 <= length <= size - 8:
            raise CheckpointError(f"{path}: truncated, or not safetensors ({size} bytes); download it again")
        if length > _MAX_HEADER:
            raise CheckpointError(
                f"{path}: a header of {length} bytes, the limit is {_MAX_HEADER}; save it again without metadata"
            )
        blob = start[8:] + file.read(length - 1)
    try:
        header: dict[str, Any] = json.loads(blob, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, CheckpointError) else "not valid JSON"
        raise CheckpointError(f"{path}: damaged header: {reason}; download it again") from error
    if not isinstance(header, dict) or len(header) > _MAX_TENSORS:
        raise CheckpointError(f"{path}: the header must be an object of at most {_MAX_TENSORS} tensors")
    header.pop("__metadata__", None)
    tensors: dict[str, TensorInfo] = {}
    for tensor, entry in header.items():
        try:
            info = _tensor_info(entry, name, 8 + length)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise CheckpointError(f"{path}: damaged header entry {tensor!r}; download it again") from error
        tensors[tensor] = info
    end = 8 + length
    for tensor, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].size)):
        if info.start != end:
            raise CheckpointError(f"{path}: damaged header: a gap or an overlap before {tensor!r}; download it again")
        end += info.size
    if end != size:
        raise CheckpointError(f"{path}: {size} bytes, its header promises {end}; download it again")
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """Return what a header says beside its tensors, of a file that `read_header` has accepted."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        found = json.loads(file.read(length)).get("__metadata__")
    return {str(name): str(text) for name, text in found.items()} if isinstance(found, dict) else {}


def _tensor_info(entry: Any, file: str, data: int) -> TensorInfo:
    shape, (begin, end), dtype = tuple(entry["shape"]), entry["data_offsets"], str(entry["dtype"])
    if any(type(number) is not int or number < 0 for number in (*shape, begin, end)) or end < begin:
        raise TypeError("sizes are integers of at least 0")
    if (known := stored_dtype(dtype)) is not None and math.prod(shape) * known.size != end - begin:
        raise ValueError("the shape is not of that many bytes")
    return TensorInfo(file, dtype, shape, data + begin, end - begin)


def _of_weights(info: TensorInfo) -> FloatRow:
    found = stored_dtype(info.dtype)
    if found is None:
        raise CheckpointError(f"{info.file}: a tensor of dtype {info.dtype}, expected {', '.join(STORED)}")
    return found


def _no_duplicates(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise CheckpointError(f"{key!r} occurs twice")
        result[key] = value
    return result


def read_tensor(path: Path, info: TensorInfo) -> torch.Tensor:
    """Read one tensor, in its stored dtype and shape.

    Raises:
        CheckpointError: the file is shorter than its header said.
    """
    tensor = torch.empty(info.shape, dtype=_of_weights(info).torch)
    with _opened(path) as file:
        _read_range(file, info.start, tensor.view(-1).view(torch.uint8).numpy() if info.size else np.empty(0, np.uint8))
    return tensor


def read_array(path: Path, info: TensorInfo) -> np.ndarray:
    """Read one tensor of integers, or of floats: those as they are, these in float32.

    Raises:
        CheckpointError: another dtype, or the file is shorter than its header said.
    """
    if stored_dtype(info.dtype) is not None:
        floats: np.ndarray = read_tensor(path, info).float().numpy()
        return floats
    dtype = _INTEGERS.get(info.dtype)
    if dtype is None or math.prod(info.shape) * dtype.itemsize != info.size:
        raise CheckpointError(f"{info.file}: a tensor of {info.size} bytes as {info.dtype} {list(info.shape)}")
    array = np.empty(info.size, np.uint8)
    with _opened(path) as file:
        _read_range(file, info.start, array)
    integers: np.ndarray = array.view(dtype).reshape(info.shape)
    return integers


def integer_size(dtype: str) -> int:
    """Return the bytes of an integer by safetensors' name of its dtype; 0: quantised weights have none of it."""
    return _INTEGERS[dtype].itemsize if dtype in _INTEGERS else 0


def read_rows(path: Path, info: TensorInfo) -> Iterator[torch.Tensor]:
    """Read a tensor in blocks of whole rows, [up to n, ...] each, at most 16 MB or one row at a time.

    A block is overwritten by the next. A tensor without axes is one block.

    Raises:
        CheckpointError: the file is shorter than its header said.
    """
    if not info.size:
        return
    rows = info.shape[0] if info.shape else 1
    row_size = info.size // rows
    step = max(1, min(rows, _ROWS // row_size))
    if step > _TILE:  # parts of about one size: of a few rows at the end a product would have other bits
        step = min(rows, -(-rows // -(-rows // step) // _TILE) * _TILE)
    block = np.empty(step * row_size, np.uint8)
    with _opened(path) as file:
        for first in range(0, rows, step):
            count = min(step, rows - first)
            part = block[: count * row_size]
            _read_range(file, info.start + first * row_size, part)
            typed = torch.from_numpy(part).view(_of_weights(info).torch)
            yield typed.view(count, *info.shape[1:]) if info.shape else typed.view(())


def read_picked(path: Path, info: TensorInfo, rows: Sequence[int]) -> torch.Tensor:
    """Read some rows of a tensor, [len(rows), ...], in its stored dtype.

    Raises:
        CheckpointError: the file is shorter than its header said.
    """
    tensor = torch.empty((len(rows), *info.shape[1:]), dtype=_of_weights(info).torch)
    size = info.size // max(1, info.shape[0])
    with _opened(path) as file:
        for row, into in zip(rows, tensor, strict=True):
            _read_range(file, info.start + row * size, into.view(-1).view(torch.uint8).numpy())
    return tensor


def count_non_finite(path: Path, info: TensorInfo) -> int:
    """Count NaN and Inf of a tensor, in pieces that stay in the processor's cache.

    Taken as integers, the numbers of one sign grow with their magnitude, and NaN and Inf are above all others: the
    largest signed integer tells of the positive ones, the largest unsigned integer of the negative ones. Both are found
    faster than memory gives the bytes.
    """
    dtype = _of_weights(info)
    sign = 1 << (8 * dtype.size - 1)
    count = 0
    for piece in _pieces(path, info):
        signed, unsigned = piece.view(f"<i{dtype.size}"), piece.view(f"<u{dtype.size}")
        if int(signed.max()) >= dtype.infinity or int(unsigned.max()) >= sign | dtype.infinity:
            count += int(((unsigned & unsigned.dtype.type(sign - 1)) >= dtype.infinity).sum())
    return count


def all_zero(path: Path, info: TensorInfo) -> bool:
    """Tell whether every number of a tensor is 0 or -0."""
    width = _of_weights(info).size
    sign = np.zeros(width, np.uint8)
    sign[-1] = 0x80  # little-endian
    return not any((piece.reshape(-1, width) & ~sign).any() for piece in _pieces(path, info))


def same_bytes(path: Path, info: TensorInfo, other_path: Path, other: TensorInfo) -> bool:
    """Tell whether two tensors have one dtype, one shape and the same bytes."""
    if (info.dtype, info.shape, info.size) != (other.dtype, other.shape, other.size):
        return False
    pairs = zip(_pieces(path, info), _pieces(other_path, other), strict=True)
    return all(np.array_equal(piece, other_piece) for piece, other_piece in pairs)


def _pieces(path: Path, info: TensorInfo) -> Iterator[np.ndarray]:
    """Read a tensor's bytes, uint8; a piece is overwritten by the next."""
    buffer = np.empty(min(_PIECE, info.size), np.uint8)
    with _opened(path) as file:
        for at in range(0, info.size, _PIECE):
            piece = buffer[: min(_PIECE, info.size - at)]
            _read_range(file, info.start + at, piece)
            yield piece


@contextmanager
def _opened(path: Path) -> Iterator[FileIO]:
    try:
        file = FileIO(os.fspath(path))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; it was there when its header was read") from error
    with file:
        yield file


def _read_range(file: FileIO, start: int, into: np.ndarray) -> None:
    """Fill an array of bytes from a file; one call of the kernel reads 2 GiB at most."""
    view = memoryview(into.data)
    file.seek(start)
    while len(view):
        try:
            count = file.readinto(view)
        except OSError as error:
            raise CheckpointError(f"{file.name}: reading failed ({error.strerror}); check the disk") from error
        if not count:
            raise CheckpointError(f"{file.name}: shorter than when its header was read; download it again")
        view = view[count:]
