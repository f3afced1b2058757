"""Messages of a chat: what each may hold, and the form in which a template gets them.

| field               | of role               | is                                                                  |
|---------------------|-----------------------|---------------------------------------------------------------------|
| role                | all                   | system, user, assistant, tool, environment (Olmo 3's word for tool) |
| content             | all                   | text; may be missing or null beside calls                           |
| reasoning_content   | assistant             | what it thought, for templates that show it again                   |
| tool_calls          | assistant             | [{"type": "function", "function": {"name", "arguments"}}]           |
| function_calls      | assistant             | the same as the model wrote it; Olmo 3's template takes it first    |
| functions           | system                | tools as text, as Olmo 3's template takes them                      |

Other fields are passed on. `arguments` is an object, or, as OpenAI's API has it, JSON text of one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from runtimes.errors import InputError

Message: TypeAlias = Mapping[str, Any]

ROLES = ("system", "user", "assistant", "tool", "environment")
RESULTS = ("tool", "environment")
"""roles of what a tool gave"""
_REASONING = ("reasoning_content", "thinking", "reasoning")


def checked_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return messages as a template gets them; fields that are null are left out, as in transformers.

    Raises:
        InputError: there is none, or one is not what the table says.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise InputError(f"messages: expected a list of objects, found {type(messages).__name__}")
    if not messages:
        raise InputError("messages: expected at least one, found none")
    return [_checked(message, f"message {number}") for number, message in enumerate(messages, 1)]


def checked_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Return tools as a template gets them; None where there are none.

    Args:
        tools: `{"type": "function", "function": {"name", "description", "parameters": JSON schema}}` each, or the inner
            object alone.

    Raises:
        InputError: one has no name.
    """
    found = []
    for number, tool in enumerate(tools or (), 1):
        inner = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str) or not inner["name"]:
            raise InputError(
                f'tool {number}: expected {{"type": "function", "function": {{"name": ..., "parameters": ...}}}}, '
                f"found {str(tool)[:80]}"
            )
        found.append(dict(tool))
    return found or None


def _checked(message: Message, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InputError(f"{where}: expected an object, found {type(message).__name__}")
    found = {name: value for name, value in message.items() if value is not None}
    role = found.get("role")
    if role not in ROLES:
        raise InputError(f"{where}: role {role!r}, expected one of {', '.join(ROLES)}")
    called = role == "assistant" and ("tool_calls" in found or "function_calls" in found)
    if "content" not in found and not called:
        raise InputError(f"{where}: no content, expected a string")
    for name in ("content", "function_calls", "functions", *_REASONING):
        if name in found and not isinstance(found[name], str):
            raise InputError(f"{where}: {name} is {type(found[name]).__name__}, expected a string")
    if "tool_calls" in found:
        found["tool_calls"] = _checked_calls(found["tool_calls"], where)
    reasoning = next((found[name] for name in _REASONING if name in found), None)
    return found if reasoning is None else {"thinking": reasoning, **found, "reasoning_content": reasoning}


def _checked_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise InputError(f"{where}: tool_calls is {type(calls).__name__}, expected a list")
    return [_checked_call(call, f"{where}, call {number}") for number, call in enumerate(calls, 1)]


def _checked_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InputError(f'{where}: expected {{"function": {{"name": ..., "arguments": ...}}}}, found {str(call)[:80]}')
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: arguments are no JSON ({error})") from error
    if not isinstance(arguments, Mapping):
        raise InputError(f"{where}: arguments are {type(arguments).__name__}, expected an object")
    return {**call, "function": {**function, "arguments": dict(arguments)}}
