"""What stands in front of every route: keys, limits of bodies and times, request ids, a line of the log a call."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtimes.errors import BusyError, NotReadyError, Olmo2ExportError
from runtimes.serve.keys import Keys
from runtimes.serve.messages import PATHS as PATHS_OF_MESSAGES
from runtimes.serve.messages import error_document
from runtimes.serve.metrics import Metrics
from runtimes.serve.page_files import PATHS
from runtimes.serve.problems import CallError, Problem, problem_of
from runtimes.serve.progress import EndedCall, Progress

if TYPE_CHECKING:
    from runtimes.serve.tracing import Traces

logger = logging.getLogger("runtimes.serve.calls")

PUBLIC = ("/health", "/ready", *PATHS)
"""paths that need no key, and are not logged"""
NOTES = "olmo2_notes"
"""in a scope: what a route adds to the line of the log"""
PROGRESS = "olmo2_progress"
"""in a scope: a list to which a route adds the progress of its requests"""
CALL_ID = "olmo2_call_id"
"""in a scope: a name of this call that no other has; a client may give two calls the same request id"""
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


@dataclass(frozen=True)
class EdgeLimits:
    """What a call may take."""

    body_bytes: int = 1 << 20
    body_seconds: float = 10.0
    write_seconds: float = 30.0
    """that a client may take none of what is written to it"""
    calls_per_key: int | None = None
    """that are not answered yet; None: any number"""


def to_json(document: Mapping[str, Any]) -> bytes:
    """Return a document as JSON, on one line and in UTF-8."""
    return _ENCODER.encode(document).encode()


def json_response(document: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a document as a response."""
    return Response(to_json(document), status, headers, media_type="application/json")


def problem_response(problem: Problem, path: str) -> Response:
    """Return an error as a response to a call of a path, in the form that its clients read."""
    document = error_document(problem) if path in PATHS_OF_MESSAGES else problem.document()
    return json_response(document, problem.status, problem.headers())


class Edge:
    """An ASGI application around another; see the module."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Keys,
        limits: EdgeLimits,
        metrics: Metrics,
        draining: Callable[[], bool] = lambda: False,
        traces: Traces | None = None,
    ) -> None:
        """Take what is in it.

        Args:
            app: the routes.
            keys: of those who may call.
            limits: of what a call may take.
            metrics: are told of refused calls.
            draining: tells whether the server is about to end, and takes no new calls.
            traces: are told of calls that ask for something, which are POSTs; None: of none.
        """
        self._app, self._keys, self._limits, self._metrics = app, keys, limits, metrics
        self._draining, self._traces = draining, traces
        self._calls: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one call."""
        if scope["type"] != "http":
            raise CallError(f"a connection of type {scope['type']}; this server speaks HTTP alone")
        headers, began = Headers(scope=scope), time.monotonic()
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(16)
        notes: dict[str, Any] = {}
        progress: list[Progress] = []
        scope[NOTES], scope[PROGRESS] = notes, progress
        scope[CALL_ID] = secrets.token_hex(12)
        status = 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id.encode())]}
            async with asyncio.timeout(self._limits.write_seconds):
                await send(message)

        key: str | None = None
        try:
            if scope["path"] not in PUBLIC and self._keys:
                key = notes["key"] = self._key(headers)
                self._calls[key] += 1
            body = await self._admitted(scope, headers, receive, key)
            await self._app(scope, _again(body, receive), sending)
        except Olmo2ExportError as error:
            await problem_response(problem_of(error), scope["path"])(scope, receive, sending)
        except TimeoutError:  # the client takes nothing
            notes |= {"error": "the client took nothing for too long", "error_code": "client_stalled"}
            raise
        finally:
            if key is not None:
                self._calls[key] -= 1
            if status in (400, 401, 404, 408, 413, 422, 429, 503):
                self._metrics.rejected(status)
            if scope["path"] not in PUBLIC:
                method, path, ended = scope["method"], scope["path"], time.monotonic()
                call = EndedCall(request_id, method, _route(scope), status, began, ended, notes, progress)
                trace = {} if self._traces is None or method != "POST" else self._traces.called(headers, call)
                line = {"request_id": request_id, **trace, "method": method, "path": path, "status": status}
                logger.info("call", extra={"fields": {**line, "seconds": round(ended - began, 6), **notes}})

    def _key(self, headers: Headers) -> str:
        given = headers.get("authorization") or f"Bearer {headers.get('x-api-key', '')}"  # the latter is Anthropic's
        name = self._keys.name_of(given)
        if name is None:
            raise CallError("a key is needed: Authorization: Bearer KEY", status=401, code="invalid_api_key")
        return name

    async def _admitted(self, scope: Scope, headers: Headers, receive: Receive, key: str | None) -> bytes:
        """Refuse what may not come in; return the body.

        Raises:
            CallError, BusyError: it is refused.
        """
        if scope["method"] != "POST":
            return b""
        if self._draining():
            raise NotReadyError("the server is about to end; try again later")
        calls = self._limits.calls_per_key
        if key is not None and calls is not None and self._calls[key] > calls:
            raise BusyError(f"{calls} calls with this key are not answered yet, no more are taken; try again later")
        most = self._limits.body_bytes
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > most:
            raise CallError(f"body: {length} bytes, at most {most} are taken", status=413)
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                return await _read(receive, most)
        except TimeoutError as error:
            raise CallError(f"body: not there after {self._limits.body_seconds:g} s", status=408) from error


def _route(scope: Scope) -> str | None:
    """Return the path of a call that found a route; the routes of POSTs have no parameters."""
    return scope["path"] if "endpoint" in scope and not scope.get("path_params") else None


async def _read(receive: Receive, most: int) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise CallError("body: the client went away", status=400)
        body += message.get("body", b"")
        if len(body) > most:
            raise CallError(f"body: more than {most} bytes, which are taken at most", status=413)
        if not message.get("more_body", False):
            return bytes(body)


def _again(body: bytes, receive: Receive) -> Receive:
    """Return what gives a body that was read, and then what else there is."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


class JsonLines(logging.Formatter):
    """A line of JSON for each record: what a client sent can break no line and steer no terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line)
