"""JSON from strangers: what is refused, in which words, and how soon."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import pytest

from runtimes.serve.problems import CallError
from runtimes.serve.strict_json import Fields, parse_object


def refused(data: bytes) -> str:
    with pytest.raises(CallError) as caught:
        parse_object(data)
    assert caught.value.status == 400
    return str(caught.value)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"a": 1,}', "not valid JSON"),
        (b"[1]", "expected a JSON object, found a list"),
        (b'"text"', "expected a JSON object, found a string"),
        (b"null", "expected a JSON object, found null"),
        (b'{"a": "\xff"}', "byte 7 is not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "byte 0 is not UTF-8"),
        ('{"a": 1}'.encode("utf-16-le"), "not valid JSON"),
        (b'\xef\xbb\xbf{"a": 1}', "not valid JSON"),
        (b'{"a": NaN}', "NaN is no JSON"),
        (b'{"a": -Infinity}', "-Infinity is no JSON"),
        (b'{"a": 1e999}', "1e999 is no number that fits"),
        (b'{"a": ' + b"9" * 5000 + b"}", "a whole number of 5000 digits"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' stands twice"),
        (b'{"a": "\\ud800"}', "half of a surrogate pair"),
        (b'{"\\udc00": 1}', "half of a surrogate pair"),
        (b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}", "nested more than 64 deep"),
    ],
)
def test_what_is_no_good_json_is_refused(data: bytes, said: str) -> None:
    assert said in refused(data)


def test_what_is_good_is_taken() -> None:
    data = '{"a": "\\ud83d\\ude00 [[[[ \\" {{{{", "b": [1, 2.5e3, -0], "c": {"d": null, "é": true}}'.encode()
    assert parse_object(data) == {"a": '😀 [[[[ " {{{{', "b": [1, 2500.0, 0], "c": {"d": None, "é": True}}
    assert parse_object(b"{" + b'"a": ' + b"[" * 63 + b"]" * 63 + b"}")


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 200_000,
        b'{"a":' * 150_000,
        b'{"a": "' + b"[" * 1_000_000 + b'"}',
        b'{"a": "' + b'\\"' * 500_000,
        b'{"a": [' + b"[]," * 300_000 + b"[]]}",
    ],
    ids=["brackets", "objects", "a string of brackets", "escapes without an end", "many lists"],
)
def test_a_mebibyte_of_anything_takes_no_long_time(data: bytes) -> None:
    began = time.process_time()
    with contextlib.suppress(CallError):
        parse_object(data)
    assert time.process_time() - began < 15  # 0.1 s where nothing else runs; what grows with the square takes minutes


@pytest.mark.parametrize(
    ("call", "value", "said"),
    [
        (lambda f: f.integer("n", 1, 4), "2", "n: expected an integer from 1 to 4, found a string"),
        (lambda f: f.integer("n", 1, 4), True, "n: expected an integer from 1 to 4, found a boolean"),
        (lambda f: f.integer("n", 1, 4), 2.0, "n: expected an integer from 1 to 4, found a number"),
        (lambda f: f.integer("n", 1, 4), 10**6, "n: expected an integer from 1 to 4, found 1000000"),
        (lambda f: f.number("n", 0, 2), 2.5, "n: expected a number from 0 to 2, found 2.5"),
        (lambda f: f.number("n", 0, 2), False, "found a boolean"),
        (lambda f: f.text("n"), 1, "n: expected a string, found a number"),
        (lambda f: f.flag("n"), 1, "n: expected true or false, found a number"),
        (lambda f: f.object("n"), [1], "n: expected an object, found a list"),
        (lambda f: f.list("n", 2), {"a": 1}, "n: expected a list, found an object"),
        (lambda f: f.list("n", 2), [1, 2, 3], "n: 3 entries, at most 2"),
    ],
)
def test_fields_have_their_types(call: Any, value: Any, said: str) -> None:
    with pytest.raises(CallError) as caught:
        call(Fields({"n": value}))
    assert said in str(caught.value)
    assert caught.value.param == "n"


def test_a_field_that_nobody_asked_for_is_named_and_null_is_none() -> None:
    fields = Fields({"a": 1, "b": None, "inner": {"c": 1}})
    assert fields.integer("a", 0, 9) == 1
    assert fields.text("b") is None
    inner = fields.object("inner")
    assert inner is not None
    with pytest.raises(CallError, match=r"inner\.c: a field that this server does not know"):
        inner.done()
    fields.done()
