"""What counts as an integer where a caller gives one: Python's, numpy's and any other that can be an index; no bool."""

from __future__ import annotations

import operator
from typing import Any


def as_integer(value: Any) -> int | None:
    """Return a value as Python's integer; None: it is none."""
    if type(value) is int:
        return value
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None
