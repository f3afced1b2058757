"""The bodies of calls: fields of OpenAI's API, and some of vLLM's, to what the engine takes; others are refused.

| fields of both                                                       | of           |
|----------------------------------------------------------------------|--------------|
| model, n, seed, stop, stream, stream_options, temperature, top_p,    | OpenAI's API |
| presence_penalty, frequency_penalty, logit_bias, response_format,    |              |
| user                                                                 |              |
| top_k, min_p, repetition_penalty, return_token_ids                   | vLLM         |
| of completions: prompt, max_tokens, logprobs, echo                   | OpenAI's API |
| of chats: messages, max_tokens, max_completion_tokens, logprobs,     | OpenAI's API |
| top_logprobs, tools, tool_choice, parallel_tool_calls                |              |
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from runtimes.chat.answers import THOUGHT
from runtimes.chat.call_grammar import RULE, call_rules
from runtimes.chat.messages import checked_tools
from runtimes.errors import InputError
from runtimes.serve.model import Chat, ServedModel
from runtimes.serve.problems import CallError
from runtimes.serve.requests import Request
from runtimes.serve.strict_json import Fields, kind_of
from runtimes.text.structured import Form

MOST_CHOICES = 4
MOST_STOPS = 4
MOST_LOGPROBS = 20
MOST_PROMPTS = 32
_MOST_BIASES = 1024
_MOST_MESSAGES = 4096
_MOST_TOOLS = 128
_DEFAULT_NEW_TOKENS = 16  # of completions, as OpenAI's


@dataclass(frozen=True)
class Call:
    """What completions and chats have in common."""

    base: Request
    """without id and prompt; max_new_tokens -1: as many as fit"""
    model: str
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    token_ids: bool
    """answers tell their tokens' ids, too"""


@dataclass(frozen=True)
class CompletionCall:
    """A body of /v1/completions."""

    call: Call
    prompts: tuple[str | tuple[int, ...], ...]
    echo: bool
    """answers begin with the prompt"""


@dataclass(frozen=True)
class ChatCall:
    """A body of /v1/chat/completions."""

    call: Call
    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] | None
    tool_choice: str
    """none, auto, required, or the name of a function"""


def read_completion(body: Mapping[str, Any], model: ServedModel) -> CompletionCall:
    """Read a body of /v1/completions.

    Raises:
        CallError: a field is not what it must be, or there is no such model.
    """
    model.check_generates()
    fields = Fields(body)
    prompts = _prompts(fields)
    echo = fields.flag("echo")
    logprobs = fields.integer("logprobs", 0, MOST_LOGPROBS)
    new = fields.integer("max_tokens", 0, 1 << 31)
    call = _call(fields, model, _DEFAULT_NEW_TOKENS if new is None else new, logprobs)
    if echo and logprobs is not None:
        call = replace(call, base=replace(call.base, prompt_logprobs=logprobs))
    if (fields.integer("best_of", 1, MOST_CHOICES) or call.base.choices) != call.base.choices:
        raise CallError("best_of: this server gives every answer that it makes; leave it out", "best_of")
    if fields.text("suffix"):
        raise CallError("suffix: the model fills in nothing; leave it out", "suffix")
    fields.done()
    return CompletionCall(call, prompts, echo)


def read_chat(body: Mapping[str, Any], model: ServedModel) -> ChatCall:
    """Read a body of /v1/chat/completions.

    Raises:
        CallError: as `read_completion`, or the model has no chat template, or none that takes tools.
    """
    model.check_generates()
    fields = Fields(body)
    if model.chat is None:
        raise CallError("this model has no chat template; use /v1/completions", "messages", status=404)
    messages = _messages(fields, model.chat)
    tools = _tools(fields, model.chat)
    choice, several = _tool_choice(fields, tools)
    wanted = fields.flag("logprobs")
    top = fields.integer("top_logprobs", 0, MOST_LOGPROBS)
    if top is not None and not wanted:
        raise CallError("top_logprobs: needs logprobs to be true", "top_logprobs")
    new = fields.integer("max_completion_tokens", 0, 1 << 31)
    old = fields.integer("max_tokens", 0, 1 << 31)
    if new is not None and old is not None and new != old:
        raise CallError("max_tokens: differs from max_completion_tokens; give one", "max_tokens")
    limit = new if new is not None else old
    call = _call(fields, model, -1 if limit is None else limit, (top or 0) if wanted else None)
    fields.done()
    shown = None if choice == "none" else tools
    form = _answer_form(call.base.form, shown, choice, several=several, thinks=model.chat.thinks)
    call = replace(call, base=replace(call.base, eos_token_ids=model.chat.eos_token_ids, form=form))
    return ChatCall(call, messages, shown, choice)


def _answer_form(
    form: Form | None,
    tools: Sequence[Mapping[str, Any]] | None,
    choice: str,
    *,
    several: bool,
    thinks: bool,
) -> Form | None:
    """Return the form of a whole answer: thoughts, then a text of a form or calls of tools; None: it is free.

    Args:
        form: of the text; None: any.
        tools: that may be called, if any.
        choice: see `ChatCall`.
        several: there may be more calls than one.
        thinks: an answer begins with thoughts.
    """
    called = choice not in ("none", "auto")
    if form is None and not called:
        return None
    if form is not None and not tools and not thinks:
        return form
    rules, ways, parts = [], [], list[tuple[str, Form]]()
    if form is not None and not called:
        ways.append("@answer")
        parts.append(("answer", form))
    if tools:
        named = [tool for tool in tools if choice in ("auto", "required", _name(tool))]
        try:
            rules.append(call_rules(named, several=several and choice in ("auto", "required")))
        except InputError as error:
            raise CallError(f"tools: {error}", "tools") from error
        ways.append(RULE)
    start = " | ".join(ways)
    if thinks:
        rules.append(f'thought[suffix="{THOUGHT}"]: /(?s:.*)/')
        start = f'thought ("\\n" "\\n"?)? ({start})'
    return Form("grammar", "\n".join([f"start: {start}", *rules]), tuple(parts))


def _name(tool: Mapping[str, Any]) -> str:
    name: str = tool.get("function", tool)["name"]
    return name


def _call(fields: Fields, model: ServedModel, new_tokens: int, logprobs: int | None) -> Call:
    """Read the fields that both have."""
    name = fields.text("model")
    if name is None:
        raise CallError("model: expected the name of one, found none", "model")
    stream = fields.flag("stream")
    options = fields.object("stream_options")
    include_usage = False
    if options is not None:
        if not stream:
            raise CallError("stream_options: only where stream is true", "stream_options")
        include_usage = options.flag("include_usage")
        options.done()
    fields.text("user")  # says who asks, and changes nothing

    def number(field: str, default: float, least: float, most: float) -> float:
        found = fields.number(field, least, most)
        return default if found is None else found

    base = Request(
        id="",
        prompt_ids=(),
        max_new_tokens=new_tokens,
        choices=fields.integer("n", 1, MOST_CHOICES) or 1,
        eos_token_ids=model.tokenizer.eos_token_ids,
        adapter=model.adapter(name),
        temperature=number("temperature", 1.0, 0.0, 100.0),
        top_k=max(0, fields.integer("top_k", -1, 1 << 31) or 0),
        top_p=number("top_p", 1.0, 1e-9, 1.0),
        min_p=number("min_p", 0.0, 0.0, 1.0),
        seed=fields.integer("seed", 0, (1 << 63) - 1),
        repetition_penalty=number("repetition_penalty", 1.0, 0.01, 100.0),
        presence_penalty=number("presence_penalty", 0.0, -2.0, 2.0),
        frequency_penalty=number("frequency_penalty", 0.0, -2.0, 2.0),
        logit_bias=_biases(fields),
        form=_form(fields),
        logprobs=logprobs,
    )
    return Call(base, name, _stops(fields), stream, include_usage, fields.flag("return_token_ids"))


def _prompts(fields: Fields) -> tuple[str | tuple[int, ...], ...]:
    given = fields.any("prompt")
    wrong = CallError(
        f"prompt: expected a text, a list of token ids, or a list of up to {MOST_PROMPTS} of these, none of them empty",
        "prompt",
    )
    if isinstance(given, str):
        return (given,)
    if not isinstance(given, list) or not given:
        raise wrong
    if all(type(i) is int for i in given):
        return (tuple(given),)
    if len(given) > MOST_PROMPTS:
        raise wrong
    found: list[str | tuple[int, ...]] = []
    for prompt in given:
        if isinstance(prompt, list) and prompt and all(type(i) is int for i in prompt):
            found.append(tuple(prompt))
        elif isinstance(prompt, str):
            found.append(prompt)
        else:
            raise wrong
    return tuple(found)


def _stops(fields: Fields) -> tuple[str, ...]:
    given = fields.any("stop")
    stops = [] if given is None else [given] if isinstance(given, str) else given
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise CallError(f"stop: expected a text, or a list of up to {MOST_STOPS}, none of them empty", "stop")
    return tuple(stops)


def _biases(fields: Fields) -> tuple[tuple[int, float], ...]:
    given = fields.any("logit_bias")
    if given is None:
        return ()
    if not isinstance(given, dict) or len(given) > _MOST_BIASES:
        raise CallError(f"logit_bias: expected an object of up to {_MOST_BIASES} token ids", "logit_bias")
    found = []
    for name, value in given.items():
        if not (name.isascii() and name.isdigit() and len(name) < 10):
            raise CallError('logit_bias: expected token ids as keys, as in {"42": -5}', "logit_bias")
        if type(value) not in (int, float) or not -100 <= value <= 100:
            raise CallError(f"logit_bias of token {name}: expected a number from -100 to 100", "logit_bias")
        found.append((int(name), float(value)))
    return tuple(found)


def _form(fields: Fields) -> Form | None:
    """Read response_format: OpenAI's kinds, and `regex` and `grammar` with a field of that name."""
    given = fields.object("response_format")
    if given is None:
        return None
    kind = given.text("type")
    form: Form | None = None
    match kind:
        case "text":
            pass
        case "json_object":
            form = Form("json_schema", '{"type": "object"}')
        case "json_schema":
            inner = given.object("json_schema")
            schema = None if inner is None else inner.any("schema")
            if inner is None or not isinstance(schema, dict):
                name = "response_format.json_schema.schema"
                raise CallError(f"{name}: expected a JSON schema, found {kind_of(schema)}", name)
            inner.text("name")
            inner.text("description")
            inner.flag("strict")  # what cannot be enforced is refused in any case
            inner.done()
            form = Form("json_schema", json.dumps(schema))
        case "regex" | "grammar":
            source = given.text(kind)
            if not source:
                raise CallError(f"response_format.{kind}: expected a text", f"response_format.{kind}")
            form = Form("regex" if kind == "regex" else "grammar", source)
        case _:
            raise CallError(
                "response_format.type: expected text, json_object, json_schema, regex or grammar",
                "response_format.type",
            )
    given.done()
    return form


def _messages(fields: Fields, chat: Chat) -> tuple[Mapping[str, Any], ...]:
    given = fields.list("messages", _MOST_MESSAGES)
    if not given:
        raise CallError("messages: expected at least one, found none", "messages")
    return tuple(_message(message, f"messages[{number}]", chat) for number, message in enumerate(given))


def _message(given: Any, where: str, chat: Chat) -> Mapping[str, Any]:
    if not isinstance(given, dict):
        raise CallError(f"{where}: expected an object, found {kind_of(given)}", "messages")
    message = {name: value for name, value in given.items() if value is not None}
    unknown = set(message) - {"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "refusal"}
    if unknown:
        raise CallError(f"{where}.{min(unknown)[:64]}: a field that this server does not know", "messages")
    roles = {"developer": "system", "tool": chat.result_role}
    message["role"] = roles.get(str(message.get("role")), message.get("role"))
    if isinstance(message.get("content"), list):
        message["content"] = _joined(message["content"], where)
    return message


def _joined(parts: Sequence[Any], where: str) -> str:
    """Return the text of a content that comes in parts."""
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise CallError(f"{where}.content: expected parts of type text; the model takes nothing else", "messages")
    return "".join(part["text"] for part in parts)


def _tools(fields: Fields, chat: Chat) -> tuple[Mapping[str, Any], ...] | None:
    given = fields.list("tools", _MOST_TOOLS)
    if not given:
        return None
    if not chat.takes_tools:
        raise CallError("tools: the chat template of this model shows none to it; leave them out", "tools")
    return tuple(checked_tools(given) or ())


def _tool_choice(fields: Fields, tools: Sequence[Mapping[str, Any]] | None) -> tuple[str, bool]:
    """Return which tools are to be called, see `ChatCall`, and whether several may be."""
    given = fields.any("tool_choice")
    parallel = fields.flag("parallel_tool_calls", missing=True)
    field = "tool_choice"
    if isinstance(given, dict):
        function = given.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        if given.get("type") != "function" or not isinstance(name, str):
            raise CallError(f'{field}: expected {{"type": "function", "function": {{"name": ...}}}}', field)
        if name not in [_name(tool) for tool in tools or ()]:
            raise CallError(f"{field}: {name[:64]!r} is none of the tools", field)
        return name, False
    if given not in (None, "none", "auto", "required"):
        raise CallError(f"{field}: expected none, auto, required or a function", field)
    choice = "auto" if given is None else str(given)
    if choice == "required" and not tools:
        raise CallError(f"{field}: there are no tools; give some, or leave it out", field)
    if not parallel and tools and choice == "auto":
        raise CallError(
            "parallel_tool_calls: may be false where tool_choice is required or a function; a model that need not "
            "call decides how often it does",
            "parallel_tool_calls",
        )
    return choice, parallel
