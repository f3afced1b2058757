"""How many tokens of a prompt to compute between two steps of those who are being answered.

A step and a piece of a prompt exclude each other, so that a long prompt makes everybody wait. The time between two
tokens is held near three steps: a piece may take two, by the rate that was seen. Small pieces cost more for each token,
so that this time is what throughput is bought with.
"""

from __future__ import annotations

from collections import deque
from statistics import median

LEAST_TOKENS, MOST_TOKENS = 8, 128
"""of a piece; the latter, where nobody is being answered"""

_STEPS = 2.0  # that a piece may take
_REMEMBERED = 64  # steps
_FIRST_SECONDS = 0.05  # before a step was seen
_FIRST_RATE = 400.0  # tokens a second, before a piece was seen


class Pace:
    """Times that were seen."""

    def __init__(self, seconds: float | None = None) -> None:
        """Begin.

        Args:
            seconds: that pieces may take between two steps; None: `_STEPS` times the median of the last steps.
        """
        self._seconds = seconds
        self._steps: deque[float] = deque(maxlen=_REMEMBERED)
        self._rate = _FIRST_RATE

    def stepped(self, seconds: float) -> None:
        """Take note of how long a step took."""
        self._steps.append(seconds)

    def computed(self, tokens: int, seconds: float) -> None:
        """Take note of how long a piece of a prompt took."""
        if seconds > 0:
            self._rate = (self._rate + tokens / seconds) / 2

    @property
    def seconds(self) -> float:
        """What pieces may take together between two steps."""
        if self._seconds is not None:
            return self._seconds
        return _STEPS * median(self._steps) if self._steps else _FIRST_SECONDS

    def piece(self, seconds: float) -> int:
        """Return how many tokens to compute in so much time; fewer than `LEAST_TOKENS`: it is not worth a call."""
        return min(MOST_TOKENS, int(seconds * self._rate))
