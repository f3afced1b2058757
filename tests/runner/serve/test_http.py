"""The HTTP edge, over sockets: OpenAI's own client, those that send what none does, and an engine without a model."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from starlette.types import Message
from support.chat import EOS, IM_END
from support.served import Served, chat_model, read_until, serving
from support.serving import InlineEngine, until

from runtimes.errors import UsageError
from runtimes.serve.app import Routes
from runtimes.serve.edge import Edge, EdgeLimits, JsonLines
from runtimes.serve.keys import Keys, read_keys
from runtimes.serve.metrics import VLLM_PREFIX, Metrics
from runtimes.serve.model import ServedModel
from runtimes.serve.protocol import LimitedProtocol
from runtimes.serve.texts import Patience

WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"town": {"type": "string"}}}},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedModel]:
    with chat_model(tmp_path_factory.mktemp("serve") / "olmo3") as found:
        yield found


@pytest.fixture(scope="module")
def one(model: ServedModel) -> Iterator[Served]:
    with serving(model) as found:
        yield found


@pytest.fixture
def served(one: Served) -> Served:
    """The server that most tests share, as it was at first."""
    until(lambda: not one.engine.busy)
    one.engine.script, one.engine.tick_seconds = "Hello there.", 0.0
    one.engine.requests.clear()
    one.engine.runner.broken = set()
    return one


def chat(content: str = "Hi", **more: Any) -> dict[str, Any]:
    return {"model": "olmo", "messages": [{"role": "user", "content": content}], **more}


def completion(prompt: Any = "Once", **more: Any) -> dict[str, Any]:
    return {"model": "olmo", "prompt": prompt, **more}


# Answers


def test_models(served: Served) -> None:
    assert [m.id for m in served.client.models.list()] == ["olmo", "first"]
    assert served.client.models.retrieve("first").model_extra == {"parent": "olmo", "max_model_len": 256}
    with pytest.raises(openai.NotFoundError, match="there is no 'other'; there is olmo, first"):
        served.client.models.retrieve("other")


def test_a_completion(served: Served) -> None:
    found = served.client.completions.create(**completion("Once upon", max_tokens=20))
    (choice,) = found.choices
    assert (choice.text, choice.finish_reason, choice.logprobs) == ("Hello there.", "stop", None)
    prompt, new = served.model.tokenizer.encode("Once upon"), served.model.tokenizer.encode("Hello there.")
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (len(prompt), len(new) + 1)
    assert (found.object, found.model, found.system_fingerprint) == ("text_completion", "olmo", "fp_c0ffeec0ffeec0ff")
    (request,) = served.engine.requests
    assert request.prompt_ids == tuple(prompt)
    assert (request.max_new_tokens, request.temperature, request.eos_token_ids) == (20, 1.0, (EOS, IM_END))


def test_a_completion_as_a_stream(served: Served) -> None:
    served.engine.script = "Grüße 🌍🏳️‍🌈 there"
    chunks = list(
        served.client.completions.create(
            **completion(stream=True, max_tokens=50, stream_options={"include_usage": True})
        )
    )
    assert "".join(c.choices[0].text for c in chunks[:-1]) == served.engine.script
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-2:] == [None, "stop"]
    assert len(chunks) > 4
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(served.model.tokenizer.encode(served.engine.script)) + 1
    assert len({c.id for c in chunks}) == 1


def test_several_prompts_and_several_choices(served: Served) -> None:
    found = served.client.completions.create(**completion(["Once", [5, 6, 7], "Twice"], n=2, max_tokens=1))
    assert [c.index for c in found.choices] == list(range(6))
    assert {c.text for c in found.choices} == {"Hello"}
    assert {c.finish_reason for c in found.choices} == {"length"}
    assert [r.prompt_ids for r in served.engine.requests][1] == (5, 6, 7)
    assert [r.choices for r in served.engine.requests] == [2, 2, 2]


def test_a_stop_string_ends_an_answer_and_the_engine_hears_of_it(served: Served) -> None:
    served.engine.script = "one two three four " * 10
    found = served.client.completions.create(**completion(stop=[" three", "zzz"], max_tokens=200))
    assert (found.choices[0].text, found.choices[0].finish_reason) == ("one two", "stop")
    until(lambda: not served.engine.busy)
    assert found.usage is not None
    assert found.usage.completion_tokens <= 4


def test_log_probabilities_and_an_echo(served: Served) -> None:
    found = served.client.completions.create(**completion("Once upon a", logprobs=2, echo=True, max_tokens=2))
    (choice,) = found.choices
    noted = choice.logprobs
    assert choice.text == "Once upon aHello there"
    assert noted is not None
    assert noted.tokens == ["Once", " upon", " a", "Hello", " there"]
    assert noted.text_offset == [0, 4, 9, 11, 16]
    assert noted.token_logprobs is not None
    assert noted.top_logprobs is not None
    assert (noted.token_logprobs[0], noted.top_logprobs[0]) == (None, None)
    assert all(value is not None and value < 0 for value in noted.token_logprobs[1:])
    assert noted.top_logprobs[3]["Hello"] == noted.token_logprobs[3] == max(noted.top_logprobs[3].values())
    chunks = list(
        served.client.completions.create(**completion("Once upon a", logprobs=2, echo=True, max_tokens=2, stream=True))
    )
    pieces = [c.choices[0].logprobs for c in chunks]
    assert [text for p in pieces if p for text in p.tokens or []] == noted.tokens
    assert [at for p in pieces if p for at in p.text_offset or []] == noted.text_offset


def test_a_prompt_may_be_scored_alone(served: Served) -> None:
    status, found, _ = served.post("/v1/completions", completion([9, 8, 7], echo=True, logprobs=0, max_tokens=0))
    assert status == 200
    assert len(found["choices"][0]["logprobs"]["tokens"]) == 3
    assert found["choices"][0]["text"] == served.model.tokenizer.decode([9, 8, 7])
    assert found["usage"]["completion_tokens"] == 0


def test_a_chat(served: Served) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there"}]},
    ]
    found = served.client.chat.completions.create(model="olmo", messages=messages)  # type: ignore[arg-type]
    (choice,) = found.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "Hello there.", "stop")
    (request,) = served.engine.requests
    prompt = served.model.tokenizer.decode(request.prompt_ids)
    assert "Be brief." in prompt
    assert "Hi there" in prompt
    assert request.row_tokens == 256  # as many new ones as fit


def test_a_chat_as_a_stream_with_log_probabilities(served: Served) -> None:
    chunks = list(
        served.client.chat.completions.create(**chat(stream=True, logprobs=True, top_logprobs=1, n=2, max_tokens=9))
    )
    for index in (0, 1):
        mine = [c.choices[0] for c in chunks if c.choices[0].index == index]
        assert mine[0].delta.role == "assistant"
        assert "".join(c.delta.content or "" for c in mine) == "Hello there."
        assert mine[-1].finish_reason == "stop"
        tokens = [t for c in mine if c.logprobs for t in c.logprobs.content or []]
        assert [t.token for t in tokens] == ["Hello", " there", ".", "<|im_end|>"]
        assert tokens[0].bytes == list(b"Hello")
        assert tokens[0].top_logprobs[0].logprob == tokens[0].logprob


def test_a_tool_is_called(served: Served) -> None:
    served.engine.script = 'I look.<function_calls>\nweather(town="Zürich")\n</function_calls>'
    body = chat("How warm is it?", tools=[WEATHER], tool_choice="auto")
    (choice,) = served.client.chat.completions.create(**body).choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "I look.")
    (call,) = choice.message.tool_calls or []
    assert (call.type, call.function.name, json.loads(call.function.arguments)) == (  # type: ignore[union-attr]
        "function",
        "weather",
        {"town": "Zürich"},
    )
    chunks = list(served.client.chat.completions.create(**body, stream=True))
    calls = [c for chunk in chunks for c in chunk.choices[0].delta.tool_calls or []]
    assert [(c.index, c.function.name if c.function else "") for c in calls] == [(0, "weather")]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    answer = {"role": "tool", "tool_call_id": call.id, "content": "7 degrees"}
    served.engine.script = "Cold."
    messages = [*body["messages"], choice.message.model_dump(exclude_none=True), answer]
    found = served.client.chat.completions.create(**{**body, "messages": messages})
    assert found.choices[0].message.content == "Cold."
    assert "7 degrees" in served.model.tokenizer.decode(served.engine.requests[-1].prompt_ids)


def test_a_response(served: Served) -> None:
    found = served.client.responses.create(model="olmo", input="Hi", instructions="Be brief.", max_output_tokens=20)
    assert (found.output_text, found.status, found.object) == ("Hello there.", "completed", "response")
    assert found.usage is not None
    assert (found.usage.output_tokens, found.usage.total_tokens) == (4, found.usage.input_tokens + 4)
    assert "Be brief." in served.model.tokenizer.decode(served.engine.requests[0].prompt_ids)
    cut = served.client.responses.create(model="olmo", input="Hi", max_output_tokens=2)
    assert (cut.status, cut.output_text) == ("incomplete", "Hello there")
    assert cut.incomplete_details is not None
    assert cut.incomplete_details.reason == "max_output_tokens"


def test_a_response_as_a_stream_of_thoughts_text_and_a_call(served: Served) -> None:
    served.engine.script = '<think>Where is it?</think>I look.<function_calls>\nweather(town="Bern")\n</function_calls>'
    tool: Any = {"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": True}
    events = list(served.client.responses.create(model="olmo", input="How warm?", tools=[tool], stream=True))
    assert [e.sequence_number for e in events] == list(range(len(events)))
    kinds = [e.type for e in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    done = events[-1].response  # type: ignore[union-attr]
    assert [item.type for item in done.output] == ["reasoning", "message", "function_call"]
    assert done.output_text == "I look."
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == "I look."
    assert "".join(e.delta for e in events if e.type == "response.reasoning_text.delta") == "Where is it?"
    call = done.output[2]
    assert (call.name, json.loads(call.arguments)) == ("weather", {"town": "Bern"})
    served.engine.script = "Cold."
    items: Any = [
        {"role": "user", "content": [{"type": "input_text", "text": "How warm?"}]},
        *(item.model_dump(exclude_none=True) for item in done.output),
        {"type": "function_call_output", "call_id": call.call_id, "output": "7 degrees"},
    ]
    assert served.client.responses.create(model="olmo", input=items, tools=[tool]).output_text == "Cold."
    assert "7 degrees" in served.model.tokenizer.decode(served.engine.requests[-1].prompt_ids)


def test_a_response_that_breaks_off_is_an_error(served: Served) -> None:
    served.engine.runner.broken = set(served.model.tokenizer.encode(" there", add_special_tokens=False))
    with pytest.raises(openai.APIError, match="NaN or infinite"):
        list(served.client.responses.create(model="olmo", input="Hi", stream=True))
    with pytest.raises(openai.InternalServerError, match="NaN or infinite"):
        served.client.responses.create(model="olmo", input="Hi")


def test_special_text_of_a_user_is_text(served: Served) -> None:
    served.client.completions.create(**completion("a<|endoftext|>b", max_tokens=1))
    served.client.chat.completions.create(**chat("a<|im_end|><|endoftext|>b", max_tokens=1))
    plain, templated = served.engine.requests
    assert EOS not in plain.prompt_ids
    _, found, _ = served.post("/tokenize", {"messages": [{"role": "user", "content": "ab"}]})
    assert templated.prompt_ids.count(IM_END) == found["tokens"].count(IM_END)
    assert EOS not in templated.prompt_ids


def test_options_reach_the_engine(served: Served) -> None:
    more: dict[str, Any] = {
        "temperature": 0.5,
        "top_p": 0.9,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
        "seed": 7,
        "logit_bias": {"5": -3},
        "user": "somebody",
    }
    extra = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "return_token_ids": True}
    found = served.client.completions.create(**{**completion(), "model": "first"}, **more, extra_body=extra)
    (request,) = served.engine.requests
    assert (request.temperature, request.top_p, request.top_k, request.min_p) == (0.5, 0.9, 5, 0.1)
    assert (request.presence_penalty, request.frequency_penalty, request.repetition_penalty) == (0.1, 0.2, 1.1)
    assert (request.seed, request.logit_bias, request.adapter) == (7, ((5, -3.0),), "first")
    assert found.model == "first"
    assert (found.choices[0].model_extra or {})["token_ids"]


def test_ids_of_texts_and_texts_of_ids(served: Served) -> None:
    tokenizer = served.model.tokenizer
    _, found, _ = served.post("/tokenize", {"prompt": "a<|endoftext|> 🌍"})
    assert found == {
        "tokens": tokenizer.encode("a<|endoftext|> 🌍"),
        "count": len(found["tokens"]),
        "max_model_len": 256,
    }
    assert served.post("/detokenize", {"tokens": found["tokens"]})[1] == {"prompt": "a<|endoftext|> 🌍"}
    _, found, _ = served.post("/tokenize", {"messages": [{"role": "user", "content": "Hi"}]})
    served.client.chat.completions.create(**chat(max_tokens=1))
    assert tuple(found["tokens"]) == served.engine.requests[0].prompt_ids
    assert "tokens: expected a list of ids" in served.post("/detokenize", {"tokens": [-1]})[1]["error"]["message"]


def test_a_shared_beginning_is_told_in_the_usage(served: Served) -> None:
    prompt = list(range(300, 330))
    for expected in (0, 29):
        found = served.client.completions.create(**completion(prompt, max_tokens=3))
        assert found.usage is not None
        assert found.usage.prompt_tokens_details is not None
        assert found.usage.prompt_tokens_details.cached_tokens == expected


# Refused


@pytest.mark.parametrize(
    ("path", "body", "said", "param"),
    [
        ("/v1/completions", b"{", "not valid JSON", None),
        ("/v1/completions", {"prompt": "x"}, "model: expected the name of one", "model"),
        ("/v1/completions", completion(None), "prompt: expected a text", "prompt"),
        ("/v1/completions", completion([]), "prompt: expected a text", "prompt"),
        ("/v1/completions", completion([[1, 2], [True]]), "prompt: expected a text", "prompt"),
        ("/v1/completions", completion([2**40]), "vocabulary", None),
        ("/v1/completions", completion([-1]), "vocabulary", None),
        ("/v1/completions", completion(n=10**6), "n: expected an integer from 1 to 4, found 1000000", "n"),
        ("/v1/completions", completion(n="2"), "n: expected an integer from 1 to 4, found a string", "n"),
        ("/v1/completions", completion(max_tokens=10**12), "max_tokens: expected an integer", "max_tokens"),
        ("/v1/completions", completion(best_of=3), "best_of", "best_of"),
        ("/v1/completions", completion(suffix="x"), "suffix", "suffix"),
        ("/v1/completions", completion(stop=[""]), "stop", "stop"),
        ("/v1/completions", completion(stop=["a"] * 5), "stop", "stop"),
        ("/v1/completions", completion(logprobs=21), "logprobs: expected an integer from 0 to 20", "logprobs"),
        ("/v1/completions", completion(logit_bias={"x": 1}), "logit_bias", "logit_bias"),
        ("/v1/completions", completion(logit_bias={"5": 101}), "logit_bias", "logit_bias"),
        ("/v1/completions", completion(logit_bias={"100352": 1}), "token id 100352", None),
        ("/v1/completions", completion(temperature=-1), "temperature", "temperature"),
        ("/v1/completions", completion(seed=-1), "seed", "seed"),
        ("/v1/completions", completion(stream_options={}), "only where stream is true", "stream_options"),
        ("/v1/completions", completion(stream=True, stream_options={"x": 1}), "stream_options.x", "stream_options.x"),
        ("/v1/completions", completion(beams=2), "beams: a field that this server does not know", "beams"),
        (
            "/v1/completions",
            completion(response_format={"type": "xml"}),
            "response_format.type",
            "response_format.type",
        ),
        ("/v1/completions", completion(response_format={"type": "regex", "regex": "a"}), "llguidance", None),
        ("/v1/chat/completions", chat(tool_choice="required"), "tool_choice: there are no tools", "tool_choice"),
        ("/v1/chat/completions", chat(tools=[{"type": "function"}]), "tool 1", None),
        ("/v1/chat/completions", chat(top_logprobs=2), "top_logprobs: needs logprobs", "top_logprobs"),
        ("/v1/chat/completions", chat(max_tokens=3, max_completion_tokens=4), "max_tokens: differs", "max_tokens"),
        ("/v1/chat/completions", chat(chat_template="{{ x }}"), "chat_template: a field", "chat_template"),
        ("/v1/chat/completions", {"model": "olmo", "messages": []}, "messages: expected at least one", "messages"),
        ("/v1/chat/completions", {"model": "olmo", "messages": ["Hi"]}, "messages[0]: expected an object", "messages"),
        ("/v1/responses", {"model": "olmo"}, "input: expected a text", "input"),
        ("/v1/responses", {"model": "olmo", "input": [1]}, "input[0]: expected an object", "input"),
        ("/v1/responses", {"model": "olmo", "input": [{"type": "file"}]}, "input[0].type: expected message", "input"),
        ("/v1/responses", {"model": "olmo", "input": "x", "store": True}, "store: this server keeps nothing", "store"),
        (
            "/v1/responses",
            {"model": "olmo", "input": "x", "previous_response_id": "y"},
            "previous_response_id",
            "previous_response_id",
        ),
        (
            "/v1/responses",
            {"model": "olmo", "input": "x", "max_output_tokens": -1},
            "max_output_tokens",
            "max_output_tokens",
        ),
        ("/v1/responses", {"model": "olmo", "input": "x", "tools": [{"type": "web_search"}]}, "tools[0]", "tools"),
        (
            "/v1/responses",
            {"model": "olmo", "input": "x", "text": {"format": {"type": "json_schema", "name": "a"}}},
            "text.format.schema: expected a JSON schema",
            "text.format.schema",
        ),
        (
            "/v1/chat/completions",
            {"model": "olmo", "messages": [{"role": "king", "content": "x"}]},
            "role 'king'",
            None,
        ),
        (
            "/v1/chat/completions",
            {"model": "olmo", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content: expected parts of type text",
            "messages",
        ),
        (
            "/v1/chat/completions",
            {"model": "olmo", "messages": [{"role": "user", "content": "x", "audio": 1}]},
            "messages[0].audio",
            "messages",
        ),
    ],
)
def test_a_field_that_is_wrong_is_named(served: Served, path: str, body: Any, said: str, param: str | None) -> None:
    status, found, _ = served.post(path, body)
    assert status == 400
    assert said in found["error"]["message"]
    assert (found["error"]["param"], found["error"]["type"]) == (param, "invalid_request_error")
    until(lambda: not served.engine.busy)


def test_what_does_not_fit_says_so_by_its_code(served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="the context holds 256") as caught:
        served.client.completions.create(**completion([5] * 250, max_tokens=16))
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="the context holds 256"):
        served.client.chat.completions.create(**chat("word " * 300))


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("GET", "/v1/completions", 405),
        ("POST", "/health", 405),
    ],
)
def test_paths_that_are_none_are_refused_in_the_same_form(served: Served, method: str, path: str, status: int) -> None:
    found, body, _ = served.call(method, path, b"{}")
    assert found == status
    assert path in body["error"]["message"]


def test_another_model_is_not_found(served: Served) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        served.client.completions.create(**{**completion(), "model": "gpt"})
    assert caught.value.code == "model_not_found"


def test_a_model_without_a_template_has_no_chats(model: ServedModel) -> None:
    with serving(ServedModel("plain", "c0ffee", model.tokenizer)) as served:
        status, found, _ = served.post("/v1/chat/completions", {**chat(), "model": "plain"})
        assert status == 404
        assert "no chat template" in found["error"]["message"]


def test_a_full_queue_is_429_and_says_when_to_come_again(model: ServedModel) -> None:
    with serving(model, max_slots=1, queue=2) as served:
        served.engine.tick_seconds = 0.02
        served.engine.script = "word " * 200
        streams = [served.stream("/v1/completions", completion(max_tokens=100))]
        body = json.dumps(completion(max_tokens=5)).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
        streams += [served.send(head + body) for _ in range(2)]
        until(lambda: served.engine.desk.waiting == 2)
        status, found, headers = served.post("/v1/completions", completion())
        assert (status, headers["retry-after"]) == (429, "1")
        assert (found["error"]["type"], found["error"]["code"]) == ("rate_limit_error", "queue_full")
        for stream in streams:  # also those that wait
            stream.close()
        until(lambda: served.engine.desk.outstanding == 0 and not served.engine.busy)
        assert len(served.engine.runner.slots) == len(served.engine.engine._kept.texts)


def test_who_waits_too_long_is_told_so(model: ServedModel) -> None:
    with serving(model, max_slots=1, patience=Patience(queue=0.05, generation=0.3)) as served:
        served.engine.tick_seconds = 0.02
        served.engine.script = "word " * 200
        with contextlib.closing(served.stream("/v1/completions", completion(max_tokens=100))) as stream:
            status, found, _ = served.post("/v1/completions", completion())
            assert (status, found["error"]["code"]) == (503, "not_ready")
            rest = read_until(stream, b"longer than 0.3 s")
            assert b"[DONE]" not in rest
        until(lambda: served.engine.desk.outstanding == 0)


# Failing, going away, and being slow


def test_numbers_that_break_in_mid_stream_end_it_with_an_error(served: Served) -> None:
    there = served.model.tokenizer.encode(" there", add_special_tokens=False)
    served.engine.runner.broken = set(there)
    with pytest.raises(openai.APIError, match="NaN or infinite"):
        list(served.client.completions.create(**completion(stream=True)))
    with pytest.raises(openai.InternalServerError, match="NaN or infinite"):
        served.client.completions.create(**completion())
    with contextlib.closing(served.stream("/v1/completions", completion())) as stream:
        rest = read_until(stream, b"0\r\n\r\n")
    assert b"[DONE]" not in rest


def test_an_engine_that_ends_costs_an_error_and_then_503(model: ServedModel) -> None:
    with serving(model) as served:
        served.engine.tick_seconds = 0.02
        served.engine.script = "word " * 100
        with contextlib.closing(served.stream("/v1/completions", completion(max_tokens=100))) as stream:
            served.engine.desk.lost("the engine's process ended (by SIGKILL)")
            assert b"engine_lost" in read_until(stream, b"engine_lost")
        status, found, headers = served.post("/v1/completions", completion())
        assert (status, found["error"]["code"], headers["retry-after"]) == (503, "not_ready", "1")
        assert served.call("GET", "/ready")[0] == 503
        assert served.call("GET", "/health")[0] == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_slot(served: Served, stream: bool) -> None:
    served.engine.tick_seconds = 0.01
    served.engine.script = "word " * 200
    data = json.dumps(completion(max_tokens=200, stream=stream, n=2)).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n".encode()
    connection = served.send(head + data)
    until(lambda: len(served.engine.engine._answers) == 2)
    connection.close()
    until(lambda: served.engine.desk.outstanding == 0)
    until(lambda: not served.engine.busy)
    assert len(served.engine.requests) == 1


def test_a_client_that_reads_nothing_is_given_up(model: ServedModel) -> None:
    async def scenario() -> None:
        engine = InlineEngine(model.tokenizer, ends=IM_END)
        engine.script, engine.tick_seconds = "word " * 100, 0.001
        metrics = Metrics(model.name)
        routes = Routes(model, engine.desk, metrics).app()
        edge = Edge(routes, keys=Keys(), limits=EdgeLimits(write_seconds=0.05), metrics=metrics)
        written: list[Message] = []

        async def send(message: Message) -> None:
            written.append(message)
            if len(written) == 4:
                await asyncio.Event().wait()

        async def receive() -> Message:
            if not written and not engine.requests:
                return {"type": "http.request", "body": json.dumps(completion(stream=True, max_tokens=100)).encode()}
            await asyncio.Event().wait()
            raise AssertionError

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
        with pytest.raises(TimeoutError):
            await edge(scope, receive, send)
        assert len(written) == 4
        assert engine.desk.outstanding == 0
        while engine.busy:
            await asyncio.sleep(0.001)

    asyncio.run(scenario())


# The edge


def test_a_body_that_is_too_large_or_too_slow(model: ServedModel) -> None:
    with serving(model, limits=EdgeLimits(body_bytes=1000, body_seconds=0.2)) as served:
        status, found, _ = served.post("/v1/completions", b" " * 1001)
        assert (status, "1001 bytes, at most 1000" in found["error"]["message"]) == (413, True)
        chunked = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
        with contextlib.closing(served.send(chunked + b"400\r\n" + b" " * 1024 + b"\r\n")) as connection:
            assert read_until(connection, b"}").startswith(b"HTTP/1.1 413 ")
        half = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{"
        with contextlib.closing(served.send(half)) as connection:
            assert read_until(connection).startswith(b"HTTP/1.1 408 ")  # and it is closed


def test_headers_that_are_too_long_too_slow_or_none(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LimitedProtocol, "header_seconds", 0.2)
    for data in (b"x: " + b"a" * 20_000, b"x: y\r\n" * 4000):
        with contextlib.closing(served.send(b"GET /health HTTP/1.1\r\n" + data)) as connection:
            assert read_until(connection).startswith(b"HTTP/1.1 431 ")
    for data in (b"GET /health HTTP/1.1\r\nho", b""):
        with contextlib.closing(served.send(data)) as connection:
            found = read_until(connection)
            assert found.startswith(b"HTTP/1.1 408 ")
            assert b'"error": {"message": "headers not complete' in found
    with contextlib.closing(served.send(b"nonsense\r\n\r\n")) as connection:
        found = read_until(connection)
        assert found.startswith(b"HTTP/1.1 400 ")
        assert b'"error"' in found
    twice = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
    with contextlib.closing(served.send(twice)) as connection:  # one that is kept
        assert read_until(connection, b"ok").startswith(b"HTTP/1.1 200 ")
        connection.sendall(twice)
        assert read_until(connection, b"ok").startswith(b"HTTP/1.1 200 ")


def test_keys(model: ServedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hashed = "sha256:2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b"  # of secret
    (tmp_path / "keys").write_text(f"# ours\nfirst-key\n\n{hashed}\n")
    with serving(model, keys=read_keys(tmp_path / "keys")) as served, caplog.at_level(logging.INFO):
        for path in ("/v1/models", "/metrics", "/version", "/nowhere"):
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic secret"}):
                status, found, answered = served.call("GET", path, **headers)
                assert (status, answered["www-authenticate"]) == (401, "Bearer")
                assert found["error"]["type"] == "authentication_error"
        for key in ("first-key", "secret"):
            assert served.call("GET", "/v1/models", authorization=f"Bearer {key}")[0] == 200
        with pytest.raises(openai.AuthenticationError):
            served.client.models.list()
        assert served.call("GET", "/health")[0] == served.call("GET", "/ready")[0] == 200
    named = [record.fields.get("key") for record in caplog.records if hasattr(record, "fields")]
    assert named[-3:] == ["9e24b553", "2bb80d53", None]  # how their hashes begin
    assert "first-key" not in caplog.text
    assert "wrong" not in caplog.text


def test_a_key_may_have_so_many_calls_at_once(model: ServedModel, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("one\ntwo\n")
    with serving(model, keys=read_keys(tmp_path / "keys"), limits=EdgeLimits(calls_per_key=1)) as served:
        served.engine.tick_seconds = 0.02
        served.engine.script = "word " * 100
        data = json.dumps(completion(max_tokens=100)).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer one\r\ncontent-length: {len(data)}"
        with contextlib.closing(served.send(f"{head}\r\n\r\n".encode() + data)):
            until(lambda: served.engine.busy)
            status, found, headers = served.post("/v1/completions", completion(), authorization="Bearer one")
            assert (status, headers["retry-after"]) == (429, "1")
            assert "1 calls with this key" in found["error"]["message"]
            served.engine.script = "Hello"
            assert served.post("/v1/completions", completion("Two"), authorization="Bearer two")[0] == 200
        until(lambda: served.engine.desk.outstanding == 0)
        until(lambda: served.post("/v1/completions", completion("One"), authorization="Bearer one")[0] == 200)


@pytest.mark.parametrize(("text", "said"), [("\n# none\n", "no key"), ("sha256:12\n", "line 1: expected sha256")])
def test_a_file_of_keys_that_has_none_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(UsageError, match=said):
        read_keys(tmp_path / "keys")


def test_request_ids_and_the_log(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="runtimes.serve.calls"):
        _, _, headers = served.post("/v1/completions", completion("a secret prompt"), x_request_id="abc-1.2")
        assert headers["x-request-id"] == "abc-1.2"
        _, _, headers = served.call("GET", "/v1/models/%1b%5b31m%0d%0aevil", x_request_id="a b")
        assert headers["x-request-id"] != "a b"
        served.call("GET", "/health")
    lines = [JsonLines().format(record) for record in caplog.records if record.name == "runtimes.serve.calls"]
    first, second = (json.loads(line) for line in lines)
    assert (first["request_id"], first["path"], first["status"]) == ("abc-1.2", "/v1/completions", 200)
    assert (first["model"], first["completion_tokens"], first["stream"]) == ("olmo", 4, False)
    assert (second["status"], second["path"]) == (404, "/v1/models/\x1b[31m\r\nevil")
    assert not any(c in line for line in lines for c in "\x1b\r\n")
    assert "secret" not in caplog.text


def test_metrics_have_the_names_that_dashboards_know(model: ServedModel) -> None:
    with serving(model) as served:
        served.client.completions.create(**completion(max_tokens=3))
        served.post("/v1/completions", b"{")
        assert served.call("GET", "/metrics")[2]["content-type"].startswith("text/plain")
        text = served.metrics.text().decode()
        for line in (
            'olmo2_prompt_tokens_total{model_name="olmo"} 1.0',
            'olmo2_generation_tokens_total{model_name="olmo"} 3.0',
            'olmo2_request_success_total{finished_reason="length",model_name="olmo"} 1.0',
            'olmo2_time_to_first_token_seconds_count{model_name="olmo"} 1.0',
            'olmo2_inter_token_latency_seconds_count{model_name="olmo"} 2.0',
            'olmo2_e2e_request_latency_seconds_count{model_name="olmo"} 1.0',
            'olmo2_request_queue_time_seconds_count{model_name="olmo"} 1.0',
            'olmo2_requests_rejected_total{model_name="olmo",status="400"} 1.0',
            'olmo2_prefix_cache_queries_total{model_name="olmo"} 1.0',
        ):
            assert line in text
    families = "num_requests_running num_requests_waiting kv_cache_usage_perc prefix_cache_hits iteration_tokens_total"
    theirs = Metrics("olmo", VLLM_PREFIX).text().decode()
    assert all(f"vllm:{name}" in theirs for name in families.split())


def test_a_server_that_is_about_to_end_takes_no_calls(model: ServedModel) -> None:
    with serving(model, draining=lambda: True) as served:
        status, found, headers = served.post("/v1/completions", completion())
        assert (status, found["error"]["code"], headers["retry-after"]) == (503, "not_ready", "1")
        assert served.call("GET", "/health")[0] == 200


def test_the_version_says_which_package(served: Served) -> None:
    found = served.call("GET", "/version")[1]
    assert (found["model"], found["package"], found["variant"], found["exact"]) == (
        "olmo",
        served.model.checksum,
        "fake",
        False,
    )


def test_many_calls_leave_nothing_behind(served: Served) -> None:
    began = time.monotonic()
    for n in range(12):
        served.client.completions.create(**completion(f"{n}", max_tokens=2, n=1 + n % 2))
    assert served.engine.desk.outstanding == 0
    assert time.monotonic() - began < 120
