"""What a call of the model costs by its number of rows, as far as it is known."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from statistics import median, median_low

import numpy as np

STEP_COSTS: Mapping[int, float] = {1: 1.0, 2: 1.3, 4: 2.2, 8: 3.8, 16: 7.0}
"""rows of a call -> its time relative to one row: int4 weights on a CPU, until it is measured"""

DRAFT_LENGTHS = (1, 2, 3, 5, 7, 11, 15)
"""of a draft; few, so that each is measured soon"""

SAMPLES = 5
"""of a time; their median does not mind an interruption"""


class StepTimes:
    """How long a call takes by its number of rows: a table of ratios at first, then what is measured."""

    def __init__(self, costs: Mapping[int, float] = STEP_COSTS) -> None:
        """Take the ratios.

        Args:
            costs: rows -> time relative to one row; between them they are interpolated.
        """
        table = sorted(costs.items())
        rows, ratios = [r for r, _ in table], [c for _, c in table]
        self._table = {n: float(np.interp(n, rows, ratios)) for n in range(1, DRAFT_LENGTHS[-1] + 2)}
        self._ratios: dict[int, deque[float]] = {n + 1: deque(maxlen=SAMPLES) for n in DRAFT_LENGTHS}
        self._plain: deque[float] = deque(maxlen=SAMPLES)
        self._known = dict(self._table)  # rows -> ratio, the best guess now
        self.most = 0
        """the longest draft whose time was measured twice"""

    @property
    def one_row(self) -> float | None:
        """Seconds; None before it was measured."""
        return median(self._plain) if self._plain else None

    def ratio(self, rows: int) -> float:
        """Return the time of a call relative to one row."""
        return self._known[rows]

    def measured(self, rows: int, seconds: float) -> None:
        """Take the time of a call; of those with several rows only after one with a single row."""
        if rows == 1:
            self._plain.append(seconds)
        elif rows in self._ratios and self._plain and (one := median(self._plain)) > 0:
            ratios = self._ratios[rows]
            ratios.extend([seconds / one] if ratios else [self._known[rows], seconds / one])
            if len(ratios) > 2:
                self.most = max(self.most, rows - 1)
            self._estimate()

    def _estimate(self) -> None:
        """A number of rows that was not measured is off from the table like the nearest that was.

        What was expected is the first sample, and the lower median counts: one call that was interrupted proves little.
        """
        off = {
            n: max(0.05, (median_low(ratios) - 1) / max(0.05, self._table[n] - 1))
            for n, ratios in self._ratios.items()
            if ratios
        }
        for n in self._ratios:
            nearest = min(off, key=lambda m: abs(m - n))
            self._known[n] = 1 + off[nearest] * max(0.05, self._table[n] - 1)
