"""Tools for a model whose template has none: a JSON object is a call, anything else is text."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.chat import TOOLS
from support.examples import examples

from runtimes.chat.answers import BrokenCall, Call, Event, Text, merged
from runtimes.chat.json_tools import JsonCallParser, answer_schema, instructions, result
from runtimes.errors import InputError, UsageError

NAME = "get-weather.now"
CALL = json.dumps({"name": NAME, "arguments": {"town": "Oslo", "n": None}})


def events(*pieces: str) -> list[Event]:
    parser = JsonCallParser(TOOLS)
    return merged([*(event for piece in pieces for event in parser.push(piece)), *parser.finish()])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (CALL, [Call(NAME, {"town": "Oslo", "n": None})]),
        (f"\n```json\n{CALL}\n```\n", [Call(NAME, {"town": "Oslo", "n": None})]),
        (f"```\n{CALL}```", [Call(NAME, {"town": "Oslo", "n": None})]),
        (json.dumps({"name": NAME}), [Call(NAME, {})]),
        (json.dumps({"name": NAME, "arguments": [1]}), [BrokenCall(f'{{"name": "{NAME}", "arguments": [1]}}',
                                                                  "arguments are list, expected an object")]),
        (CALL[:-4], [BrokenCall(CALL[:-4], "cut off")]),
        ('{"name": "another"}', [Text('{"name": "another"}')]),
        ('{"name": ["x"]}', [Text('{"name": ["x"]}')]),
        ("{not json}", [Text("{not json}")]),
        ('{"name": NaN}', [Text('{"name": NaN}')]),
        ("```python\nx = 1\n```", [Text("```python\nx = 1\n```")]),
        (f"I call {CALL}", [Text(f"I call {CALL}")]),
        ("", []),
        ("Plain.", [Text("Plain.")]),
    ],
)  # fmt: skip
def test_events(text: str, found: list[Event]) -> None:
    assert events(text) == found
    assert events(*text) == found


@examples(60)
@given(
    st.lists(st.sampled_from(["`", "```", "json", "{", "}", '"name"', ":", "\n", " ", "x", CALL]), max_size=8).map(
        "".join
    )
)
def test_any_cut_gives_the_events_of_the_whole(text: str) -> None:
    whole = events(text)
    for cut in range(len(text) + 1):
        assert events(text[:cut], text[cut:]) == whole


def test_text_is_not_held_back() -> None:
    assert JsonCallParser(TOOLS).push("Hello") == [Text("Hello")]


def test_the_prompt_lists_every_tool_behind_the_system_prompt() -> None:
    text = instructions(TOOLS, "Be brief.")
    assert text.startswith("Be brief.\n\nYou can call functions.")
    assert json.loads(text.splitlines()[-1]) == TOOLS[0]["function"]
    assert instructions([TOOLS[0]["function"]]).startswith("You can call")
    assert result("f", "12") == "The function f returned:\n12"


def test_the_schema_is_that_of_a_call() -> None:
    (one,) = answer_schema(TOOLS)["anyOf"]
    assert one["properties"] == {"name": {"const": NAME}, "arguments": TOOLS[0]["function"]["parameters"]}
    assert one["required"] == ["name", "arguments"]
    (free,) = answer_schema([{"name": "f"}])["anyOf"]
    assert free["properties"]["arguments"] == {"type": "object"}


@pytest.mark.parametrize("tools", [[], [{"type": "function"}], [{"function": {"name": ""}}], ["f"]])
def test_tools_without_names_are_refused(tools: list[dict[str, object]]) -> None:
    with pytest.raises(InputError, match="tool"):
        instructions(tools)


def test_an_answer_that_has_ended_takes_no_more() -> None:
    parser = JsonCallParser(TOOLS)
    parser.finish()
    with pytest.raises(UsageError, match="begin another"):
        parser.push("x")
