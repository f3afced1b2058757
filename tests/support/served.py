"""A server on sockets with an engine that says what it is told to say, and clients of it."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
from support.chat import EOS, IM_END, template_folder
from support.serving import InlineEngine, listening

from runtimes.chat.template import ChatTemplate
from runtimes.serve.app import Routes
from runtimes.serve.edge import Edge, EdgeLimits
from runtimes.serve.keys import Keys
from runtimes.serve.metrics import Metrics
from runtimes.serve.model import Chat, ServedModel
from runtimes.serve.protocol import LimitedProtocol
from runtimes.serve.texts import Patience
from runtimes.serve.tracing import Traces
from runtimes.text.tokenizer import Tokenizer


@dataclass
class Served:
    """A server, and what is behind it."""

    port: int
    engine: InlineEngine
    model: ServedModel
    metrics: Metrics
    client: openai.OpenAI

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, dict[str, Any], dict[str, str]]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.call("POST", path, data, **headers)

    def refused(self, path: str, **body: Any) -> tuple[int, str, str | None]:
        """Send what the server is to refuse; the status, what it says, and the field that it is about."""
        status, found, _ = self.post(path, {"model": self.model.name, **body})
        return status, found["error"]["message"], found["error"]["param"]

    def call(
        self, method: str, path: str, data: bytes = b"", **headers: str
    ) -> tuple[int, dict[str, Any], dict[str, str]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        with contextlib.closing(connection):
            connection.request(method, path, data, {n.replace("_", "-"): v for n, v in headers.items()})
            response = connection.getresponse()
            found = response.read()
            names = {name.lower(): value for name, value in response.getheaders()}
            return response.status, json.loads(found) if "json" in names.get("content-type", "") else {}, names

    def raw(self, method: str, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
        """Send a call without a body; the status, the headers and the body of what comes back."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        with contextlib.closing(connection):
            connection.request(method, path, headers={n.replace("_", "-"): v for n, v in headers.items()})
            response = connection.getresponse()
            names = {name.lower(): value for name, value in response.getheaders()}
            return response.status, names, response.read()

    def raw_post(self, path: str, body: dict[str, Any]) -> bytes:
        """Send a call; the body of what comes back, be it a stream."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        with contextlib.closing(connection):
            connection.request("POST", path, json.dumps(body).encode())
            return connection.getresponse().read()

    def send(self, data: bytes) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        connection.sendall(data)
        return connection

    def stream(self, path: str, body: dict[str, Any]) -> socket.socket:
        """Send a call whose answer is a stream, and read until its first event."""
        data = json.dumps({**body, "stream": True}).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n".encode()
        connection = self.send(head + data)
        assert b"data: " in read_until(connection, b"data: ")
        return connection


def read_until(connection: socket.socket, mark: bytes = b"") -> bytes:
    """What comes until a mark, or the end."""
    found = b""
    while not mark or mark not in found:
        more = connection.recv(65536)
        if not more:
            return found
        found += more
    return found


@contextlib.contextmanager
def chat_model(folder: Path, template: str = "olmo3_instruct") -> Iterator[ServedModel]:
    """A model with AI2's tokenizer and a chat template of the tests, written into a folder."""
    tokenizer = Tokenizer.from_folder(template_folder(folder, template, model_type="olmo3", eos=[EOS, IM_END]))
    with ChatTemplate.from_folder(folder) as found:
        yield ServedModel("olmo", "c0ffee" * 10, tokenizer, Chat.of(found, tokenizer), adapters=("first",))


@contextlib.contextmanager
def serving(
    model: ServedModel,
    *,
    keys: Keys | None = None,
    limits: EdgeLimits | None = None,
    patience: Patience | None = None,
    about: Any = None,
    page: bool = True,
    draining: Callable[[], bool] = lambda: False,
    traces: Traces | None = None,
    **options: Any,
) -> Iterator[Served]:
    """A server of an engine without a model, whose answers end as those of Olmo 3 do."""
    engine = InlineEngine(
        model.tokenizer, ends=IM_END, hidden_states=model.hidden_states, labels=model.labels, **options
    )
    metrics = Metrics(model.name)
    routes = Routes(model, engine.desk, metrics, about=about, page=page, patience=patience)
    edge = Edge(
        routes.app(),
        keys=keys or Keys(),
        limits=limits or EdgeLimits(),
        metrics=metrics,
        draining=draining,
        traces=traces,
    )
    with listening(edge, LimitedProtocol) as port:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="a key", max_retries=0, timeout=20)
        with client:
            yield Served(port, engine, model, metrics, client)
