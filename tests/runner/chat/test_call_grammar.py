"""Calls as a grammar: whatever it lets a model write is read as calls that the schemas allow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runtimes
from runtimes.chat.answers import AnswerParser, Call, Event
from runtimes.chat.call_grammar import RULE, call_rules
from runtimes.errors import InputError
from runtimes.text.structured import Form, StructuredOutput
from runtimes.text.tokenizer import Tokenizer

pytest.importorskip("llguidance")

DEMO = Path(runtimes.__file__).parents[1] / "olmo2_export" / "demo"
VOCABULARY: int = json.loads((DEMO / "config.json").read_text())["vocab_size"]
WEATHER: dict[str, Any] = {
    "name": "weather",
    "parameters": {
        "type": "object",
        "properties": {
            "town": {"type": "string", "maxLength": 6},
            "days": {"$ref": "#/$defs/few"},
            "units": {"enum": ["C", "F", None]},
            "raw": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
        },
        "required": ["days"],
        "additionalProperties": False,
        "$defs": {"few": {"type": "integer", "minimum": 1, "maximum": 9}},
    },
}
NOTHING: dict[str, Any] = {"type": "function", "function": {"name": "do-nothing.now"}}


@pytest.fixture(scope="module")
def made() -> tuple[Tokenizer, StructuredOutput]:
    tokenizer = Tokenizer.from_folder(DEMO)
    return tokenizer, StructuredOutput(tokenizer, VOCABULARY)


def written(made: tuple[Tokenizer, StructuredOutput], lark: str, seed: int) -> str:
    """What a model that likes any token as well as another writes under a grammar."""
    tokenizer, structured = made
    rule = structured.of(Form("grammar", lark))
    rule.begin([])
    random = np.random.default_rng(seed)
    ids: list[int] = []
    while len(ids) < 2000:
        logits = random.gumbel(size=VOCABULARY).astype(np.float32)
        rule.apply(logits)
        ids.append(int(logits.argmax()))
        if ids[-1] in tokenizer.eos_token_ids:
            return tokenizer.decode(ids[:-1])
        rule.push(ids[-1])
    raise AssertionError("it does not end")


def events_of(text: str) -> list[Event]:
    parser = AnswerParser(tools=True)
    return [*parser.push(text), *parser.finish()]


def test_what_it_allows_is_read_as_calls_of_the_tools(made: tuple[Tokenizer, StructuredOutput]) -> None:
    lark = f"start: {RULE}\n{call_rules([WEATHER, NOTHING], several=True)}"
    names: set[str] = set()
    keys: set[str] = set()
    counts = set()
    for seed in range(30):
        events = events_of(written(made, lark, seed))
        calls = [event for event in events if isinstance(event, Call)]
        assert len(calls) == len(events) >= 1, events
        counts.add(len(calls))
        for call in calls:
            names.add(call.name)
            keys |= set(call.arguments)
            if call.name == "weather":
                assert 1 <= call.arguments["days"] <= 9
                assert len(call.arguments.get("town", "")) <= 6
                assert call.arguments.get("units") in ("C", "F", None)
                assert all(type(value) is bool for value in call.arguments.get("raw", []))
            else:
                assert call.arguments == {}
    assert names == {"weather", "do-nothing.now"}
    assert keys == {"town", "days", "units", "raw"}
    assert len(counts) > 1


def test_one_call_is_one(made: tuple[Tokenizer, StructuredOutput]) -> None:
    lark = f"start: {RULE}\n{call_rules([NOTHING], several=False)}"
    assert {written(made, lark, seed) for seed in range(5)} == {"<function_calls>\ndo-nothing.now()\n</function_calls>"}


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ({"name": "a b"}, "tool 'a b': a call cannot be written with that name"),
        ({"name": "f", "parameters": {"type": "array"}}, "expected a JSON schema of an object"),
        ({"name": "f", "parameters": {"anyOf": []}}, "tool f, parameters: 'anyOf' cannot be enforced"),
        ({"name": "f", "parameters": {"properties": []}}, "expected properties to be an object"),
        ({"name": "f", "parameters": {"required": ["x"]}}, "'x' is required, and no property"),
        ({"name": "f", "parameters": {"properties": {"a b": {}}}}, "property 'a b': a call cannot be written"),
        ({"name": "f", "parameters": {"properties": {"a": True}}}, "property a: expected a JSON schema"),
    ],
)
def test_what_it_cannot_hold_a_model_to_is_refused(function: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        call_rules([function], several=False)
    assert said in str(caught.value)


def test_a_form_may_have_others_as_parts(made: tuple[Tokenizer, StructuredOutput]) -> None:
    tokenizer, structured = made
    parts = (
        ("json", Form("json_schema", json.dumps({"type": "boolean"}))),
        ("word", Form("regex", "(yes|no)/")),
        ("lark", Form("grammar", 'start: "maybe"')),
    )
    form = Form("grammar", 'start: @json " " @word " " @lark', parts)
    rule = structured.of(form)
    for token_id in tokenizer.encode("true yes/ maybe", add_special_tokens=False):
        rule.push(token_id)
    assert rule.complete
    for wrong in (Form("json_schema", '{"not": {}}'), Form("regex", "("), form):
        with pytest.raises(InputError):
            structured.of(Form("grammar", "start: @a", (("a", wrong),)))
