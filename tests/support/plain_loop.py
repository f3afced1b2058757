"""The loop for onnxruntime alone that docs/interop.md shows, and how its tokens are compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

PAGE = Path(__file__).parents[2] / "docs" / "interop.md"
Generate = Callable[..., tuple[np.ndarray, np.ndarray]]


def plain_loop() -> Generate:
    """Return `generate` of the first block of Python there."""
    block = PAGE.read_text(encoding="utf-8").split("```python\n", 1)[1].split("```", 1)[0]
    names: dict[str, Any] = {}
    exec(compile(block, PAGE, "exec"), names)
    generate: Generate = names["generate"]
    return generate


def parted(found: Sequence[int], wanted: np.ndarray, gaps: np.ndarray, margin: float) -> int | None:
    """Return where tokens part from the wanted ones, unless that is a near-tie; None: they do not."""
    same = min(len(found), len(wanted))
    differ = np.flatnonzero(np.asarray(found[:same]) != wanted[:same])
    if not len(differ):
        return None if len(found) == len(wanted) else same
    return None if gaps[differ[0]] < margin else int(differ[0])
