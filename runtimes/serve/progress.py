"""How far the requests of a call have come, and when: noted as it happens, and what traces are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from runtimes.serve.requests import Request, Texts


@dataclass
class Progress:
    """One request. Times are seconds of the clock by which it is served; None: it did not come to that."""

    request: Request | Texts
    submitted: float | None = None
    started: float | None = None
    """its prompt is being computed"""
    first: float | None = None
    """the first token of any choice"""
    last: float | None = None
    """the last token so far, or the end"""
    reused_tokens: int = 0
    new_tokens: int = 0
    reasons: list[str] = field(default_factory=list)
    """why its choices, or texts, have ended, those that have"""

    @property
    def prompt_tokens(self) -> int:
        """Tokens of its prompt, or of its texts."""
        request = self.request
        return len(request.prompt_ids) if isinstance(request, Request) else sum(map(len, request.sequences))

    @property
    def ended(self) -> bool:
        """Whether all of it was answered."""
        return len(self.reasons) == self.request.parts


class EndedCall(NamedTuple):
    """A call, when it has been answered, or given up."""

    request_id: str
    method: str
    route: str | None
    """the path, if it is one of the server's"""
    status: int
    """0: nothing was answered"""
    began: float
    """seconds of `time.monotonic`"""
    ended: float
    notes: Mapping[str, Any]
    """what the routes noted for the log"""
    progress: Sequence[Progress]
    """of its requests"""
