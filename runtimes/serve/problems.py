"""What is wrong with a call, in the form of OpenAI's API, and the HTTP status that goes with it.

{"error": {"message": "...", "type": "invalid_request_error", "param": "temperature", "code": null}}
"""

from __future__ import annotations

from typing import NamedTuple

from runtimes.errors import (
    BusyError,
    ContextLengthError,
    EngineLostError,
    InputError,
    NotReadyError,
    NumericError,
    Olmo2ExportError,
    UsageError,
)

RETRY_SECONDS = 1
"""after which a client that was refused for want of room may come again"""


class CallError(InputError):
    """A call that is refused; `param` is the field that it is about."""

    def __init__(self, message: str, param: str | None = None, *, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


class Problem(NamedTuple):
    """An error as a client gets it."""

    status: int
    message: str
    type: str
    param: str | None = None
    code: str | None = None

    def document(self) -> dict[str, object]:
        """Return its JSON."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}

    def headers(self) -> dict[str, str]:
        """Return the headers that go with it."""
        found = {"retry-after": str(RETRY_SECONDS)} if self.status in (429, 503) else {}
        if self.status == 401:
            found["www-authenticate"] = "Bearer"
        if self.status in (408, 413):  # the rest of the body is not read
            found["connection"] = "close"
        return found


def problem_of(error: Olmo2ExportError) -> Problem:
    """Return what a client is told of an error."""
    message = " ".join(str(error).split())
    match error:
        case CallError():
            kind = "authentication_error" if error.status == 401 else "invalid_request_error"
            return Problem(error.status, message, kind, error.param, error.code)
        case ContextLengthError():
            return Problem(400, message, "invalid_request_error", code="context_length_exceeded")
        case InputError() | UsageError():
            return Problem(400, message, "invalid_request_error")
        case NotReadyError():
            return Problem(503, message, "server_error", code="not_ready")
        case BusyError():
            return Problem(429, message, "rate_limit_error", code="queue_full")
        case NumericError():
            return Problem(500, message, "server_error", code="broken_numbers")
        case EngineLostError():
            return Problem(500, message, "server_error", code="engine_lost")
        case _:
            return Problem(500, message, "server_error")
