"""Calls written in Python's or JSON's literals, read without evaluating anything."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.examples import examples

from runtimes.chat.literals import LiteralError, parse_calls

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("f()", {}),
        ("f(a=1, b=-2.5, c=1e3, d=+7, e=.5)", {"a": 1, "b": -2.5, "c": 1000.0, "d": 7, "e": 0.5}),
        ("f(a=null, b=None, c=true, d=True, e=false, f=False)",
         {"a": None, "b": None, "c": True, "d": True, "e": False, "f": False}),
        ("f(a='it\\'s', b=\"say \\\"x\\\"\")", {"a": "it's", "b": 'say "x"'}),
        (r"f(a='\n\t\\\/\x41\u00e9\U0001f30d\q')", {"a": "\n\t\\/Aé🌍\\q"}),
        (r"f(a='\ud83c\udf0d', b='\ud83c')", {"a": "🌍", "b": "\ufffd"}),
        ("f(a='''two\nlines''', b='ab' \"cd\")", {"a": "two\nlines", "b": "abcd"}),
        ("f(a='''it's \"it\"''', b=\"\"\" \"\"\\\"\"\"\" 'c')", {"a": "it's \"it\"", "b": ' """c'}),
        ("f(a='', b=\"\" \"\", c='''''')", {"a": "", "b": "", "c": ""}),
        ("f(a=[1, [2, {'k': (3, null)}],], b={}, c=(), d={\"x\": {'y': []}},)",
         {"a": [1, [2, {"k": [3, None]}]], "b": {}, "c": [], "d": {"x": {"y": []}}}),
        ("f( a = 1 ,\n  b = [ ] )", {"a": 1, "b": []}),
        ("f(a='f(b=1)\\n</function_calls>')", {"a": "f(b=1)\n</function_calls>"}),
        ("f(the-arg=1, an.other=2)", {"the-arg": 1, "an.other": 2}),
    ],
)  # fmt: skip
def test_values(text: str, arguments: dict[str, Any]) -> None:
    assert parse_calls(text) == [("f", arguments)]


def test_names_and_several_calls() -> None:
    text = "get-weather.now(town='Oslo')\n\nns.tool_2()\n3d(x=1), last(), "
    assert [call.name for call in parse_calls(text)] == ["get-weather.now", "ns.tool_2", "3d", "last"]
    assert parse_calls(" \n ") == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("f(1)", "expected '='"),
        ("f(a=1, a=2)", "a second 'a'"),
        ("f(a=__import__('os'))", "expected a string"),
        ("f(a=1+1)", "expected ')'"),
        ("f(a=b)", "expected a string"),
        ("f(a=lambda: 1)", "expected a string"),
        ("f(a=f'{x}')", "expected a string"),
        ("f(a=nan, b=1)", "expected a string"),
        ("f(a=1e999)", "too large"),
        ("f(a=" + "9" * 500 + ")", "a number of 500 characters"),
        ("f(a={1: 2})", "a key in quotes"),
        ("f(a={'k': 1, 'k': 2})", "a second 'k'"),
        ("f(a=" + "[" * 65 + "]" * 65 + ")", "more than 64 levels"),
        ("f(a=" + "[" * 100_000, "more than 64 levels"),
        ("f(a=[1, 2", "expected ']' at the end"),
        ("f(a='x", "a string without end"),
        ("f(a='x\\", "a string without end"),
        (r"f(a='\u12')", "4 hexadecimal digits"),
        (r"f(a='\Uffffffff')", "8 hexadecimal digits"),
        ("f(a=1_000)", "expected a string"),
        ("f(a=1", "expected ')' at the end"),
        ("f a", "expected '('"),
        ("I would call f()", "expected '('"),
        ("f() and more", "expected '('"),
    ],
)
def test_what_is_no_call_says_where(text: str, words: str) -> None:
    with pytest.raises(LiteralError) as caught:
        parse_calls(text)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@examples(40)
@given(st.dictionaries(st.from_regex(r"[A-Za-z_][\w.-]*", fullmatch=True), JSON, max_size=4))
def test_what_a_template_writes_is_read_back(arguments: dict[str, Any]) -> None:
    """The template writes values as JSON; Python's own form of them is read too."""
    as_json = ", ".join(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in arguments.items())
    assert parse_calls(f"a.tool-1({as_json})") == [("a.tool-1", arguments)]
    assert parse_calls(f"f({', '.join(f'{key}={value!r}' for key, value in arguments.items())})") == [("f", arguments)]


@examples(150)
@given(st.text(st.sampled_from("fx=,()[]{}'\"\\ \n1-.eunlNoT:"), max_size=30))
def test_any_text_is_calls_or_one_error(text: str) -> None:
    try:
        parse_calls(text)
    except LiteralError:
        return
