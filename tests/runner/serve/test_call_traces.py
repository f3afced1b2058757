"""OpenTelemetry's traces of calls: what the spans say, and what becomes of them when the collector takes none."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from support.collector import collecting
from support.served import Served, chat_model, serving
from support.serving import until

from runtimes.errors import UsageError
from runtimes.serve import collector as collector_module
from runtimes.serve.collector import Collector, traces_url
from runtimes.serve.edge import JsonLines
from runtimes.serve.keys import read_keys
from runtimes.serve.model import ServedModel
from runtimes.serve.tracing import Traces

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
HEADER = f"00-{TRACE}-{PARENT}-01"
SECRET = "a secret prompt"


@dataclass
class Traced:
    """A server, and the spans of its calls."""

    served: Served
    exporter: InMemorySpanExporter

    def spans(self) -> list[ReadableSpan]:
        """Those of the calls so far; a call's are made behind its answer."""
        until(lambda: any(span.kind is SpanKind.SERVER for span in self.exporter.get_finished_spans()))
        found = list(self.exporter.get_finished_spans())
        self.exporter.clear()
        return found

    def call(self) -> ReadableSpan:
        """That of the only call."""
        (found,) = (span for span in self.spans() if span.kind is SpanKind.SERVER)
        return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedModel]:
    with chat_model(tmp_path_factory.mktemp("traces") / "olmo3") as found:
        yield found


def in_memory() -> tuple[Traces, InMemorySpanExporter]:
    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return Traces(provider), exporter


@pytest.fixture(scope="module")
def one(model: ServedModel) -> Iterator[Traced]:
    traces, exporter = in_memory()
    with serving(model, traces=traces, max_slots=8) as served:
        yield Traced(served, exporter)


@pytest.fixture
def traced(one: Traced) -> Traced:
    until(lambda: not one.served.engine.busy)
    one.served.engine.script, one.served.engine.tick_seconds = "Hello there.", 0.0
    one.served.engine.runner.broken = set()
    one.exporter.clear()
    return one


def completion(prompt: Any = SECRET, **more: Any) -> dict[str, Any]:
    return {"model": "olmo", "prompt": prompt, **more}


def chat(**more: Any) -> dict[str, Any]:
    return {"model": "olmo", "messages": [{"role": "user", "content": SECRET}], **more}


def lines_of(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [json.loads(JsonLines().format(r)) for r in caplog.records if r.name == "runtimes.serve.calls"]


# What spans say


def test_a_call_is_a_span_of_the_clients_trace_with_what_it_waited_for_below_it(
    traced: Traced, caplog: pytest.LogCaptureFixture
) -> None:
    body = chat(max_tokens=40, temperature=0.5, top_p=0.9, top_k=7, seed=3, stop=["a stop"], n=1)
    with caplog.at_level(logging.INFO, logger="runtimes.serve.calls"):
        status, found, _ = traced.served.post("/v1/chat/completions", body, traceparent=HEADER, x_request_id="abc-1")
        queue, prefill, decode, call = traced.spans()
        until(lambda: len(lines_of(caplog)) == 1)
    assert (status, found["choices"][0]["message"]["content"]) == (200, "Hello there.")
    assert [span.name for span in (queue, prefill, decode, call)] == ["queue", "prefill", "decode", "chat olmo"]
    assert call.context is not None
    assert call.parent is not None
    assert (f"{call.context.trace_id:032x}", f"{call.parent.span_id:016x}") == (TRACE, PARENT)
    assert (call.kind, call.status.status_code) == (SpanKind.SERVER, StatusCode.UNSET)
    for child in (queue, prefill, decode):
        assert child.parent is not None
        assert (child.parent.span_id, child.kind) == (call.context.span_id, SpanKind.INTERNAL)
    times = [call.start_time, queue.start_time, queue.end_time, prefill.end_time, decode.end_time, call.end_time]
    assert times == sorted(times, key=lambda at: at or 0)
    assert (prefill.start_time, decode.start_time) == (queue.end_time, prefill.end_time)

    usage = found["usage"]
    assert (prefill.attributes or {})["olmo2.prompt_tokens"] == usage["prompt_tokens"]
    assert (decode.attributes or {})["olmo2.completion_tokens"] == usage["completion_tokens"]
    said = dict(call.attributes or {})
    latencies = {name: said.pop(name) for name in list(said) if name.startswith("gen_ai.latency.")}
    assert said == {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "url.path": "/v1/chat/completions",
        "http.response.status_code": 200,
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "olmo2-export",
        "gen_ai.request.id": "abc-1",
        "gen_ai.request.model": "olmo",
        "gen_ai.response.model": "olmo",
        "gen_ai.request.stream": False,
        "gen_ai.request.choice.count": 1,
        "gen_ai.request.max_tokens": 40,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.top_k": 7,
        "gen_ai.request.seed": 3,
        "gen_ai.request.presence_penalty": 0.0,
        "gen_ai.request.frequency_penalty": 0.0,
        "gen_ai.response.finish_reasons": ("eos",),
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": usage["completion_tokens"],
        "gen_ai.usage.cache_read.input_tokens": 0,
    }
    assert {name.rpartition(".")[2]: pytest.approx(seconds, abs=1e-6) for name, seconds in latencies.items()} == {
        "e2e": seconds_of(call),
        "time_in_queue": seconds_of(queue),
        "time_to_first_token": seconds_of(queue) + seconds_of(prefill),
        "time_in_model_prefill": seconds_of(prefill),
        "time_in_model_decode": seconds_of(decode),
        "time_in_model_inference": seconds_of(prefill) + seconds_of(decode),
    }
    everything = " ".join(span.to_json() for span in (queue, prefill, decode, call))
    assert not any(word in everything for word in ("secret", "Hello", "a stop"))
    (line,) = lines_of(caplog)
    assert (line["trace_id"], line["span_id"]) == (TRACE, f"{call.context.span_id:016x}")
    assert line["request_id"] == "abc-1"


def seconds_of(span: ReadableSpan) -> float:
    assert span.start_time is not None
    assert span.end_time is not None
    return (span.end_time - span.start_time) / 1e9


def test_several_prompts_have_spans_of_their_own(traced: Traced) -> None:
    body = completion(["One two three", "Four"], n=2, max_tokens=3)
    _, found, _ = traced.served.post("/v1/completions", body)
    *children, call = traced.spans()
    assert [(child.name, (child.attributes or {})["olmo2.prompt_index"]) for child in children] == [
        (name, number) for number in (0, 1) for name in ("queue", "prefill", "decode")
    ]
    said = call.attributes or {}
    assert (call.name, said["gen_ai.operation.name"]) == ("text_completion olmo", "text_completion")
    assert said["gen_ai.response.finish_reasons"] == ("length",) * 4
    assert said["gen_ai.usage.output_tokens"] == found["usage"]["completion_tokens"] == 12
    assert [(child.attributes or {}).get("olmo2.completion_tokens") for child in children] == [None, None, 6] * 2


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", chat(stream=True)),
        ("/v1/responses", {"model": "olmo", "input": SECRET, "stream": True}),
        ("/v1/messages", {**chat(stream=True), "max_tokens": 40}),
    ],
)
def test_streams_of_every_api_are_traced(traced: Traced, path: str, body: dict[str, Any]) -> None:
    assert traced.served.raw_post(path, body).count(b"data: ") > 3
    *children, call = traced.spans()
    assert [child.name for child in children] == ["queue", "prefill", "decode"]
    said = call.attributes or {}
    assert (call.name, said["http.route"], said["gen_ai.request.stream"]) == ("chat olmo", path, True)
    assert said["gen_ai.response.finish_reasons"] == ("eos",)


def test_texts_that_are_measured_are_traced(model: ServedModel) -> None:
    traces, exporter = in_memory()
    with serving(replace(model, hidden_states=(1,)), traces=traces) as served:
        traced = Traced(served, exporter)
        assert served.post("/v1/embeddings", {"model": "olmo", "input": ["a ship", "a tree"]})[0] == 200
        queue, prefill, call = traced.spans()
        assert (queue.name, prefill.name, call.name) == ("queue", "prefill", "embeddings olmo")
        said = call.attributes or {}
        assert said["gen_ai.usage.input_tokens"] == (prefill.attributes or {})["olmo2.prompt_tokens"] == 4
        assert said["gen_ai.latency.time_in_model_inference"] == pytest.approx(seconds_of(prefill), abs=1e-6)
        assert "gen_ai.usage.output_tokens" not in said


def test_what_is_refused_is_a_span_without_children_and_without_the_clients_words(
    traced: Traced, model: ServedModel, tmp_path: Path
) -> None:
    for path, body, status, name in (
        ("/v1/completions", {"model": "olmo", "prompt": "x", "secret": 1}, 400, "POST /v1/completions"),
        ("/v1/completions", {"model": "secret", "prompt": "x"}, 404, "POST /v1/completions"),
        ("/v1/secret", {}, 404, "POST"),
        ("/v1/models/secret", {}, 405, "POST"),
        ("/v1/completions", {"model": "olmo", "prompt": ["secret"] * 9}, 429, "text_completion olmo"),
    ):
        assert traced.served.post(path, body)[0] == status
        (call,) = traced.spans()
        assert (call.name, (call.attributes or {})["http.response.status_code"]) == (name, status)
        assert call.status.status_code is StatusCode.UNSET
        assert "secret" not in call.to_json()
    (tmp_path / "keys").write_text("a key\n")
    traces, exporter = in_memory()
    with serving(model, keys=read_keys(tmp_path / "keys"), traces=traces) as served:
        assert served.post("/secret", {})[0] == 401
        (call,) = Traced(served, exporter).spans()
        assert call.name == "POST"
        assert "secret" not in call.to_json()


def test_an_answer_that_breaks_off_is_an_error_by_its_code(traced: Traced) -> None:
    broken = traced.served.model.tokenizer.encode(" there", add_special_tokens=False)
    traced.served.engine.runner.broken = set(broken)
    for stream in (False, True):
        traced.served.raw_post("/v1/completions", completion(max_tokens=40, stream=stream))
        *_, call = traced.spans()
        assert call.status.status_code is StatusCode.ERROR
        assert (call.attributes or {})["error.type"] == ("broken_numbers" if stream else "500")


def test_a_client_that_goes_away_ends_its_spans(traced: Traced) -> None:
    traced.served.engine.script, traced.served.engine.tick_seconds = "word " * 200, 0.02
    connection = traced.served.stream("/v1/completions", completion(max_tokens=200))
    traced.served.engine.held = True
    try:
        assert traced.exporter.get_finished_spans() == ()
        connection.close()
        *_, decode, call = traced.spans()
    finally:
        traced.served.engine.held = False
    assert (decode.name, decode.end_time) == ("decode", call.end_time)
    assert (call.attributes or {})["gen_ai.response.finish_reasons"] == ()


def test_a_request_that_was_not_begun_has_a_queue_and_no_more(traced: Traced) -> None:
    traced.served.engine.held = True
    try:
        data = json.dumps(completion()).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n"
        connection = traced.served.send(head.encode() + data)
        until(lambda: traced.served.engine.desk.outstanding == 1)
        connection.close()
        queue, call = traced.spans()
    finally:
        traced.served.engine.held = False
    assert (queue.name, queue.end_time) == ("queue", call.end_time)
    assert "gen_ai.latency.time_in_queue" not in (call.attributes or {})


@pytest.mark.parametrize(
    ("header", "same", "exported"),
    [(f"00-{TRACE}-{PARENT}-00", True, False), ("00-nothing-like-it", False, True), (None, False, True)],
)
def test_the_clients_header_says_which_trace_and_whether_it_is_wanted(
    traced: Traced, caplog: pytest.LogCaptureFixture, header: str | None, same: bool, exported: bool
) -> None:
    with caplog.at_level(logging.INFO, logger="runtimes.serve.calls"):
        traced.served.post("/v1/completions", completion(), **({} if header is None else {"traceparent": header}))
        until(lambda: len(lines_of(caplog)) == 1)
    (line,) = lines_of(caplog)
    assert (line["trace_id"] == TRACE) == same
    assert int(line["trace_id"], 16)
    assert bool(traced.exporter.get_finished_spans()) == exported


def test_calls_that_ask_for_nothing_are_not_traced(traced: Traced, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="runtimes.serve.calls"):
        for path in ("/health", "/metrics", "/v1/models"):
            assert traced.served.raw("GET", path)[0] == 200
        assert traced.served.post("/tokenize", {"prompt": SECRET})[0] == 200
        assert traced.call().name == "POST /tokenize"
    assert all("trace_id" not in line for line in lines_of(caplog) if line["method"] == "GET")


# The collector


@pytest.mark.parametrize(
    ("endpoint", "url"),
    [
        ("http://c:4318", "http://c:4318/v1/traces"),
        ("http://c:4318/", "http://c:4318/v1/traces"),
        ("https://c/otlp/v1/traces", "https://c/otlp/v1/traces"),
    ],
)
def test_an_endpoint_without_a_path_gets_that_of_otlp(endpoint: str, url: str) -> None:
    assert traces_url(endpoint) == url


def test_a_collector_gets_the_spans_and_the_last_ones_at_the_end(
    model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=a-test")
    with collecting() as found:
        with (
            Collector(found.url, delay_seconds=600) as collector,
            serving(model, traces=Traces(collector.provider)) as served,
        ):
            for _ in range(3):
                assert served.post("/v1/completions", completion(max_tokens=2), traceparent=HEADER)[0] == 200
            assert found.spans == []  # they go in batches
        assert [span.name for span in found.spans] == ["queue", "prefill", "decode", "text_completion olmo"] * 3
        assert {span.trace_id.hex() for span in found.spans} == {TRACE}
        assert set(found.paths) == {"/v1/traces"}
        (resource,) = found.resources
        assert (resource["service.name"], resource["deployment.environment.name"]) == ("olmo2-run", "a-test")
    with collecting() as found:
        monkeypatch.setenv("OTEL_SERVICE_NAME", "answers")
        monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
        with (
            Collector(found.url, delay_seconds=0.02) as collector,
            serving(model, traces=Traces(collector.provider)) as served,
        ):
            assert served.post("/v1/completions", completion(max_tokens=2))[0] == 200
            assert served.post("/v1/completions", completion(max_tokens=2), traceparent=HEADER)[0] == 200
            until(lambda: len(found.spans) == 4)
        assert len(found.spans) == 4
        assert found.resources[0]["service.name"] == "answers"


def of_collector(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    return [(r.levelname, r.getMessage()) for r in caplog.records if r.name == collector_module.logger.name]


def test_a_collector_that_is_away_costs_one_line_and_is_said_to_be_back(
    model: ServedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "1.5")  # of an attempt and one more
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    lost = ("WARNING", "traces: the collector does not take them, they are lost")
    back = ("INFO", "traces: the collector takes them again")
    with (
        caplog.at_level(logging.INFO),
        Collector(f"http://127.0.0.1:{port}", delay_seconds=0.02) as collector,
        serving(model, traces=Traces(collector.provider)) as served,
    ):
        heard = collector._told

        def ask() -> None:
            assert served.post("/v1/completions", completion(max_tokens=2))[0] == 200

        for spans in (4, 8):  # each in a batch of its own
            ask()
            until(lambda spans=spans: heard._lost >= spans)
        assert of_collector(caplog) == [lost]
        (record,) = (r for r in caplog.records if r.name == collector_module.logger.name)
        assert "refused" in record.fields["reason"]
        with collecting(port) as found:
            ask()
            until(lambda: len(found.spans) == 4)
            until(lambda: heard._lost == 0)
            assert of_collector(caplog) == [lost, back]
            found.status = 404
            ask()
            until(lambda: heard._lost == 4)
        assert of_collector(caplog) == [lost, back, lost]
        assert "404" in [r for r in caplog.records if r.name == collector_module.logger.name][-1].fields["reason"]
    assert not [r for r in caplog.records if r.name.startswith("opentelemetry")]
    assert logging.getLogger("opentelemetry").propagate


def test_a_collector_that_is_slow_holds_up_no_call_and_no_end(
    model: ServedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "8")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "4")
    monkeypatch.setattr(collector_module, "_CLOSE_SECONDS", 0.05)
    slow = ("WARNING", "traces: the collector is too slow for all of them, some are lost")
    with collecting() as found, caplog.at_level(logging.INFO):
        found.open.clear()
        with (
            Collector(found.url, delay_seconds=0.02) as collector,
            serving(model, traces=Traces(collector.provider)) as served,
        ):
            for _ in range(8):  # of 32 spans 4 are under way and 8 wait
                assert served.post("/v1/completions", completion(max_tokens=2))[0] == 200
            until(lambda: of_collector(caplog) == [slow])
        assert found.paths == []  # it has answered nothing, and the server has ended
        assert of_collector(caplog) == [slow]


def test_a_variable_that_is_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "9")  # below that of a batch
    with pytest.raises(UsageError, match=r"OTEL_\.\.\.: max_export_batch_size must be .*; change it, or unset it"):
        Collector("http://localhost:4318")


def test_what_opentelemetry_says_of_other_things_goes_to_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with Collector("http://localhost:4318"):
        logging.getLogger("opentelemetry.sdk.trace").warning("something else")
    assert "something else" in caplog.text
    assert of_collector(caplog) == []
