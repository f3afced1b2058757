"""A collector of OpenTelemetry's traces on loopback, by OTLP over HTTP; it may refuse, or let wait."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


class Collecting:
    """What came to a collector."""

    def __init__(self, port: int = 0) -> None:
        self.paths: list[str] = []
        self.spans: list[Any] = []
        self.resources: list[dict[str, str]] = []
        self.status = 200
        self.open = threading.Event()
        """nothing is answered until it is set"""
        self.open.set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                outer.open.wait(20)
                if outer.status == 200:
                    for found in ExportTraceServiceRequest.FromString(body).resource_spans:
                        outer.resources.append({a.key: a.value.string_value for a in found.resource.attributes})
                        outer.spans += [span for scope in found.scope_spans for span in scope.spans]
                outer.paths.append(self.path)
                try:
                    self.send_response(outer.status)
                    self.send_header("content-length", "0")
                    self.end_headers()
                except OSError:
                    pass

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.port: int = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"


@contextmanager
def collecting(port: int = 0) -> Iterator[Collecting]:
    """Collect what is sent to a port; 0: any that is free."""
    found = Collecting(port)
    thread = threading.Thread(target=found.server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield found
    finally:
        found.open.set()
        found.server.shutdown()
        thread.join()
        found.server.server_close()
