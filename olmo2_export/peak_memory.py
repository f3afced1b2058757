"""The most memory that a process has had, on the systems that count it."""

from __future__ import annotations

import sys

try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None  # type: ignore[assignment]

MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024
"""bytes that a step of rusage's ru_maxrss stands for"""


def peak_bytes() -> int | None:
    """Return the most memory this process has held so far, in bytes; None where the system does not count it."""
    return None if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_UNIT
