"""Where the weights to be quantised come from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from runtimes.manifest import SourceKind


class WeightSource(Protocol):
    """A checkpoint, or a package that holds the same weights."""

    @property
    def folder(self) -> Path:
        """has config.json and, if there is one, tokenizer.json"""
        ...

    @property
    def kind(self) -> SourceKind:
        """where it came from"""
        ...

    def tensor(self, name: str) -> Tensor:
        """Return one weight by the checkpoint's name, in the checkpoint's layout, [N, K] where it is a matrix."""
        ...

    def picked(self, name: str, rows: Tensor) -> Tensor:
        """Return some rows of one weight, int64 [n] -> [n, K], without reading all of it where that can be."""
        ...


class Replaced:
    """A checkpoint with some weights replaced, such as dequantised ones."""

    def __init__(self, source: WeightSource, weights: Mapping[str, Tensor]) -> None:
        self.folder, self.kind = source.folder, source.kind
        self._source, self._weights = source, weights

    def tensor(self, name: str) -> Tensor:
        """Return one weight; see `WeightSource`."""
        return self._weights[name] if name in self._weights else self._source.tensor(name)

    def picked(self, name: str, rows: Tensor) -> Tensor:
        """Return some rows of one weight; see `WeightSource`."""
        return self._weights[name][rows] if name in self._weights else self._source.picked(name, rows)
