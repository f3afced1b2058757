"""How the verbs print sizes."""

from __future__ import annotations


def megabytes(size: int | None) -> str:
    """Return a size in bytes for people, in MB of 10**6 bytes."""
    return "unknown" if size is None else f"{size / 1e6:,.1f} MB"
