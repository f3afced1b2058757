"""The server: an engine's process, the routes, a socket, and how it ends.

On SIGTERM and SIGINT it takes no more calls, answers those that it has, and ends; on the second it ends at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import signal
import socket
import ssl
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import uvicorn

from runtimes import open_package
from runtimes.errors import BackendError, UsageError
from runtimes.serve.about import About
from runtimes.serve.app import Routes
from runtimes.serve.edge import Edge, EdgeLimits, JsonLines
from runtimes.serve.engine import Tick
from runtimes.serve.keys import Keys
from runtimes.serve.metrics import PREFIX, Metrics
from runtimes.serve.model import ServedModel, served_model
from runtimes.serve.options import EngineOptions
from runtimes.serve.protocol import LimitedProtocol
from runtimes.serve.supervisor import Supervisor
from runtimes.serve.texts import Patience
from runtimes.serve.worker import OpenEngine, open_engine

if TYPE_CHECKING:
    from runtimes.serve.tracing import Traces

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerOptions:
    """How a server is reached, and what it takes."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0: any that is free"""
    keys: Keys = field(default_factory=Keys)
    queue: int = 64
    """requests that may wait"""
    drain_seconds: float = 30.0
    """that calls may go on when the server is told to end"""
    metrics_prefix: str = PREFIX
    certificate: Path | None = None
    """PEM, with the chain; None: no TLS"""
    private_key: Path | None = None
    """PEM; None: it is in the certificate's file"""
    page: bool = True
    """there is a page at /"""
    limits: EdgeLimits = field(default_factory=EdgeLimits)
    patience: Patience = field(default_factory=Patience)
    traces_endpoint: str | None = None
    """URL to which OpenTelemetry's traces are sent, by OTLP over HTTP; None: there are none"""


def check_reach(options: ServerOptions) -> None:
    """Refuse a server that everybody could use.

    Raises:
        UsageError: the address is not of this machine alone, and there are no keys.
    """
    try:
        local = ipaddress.ip_address(options.host).is_loopback
    except ValueError:
        local = options.host == "localhost"
    if not local and not options.keys:
        raise UsageError(
            f"--host {options.host}: others reach it, and there are no keys; give --api-keys-file, or leave it out"
        )


def check_certificate(options: ServerOptions) -> None:
    """Refuse files that TLS could not use.

    Raises:
        UsageError: they are no certificate and its key.
    """
    if options.certificate is None:
        if options.private_key is not None:
            raise UsageError(f"--tls-key {options.private_key}: of no certificate; give --tls-certificate too")
        return
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(options.certificate, options.private_key)
    except OSError as error:  # ssl.SSLError is one
        raise UsageError(
            f"--tls-certificate {options.certificate}: not a certificate with its key, in PEM ({error})"
        ) from error


def check_traces(options: ServerOptions) -> None:
    """Refuse what traces could not be sent to.

    Raises:
        UsageError: it is no URL, or has a password, which the log would show.
    """
    if options.traces_endpoint is None:
        return
    try:
        url = urlsplit(options.traces_endpoint)
        usable = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:  # a port that is none
        usable = False
    if not usable:
        raise UsageError(
            f"--otlp-traces-endpoint {options.traces_endpoint}: expected a URL such as http://localhost:4318/v1/traces"
        )
    if "@" in url.netloc:
        raise UsageError("--otlp-traces-endpoint: has a user or a password; use OTEL_EXPORTER_OTLP_TRACES_HEADERS")


class _Server(uvicorn.Server):
    """uvicorn's server without its own handling of signals, which ends by raising them again."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave them to whoever runs it."""
        yield


class Serving:
    """A server that runs."""

    def __init__(
        self,
        model: ServedModel,
        opened: OpenEngine,
        options: ServerOptions,
        about: About | None = None,
        traces: Traces | None = None,
    ) -> None:
        """Bind the address; start nothing.

        Args:
            model: the texts of the package.
            opened: opens the engine, in its process.
            options: how it is reached.
            about: the package, for people.
            traces: are told of calls.

        Raises:
            UsageError: the address is taken, or none.
        """
        self._options = options
        self._metrics = Metrics(model.name, options.metrics_prefix)
        self.supervisor = Supervisor(
            opened, queue=options.queue, on_tick=self._ticked, on_restart=self._metrics.restarted
        )
        self._draining = False
        self._ends = 0
        desk = self.supervisor.desk
        routes = Routes(
            model,
            desk,
            self._metrics,
            about=about,
            page=options.page,
            patience=options.patience,
            ready=self._ready,
        )
        edge = Edge(
            routes.app(),
            keys=options.keys,
            limits=options.limits,
            metrics=self._metrics,
            draining=lambda: self._draining,
            traces=traces,
        )
        self._socket = _bound(options.host, options.port)
        config = uvicorn.Config(
            edge,
            http=LimitedProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=5,
            ssl_certfile=options.certificate,
            ssl_keyfile=options.private_key,
        )
        self._server = _Server(config)

    @property
    def url(self) -> str:
        """Where it is reached."""
        host, port = self._socket.getsockname()[:2]
        scheme = "http" if self._options.certificate is None else "https"
        return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"

    async def run(self, on_ready: Callable[[str], object] = lambda _: None) -> None:
        """Serve until a signal says to end.

        Args:
            on_ready: called with the address once calls are taken.

        Raises:
            Olmo2ExportError: the engine cannot be started.
        """
        loop = asyncio.get_running_loop()
        with _on_signals(lambda: loop.call_soon_threadsafe(self.end)):
            listening = asyncio.create_task(self._server.serve(sockets=[self._socket]))
            try:
                await self._start()
                if not self._draining:
                    on_ready(self.url)
                await self._ended()
            finally:
                self._server.should_exit = True
                await self.supervisor.close()
                await listening

    def end(self) -> None:
        """Take no more calls, and end when those are answered that there are; at once if it is said again."""
        self._ends += 1
        self._draining = True

    async def _start(self) -> None:
        """Start the engine; give it up where the server is told to end meanwhile."""
        starting = asyncio.create_task(self.supervisor.start())
        while not starting.done() and not self._draining:
            await asyncio.wait([starting], timeout=0.1)
        if starting.done():
            await starting
        else:
            starting.cancel()

    async def _ended(self) -> None:
        while not self._draining:
            await asyncio.sleep(0.05)
        logger.info("ending", extra={"fields": {"requests": self.supervisor.desk.outstanding}})
        loop = asyncio.get_running_loop()
        until = loop.time() + self._options.drain_seconds
        while self._busy() and self._ends < 2 and loop.time() < until:
            await asyncio.sleep(0.05)

    def _busy(self) -> bool:
        """Whether an answer is being made, or what was made of one is not written yet."""
        return self.supervisor.desk.outstanding > 0 or bool(self._server.server_state.tasks)

    def _ready(self) -> bool:
        return self.supervisor.desk.open and not self._draining

    def _ticked(self, tick: Tick) -> None:
        capacity = self.supervisor.desk.capacity
        assert capacity is not None  # it ticks
        self._metrics.ticked(tick, capacity.kv_tokens)


def serve(
    engine: EngineOptions, options: ServerOptions, *, name: str | None = None, on_ready: Callable[[str], object]
) -> None:
    """Serve a package until a signal says to end.

    Args:
        engine: which package, and how it is opened.
        options: how it is reached.
        name: of the model; None: that of the package's folder.
        on_ready: called with the address once calls are taken.

    Raises:
        UsageError: an address that everybody reaches and no keys, or one that is taken.
        BackendError: traces are wanted, and OpenTelemetry is not installed.
        Olmo2ExportError: the package cannot be opened.
    """
    check_reach(options)
    check_certificate(options)
    check_traces(options)
    package = open_package(engine.package)
    named = name or package.folder.resolve().name
    if package.manifest.adapters and named in package.manifest.adapters:
        raise UsageError(f"--name {named}: a LoRA adapter of the package is called so; give another")
    try:
        model = served_model(package, named, check_hashes=engine.check_hashes)
    except BackendError as error:
        raise BackendError(f"the package has a chat template: {error}") from error
    if not engine.exact:
        model = replace(model, adapters=tuple(package.manifest.adapters))
    opened = partial(open_engine, engine)
    try:
        with _traces(options.traces_endpoint) as traces:
            asyncio.run(Serving(model, opened, options, About(package), traces).run(on_ready))
    finally:
        if model.chat is not None:
            model.chat.template.close()


@contextlib.contextmanager
def _traces(endpoint: str | None) -> Iterator[Traces | None]:
    """Give what is told of calls, and send what it has at the end."""
    if endpoint is None:
        yield None
        return
    try:
        from runtimes.serve.collector import Collector
        from runtimes.serve.tracing import Traces
    except ImportError as error:
        raise BackendError(
            "--otlp-traces-endpoint needs OpenTelemetry's SDK and its OTLP exporter; pip install 'olmo2-export[otel]'"
        ) from error
    with Collector(endpoint) as collector:
        yield Traces(collector.provider)


def log_as_json() -> None:
    """Write all records to stderr, a line of JSON each."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)


@contextlib.contextmanager
def _on_signals(end: Callable[[], object]) -> Iterator[None]:
    def on_signal(_number: int, _frame: FrameType | None) -> None:
        end()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _bound(host: str, port: int) -> socket.socket:
    if not 0 <= port < 1 << 16:
        raise UsageError(f"--port {port}: expected 0 to 65535")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        made = socket.socket(family)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address)
        except BaseException:
            made.close()
            raise
    except OSError as error:
        raise UsageError(f"{host}:{port}: no address to listen on ({error}); give another --host or --port") from error
    return made
