"""JSON from strangers: UTF-8, no NaN, no key twice, no half of a surrogate pair, not nested deeply; and the fields of
an object, read by name and type, of which none is left over."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from runtimes.serve.problems import CallError

MOST_DEPTH = 64
"""objects and lists in each other"""

_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_object(data: bytes) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        CallError: it is none; says why, and not what is in it.
    """
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise CallError(f"body: byte {error.start} is not UTF-8; send JSON in UTF-8") from error
    _check_depth(data)
    try:
        found = json.loads(
            text, object_pairs_hook=_object, parse_constant=_refuse_constant, parse_float=_finite, parse_int=_integer
        )
    except json.JSONDecodeError as error:
        raise CallError(f"body: not valid JSON ({error.msg}, line {error.lineno}, column {error.colno})") from error
    if not isinstance(found, dict):
        raise CallError(f"body: expected a JSON object, found {kind_of(found)}")
    if _SURROGATE.search(text):
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise CallError("body: a string holds half of a surrogate pair; expected valid Unicode") from error
    return found


def kind_of(value: object) -> str:
    """Return what JSON calls the type of a value."""
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "a list"
        case _:
            return "an object"


def _check_depth(data: bytes) -> None:
    depth = 0
    for char in _STRING.sub(b"", data).translate(None, _NO_BRACKETS):
        depth += 1 if char in b"[{" else -1
        if depth > MOST_DEPTH:
            raise CallError(f"body: nested more than {MOST_DEPTH} deep")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise CallError(f"body: the key {twice[:64]!r} stands twice in an object")
    return found


def _refuse_constant(word: str) -> None:
    raise CallError(f"body: {word} is no JSON")


def _finite(word: str) -> float:
    value = float(word)
    if not math.isfinite(value):
        raise CallError(f"body: {word[:32]} is no number that fits")
    return value


def _integer(word: str) -> int:
    if len(word) > 20:
        raise CallError(f"body: a whole number of {len(word)} digits")
    return int(word)


class Fields:
    """The fields of a JSON object. Each that is null counts as missing; `done` refuses those that nobody asked for."""

    def __init__(self, given: Mapping[str, Any], where: str = "") -> None:
        """Take an object.

        Args:
            given: it, parsed.
            where: it stands, for the names of its fields: `stream_options.`.
        """
        self._left = {name: value for name, value in given.items() if value is not None}
        self._where = where

    def name(self, field: str) -> str:
        """Return the name of a field as a client reads it."""
        return f"{self._where}{field}"

    def any(self, field: str) -> Any:
        """Return a value of any type; None: it is missing."""
        return self._left.pop(field, None)

    def text(self, field: str) -> str | None:
        """Return a string; None: it is missing."""
        value: str | None = self._typed(field, str, "a string")
        return value

    def flag(self, field: str, *, missing: bool = False) -> bool:
        """Return whether it is true; `missing` where it is not there."""
        value: bool | None = self._typed(field, bool, "true or false")
        return missing if value is None else value

    def integer(self, field: str, least: int, most: int) -> int | None:
        """Return a whole number of a range; None: it is missing."""
        value = self.any(field)
        if value is None:
            return None
        if type(value) is not int or not least <= value <= most:
            found = value if type(value) is int else kind_of(value)
            raise CallError(
                f"{self.name(field)}: expected an integer from {least} to {most}, found {found}", self.name(field)
            )
        return value

    def number(self, field: str, least: float, most: float) -> float | None:
        """Return a number of a range; None: it is missing."""
        value = self.any(field)
        if value is None:
            return None
        if type(value) not in (int, float) or not least <= value <= most:
            found = value if type(value) in (int, float) else kind_of(value)
            raise CallError(
                f"{self.name(field)}: expected a number from {least:g} to {most:g}, found {found}", self.name(field)
            )
        return float(value)

    def object(self, field: str) -> Fields | None:
        """Return an object's fields; None: it is missing."""
        value = self._typed(field, dict, "an object")
        return None if value is None else Fields(value, f"{self.name(field)}.")

    def list(self, field: str, most: int) -> list[Any] | None:
        """Return a list of some values at most; None: it is missing."""
        value: list[Any] | None = self._typed(field, list, "a list")
        if value is not None and len(value) > most:
            raise CallError(f"{self.name(field)}: {len(value)} entries, at most {most} are taken", self.name(field))
        return value

    def done(self) -> None:
        """Refuse what is left.

        Raises:
            CallError: naming a field.
        """
        for field in self._left:
            name = self.name(field)[:128]
            raise CallError(f"{name}: a field that this server does not know; leave it out", name)

    def _typed(self, field: str, kind: type, words: str) -> Any:
        value = self.any(field)
        if value is not None and type(value) is not kind:
            raise CallError(f"{self.name(field)}: expected {words}, found {kind_of(value)}", self.name(field))
        return value
