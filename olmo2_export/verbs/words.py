"""How the verbs print sizes."""

from __future__ import annotations

import resource


def megabytes(size: int) -> str:
    """Return a size in bytes for people, in MB of 10**6 bytes."""
    return f"{size / 1e6:,.1f} MB"


def peak_bytes() -> int:
    """Return the most memory this process has held so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_megabytes() -> str:
    """Return the same for people."""
    return megabytes(peak_bytes())
