"""Calls of tools as a grammar, so that a model can be held to them: `answers.AnswerParser` reads what it allows.

    <function_calls>
    weather(town="Bern", days=3)
    </function_calls>

Arguments come in the order of the schema, each as JSON of its own; those that are not required may be missing, and no
others are there. What a schema says of all arguments together cannot be said in this form, and is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from runtimes.chat.answers import CALLED, CALLS
from runtimes.errors import InputError
from runtimes.text.structured import json_rule

RULE = "calls"
"""the name of the rule that begins them"""

_NAME = re.compile(r"[\w.-]+")
_DEFINITIONS = ("$defs", "definitions")
_SAID = {"type", "properties", "required", "additionalProperties", "description", "title", "$schema", *_DEFINITIONS}


def call_rules(tools: Sequence[Mapping[str, Any]], *, several: bool) -> str:
    """Return rules of a Lark grammar, in llguidance's dialect; `RULE` is a text of calls.

    Args:
        tools: that may be called, at least one; see `runtimes.chat.messages.checked_tools`.
        several: one call or more; else exactly one.

    Raises:
        InputError: a name cannot be written as a call, or a schema says what cannot be held to.
    """
    functions = [tool.get("function", tool) for tool in tools]
    again = ' ("\\n" call)*' if several else ""
    names = " | ".join(f"tool_{number}" for number in range(len(functions)))
    rules = [f'{RULE}: "{CALLS}\\n" call{again} "\\n{CALLED}"', f"call: {names}"]
    for number, function in enumerate(functions):
        rules += _tool_rules(f"tool_{number}", function)
    return "\n".join(rules)


def _tool_rules(rule: str, function: Mapping[str, Any]) -> list[str]:
    """Two rules for each argument: as the first that is written, and behind another."""
    name, schema = function["name"], function.get("parameters") or {}
    _check_name(name, f"tool {name[:64]!r}")
    where = f"tool {name}, parameters"
    if not isinstance(schema, Mapping) or schema.get("type", "object") != "object":
        raise InputError(f"{where}: expected a JSON schema of an object")
    unknown = sorted(set(schema) - _SAID)
    if unknown:
        raise InputError(f"{where}: {unknown[0][:64]!r} cannot be enforced where a call is; leave it out")
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, Mapping) or not isinstance(required, list):
        raise InputError(f"{where}: expected properties to be an object, and required a list")
    missing = [str(key) for key in required if key not in properties]
    if missing:
        raise InputError(f"{where}: {missing[0][:64]!r} is required, and no property")
    rules = [f"{rule}: {_text(name + '(')} {rule}_first_0 {_text(')')}"]
    for number, (key, value) in enumerate(properties.items()):
        _check_name(key, f"{where}, property {key[:64]!r}")
        if not isinstance(value, Mapping):
            raise InputError(f"{where}, property {key}: expected a JSON schema that is an object")
        following = f"{rule}_more_{number + 1}"
        definitions = {name: schema[name] for name in _DEFINITIONS if name in schema}
        rules.append(f"{rule}_value_{number}: {json_rule({**definitions, **value})}")
        for kind, comma in (("first", ""), ("more", ", ")):
            skipped = "" if key in required else f" | {rule}_{kind}_{number + 1}"
            written = f"{_text(f'{comma}{key}=')} {rule}_value_{number} {following}"
            rules.append(f"{rule}_{kind}_{number}: {written}{skipped}")
    rules += [f'{rule}_{kind}_{len(properties)}: ""' for kind in ("first", "more")]
    return rules


def _check_name(name: str, where: str) -> None:
    if not _NAME.fullmatch(name):
        raise InputError(f"{where}: a call cannot be written with that name; expected letters, digits, _ - and .")


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
