"""What clients, crashes and crowds may do to a server, by the rows of the fault table: 36 to 45.

| row | what                                          | also in                                                       |
|-----|-----------------------------------------------|---------------------------------------------------------------|
| 36  | JSON that is none, numbers that are too large | test_strict_json                                              |
| 37  | bodies and headers, large and slow            | test_http: too_large_or_too_slow, too_long_too_slow_or_none   |
| 38  | more clients than slots                       | test_serve_verb: accepted_answers_are_those_of_a_client_alone |
| 39  | clients that go away                          | test_http: goes_away_frees_its_slot, full_queue               |
| 40  | clients that do not read                      | test_http: reads_nothing_is_given_up                          |
| 41  | the engine's process is killed                | test_serve_verb: killed_engine; test_supervisor               |
| 42  | SIGTERM                                       | test_serve_verb: sigterm_lets_them_end                        |
| 43  | keys                                          | test_http: test_keys                                          |
| 44  | names of special tokens in a text             | test_http: special_text                                       |
| 45  | what a client sends, in the log               | test_http: request_ids_and_the_log                            |
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import resource
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from starlette.routing import Route
from starlette.types import Message
from support.chat import IM_END
from support.served import Served, chat_model, read_until, serving
from support.serving import InlineEngine, fake_next, until

from runtimes.serve.app import Routes
from runtimes.serve.edge import PUBLIC, Edge, EdgeLimits, JsonLines
from runtimes.serve.keys import Keys
from runtimes.serve.metrics import Metrics
from runtimes.serve.model import ServedModel
from runtimes.serve.protocol import LimitedProtocol


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedModel]:
    with chat_model(tmp_path_factory.mktemp("faults") / "olmo3") as found:
        yield found


def body_of(prompt: Any = "Once", **more: Any) -> dict[str, Any]:
    return {"model": "olmo", "prompt": prompt, "max_tokens": 8, **more}


def head_of(data: bytes, path: str = "/v1/completions") -> bytes:
    return f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n".encode()


def test_row_36_what_is_no_good_json_is_400_soon_and_takes_no_memory(model: ServedModel) -> None:
    bodies = [
        b"{",
        b'{"model": "\xff"}',
        b'{"model": "\\ud800"}',
        b'{"model": "olmo", "prompt": "x", "temperature": NaN}',
        b'{"model": ' + b"[" * 200_000,
        json.dumps(body_of(n=10**6)).encode(),
        json.dumps(body_of(max_tokens=10**12)).encode(),
    ]
    paths = ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize", "/detokenize"]
    with serving(model) as served:
        served.post("/v1/completions", b"{")  # what is loaded once
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for path in paths:
            for body in bodies:
                began = time.process_time()
                status, found, _ = served.post(path, body)
                assert time.process_time() - began < 1
                assert status == 400
                assert set(found["error"]) == {"message", "type", "param", "code"}
                assert len(found["error"]["message"]) < 400
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # kB
        assert served.engine.requests == []


def test_row_37_limits_are_those_that_are_said() -> None:
    limits = EdgeLimits()
    assert (limits.body_bytes, limits.body_seconds, limits.write_seconds) == (1 << 20, 10.0, 30.0)
    assert (LimitedProtocol.header_bytes, LimitedProtocol.header_seconds) == (16 << 10, 10.0)


def test_row_38_of_64_clients_those_that_are_accepted_get_what_they_would_alone(model: ServedModel) -> None:
    prompts = [[7 + n, 300 + n, 5] for n in range(64)]

    def ask(served: Served, number: int) -> tuple[int, str, str | None]:
        body = body_of(prompts[number], seed=number, temperature=1.0, max_tokens=6)
        status, found, headers = served.post("/v1/completions", body)
        return status, found["choices"][0]["text"] if status == 200 else "", headers.get("retry-after")

    with serving(model, max_slots=4, queue=16, exact=True) as served:
        served.engine.runner.next_token = lambda text: fake_next(text, 5000)
        served.engine.runner.height = 9.0  # others are drawn, too
        alone = [ask(served, number)[1] for number in range(64)]
        assert len(set(alone)) == 64
        served.engine.held = True
        with ThreadPoolExecutor(64) as pool:
            asked = [pool.submit(ask, served, number) for number in range(64)]
            until(lambda: sum(future.done() for future in asked) == 48)
            served.engine.held = False
            found = [future.result() for future in asked]
        assert [status for status, _, _ in found].count(200) == 16  # those that could wait
        for number, (status, text, retry) in enumerate(found):
            assert (text, retry) == ((alone[number], None) if status == 200 else ("", "1"))
        until(lambda: served.engine.desk.outstanding == 0 and not served.engine.busy)
        assert len(served.engine.runner.slots) == len(served.engine.engine._kept.texts)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"])
@pytest.mark.parametrize("stream", [True, False])
def test_row_39_who_goes_away_frees_the_slot_on_every_route(model: ServedModel, path: str, stream: bool) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    own: dict[str, dict[str, Any]] = {
        "/v1/completions": {"prompt": "Once", "max_tokens": 200},
        "/v1/chat/completions": {"messages": messages},
        "/v1/responses": {"input": "Hi"},
        "/v1/messages": {"messages": messages, "max_tokens": 150},
    }
    with serving(model, max_slots=1) as served:
        served.engine.script, served.engine.tick_seconds = "word " * 200, 0.01
        data = json.dumps({"model": "olmo", "stream": stream, **own[path]}).encode()
        connection = served.send(head_of(data, path) + data)
        until(lambda: bool(served.engine.engine._answers))
        connection.close()
        until(lambda: served.engine.desk.outstanding == 0 and not served.engine.busy)
        served.engine.script = "Hello."
        assert served.post("/v1/completions", body_of("Next"))[1]["choices"][0]["text"] == "Hello."


def test_row_40_who_does_not_read_holds_up_nobody(model: ServedModel) -> None:
    async def scenario() -> None:
        engine = InlineEngine(model.tokenizer, ends=IM_END)
        engine.script, engine.tick_seconds = "word " * 100, 0.001
        metrics = Metrics(model.name)
        routes = Routes(model, engine.desk, metrics).app()
        edge = Edge(routes, keys=Keys(), limits=EdgeLimits(write_seconds=5.0), metrics=metrics)

        async def call(written: list[Message], most: int) -> None:
            body = json.dumps(body_of("Once" if most else "Twice", stream=True, max_tokens=60)).encode()
            given = False

            async def send(message: Message) -> None:
                written.append(message)
                if most and len(written) == most:
                    await asyncio.Event().wait()

            async def receive() -> Message:
                nonlocal given
                if not given:
                    given = True
                    return {"type": "http.request", "body": body}
                await asyncio.Event().wait()
                raise AssertionError

            scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
            await edge(scope, receive, send)

        slow: list[Message] = []
        stuck = asyncio.create_task(call(slow, 4))
        while len(slow) < 4:
            await asyncio.sleep(0.001)
        quick: list[Message] = []
        await asyncio.wait_for(call(quick, 0), 60)
        assert b"[DONE]" in b"".join(m.get("body", b"") for m in quick)
        assert len(slow) == 4  # what it has not taken waits, and is no more than its answer has tokens
        stuck.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await stuck
        assert engine.desk.outstanding == 0

    asyncio.run(scenario())


def test_row_41_an_engine_that_is_gone_is_503_on_every_route_that_needs_it(model: ServedModel) -> None:
    with serving(model, max_slots=1) as served:
        served.engine.script, served.engine.tick_seconds = "word " * 100, 0.02
        with contextlib.closing(served.stream("/v1/completions", body_of(max_tokens=100))) as stream:
            served.engine.desk.lost("the engine's process ended (by SIGKILL)")
            rest = read_until(stream, b"engine_lost")
            assert b"[DONE]" not in rest
        messages = [{"role": "user", "content": "Hi"}]
        for path, more in (
            ("/v1/completions", {"prompt": "x"}),
            ("/v1/chat/completions", {"messages": messages}),
            ("/v1/responses", {"input": "x"}),
            ("/v1/messages", {"messages": messages, "max_tokens": 5}),
        ):
            assert served.post(path, {"model": "olmo", **more})[0] == 503, path
        served.engine.desk.ready(served.engine.engine.capacity)
        until(lambda: served.call("GET", "/ready")[0] == 200)


def test_row_42_who_drains_takes_nothing_new_and_says_so(model: ServedModel) -> None:
    draining = [False]
    with serving(model, draining=lambda: draining[0]) as served:
        served.engine.script, served.engine.tick_seconds = "word " * 30, 0.01
        with contextlib.closing(served.stream("/v1/completions", body_of(max_tokens=20))) as stream:
            draining[0] = True
            status, _, headers = served.post("/v1/completions", body_of("Other"))
            assert (status, headers["retry-after"]) == (503, "1")
            assert b"[DONE]" in read_until(stream, b"[DONE]")  # what was begun is answered


def test_row_43_every_route_but_the_public_ones_wants_a_key(model: ServedModel) -> None:
    keys = Keys((hashlib.sha256(b"right").digest(),))
    with serving(model, keys=keys) as served:
        routes = Routes(model, served.engine.desk, served.metrics).app().routes
        paths = [(route.path, min((route.methods or set()) - {"HEAD"})) for route in routes if isinstance(route, Route)]
        assert len(paths) > 15
        for path, method in paths:
            path = path.replace("{name:path}", "olmo")
            for headers in ({}, {"authorization": "Bearer wrong"}, {"x_api_key": "wrong"}, {"authorization": "right"}):
                status, _, _ = served.call(method, path, **headers)
                assert (status == 401) == (path not in PUBLIC), path
            if path not in PUBLIC:
                assert served.call(method, path, b"{}", authorization="Bearer right")[0] != 401
                assert served.call(method, path, b"{}", x_api_key="right")[0] != 401
        assert served.call("DELETE", "/v1/models")[0] == served.call("GET", "/%2e%2e/health")[0] == 401


@pytest.mark.parametrize("name", ["<|endoftext|>", "<|im_end|>", "<|im_start|>"])
def test_row_44_the_name_of_a_special_token_is_text_on_every_route(model: ServedModel, name: str) -> None:
    (special,) = (token_id for token_id, text in model.tokenizer.added_tokens.items() if text == name)
    with serving(model) as served:
        messages = [{"role": "user", "content": f"a{name}b"}]
        served.post("/v1/chat/completions", {"model": "olmo", "messages": [{"role": "user", "content": "ab"}]})
        usual = list(served.engine.requests[-1].prompt_ids).count(special)
        for path, more in (
            ("/v1/chat/completions", {"messages": messages}),
            ("/v1/responses", {"input": f"a{name}b"}),
            ("/v1/messages", {"messages": messages, "max_tokens": 5}),
        ):
            assert served.post(path, {"model": "olmo", **more})[0] == 200
            assert list(served.engine.requests[-1].prompt_ids).count(special) == usual, path
        served.post("/v1/completions", body_of(f"a{name}b"))
        assert special not in served.engine.requests[-1].prompt_ids


def test_row_45_nothing_that_a_client_sends_breaks_a_line_or_shows_a_prompt(
    model: ServedModel, caplog: pytest.LogCaptureFixture
) -> None:
    evil = "evil\r\n\x1b[31m{}\x07"
    with serving(model) as served, caplog.at_level(logging.INFO, logger="runtimes.serve.calls"):
        served.post("/v1/completions", body_of(f"a secret {evil}"), x_request_id="two words")
        served.post("/v1/completions", {"model": evil, "prompt": "a secret"})
        served.post("/v1/chat/completions", {"model": "olmo", "messages": [{"role": "user", "content": "a secret"}]})
        served.post("/v1/messages", {"model": "olmo", "max_tokens": 5, "messages": [{"role": evil, "content": "x"}]})
        until(lambda: len(caplog.records) == 4)  # a line is written when its answer has been
    lines = [JsonLines().format(record) for record in caplog.records]
    assert not any(ord(char) < 32 or ord(char) == 127 for line in lines for char in line)
    assert all("secret" not in line and "two words" not in line for line in lines)
    assert [json.loads(line)["status"] for line in lines] == [200, 404, 200, 400]
