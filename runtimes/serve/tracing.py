"""Traces of calls, for OpenTelemetry: a span for each call, and below it one for each thing that it waited for.

    chat olmo        the call, in the trace that the client's `traceparent` names, or in one of its own
    ├── queue        a request, until it is begun
    ├── prefill      its prompt, until the first token; or whole texts, until they are measured
    └── decode       its answers, until the last token

Spans are made when a call has been answered, of times that were noted in any case. What they say are names, numbers
and choices among a few words, and never a text of a client's or of the model's.

Source: OpenTelemetry's semantic conventions 1.44, of HTTP and of generative AI; `gen_ai.latency.*` and
`gen_ai.request.id` are vLLM's, https://github.com/vllm-project/vllm/blob/main/vllm/tracing.py
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from opentelemetry.context import Context
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import SpanKind, StatusCode, format_span_id, format_trace_id, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from runtimes.serve.progress import EndedCall, Progress
from runtimes.serve.requests import Request

Attributes: TypeAlias = dict[str, str | bool | int | float | Sequence[str]]

_OPERATIONS = {
    "/v1/completions": "text_completion",
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/v1/embeddings": "embeddings",
    "/v1/score": "score",  # of this and the next, the conventions say nothing
    "/v1/rerank": "rerank",
}
_PROPAGATOR = TraceContextTextMapPropagator()


class _Phase(NamedTuple):
    """What a request waited for; seconds of its clock."""

    name: str
    began: float
    ended: float
    attributes: Attributes


class Traces:
    """Makes the spans of calls."""

    def __init__(self, provider: TracerProvider) -> None:
        """Take what the spans are given to; whoever has it shuts it down."""
        self._tracer = provider.get_tracer("runtimes.serve")

    def called(self, headers: Mapping[str, str], call: EndedCall) -> dict[str, str]:
        """Make the spans of a call.

        Args:
            headers: of the call.
            call: that has ended.

        Returns:
            `trace_id` and `span_id`, in hexadecimal, for the log.
        """
        carrier = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        parent = _PROPAGATOR.extract(carrier, Context())
        epoch = time.time() - time.monotonic()

        def nanoseconds(seconds: float) -> int:
            return round((epoch + seconds) * 1e9)

        operation, model = _OPERATIONS.get(call.route or ""), call.notes.get("model")
        name = f"{operation} {model}" if operation and model else " ".join(filter(None, (call.method, call.route)))
        span = self._tracer.start_span(
            name, parent, SpanKind.SERVER, _of_call(call, operation), start_time=nanoseconds(call.began)
        )
        if span.is_recording():
            below = set_span_in_context(span, Context())
            for number, request in enumerate(call.progress):
                place: Attributes = {"olmo2.prompt_index": number} if len(call.progress) > 1 else {}
                for phase in _phases(request, call.ended):
                    began, ended = nanoseconds(phase.began), nanoseconds(phase.ended)
                    child = self._tracer.start_span(
                        phase.name, below, attributes={**place, **phase.attributes}, start_time=began
                    )
                    child.end(ended)
            if call.status >= 500 or "error" in call.notes:
                span.set_status(StatusCode.ERROR)
                span.set_attribute("error.type", str(call.notes.get("error_code", call.status)))
        span.end(nanoseconds(call.ended))
        context = span.get_span_context()
        return {"trace_id": format_trace_id(context.trace_id), "span_id": format_span_id(context.span_id)}


def _of_call(call: EndedCall, operation: str | None) -> Attributes:
    found: Attributes = {
        "http.request.method": call.method,
        "gen_ai.request.id": call.request_id,
    }
    if call.route is not None:  # else it is any text of a client
        found |= {"http.route": call.route, "url.path": call.route}
    if call.status:
        found["http.response.status_code"] = call.status
    if operation is not None:
        found |= {"gen_ai.operation.name": operation, "gen_ai.provider.name": "olmo2-export"}
    if "model" in call.notes:
        found |= {"gen_ai.request.model": call.notes["model"], "gen_ai.response.model": call.notes["model"]}
    if "stream" in call.notes:
        found["gen_ai.request.stream"] = call.notes["stream"]
    if call.progress:
        found |= _of_requests(call.progress)
        found |= _latencies(call)
    return found


def _of_requests(progress: Sequence[Progress]) -> Attributes:
    """Return what was asked for, which is the same of all requests of a call, and how many tokens that was."""
    found: Attributes = {"gen_ai.usage.input_tokens": sum(one.prompt_tokens for one in progress)}
    request = progress[0].request
    if not isinstance(request, Request):
        return found
    found |= {
        "gen_ai.usage.output_tokens": sum(one.new_tokens for one in progress),
        "gen_ai.usage.cache_read.input_tokens": sum(one.reused_tokens for one in progress),
        "gen_ai.response.finish_reasons": [reason for one in progress for reason in one.reasons],
        "gen_ai.request.choice.count": request.choices,
        "gen_ai.request.max_tokens": request.max_new_tokens,
        "gen_ai.request.temperature": request.temperature,
        "gen_ai.request.top_p": request.top_p,
        "gen_ai.request.presence_penalty": request.presence_penalty,
        "gen_ai.request.frequency_penalty": request.frequency_penalty,
    }
    if request.top_k:
        found["gen_ai.request.top_k"] = request.top_k
    if request.seed is not None:
        found["gen_ai.request.seed"] = request.seed
    return found


def _latencies(call: EndedCall) -> Attributes:
    """Return the times of a call in seconds; of several requests, until the first of them and until the last."""
    found: Attributes = {"gen_ai.latency.e2e": call.ended - call.began}
    submitted, started, first = (
        min((at for one in call.progress if (at := getattr(one, name)) is not None), default=None)
        for name in ("submitted", "started", "first")
    )
    last = max((one.last for one in call.progress if one.last is not None), default=None)
    if submitted is None or started is None:
        return found
    found["gen_ai.latency.time_in_queue"] = started - submitted
    if last is not None:
        found["gen_ai.latency.time_in_model_inference"] = last - started
    if first is not None and last is not None:
        found |= {
            "gen_ai.latency.time_to_first_token": first - submitted,
            "gen_ai.latency.time_in_model_prefill": first - started,
            "gen_ai.latency.time_in_model_decode": last - first,
        }
    return found


def _phases(one: Progress, call_ended: float) -> Iterator[_Phase]:
    """Yield what a request waited for; what did not come to its end ends with the call."""
    if one.submitted is None:
        return
    yield _Phase("queue", one.submitted, call_ended if one.started is None else one.started, {})
    if one.started is None:
        return
    ended = one.last if one.ended and one.last is not None else call_ended
    prompt: Attributes = {"olmo2.prompt_tokens": one.prompt_tokens, "olmo2.cached_tokens": one.reused_tokens}
    yield _Phase("prefill", one.started, ended if one.first is None else one.first, prompt)
    if one.first is not None:
        yield _Phase("decode", one.first, ended, {"olmo2.completion_tokens": one.new_tokens})
