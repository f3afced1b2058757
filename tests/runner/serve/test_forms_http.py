"""Answers that are held to a form: calls of tools that must be made, and formats behind thoughts and beside tools."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from support.served import Served, chat_model, serving
from support.serving import until

from runtimes.serve.model import ServedModel
from runtimes.text.structured import StructuredOutput

pytest.importorskip("llguidance")

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"unit": {"enum": ["C", "F"]}}, "required": ["unit"]},
    },
}
NEWS = {"type": "function", "function": {"name": "news", "parameters": {"type": "object", "properties": {}}}}
BOOLEAN = {"type": "json_schema", "json_schema": {"name": "it", "schema": {"type": "boolean"}}}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedModel]:
    with chat_model(tmp_path_factory.mktemp("forms") / "instruct") as found:
        yield found


@pytest.fixture(scope="module")
def structured(model: ServedModel) -> StructuredOutput:
    return StructuredOutput(model.tokenizer, 100_352)


@pytest.fixture(scope="module")
def one(model: ServedModel, structured: StructuredOutput) -> Iterator[Served]:
    with serving(model, structured=structured) as found:
        yield found


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory, structured: StructuredOutput) -> Iterator[Served]:
    with (
        chat_model(tmp_path_factory.mktemp("forms") / "think", "olmo3_think") as found,
        serving(found, structured=structured) as served,
    ):
        assert found.chat is not None
        assert found.chat.thinks
        yield served


def ask(served: Served, script: str, **more: Any) -> Any:
    """The choice that comes of it where the model would rather say something else."""
    until(lambda: not served.engine.busy)
    served.engine.script = script
    messages: Any = [{"role": "user", "content": f"How warm is it? {script}"}]
    found = served.client.chat.completions.create(model="olmo", messages=messages, temperature=0, max_tokens=60, **more)
    return found.choices[0]


def calls_of(choice: Any) -> list[tuple[str, dict[str, Any]]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls or ()]


def test_a_tool_that_must_be_called_is_called(one: Served) -> None:
    choice = ask(one, "I will not.", tools=[WEATHER], tool_choice="required", parallel_tool_calls=False)
    ((name, arguments),) = calls_of(choice)
    assert (name, arguments["unit"] in ("C", "F")) == ("weather", True)
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    free = ask(one, "I will not.", tools=[WEATHER])
    assert (free.message.content, free.finish_reason) == ("I will not.", "stop")


def test_several_may_be_called_and_which_is_the_models_choice(one: Served) -> None:
    script = '<function_calls>\nnews()\nweather(unit="F")\n</function_calls>'
    choice = ask(one, script, tools=[WEATHER, NEWS], tool_choice="required")
    assert calls_of(choice) == [("news", {}), ("weather", {"unit": "F"})]


def test_a_function_that_is_named_is_called_once(one: Served) -> None:
    script = '<function_calls>\nweather(unit="F")\n</function_calls>'
    assert calls_of(ask(one, script, tools=[WEATHER, NEWS], tool_choice=named("news"))) == [("news", {})]
    tools: Any = [{**NEWS["function"], "type": "function"}]  # type: ignore[dict-item]
    one.engine.script = "I will not."
    found = one.client.responses.create(
        model="olmo", input="Hi", tools=tools, tool_choice={"type": "function", "name": "news"}, temperature=0
    )
    assert [(item.type, item.name) for item in found.output] == [("function_call", "news")]  # type: ignore[union-attr]
    assert found.tool_choice.model_dump() == {"type": "function", "name": "news"}  # type: ignore[union-attr]


def test_a_format_beside_tools_is_of_the_text_that_is_no_call(one: Served) -> None:
    script = '<function_calls>\nweather(unit="C")\n</function_calls>'
    assert calls_of(ask(one, script, tools=[WEATHER], response_format=BOOLEAN)) == [("weather", {"unit": "C"})]
    assert ask(one, "true", tools=[WEATHER], response_format=BOOLEAN).message.content == "true"
    assert ask(one, "true", tools=[WEATHER], tool_choice="none", response_format=BOOLEAN).message.content == "true"
    assert ask(one, "It is.", response_format=BOOLEAN).message.content in ("true", "false")
    must = ask(one, "true", tools=[NEWS], tool_choice="required", parallel_tool_calls=False, response_format=BOOLEAN)
    assert calls_of(must) == [("news", {})]


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (BOOLEAN, "true"),
        ({"type": "regex", "regex": "(yes|no)/?"}, "no/"),
        ({"type": "grammar", "grammar": 'start: "yes" | "no"'}, "yes"),
    ],
)
def test_thoughts_are_free_and_the_answer_behind_them_has_its_form(
    thinker: Served, form: dict[str, Any], text: str
) -> None:
    choice = ask(thinker, f"Is it <so>?\n It is.</think>\n\n{text}", extra_body={"response_format": form})
    assert choice.message.reasoning_content == "Is it <so>?\n It is."
    assert (choice.message.content, choice.finish_reason) == (text, "stop")


def test_a_model_that_thinks_may_be_made_to_call(thinker: Served) -> None:
    choice = ask(thinker, "Hm.</think>\nNo.", tools=[NEWS], tool_choice="required", parallel_tool_calls=False)
    assert choice.message.reasoning_content == "Hm."
    assert calls_of(choice) == [("news", {})]


@pytest.mark.parametrize(
    ("more", "said", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice: there are no tools", "tool_choice"),
        ({"tool_choice": "always", "tools": [NEWS]}, "expected none, auto, required or a function", "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools"}, "tools": [NEWS]}, 'expected {"type": "function"', "tool_choice"),
        ({"tool_choice": named("weather"), "tools": [NEWS]}, "'weather' is none of the tools", "tool_choice"),
        ({"parallel_tool_calls": False, "tools": [NEWS]}, "may be false where tool_choice is", "parallel_tool_calls"),
        ({"tool_choice": "required", "tools": [named("a b")]}, "a call cannot be written with that name", "tools"),
        (
            {"tool_choice": "required", "tools": [{"name": "f", "parameters": {"oneOf": []}}]},
            "tool f, parameters: 'oneOf' cannot be enforced",
            "tools",
        ),
        (
            {"tool_choice": "required", "tools": [{"name": "f", "parameters": {"properties": {"a": {"not": {}}}}}]},
            "grammar",
            None,
        ),
    ],
)
def test_what_cannot_be_enforced_says_why(one: Served, more: dict[str, Any], said: str, param: str | None) -> None:
    status, message, named_field = one.refused(
        "/v1/chat/completions", messages=[{"role": "user", "content": "x"}], **more
    )
    assert (status, named_field) == (400, param)
    assert said in message


def test_without_llguidance_a_call_that_must_be_made_is_refused(model: ServedModel) -> None:
    with serving(model) as served, pytest.raises(openai.BadRequestError, match="install llguidance"):
        ask(served, "No.", tools=[NEWS], tool_choice="required")
