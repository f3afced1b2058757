"""Finished tensors on disk, until the package is written: one .npz each."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from olmo2_export.catalog import BlockFormat
from olmo2_export.quantize.blocks import QuantizedMatrix
from runtimes.errors import DISK_FULL, ResourceError, UsageError


class Spool:
    """A folder of quantised matrices, by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, name: str, matrix: QuantizedMatrix) -> None:
        """Write one matrix.

        Raises:
            ResourceError: the disk is full.
            UsageError: the folder cannot be written.
        """
        form = matrix.form
        zeros = np.empty(0, np.uint8) if matrix.zero_points is None else matrix.zero_points
        shape = np.array(
            [form.bits, form.block_size, form.symmetric, form.positive, matrix.rows, matrix.columns], np.int64
        )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._path(name).open("wb") as file:
                np.savez(file, shape=shape, packed=matrix.packed, scales=matrix.scales, zero_points=zeros)
        except OSError as error:
            kind = ResourceError if error.errno in DISK_FULL else UsageError
            raise kind(f"{self.folder}: cannot keep {name} ({error.strerror})") from error

    def load(self, name: str) -> QuantizedMatrix:
        """Read one matrix back."""
        with np.load(self._path(name), allow_pickle=False) as file:
            bits, block_size, symmetric, positive, rows, columns = (int(n) for n in file["shape"])
            return QuantizedMatrix(
                form=BlockFormat(bits, block_size, bool(symmetric), bool(positive)),
                rows=rows,
                columns=columns,
                packed=file["packed"],
                scales=file["scales"],
                zero_points=None if symmetric else file["zero_points"],
            )

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npz"
