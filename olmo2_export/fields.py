"""Typed fields of a config.json: each is read by name and checked, and every problem is collected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Fields:
    """Reads typed fields and collects every problem, so that one message names them all."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw
        self.problems: list[str] = []
        self.said: list[str] = []
        """what changes no logits, or is read in a way that its owner should know"""

    def require(self, condition: bool, problem: str) -> None:
        """Note a problem unless the condition holds."""
        if not condition:
            self.problems.append(problem)

    def integer(
        self, name: str, low: int, high: int, default: int | None = None, source: Mapping[str, Any] | None = None
    ) -> int:
        """Return an integer of a range; the lowest where it is none. `source` is a table inside the file."""
        value = (self.raw if source is None else source).get(name)
        if value is None and default is not None:
            return default
        if type(value) is not int or not low <= value <= high:  # bool is an int to Python
            self.problems.append(f"{name} {short(value)} (an integer from {low} to {high})")
            return low
        return value

    def number(self, name: str, default: float | None = None, source: Mapping[str, Any] | None = None) -> float:
        """Return a positive number; 1 where it is none."""
        value: Any = (self.raw if source is None else source).get(name)
        if value is None and default is not None:
            return default
        if type(value) not in (int, float) or not 0 < value < 1e30:  # false for NaN, too
            self.problems.append(f"{name} {short(value)} (a positive number)")
            return 1.0
        return float(value)

    def boolean(self, name: str, source: Mapping[str, Any] | None = None, *, default: bool = False) -> bool:
        """Return true or false; `default` where it is absent or null."""
        value = (self.raw if source is None else source).get(name)
        if value is None:
            return default
        if type(value) is not bool:
            self.problems.append(f"{name} {short(value)} (true or false)")
            return default
        return value


def short(value: object) -> str:
    """Return a value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
