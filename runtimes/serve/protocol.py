"""uvicorn's protocol with limits on headers: their bytes, and the time until they are complete.

Where they are broken the connection is answered and closed before any application hears of it.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from runtimes.serve.problems import Problem

HEADER_BYTES = 16 << 10
HEADER_SECONDS = 10.0


class LimitedProtocol(HttpToolsProtocol):
    """One connection. httptools gives headers when they are complete, so that their bytes are counted as they come."""

    header_bytes = HEADER_BYTES
    header_seconds = HEADER_SECONDS

    def __init__(self, *args: Any, **options: Any) -> None:
        """Take uvicorn's own arguments."""
        super().__init__(*args, **options)
        self._in_headers = True
        self._bytes = 0
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for headers."""
        super().connection_made(transport)
        self._timer = self.loop.call_later(self.header_seconds, self._late)

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count what comes while headers are not complete."""
        if self._in_headers and self._timer is None:  # the next request of a connection that is kept
            self._timer = self.loop.call_later(self.header_seconds, self._late)
        if self._in_headers:
            end = data.find(b"\r\n\r\n")  # what is behind it is a body
            self._bytes += len(data) if end < 0 else end
            if self._bytes > self.header_bytes:
                self._refuse(431, f"headers of more than {self.header_bytes} bytes")
                return
        super().data_received(data)

    def on_headers_complete(self) -> None:
        """Count no longer, until the next request begins."""
        self._in_headers, self._bytes = False, 0
        self._stop_timer()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The next request may begin."""
        super().on_message_complete()
        self._in_headers = True

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, in the form that all errors have."""
        self._refuse(400, msg.rstrip("."))

    def _late(self) -> None:
        self._timer = None
        waits = self.cycle is not None and not self.cycle.response_complete
        if self._in_headers and not waits and not self.transport.is_closing():
            self._refuse(408, f"headers not complete after {self.header_seconds:g} s")

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, status: int, message: str) -> None:
        body = json.dumps(Problem(status, message, "invalid_request_error").document()).encode()
        headers = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
        self._stop_timer()
        if not self.transport.is_closing():
            self.transport.write(STATUS_LINE[status] + headers + body)
            self.transport.close()
