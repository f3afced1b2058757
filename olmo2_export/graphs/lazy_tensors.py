"""Tensors by name that are made when they are asked for: one is in memory where a model would not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

Made = TypeVar("Made")


class LazyTensors(Mapping[str, Made]):
    """Values that are made when they are asked for, anew each time: they are large."""

    def __init__(self, makers: Mapping[str, Callable[[], Made]]) -> None:
        self._makers = makers

    def __getitem__(self, name: str) -> Made:
        return self._makers[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._makers

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)
