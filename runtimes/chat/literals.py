"""Calls as a model writes them, `name(arg=literal, ...)`, to names and values. Nothing is evaluated.

    call    := name "(" [argument ("," argument)* [","]] ")"         name: letters, digits, _ - and .
    argument := name "=" literal
    literal := string+ | number | None | True | False | null | true | false
             | "[" literal, ... "]" | "(" literal, ... ")" | "{" string ":" literal, ... "}"
    string  := '...' or "...", or between three of these, with the escapes of Python and of JSON; lines may end in it

Olmo 3 was trained on Python's calls with JSON's literals in them; both are read. Names of tools hold - and . elsewhere,
so they may here.
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

from runtimes.errors import InputError

_NAME = re.compile(r"[\w.-]+")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?![\w.])")
_WORD = re.compile(r"[A-Za-z]+(?![\w(])")
_WORDS: dict[str, Any] = {"None": None, "null": None, "True": True, "true": True, "False": False, "false": False}
_PLAIN = re.compile(r"[^\\'\"]+")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v", "0": "\0", "\n": ""}
_CODES = {"x": 2, "u": 4, "U": 8}
_CLOSERS = {"[": "]", "(": ")"}
_SPACE = re.compile(r"\s*")
_DEEPEST = 64
_LONGEST_NUMBER = 400  # characters


class LiteralError(InputError):
    """A call that is not written as the grammar says; the message says where, in one line."""

    def __init__(self, message: str, *, at_end: bool) -> None:
        super().__init__(message)
        self.at_end = at_end
        """more text might have made it one"""


class ParsedCall(NamedTuple):
    """A call."""

    name: str
    arguments: dict[str, Any]


def parse_calls(text: str) -> list[ParsedCall]:
    """Return the calls of a text; between them white space, commas or semicolons.

    Raises:
        LiteralError: it is anything else.
    """
    reader, calls = _Reader(text), list[ParsedCall]()
    while not reader.at_end():
        calls.append(reader.call())
        while reader.take(",") or reader.take(";"):
            pass
    return calls


class _Reader:
    """Reads a text from left to right."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._depth = 0

    def at_end(self) -> bool:
        self._skip()
        return self._at == len(self._text)

    def take(self, mark: str) -> bool:
        self._skip()
        found = self._text.startswith(mark, self._at)
        self._at += len(mark) if found else 0
        return found

    def call(self) -> ParsedCall:
        name = self._match(_NAME, "the name of a tool")
        self._expect("(")
        arguments: dict[str, Any] = {}
        while not self.take(")"):
            key = self._match(_NAME, "the name of an argument")
            self._expect("=")
            if key in arguments:
                raise self._error(f"a second {key!r}")
            arguments[key] = self._literal()
            if not self.take(","):
                self._expect(")")
                break
        return ParsedCall(name, arguments)

    def _literal(self) -> Any:
        self._skip()
        start = self._text[self._at : self._at + 1]
        if start in ("'", '"'):
            return self._strings()
        if start in ("[", "(", "{"):
            self._depth += 1
            if self._depth > _DEEPEST:
                raise self._error(f"more than {_DEEPEST} levels")
            self._at += 1
            found = self._object() if start == "{" else self._list(_CLOSERS[start])
            self._depth -= 1
            return found
        if match := _NUMBER.match(self._text, self._at):
            return self._number(match)
        if (match := _WORD.match(self._text, self._at)) and match[0] in _WORDS:
            self._at = match.end()
            return _WORDS[match[0]]
        raise self._error("expected a string, a number, a list, an object, null, true or false")

    def _number(self, match: re.Match[str]) -> int | float:
        text = match[0]
        if len(text) > _LONGEST_NUMBER:
            raise self._error(f"a number of {len(text)} characters")
        whole = text.lstrip("+-").isdigit()
        value = int(text) if whole else float(text)
        if isinstance(value, float) and not math.isfinite(value):
            raise self._error(f"{text} is too large")
        self._at = match.end()
        return value

    def _list(self, closer: str) -> list[Any]:
        found: list[Any] = []
        while not self.take(closer):
            found.append(self._literal())
            if not self.take(","):
                self._expect(closer)
                break
        return found

    def _object(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while not self.take("}"):
            self._skip()
            if self._text[self._at : self._at + 1] not in ("'", '"'):
                raise self._error("expected a key in quotes")
            key = self._strings()
            self._expect(":")
            if key in found:
                raise self._error(f"a second {key!r}")
            found[key] = self._literal()
            if not self.take(","):
                self._expect("}")
                break
        return found

    def _strings(self) -> str:
        """Read one string or several behind each other, which are one, as in Python."""
        parts: list[str] = []
        while self._text[self._at : self._at + 1] in ("'", '"'):
            parts.append(self._string())
            self._skip()
        text = "".join(parts)
        # JSON writes a character beyond 16 bits as two escapes; one alone is no character.
        whole = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        return whole if any("\ud800" <= c <= "\udfff" for c in text) else text

    def _string(self) -> str:
        quote = self._text[self._at]
        quote *= 3 if self._text.startswith(3 * quote, self._at) else 1
        self._at += len(quote)
        parts: list[str] = []
        while True:
            if match := _PLAIN.match(self._text, self._at):
                parts.append(match[0])
                self._at = match.end()
            char = self._text[self._at : self._at + 1]
            if not char:
                raise self._error("a string without end")
            if self._text.startswith(quote, self._at):
                self._at += len(quote)
                return "".join(parts)
            self._at += 1
            parts.append(self._escape() if char == "\\" else char)

    def _escape(self) -> str:
        char = self._text[self._at : self._at + 1]
        self._at += 1
        if char in _CODES:
            digits = self._text[self._at : self._at + _CODES[char]]
            code = int(digits, 16) if re.fullmatch(f"[0-9a-fA-F]{{{_CODES[char]}}}", digits) else 0x110000
            if code > 0x10FFFF:
                raise self._error(f"expected {_CODES[char]} hexadecimal digits of a character")
            self._at += _CODES[char]
            return chr(code)
        if not char:
            raise self._error("a string without end")
        return _ESCAPES.get(char, char if char in "\\'\"/" else "\\" + char)

    def _match(self, pattern: re.Pattern[str], what: str) -> str:
        self._skip()
        match = pattern.match(self._text, self._at)
        if match is None:
            raise self._error(f"expected {what}")
        self._at = match.end()
        return match[0]

    def _expect(self, mark: str) -> None:
        if not self.take(mark):
            raise self._error(f"expected {mark!r}")

    def _skip(self) -> None:
        match = _SPACE.match(self._text, self._at)
        self._at = match.end() if match else self._at

    def _error(self, problem: str) -> LiteralError:
        near = self._text[self._at : self._at + 20]
        where = f"at character {self._at}, found {near!r}" if near else "at the end"
        return LiteralError(f"{problem} {where}", at_end=not near)
