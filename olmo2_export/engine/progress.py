"""Nested phases of a build -> one fraction."""

from __future__ import annotations

from dataclasses import dataclass, field

_SHOWN_DEPTH = 2  # the name shown is of a phase so deep at most: below it there are thousands
_SMALLEST_STEP = 0.01  # of the whole: less is not worth a message


@dataclass
class _Phase:
    """A phase that has begun; the phase within it that has begun counts as a part of its next step."""

    name: str
    steps: int
    done: int = 0
    inner: _Phase | None = None

    def fraction(self) -> float:
        inner = self.inner.fraction() if self.inner is not None else 0.0
        return min(1.0, (self.done + inner) / max(self.steps, 1))


@dataclass
class Progress:
    """What TensorRT's IProgressMonitor is told -> the name of the phase and the fraction of the build that is done."""

    name: str = ""
    fraction: float = 0.0
    """never decreases"""
    _open: dict[str, tuple[_Phase, int]] = field(default_factory=dict)
    _root: _Phase | None = None

    def start(self, name: str, parent: str | None, steps: int) -> bool:
        """Begin a phase; tell whether there is something to show, as the other methods do."""
        phase = _Phase(name, steps)
        outer, depth = self._open.get(parent or "", (None, -1))
        self._open[name] = (phase, depth + 1)
        if outer is None:
            self._root = phase
        else:
            outer.inner = phase
        shown = depth + 1 <= _SHOWN_DEPTH
        if shown:
            self.name = name
        return self._update() or shown

    def step(self, name: str) -> bool:
        """End a step of a phase."""
        if name in self._open:
            phase, _ = self._open[name]
            phase.done += 1
            phase.inner = None
        return self._update()

    def finish(self, name: str) -> bool:
        """End a phase."""
        if name in self._open:
            phase, _ = self._open.pop(name)
            phase.done = phase.steps
        return self._update()

    def _update(self) -> bool:
        """Take over a fraction that is larger by enough, or the end."""
        fraction = self._root.fraction() if self._root is not None else 0.0
        if fraction >= self.fraction + _SMALLEST_STEP or (fraction == 1.0 > self.fraction):
            self.fraction = fraction
            return True
        return False
