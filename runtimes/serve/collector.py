"""Where traces go: to a collector, by OTLP over HTTP, from a thread and a queue of OpenTelemetry's.

The queue is bounded: with a collector that is away or slow, spans are lost and calls go on as ever. The log says so
once, and once more when the collector is back, where OpenTelemetry itself would say it each time.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from runtimes.errors import UsageError
from runtimes.serve.about import own_version

logger = logging.getLogger(__name__)

_PATH = "/v1/traces"
_CLOSE_SECONDS = 3.0
_LIBRARY = logging.getLogger("opentelemetry")
_QUEUE = "opentelemetry.sdk._shared_internal"
"""logs that the queue is full"""


def traces_url(endpoint: str) -> str:
    """Return where spans are posted: the endpoint, with OTLP's own path where it has none."""
    url = urlsplit(endpoint)
    return url._replace(path=_PATH).geturl() if url.path in ("", "/") else endpoint


class _Told(SpanExporter):
    """An exporter around another that logs when spans begin to be lost, and when they no longer are."""

    def __init__(self, inner: SpanExporter, url: str) -> None:
        self._inner, self._url = inner, url
        self._lost = 0
        self._said_full = False
        self.reason = ""
        """the first thing that the library said since spans were taken"""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send spans; waits."""
        result = self._inner.export(spans)
        if result is SpanExportResult.SUCCESS:
            if self._lost:
                self._say(logging.INFO, "traces: the collector takes them again", lost_spans=self._lost)
            self._lost, self.reason = 0, ""
            return result
        if not self._lost:
            self._say(logging.WARNING, "traces: the collector does not take them, they are lost", reason=self.reason)
        self._lost += len(spans)
        return result

    def full(self) -> None:
        """Take note that spans are lost since too many wait."""
        if not self._said_full and not self._lost:
            self._said_full = True
            self._say(logging.WARNING, "traces: the collector is too slow for all of them, some are lost")

    def shutdown(self) -> None:
        """Send no more."""
        self._inner.shutdown()

    def _say(self, level: int, message: str, **fields: Any) -> None:
        logger.log(level, message, extra={"fields": {"url": self._url, **fields}})


class _Heard(logging.Handler):
    """Takes what OpenTelemetry logs, so that each trouble is said once; what is of another kind goes on to the log."""

    def __init__(self, told: _Told) -> None:
        super().__init__(logging.WARNING)
        self._told = told

    def emit(self, record: logging.LogRecord) -> None:
        """Keep why an export failed, and take note that the queue is full."""
        if record.name.startswith("opentelemetry.exporter."):
            self._told.reason = self._told.reason or record.getMessage()
        elif record.name.startswith(_QUEUE) and record.levelno == logging.WARNING:
            self._told.full()
        else:
            logging.getLogger().handle(record)


class Collector:
    """A collector of traces, while it is entered; `provider` makes spans that go there.

    OpenTelemetry's own variables say the rest: headers, certificates, the sampler, names of the service.
    """

    def __init__(self, endpoint: str, *, delay_seconds: float | None = None) -> None:
        """Connect to nothing yet.

        Args:
            endpoint: its URL; see `traces_url`.
            delay_seconds: between two batches; None: as OpenTelemetry has it, 5.

        Raises:
            UsageError: a variable of OpenTelemetry's is not what it must be.
        """
        url = traces_url(endpoint)
        delay = None if delay_seconds is None else delay_seconds * 1000
        try:
            told = _Told(OTLPSpanExporter(url), url)
            queue = BatchSpanProcessor(told, schedule_delay_millis=delay)
        except ValueError as error:
            raise UsageError(f"a variable of OpenTelemetry's, OTEL_...: {error}; change it, or unset it") from error
        named = Resource({"service.name": "olmo2-run", "service.version": own_version()})
        self.provider = TracerProvider(resource=named.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
        self.provider.add_span_processor(queue)
        self._told, self._heard = told, _Heard(told)

    def __enter__(self) -> Collector:
        """Take over what OpenTelemetry logs."""
        _LIBRARY.addHandler(self._heard)
        self._propagated, _LIBRARY.propagate = _LIBRARY.propagate, False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Send what there is, for some seconds at most."""
        ending = threading.Thread(target=self.provider.shutdown, name="traces-end", daemon=True)
        ending.start()
        ending.join(_CLOSE_SECONDS)
        if ending.is_alive():
            self._told.full()
            self._told.shutdown()  # it tries no more
        _LIBRARY.removeHandler(self._heard)
        _LIBRARY.propagate = self._propagated
