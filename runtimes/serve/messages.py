"""/v1/messages, as Anthropic's API has it: bodies to those of a chat, a chat's pieces to blocks and events.

| in a body                  | of a chat                               | in an answer               |
|----------------------------|-----------------------------------------|----------------------------|
| system                     | a system prompt                         |                            |
| messages: text             | messages                                | a block of type text       |
| messages: tool_use         | tool_calls of an assistant              | a block of type tool_use   |
| messages: tool_result      | a message of a tool                     |                            |
| messages: thinking         | reasoning_content of an assistant       | a block of type thinking   |
| max_tokens, stop_sequences | max_completion_tokens, stop             | stop_reason, stop_sequence |
| tools, tool_choice         | tools, tool_choice, parallel_tool_calls |                            |
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from runtimes.serve.calls import ChatCall, read_chat
from runtimes.serve.model import ServedModel
from runtimes.serve.problems import CallError, Problem
from runtimes.serve.strict_json import Fields, kind_of
from runtimes.serve.texts import Said
from runtimes.serve.writers import ChatWriter

PATHS = ("/v1/messages", "/v1/messages/count_tokens")
"""whose errors have Anthropic's form"""
_NAMES = {
    "max_completion_tokens": "max_tokens",
    "stop": "stop_sequences",
}
"""field of a chat -> where it stands here"""
_SAME = ("model", "stream", "temperature", "top_p", "top_k")
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_REASONS = {"length": "max_tokens", "tool_calls": "tool_use"}
_ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_MOST_MESSAGES = 4096


def error_document(problem: Problem) -> dict[str, Any]:
    """Return an error in Anthropic's form."""
    kind = _ERRORS.get(problem.status, "invalid_request_error" if problem.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": problem.message}}


def read_messages(body: Mapping[str, Any], model: ServedModel, *, counted: bool = False) -> ChatCall:
    """Read a body of /v1/messages.

    Args:
        body: parsed.
        model: that is served.
        counted: its tokens are to be counted alone: of /v1/messages/count_tokens.

    Raises:
        CallError: as `read_chat`.
    """
    fields = Fields(body)
    chat: dict[str, Any] = {name: fields.any(name) for name in _SAME}
    chat["messages"] = [*_system(fields.any("system")), *_messages(fields.list("messages", _MOST_MESSAGES))]
    limit = fields.integer("max_tokens", 1, 1 << 31)
    if limit is None and not counted:
        raise CallError("max_tokens: expected an integer, found none", "max_tokens")
    chat["max_completion_tokens"] = limit
    chat["stop"] = fields.list("stop_sequences", 4)
    tools = fields.list("tools", 128)
    if tools is not None:
        chat["tools"] = [_tool(tool, f"tools[{number}]") for number, tool in enumerate(tools)]
    choice = fields.object("tool_choice")
    if choice is not None:
        chat |= _choice(choice)
    metadata = fields.object("metadata")
    if metadata is not None:  # says who asks, and changes nothing
        metadata.text("user_id")
        metadata.done()
    _check_thinking(fields.object("thinking"), model)
    fields.done()
    try:
        return read_chat(chat, model)
    except CallError as error:
        name = next((name for name in _NAMES if error.param == name), None)
        if name is None:
            raise
        message = str(error).replace(name, _NAMES[name], 1)
        raise CallError(message, _NAMES[name], status=error.status, code=error.code) from error


def _check_thinking(given: Fields | None, model: ServedModel) -> None:
    if given is None:
        return
    kind = given.text("type")
    thinks = model.chat is not None and model.chat.thinks
    if kind not in ("enabled", "adaptive", "disabled") or (kind == "disabled") == thinks:
        does = "always thinks first" if thinks else "does not think first"
        raise CallError(f"thinking: this model {does}, and is not told to; leave it out", "thinking")
    if given.any("budget_tokens") is not None:
        raise CallError("thinking.budget_tokens: thoughts count as max_tokens do; leave it out", "thinking")
    given.done()


def _system(given: Any) -> list[dict[str, Any]]:
    return [] if given is None else [{"role": "system", "content": _text(given, "system", "system")}]


def _messages(given: Sequence[Any] | None) -> list[dict[str, Any]]:
    if not given:
        raise CallError("messages: expected at least one, found none", "messages")
    found: list[dict[str, Any]] = []
    for number, message in enumerate(given):
        where = f"messages[{number}]"
        if not isinstance(message, dict):
            raise CallError(f"{where}: expected an object, found {kind_of(message)}", "messages")
        if set(message) - {"role", "content"}:
            raise CallError(f"{where}: expected role and content, and no other fields", "messages")
        role, content = message.get("role"), message.get("content")
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(blocks, list) or not blocks:
            raise CallError(f"{where}.content: expected a text or a list of blocks", "messages")
        if role not in ("user", "assistant"):
            raise CallError(f"{where}.role: expected user or assistant", "messages")
        found += _of_user(blocks, where) if role == "user" else [_of_assistant(blocks, where)]
    if found[-1]["role"] == "assistant":
        raise CallError("messages: the last is the assistant's; this server goes on with none", "messages")
    return found


def _of_user(blocks: Sequence[Any], where: str) -> list[dict[str, Any]]:
    """Return what tools gave, a message each, and then what the user wrote."""
    found, texts = [], []
    for block in blocks:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "tool_result":
            content = block.get("content")
            text = "" if content is None else _text(content, f"{where}.content", "messages")
            found.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": text})
        else:
            texts.append(_text([block], f"{where}.content", "messages"))
    return [*found, *([{"role": "user", "content": "".join(texts)}] if texts else [])]


def _of_assistant(blocks: Sequence[Any], where: str) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant"}
    for block in blocks:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "thinking" and isinstance(block.get("thinking"), str):
            message["reasoning_content"] = message.get("reasoning_content", "") + block["thinking"]
        elif kind == "tool_use":
            function = {"name": block.get("name"), "arguments": block.get("input")}
            message.setdefault("tool_calls", []).append({"type": "function", "function": function})
        else:
            message["content"] = message.get("content", "") + _text([block], f"{where}.content", "messages")
    if "tool_calls" not in message:
        message.setdefault("content", "")
    return message


def _text(given: Any, where: str, field: str) -> str:
    blocks = [{"type": "text", "text": given}] if isinstance(given, str) else given
    if not isinstance(blocks, list):
        raise CallError(f"{where}: expected a text or a list of blocks, found {kind_of(given)}", field)
    for block in blocks:
        if not isinstance(block, dict) or block.get("type") != "text" or not isinstance(block.get("text"), str):
            raise CallError(f"{where}: expected blocks of type text; the model takes nothing else", field)
    return "".join(block["text"] for block in blocks)


def _tool(given: Any, where: str) -> dict[str, Any]:
    if not isinstance(given, dict) or given.get("type", "custom") != "custom":
        raise CallError(f"{where}: expected one of type custom; this server has none of its own", "tools")
    if not isinstance(given.get("input_schema"), dict):
        raise CallError(f"{where}.input_schema: expected a JSON schema", "tools")
    function = {"name": given.get("name"), "parameters": given["input_schema"]}
    if given.get("description") is not None:
        function["description"] = given["description"]
    return {"type": "function", "function": function}


def _choice(given: Fields) -> dict[str, Any]:
    kind, name = given.text("type"), given.text("name")
    single = given.flag("disable_parallel_tool_use")
    given.done()
    if single and kind not in ("any", "tool"):
        field = "tool_choice.disable_parallel_tool_use"
        raise CallError(
            f"{field}: only where type is any or tool; a model that need not call decides how often it does", field
        )
    choice: Any = _CHOICES.get(kind or "")
    if kind == "tool":
        choice = {"type": "function", "function": {"name": name}}
    if choice is None:
        raise CallError("tool_choice.type: expected auto, any, none or tool", "tool_choice")
    return {"tool_choice": choice, **({"parallel_tool_calls": False} if single else {})}


class MessageWriter:
    """The blocks of one answer, and the events of a stream of it."""

    def __init__(self, chat: ChatWriter, name: str, model: str) -> None:
        """Begin.

        Args:
            chat: writes the pieces of the answer, the only choice.
            name: of the call.
            model: that answers.
        """
        self._chat = chat
        self.document: dict[str, Any] = {
            "id": f"msg_{name}",
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": None,
        }
        self._open = False

    @property
    def _blocks(self) -> list[dict[str, Any]]:
        blocks: list[dict[str, Any]] = self.document["content"]
        return blocks

    def first(self, usage: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the events that a stream begins with; `usage` as a chat has it."""
        self.document["usage"] = _usage(usage)
        return [{"type": "message_start", "message": {**self.document, "content": []}}]

    def events(self, said: Said) -> list[dict[str, Any]]:
        """Return what there is to say now."""
        found = []
        for piece in self._chat.pieces(said):
            delta, reason = piece["delta"], piece["finish_reason"]
            if delta.get("reasoning_content"):
                found += self._add("thinking", "thinking", delta["reasoning_content"])
            if delta.get("content"):
                found += self._add("text", "text", delta["content"])
            for call in delta.get("tool_calls", ()):
                found += self._call(call)
            if reason is not None:
                self.document["stop_reason"] = _REASONS.get(reason, "end_turn")
                if reason == "stop" and said.stop is not None:
                    self.document |= {"stop_reason": "stop_sequence", "stop_sequence": said.stop}
        return found

    def last(self, usage: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the events that a stream ends with; the document is whole then.

        Args:
            usage: as a chat has it.
        """
        found = self._end_block()
        self.document["usage"] = _usage(usage)
        delta = {name: self.document[name] for name in ("stop_reason", "stop_sequence")}
        return [
            *found,
            {"type": "message_delta", "delta": delta, "usage": self.document["usage"]},
            {"type": "message_stop"},
        ]

    def _add(self, kind: str, field: str, text: str) -> list[dict[str, Any]]:
        """Add text to the last block, if it is of that kind, or to another."""
        found: list[dict[str, Any]] = []
        if not self._open or self._blocks[-1]["type"] != kind:
            empty = {"type": kind, field: ""} | ({"signature": ""} if kind == "thinking" else {})
            found = [*self._end_block(), self._begin_block(empty)]
        self._blocks[-1][field] += text
        return [*found, self._of_block("content_block_delta", delta={"type": f"{kind}_delta", field: text})]

    def _call(self, call: Mapping[str, Any]) -> list[dict[str, Any]]:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        found = self._end_block()
        found.append(self._begin_block({"type": "tool_use", "id": call["id"], "name": name, "input": {}}))
        delta = {"type": "input_json_delta", "partial_json": arguments}
        found.append(self._of_block("content_block_delta", delta=delta))
        self._blocks[-1]["input"] = json.loads(arguments)
        return [*found, *self._end_block()]

    def _begin_block(self, block: dict[str, Any]) -> dict[str, Any]:
        self._blocks.append(block)
        self._open = True
        return self._of_block("content_block_start", content_block=dict(block))

    def _end_block(self) -> list[dict[str, Any]]:
        """End the last block, if it has not ended."""
        ended = [self._of_block("content_block_stop")] if self._open else []
        self._open = False
        return ended

    def _of_block(self, kind: str, **fields: Any) -> dict[str, Any]:
        return {"type": kind, "index": len(self._blocks) - 1, **fields}


def _usage(usage: Mapping[str, Any]) -> dict[str, int]:
    reused = usage["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": usage["prompt_tokens"] - reused,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": reused,
        "output_tokens": usage["completion_tokens"],
    }
