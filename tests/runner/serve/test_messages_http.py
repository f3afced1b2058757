"""/v1/messages: Anthropic's own client, where it is installed, and what it would not send."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.served import Served, chat_model, read_until, serving
from support.serving import until

from runtimes.serve.keys import Keys
from runtimes.serve.model import ServedModel

WEATHER = {
    "name": "weather",
    "description": "How warm it is.",
    "input_schema": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
}
CALLING = 'I look.<function_calls>\nweather(town="Zürich")\n</function_calls>'
HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedModel]:
    with chat_model(tmp_path_factory.mktemp("messages") / "olmo3") as found:
        yield found


@pytest.fixture(scope="module")
def one(model: ServedModel) -> Iterator[Served]:
    with serving(model) as found:
        yield found


@pytest.fixture
def served(one: Served) -> Served:
    until(lambda: not one.engine.busy)
    one.engine.script = "Hello there."
    one.engine.requests.clear()
    one.engine.runner.broken = set()
    return one


def client_of(served: Served, **options: Any) -> Any:
    anthropic = pytest.importorskip("anthropic")
    url = f"http://127.0.0.1:{served.port}"
    return anthropic.Anthropic(base_url=url, max_retries=0, timeout=20, **{"api_key": "none", **options})


def create(served: Served, **more: Any) -> dict[str, Any]:
    status, found, _ = served.post("/v1/messages", {"model": "olmo", "max_tokens": 40, "messages": HI, **more})
    assert status == 200, found
    return found


def test_a_message(served: Served) -> None:
    found = create(served, system="Be brief.", temperature=0.5, top_p=0.9, top_k=5, metadata={"user_id": "x"})
    assert found["content"] == [{"type": "text", "text": "Hello there."}]
    assert (found["type"], found["role"], found["model"], found["stop_reason"]) == (
        "message",
        "assistant",
        "olmo",
        "end_turn",
    )
    (request,) = served.engine.requests
    assert (request.temperature, request.top_p, request.top_k, request.max_new_tokens) == (0.5, 0.9, 5, 40)
    assert "Be brief." in served.model.tokenizer.decode(request.prompt_ids)
    assert found["usage"] == {
        "input_tokens": len(request.prompt_ids),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "output_tokens": 4,
    }
    again = create(served, system="Be brief.")["usage"]
    assert again["input_tokens"] + again["cache_read_input_tokens"] == len(request.prompt_ids)
    assert again["cache_read_input_tokens"] > 8


def test_why_it_ended(served: Served) -> None:
    assert create(served, max_tokens=2)["stop_reason"] == "max_tokens"
    served.engine.script = "one two three four"
    found = create(served, stop_sequences=["zzz", " three"])
    assert (found["stop_reason"], found["stop_sequence"]) == ("stop_sequence", " three")
    assert found["content"][0]["text"] == "one two"


def test_thoughts_and_a_call_are_blocks_and_come_back_as_what_they_were(served: Served) -> None:
    served.engine.script = f"<think>Where is it?</think>{CALLING}"
    found = create(served, tools=[WEATHER])
    thought, text, call = found["content"]
    assert thought == {"type": "thinking", "thinking": "Where is it?", "signature": ""}
    assert text == {"type": "text", "text": "I look."}
    assert (call["type"], call["name"], call["input"]) == ("tool_use", "weather", {"town": "Zürich"})
    assert found["stop_reason"] == "tool_use"
    result = {"type": "tool_result", "tool_use_id": call["id"], "content": [{"type": "text", "text": "7 degrees"}]}
    served.engine.script = "Cold."
    messages = [
        *HI,
        {"role": "assistant", "content": found["content"]},
        {"role": "user", "content": [result, {"type": "text", "text": "And?"}]},
    ]
    assert create(served, tools=[WEATHER], messages=messages)["content"][0]["text"] == "Cold."
    prompt = served.model.tokenizer.decode(served.engine.requests[-1].prompt_ids)
    assert all(words in prompt for words in ("weather(town=", "7 degrees", "And?", "How warm it is."))


def test_anthropics_client_reads_it_whole_and_as_a_stream(served: Served) -> None:
    served.engine.script = f"<think>Where is it?</think>{CALLING}"
    with client_of(served) as client:
        body: Any = {"model": "olmo", "max_tokens": 60, "messages": HI, "tools": [WEATHER]}
        whole = client.messages.create(**body)
        with client.messages.stream(**body) as stream:
            kinds = [event.type for event in stream]
            streamed = stream.get_final_message()
        count = client.messages.count_tokens(model="olmo", messages=HI, tools=[WEATHER]).input_tokens
    assert [block.type for block in whole.content] == ["thinking", "text", "tool_use"]
    assert whole.content[2].input == {"town": "Zürich"}
    assert [b.model_dump(exclude={"id"}) for b in streamed.content] == [
        b.model_dump(exclude={"id"}) for b in whole.content
    ]
    assert (streamed.stop_reason, streamed.usage.output_tokens) == ("tool_use", whole.usage.output_tokens)
    assert (kinds[0], kinds[-1]) == ("message_start", "message_stop")
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 3
    assert count == len(served.engine.requests[0].prompt_ids)


def test_a_stream_that_breaks_off_ends_in_an_error_event(served: Served) -> None:
    served.engine.runner.broken = set(served.model.tokenizer.encode(" there", add_special_tokens=False))
    data = json.dumps({"model": "olmo", "max_tokens": 40, "messages": HI, "stream": True}).encode()
    head = f"POST /v1/messages HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n".encode()
    with served.send(head + data) as connection:
        found = read_until(connection, b"0\r\n\r\n")
    assert b"event: error\n" in found
    assert b"message_stop" not in found
    assert b'"type":"api_error"' in found


def test_errors_have_the_form_that_its_client_reads(served: Served, model: ServedModel) -> None:
    with client_of(served) as client:
        import anthropic

        with pytest.raises(anthropic.NotFoundError, match="there is no 'other'") as caught:
            client.messages.create(model="other", max_tokens=5, messages=HI)
        assert caught.value.body["error"]["type"] == "not_found_error"
    with serving(model, keys=Keys((hashlib.sha256(b"a key").digest(),))) as locked:
        with client_of(locked, api_key="wrong") as client, pytest.raises(anthropic.AuthenticationError):
            client.messages.create(model="olmo", max_tokens=5, messages=HI)
        with client_of(locked, api_key="a key") as client:
            assert client.messages.create(model="olmo", max_tokens=5, messages=HI).content[0].text == "Hello there."


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"max_tokens": None}, "max_tokens: expected an integer, found none"),
        ({"max_tokens": 0}, "max_tokens: expected an integer from 1"),
        ({"messages": []}, "messages: expected at least one"),
        ({"messages": [1]}, "messages[0]: expected an object"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role: expected user or assistant"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content: expected a text or a list of blocks"),
        ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "expected role and content"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "expected blocks of type text"),
        ({"messages": [*HI, {"role": "assistant", "content": "I"}]}, "the last is the assistant's"),
        ({"system": [{"type": "image"}]}, "system: expected blocks of type text"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0]: expected one of type custom"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema: expected a JSON schema"),
        ({"tool_choice": {"type": "every"}}, "tool_choice.type: expected auto, any, none or tool"),
        ({"tool_choice": {"type": "any"}}, "tool_choice: there are no tools"),
        ({"tool_choice": {"type": "tool", "name": "f"}, "tools": [WEATHER]}, "'f' is none of the tools"),
        (
            {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}, "tools": [WEATHER]},
            "tool_choice.disable_parallel_tool_use: only where type is any or tool",
        ),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking: this model does not think first"),
        ({"stop_sequences": [""]}, "stop_sequences: expected"),
        ({"container": "x"}, "container: a field that this server does not know"),
    ],
)
def test_a_field_that_is_wrong_is_named(served: Served, more: dict[str, Any], said: str) -> None:
    body = {"model": "olmo", "max_tokens": 40, "messages": HI, **more}
    status, found, _ = served.post("/v1/messages", body)
    assert (status, found["type"], found["error"]["type"]) == (400, "error", "invalid_request_error")
    assert said in found["error"]["message"]
    assert served.engine.requests == []


def test_a_model_that_thinks_does_so_without_a_budget(tmp_path: Path) -> None:
    with chat_model(tmp_path / "think", "olmo3_think") as model, serving(model) as served:
        served.engine.script = "Hm.</think>\n\nYes."
        found = create(served, thinking={"type": "adaptive"})
        assert [block["type"] for block in found["content"]] == ["thinking", "text"]
        for thinking in ({"type": "disabled"}, {"type": "enabled", "budget_tokens": 9}):
            status, said, _ = served.post(
                "/v1/messages", {"model": "olmo", "max_tokens": 9, "messages": HI, "thinking": thinking}
            )
            assert (status, "leave it out" in said["error"]["message"]) == (400, True)


def test_what_is_no_json_is_said_in_that_form_too(served: Served) -> None:
    status, found, _ = served.post("/v1/messages", b"{")
    assert (status, found["type"]) == (400, "error")
    assert json.dumps(found)
