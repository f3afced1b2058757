"""Thoughts, text and calls, however an answer is cut into pieces."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.examples import examples

from runtimes.chat.answers import AnswerParser, BrokenCall, Call, Event, Text, Thought, merged
from runtimes.errors import UsageError

CALLS = "<function_calls>get-weather.now(town='Oslo', days=[1, null])\nother.tool(x={\"a\": true})</function_calls>"
TWO = [Call("get-weather.now", {"town": "Oslo", "days": [1, None]}), Call("other.tool", {"x": {"a": True}})]

NO_END = "a string without end at the end"
NO_NAME = "expected the name of a tool at character 6, found '<b>'"
ODD = 'expected the name of an argument at character 2, found "\'</function_calls><f"'


def events(*pieces: str, thinking: bool = False, tools: bool = True) -> list[Event]:
    parser = AnswerParser(thinking=thinking, tools=tools)
    found = [event for piece in pieces for event in parser.push(piece)]
    return merged([*found, *parser.finish()])


@pytest.mark.parametrize(
    ("text", "thinking", "found"),
    [
        ("", False, []),
        ("Hello.", False, [Text("Hello.")]),
        ("  \n", False, [Text("  \n")]),
        ("Hm.</think>\n\nHello.", True, [Thought("Hm."), Text("Hello.")]),
        ("<think>Hm.</think>\n\nHello.", False, [Thought("Hm."), Text("Hello.")]),
        ("\n <think>Hm.</think>", False, [Thought("Hm.")]),
        ("never ending </thin", True, [Thought("never ending </thin")]),
        ("a <think>b</think>", False, [Text("a <think>b</think>")]),
        ("<thinker>", False, [Text("<thinker>")]),
        ("</think>x</think>", True, [Text("x</think>")]),
        ("Let me see.\n" + CALLS, False, [Text("Let me see.\n"), *TWO]),
        ("Hm.</think>" + CALLS + "done", True, [Thought("Hm."), *TWO, Text("done")]),
        (CALLS + CALLS, False, [*TWO, *TWO]),
        ("<function_calls></function_calls>", False, []),
        ("<function_calls>\nf(\n  a=1,\n)\n</function_calls>", False, [Call("f", {"a": 1})]),
        ("<function_calls>f(a='</function_calls>')</function_calls>", False, [Call("f", {"a": "</function_calls>"})]),
        (
            "<function_calls>f(a='\\'</function_calls>')</function_calls>",
            False,
            [Call("f", {"a": "'</function_calls>"})],
        ),
        ("<function_calls>f(a=1)", False, [Call("f", {"a": 1})]),
        ("<function_calls>f(a=1)\ng(b='Os", False, [Call("f", {"a": 1}), BrokenCall("g(b='Os", "cut off")]),
        ("<function_calls>g(b=[1,", False, [BrokenCall("g(b=[1,", "cut off")]),
        ("a <function_cal", False, [Text("a <function_cal")]),
        ("<function_calls>get_wea", False, [BrokenCall("get_wea", "cut off")]),
        ("<function_calls>f(a=1)\nget.", False, [Call("f", {"a": 1}), BrokenCall("get.", "cut off")]),
        ("<function_calls>get_wea</function_calls>", False, [BrokenCall("get_wea", "expected '(' at the end")]),
        ("<function_calls>f(a=1)</function_cal", False, [Call("f", {"a": 1})]),
        ("<function_calls>f(a='</function_calls>')", False, [Call("f", {"a": "</function_calls>"})]),
        ("<function_calls>f(a=1)\n<", False, [Call("f", {"a": 1})]),
        ("<function_calls>f(a=1)<b>", False, [BrokenCall("f(a=1)<b>", NO_NAME)]),
        ("<function_calls>f(a='x)</function_calls>done", False, [BrokenCall("f(a='x)", NO_END), Text("done")]),
        (
            "<function_calls>f(a='</function_calls>', b=\"x)\ng()</function_calls>" + CALLS,
            False,
            [BrokenCall("f(a='", NO_END), Text("', b=\"x)\ng()</function_calls>"), *TWO],
        ),
        (
            "<function_calls>f('</function_calls><function_calls>g('</function_calls>h",
            False,
            [BrokenCall("f('</function_calls><function_calls>g('", ODD), Text("h")],
        ),
        (
            """<function_calls>w(a=\"\"\"def f():\n    return "</function_calls>"\n\"\"\", b="", c='''it's''')
g()</function_calls>.""",
            False,
            [
                Call("w", {"a": 'def f():\n    return "</function_calls>"\n', "b": "", "c": "it's"}),
                Call("g", {}),
                Text("."),
            ],
        ),
        (
            """<function_calls>f(a="\\"", b=\"\"\"\\\"\"\"\")</function_calls>.""",
            False,
            [Call("f", {"a": '"', "b": '"'}), Text(".")],
        ),
        ("<function_calls>f(a='''x)</function_calls>.", False, [BrokenCall("f(a='''x)", NO_END), Text(".")]),
        (
            "<function_calls>f(1)\ng()</function_calls>",
            False,
            [BrokenCall("f(1)", "expected '=' at character 3, found ')'"), Call("g", {})],
        ),
    ],
)
def test_events(text: str, thinking: bool, found: list[Event]) -> None:
    assert events(text, thinking=thinking) == found
    assert events(*text, thinking=thinking) == found  # character by character


def test_without_tools_calls_are_text() -> None:
    assert events(CALLS, tools=False) == [Text(CALLS)]


def test_events_come_as_soon_as_they_are_certain() -> None:
    parser = AnswerParser(tools=True)
    said = [
        parser.push(piece)
        for piece in ("Hel", "lo <", "b> <func", "tion_calls>f()", "\n", "g(a=", "1)", "</function_calls>")
    ]
    text = [Text("Hel")], [Text("lo ")], [Text("<b> ")]
    assert said == [*text, [], [Call("f", {})], [], [], [Call("g", {"a": 1})]]
    assert parser.calls_text == "f()\ng(a=1)"


def test_text_behind_a_quote_that_is_not_closed_is_no_text_of_calls() -> None:
    parser = AnswerParser(tools=True)
    said = parser.push("<function_calls>g()\nf(a='x)</function_calls> It's so.")
    assert [*said, *parser.finish()] == [Call("g", {}), BrokenCall("f(a='x)", NO_END), Text(" It's so.")]
    assert parser.calls_text == "g()\nf(a='x)"


def test_quotes_that_are_never_closed_cost_no_more_than_the_answer_is_long() -> None:
    """Each was mended by reading all that follows it: minutes, for an answer as long as Olmo 3's context."""
    once = "<function_calls>f(\\'</function_calls>"
    found = events(once * 20)
    assert found[:8] == [BrokenCall("f(\\'", 'expected the name of an argument at character 2, found "\\\\\'"')] * 8
    assert found[8:] == [BrokenCall((once * 12).removeprefix("<function_calls>"), "cut off")]


def test_an_answer_that_has_ended_takes_no_more() -> None:
    parser = AnswerParser()
    parser.finish()
    with pytest.raises(UsageError, match="begin another"):
        parser.push("x")


PARTS = (
    "<think>", "</think>", "<function_calls>", "</function_calls>", "f(", ")", "a=", "'", '"', "\\", "[", "]", ",", "1",
    "\n", " ", "<", "</", "think>", "null", "é🌍", "name-x.y(", "f(a='</function_calls>')\n", "g()", "'''", '"""',
)  # fmt: skip


@examples(120)
@given(st.lists(st.sampled_from(PARTS), max_size=14).map("".join), st.data(), st.booleans(), st.booleans())
@example("<think>\n</think>\n<function_calls>f(a='\n", None, False, True)
def test_any_cut_gives_the_events_of_the_whole(
    text: str, data: st.DataObject | None, thinking: bool, tools: bool
) -> None:
    whole = events(text, thinking=thinking, tools=tools)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8))) if data else [1, 5]
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert events(*pieces, thinking=thinking, tools=tools) == whole
    for cut in range(len(text) + 1):  # every place, once
        assert events(text[:cut], text[cut:], thinking=thinking, tools=tools) == whole
    assert events(*text, thinking=thinking, tools=tools) == whole


@examples(50)
@given(st.lists(st.sampled_from(PARTS), max_size=24).map("".join))
def test_without_markers_nothing_is_lost(text: str) -> None:
    found = events(text, tools=False)
    if not text.lstrip().startswith("<think>"):
        assert found == ([Text(text)] if text else [])
