"""A linear of few bits, whatever library stored it: codes, and the scale and zero point of each group of columns.

    weight[n, k] = (codes[n, k] - zero_points[n, g]) * scales[n, g]        g = groups[k]

All formats that blocks of MatMulNBits can hold become this; what has float zero points or a code book does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtimes.errors import CheckpointError, ConfigError

_ROWS = 1024
REMEDY = "give the checkpoint that it was made from"


@dataclass(frozen=True, eq=False)
class Codes:
    """The integers of one linear, N outputs and K inputs."""

    bits: int
    """4 | 8"""
    codes: np.ndarray
    """uint8 [N, K], the columns in the order of the weight's"""
    scales: np.ndarray
    """float32 [N, G]"""
    zero_points: np.ndarray
    """uint8 [N, G]"""
    groups: np.ndarray
    """int64 [K]: the group of each column"""

    @property
    def symmetric(self) -> bool:
        """Whether each zero point is 2^(bits - 1)."""
        return bool((self.zero_points == 1 << (self.bits - 1)).all())

    @property
    def order(self) -> np.ndarray | None:
        """Return the columns so that those of a group are neighbours, int64 [K]; None: they are."""
        return None if (np.diff(self.groups) >= 0).all() else np.argsort(self.groups, kind="stable")

    def dequantize(self) -> np.ndarray:
        """Return the weight, float32 [N, K]: an integer times a scale, rounded once, where that rounds at all."""
        weight = np.empty(self.codes.shape, np.float32)
        for start in range(0, len(weight), _ROWS):
            rows = slice(start, start + _ROWS)
            zeros = self.zero_points[rows].astype(np.float32)[:, self.groups]
            np.subtract(self.codes[rows], zeros, out=weight[rows])
            weight[rows] *= self.scales[rows][:, self.groups]
        return weight


Arrays = Mapping[str, np.ndarray]
"""the tensors of a linear, by what each is"""


@dataclass(frozen=True, eq=False)
class StoredLinear:
    """One linear of a quantised checkpoint: where its tensors are, and how they are read."""

    shape: tuple[int, int]
    """[N, K] of the weight"""
    bits: int | None
    """of a code; None: the values are those of no integers, and `decode` gives them as float32"""
    tensors: Mapping[str, str]
    """what each tensor is -> its name in the checkpoint"""
    decode: Callable[[Arrays], Codes | np.ndarray]
    unread: tuple[str, ...] = ()
    """names of tensors that belong to it and are not needed"""
    group: int = 0
    """columns that share a scale, the last of a row may be fewer; 0: a whole row does"""
    symmetric: bool = True
    """whether zero points are in the middle, as far as it is known without them"""


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """Take integers apart, the lowest bits first: int32 [R, W] -> uint8 [R, W * 32 / bits]; 4 or 8 bits."""
    octets = np.ascontiguousarray(words, dtype="<i4").view(np.uint8)
    return octets if bits == 8 else np.stack([octets & 15, octets >> 4], axis=-1).reshape(len(octets), -1)


def unsigned(codes: np.ndarray, bits: int) -> np.ndarray:
    """Move signed integers so that the least is 0: int8 -> uint8.

    Raises:
        CheckpointError: one needs more bits.
    """
    moved = codes.astype(np.int16) + (1 << (bits - 1))
    if moved.size and (moved.min() < 0 or moved.max() >= 1 << bits):
        raise CheckpointError(f"an integer of {int(codes.min())} to {int(codes.max())}, expected {bits} bits; {REMEDY}")
    return moved.astype(np.uint8)


def refuse_rules(table: Mapping[str, Any]) -> None:
    """Refuse rules that give some modules other bits or groups than all have; those that leave one alone are fine.

    Raises:
        ConfigError: naming the first.
    """
    for field in ("dynamic", "extra_config"):
        rules = table.get(field)
        for module, rule in (rules if isinstance(rules, Mapping) else {}).items():
            if not isinstance(rule, Mapping) or str(module).startswith("-:") or rule.get("bits", 0) >= 16:
                continue
            other = [f"{k} {rule[k]}" for k in ("bits", "group_size") if k in rule and rule[k] != table.get(k)]
            if other:
                raise ConfigError(f"{field} gives {module} {', '.join(other)}, read is one form for all; {REMEDY}")


def group_columns(columns: int, size: object, groups: int) -> int:
    """Return how many columns share a scale, as `StoredLinear` has it; arguments as `even_groups`."""
    if groups <= 1:
        return 0
    return size if type(size) is int and size > 0 else -(-columns // groups)


def even_groups(columns: int, size: object, groups: int) -> np.ndarray:
    """Return the group of each column where neighbours share one, int64 [columns]; the last may have fewer columns.

    Args:
        columns: of the weight.
        size: columns of a group, as a config says it; -1, null: a whole row.
        groups: of which there are scales.

    Raises:
        CheckpointError: that is another number of groups.
    """
    width = size if type(size) is int and size > 0 else columns
    if -(-columns // width) != groups:
        raise CheckpointError(f"{groups} groups of {width} in {columns} columns; {REMEDY}")
    return np.arange(columns) // width


def given_groups(index: np.ndarray, size: object, groups: int) -> np.ndarray:
    """Return the group of each column as a checkpoint says it, int64 [K]; the last may have fewer columns.

    Raises:
        CheckpointError: a group that has no scale, or groups of several sizes, which blocks cannot hold.
    """
    found = index.astype(np.int64)
    counts = np.bincount(found, minlength=groups) if len(found) and found.min() >= 0 else np.zeros(0, np.int64)
    if not np.array_equal(counts, np.bincount(even_groups(len(found), size, groups))):
        raise CheckpointError(f"g_idx: expected {groups} groups of one size; {REMEDY}")
    return found
