"""What a server tells Prometheus, under the names that vLLM's dashboards know."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from runtimes.serve.engine import Tick
from runtimes.serve.requests import FailureKind

PREFIX, VLLM_PREFIX = "olmo2_", "vllm:"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0)
_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """The families, of one server. Counters end in `_total`."""

    def __init__(self, model: str, prefix: str = PREFIX) -> None:
        """Begin at zero.

        Args:
            model: the label `model_name` of all.
            prefix: of the names.
        """
        self._registry = CollectorRegistry()
        self._labels = {"model_name": model}

        def gauge(name: str, words: str) -> Gauge:
            return Gauge(prefix + name, words, ["model_name"], registry=self._registry).labels(**self._labels)

        def counter(name: str, words: str) -> Counter:
            return Counter(prefix + name, words, ["model_name"], registry=self._registry).labels(**self._labels)

        def histogram(name: str, words: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
            made = Histogram(prefix + name, words, ["model_name"], registry=self._registry, buckets=buckets)
            return made.labels(**self._labels)

        def labelled(name: str, words: str, label: str) -> Counter:
            return Counter(prefix + name, words, ["model_name", label], registry=self._registry)

        self._running = gauge("num_requests_running", "Answers that are being made")
        self._waiting = gauge("num_requests_waiting", "Requests that are not begun")
        self._usage = gauge("kv_cache_usage_perc", "Share of the KV cache that is spoken for, 1 is all")
        self._queries = counter("prefix_cache_queries", "Tokens of prompts that were looked for in the cache")
        self._hits = counter("prefix_cache_hits", "Tokens of prompts that were found there")
        self._prompt_tokens = counter("prompt_tokens", "Tokens of prompts")
        self._new_tokens = counter("generation_tokens", "Tokens of answers")
        self._first_token = histogram("time_to_first_token_seconds", "From a request to its first token")
        self._between = histogram("inter_token_latency_seconds", "From a token to the next")
        self._whole = histogram("e2e_request_latency_seconds", "From a request to its last token")
        self._queued = histogram("request_queue_time_seconds", "From a request until it is begun")
        self._iteration = histogram("iteration_tokens_total", "Tokens that a tick computes", _TOKENS)
        self._success = labelled("request_success", "Answers that ended", "finished_reason")
        self._rejected = labelled("requests_rejected", "Calls that were refused", "status")
        self._cancelled = counter("requests_cancelled", "Calls whose client went away")
        self._restarts = counter("engine_restarts", "Ends of the engine's process")
        self._broken = counter("nan_events", "Answers whose numbers broke down")

    def text(self) -> bytes:
        """Return them in Prometheus' form."""
        return generate_latest(self._registry)

    def ticked(self, tick: Tick, kv_tokens: int) -> None:
        """Take note of a tick; `kv_tokens`: what the engine holds at most."""
        self._running.set(tick.running)
        self._usage.set(tick.kv_tokens / kv_tokens)
        if tick.stepped + tick.prompted:
            self._iteration.observe(tick.stepped + tick.prompted)

    def waiting(self, count: int) -> None:
        """Take note of how many requests are not begun."""
        self._waiting.set(count)

    def started(self, seconds: float, prompt_tokens: int, reused: int) -> None:
        """Take note of a request that is begun."""
        self._queued.observe(seconds)
        self._prompt_tokens.inc(prompt_tokens)
        self._queries.inc(prompt_tokens)
        self._hits.inc(reused)

    def first_token(self, seconds: float) -> None:
        """Take note of an answer's first token."""
        self._first_token.observe(seconds)
        self._new_tokens.inc()

    def token(self, seconds: float) -> None:
        """Take note of another token, so long after the one before."""
        self._between.observe(seconds)
        self._new_tokens.inc()

    def ended(self, reason: str, seconds: float) -> None:
        """Take note of an answer's end."""
        self._success.labels(**self._labels, finished_reason=reason).inc()
        self._whole.observe(seconds)

    def failed(self, kind: FailureKind) -> None:
        """Take note of a request that failed."""
        if kind == "numeric":
            self._broken.inc()

    def rejected(self, status: int) -> None:
        """Take note of a call that was refused."""
        self._rejected.labels(**self._labels, status=str(status)).inc()

    def cancelled(self) -> None:
        """Take note of a call that was given up."""
        self._cancelled.inc()

    def restarted(self) -> None:
        """Take note of an engine's end."""
        self._restarts.inc()
