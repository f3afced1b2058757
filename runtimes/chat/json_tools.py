"""Tools for a model whose template has none, as OLMo 2's: they are listed in the system prompt, and a call is an answer
that is a JSON object.

    messages = [{"role": "system", "content": instructions(tools, system)}, ...]
    schema = answer_schema(tools)     # for whoever can hold a sampler to a JSON schema; nothing here needs it
    events = JsonCallParser(tools)    # pushed piece by piece, as AnswerParser
    messages += [{"role": "user", "content": result("weather", "12 degrees")}]

Such a model was not trained to do so, and small ones often do not. An answer that is no call is text, never an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from runtimes.chat.answers import BrokenCall, Call, Event, Text
from runtimes.chat.messages import checked_tools
from runtimes.errors import InputError, UsageError

_FENCES = ("```json", "```")
_ASK = (
    "You can call functions. To call one, answer with a JSON object and nothing else:\n"
    '{"name": "the function\'s name", "arguments": {"an argument\'s name": its value}}\n'
    "You are then told what it returned. If no function is needed, answer in plain text.\n"
    "The functions, with a JSON schema of their arguments each:\n"
)


def instructions(tools: Sequence[Mapping[str, Any]], system: str | None = None) -> str:
    """Return a system prompt that lists tools and says how to call one.

    Args:
        tools: see `runtimes.chat.messages.checked_tools`; at least one.
        system: what the system prompt says besides, in front.

    Raises:
        InputError: no tool, or one has no name.
    """
    lines = [json.dumps(function, ensure_ascii=False) for function in _functions(tools)]
    return f"{system}\n\n{_ASK}" + "\n".join(lines) if system else _ASK + "\n".join(lines)


def answer_schema(tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the JSON schema of a call of any of these tools, for a sampler that is held to it.

    Raises:
        InputError: no tool, or one has no name.
    """
    return {
        "anyOf": [
            {
                "type": "object",
                "properties": {
                    "name": {"const": function["name"]},
                    "arguments": function.get("parameters") or {"type": "object"},
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for function in _functions(tools)
        ]
    }


def result(name: str, content: str) -> str:
    """Return what a tool gave, as the text of a user's message: the template knows no other role for it."""
    return f"The function {name} returned:\n{content}"


class JsonCallParser:
    """Takes an answer in pieces: one that begins with `{`, or a fence of code around one, is held until its end.

    As `AnswerParser`, but for thoughts. An object that names none of the tools is text.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        """Begin an answer.

        Args:
            tools: those that may be called.

        Raises:
            InputError: no tool, or one has no name.
        """
        self._names = {function["name"] for function in _functions(tools)}
        self._held = ""
        self._plain = False
        self._ended = False
        self.calls_text = ""
        """the call as the model wrote it"""

    def push(self, piece: str) -> list[Event]:
        """Take the next piece; return the events that are certain now.

        Raises:
            UsageError: the answer has ended.
        """
        if self._ended:
            raise UsageError("the answer has ended; begin another parser")
        self._held += piece
        begun = self._held.lstrip()
        fence = any(f.startswith(begun) or begun.startswith(f) for f in _FENCES)
        self._plain = self._plain or not (not begun or begun.startswith("{") or fence)
        if not self._plain:
            return []
        text, self._held = self._held, ""
        return [Text(text)] if text else []

    def finish(self) -> list[Event]:
        """End the answer; return what was left of it."""
        self._ended = True
        text, self._held = self._held, ""
        if self._plain or not text:
            return [Text(text)] if text else []
        bare = _unfenced(text)
        try:
            found = json.loads(bare, parse_constant=_refuse_constant)
        except (ValueError, RecursionError):
            cut_off = bare.startswith("{") and bare.count("{") > bare.count("}")
            self.calls_text = text if cut_off else ""
            return [BrokenCall(text.strip(), "cut off") if cut_off else Text(text)]
        if isinstance(found, dict) and isinstance(found.get("name"), str) and found["name"] in self._names:
            arguments = found.get("arguments", {})
            self.calls_text = text
            if isinstance(arguments, dict):
                return [Call(found["name"], arguments)]
            return [BrokenCall(text.strip(), f"arguments are {type(arguments).__name__}, expected an object")]
        return [Text(text)]


def _unfenced(text: str) -> str:
    bare = text.strip()
    for fence in _FENCES:
        if bare.startswith(fence):
            return bare.removeprefix(fence).removesuffix("```").strip()
    return bare


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is no JSON")


def _functions(tools: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    checked = checked_tools(tools)
    if checked is None:
        raise InputError("tools: expected at least one, found none")
    return [tool.get("function", tool) for tool in checked]
