"""/v1/responses, without what keeps something: bodies to those of a chat, a chat's pieces to items and events.

| in a body                        | of a chat                         | in an answer                          |
|----------------------------------|-----------------------------------|---------------------------------------|
| instructions                     | a system prompt                   |                                       |
| input: a text, or messages       | messages                          | an item of type message               |
| input: function_call             | tool_calls of an assistant        | an item of type function_call         |
| input: function_call_output      | a message of a tool               |                                       |
| input: reasoning                 | reasoning_content of an assistant | an item of type reasoning             |
| max_output_tokens, text.format   | max_completion_tokens,            |                                       |
|                                  | response_format                   |                                       |
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from runtimes.serve.calls import ChatCall, read_chat
from runtimes.serve.model import ServedModel
from runtimes.serve.problems import CallError
from runtimes.serve.strict_json import Fields, kind_of
from runtimes.serve.texts import Said
from runtimes.serve.writers import ChatWriter

_SAME = (
    "model stream temperature top_p top_k min_p seed presence_penalty frequency_penalty repetition_penalty logit_bias "
    "parallel_tool_calls user"
).split()
"""fields that a chat has by the same name"""
_NAMES = {
    "max_completion_tokens": "max_output_tokens",
    "messages": "input",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
}
"""field of a chat -> where it stands here"""
_MOST_ITEMS = 4096
_TEXTS = ("input_text", "output_text", "text", "reasoning_text")


def read_response(body: Mapping[str, Any], model: ServedModel) -> ChatCall:
    """Read a body of /v1/responses.

    Raises:
        CallError: as `read_chat`; or it wants something kept.
    """
    fields = Fields(body)
    chat: dict[str, Any] = {name: fields.any(name) for name in _SAME}
    chat["messages"] = _messages(fields.text("instructions"), fields.any("input"))
    chat["max_completion_tokens"] = fields.any("max_output_tokens")
    choice = fields.any("tool_choice")
    if isinstance(choice, dict) and choice.get("type") == "function":
        choice = {"type": "function", "function": {"name": choice.get("name")}}
    chat["tool_choice"] = choice
    tools = fields.list("tools", 128)
    if tools is not None:
        chat["tools"] = [_tool(tool, number) for number, tool in enumerate(tools)]
    text = fields.object("text")
    if text is not None:
        chat["response_format"] = _form(text.any("format"))
        text.done()
    if fields.flag("store"):
        raise CallError("store: this server keeps nothing; leave it out, or give false", "store")
    fields.done()
    try:
        return read_chat(chat, model)
    except CallError as error:
        name = next((name for name in _NAMES if (error.param or "").startswith(name)), None)
        if name is None:
            raise
        message = str(error).replace(name, _NAMES[name])
        param = (error.param or "").replace(name, _NAMES[name])
        raise CallError(message, param, status=error.status, code=error.code) from error


def _messages(instructions: str | None, given: Any) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = [] if instructions is None else [{"role": "system", "content": instructions}]
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    if not isinstance(given, list) or not 0 < len(given) <= _MOST_ITEMS:
        raise CallError(f"input: expected a text, or a list of up to {_MOST_ITEMS} items", "input")
    thought: str | None = None
    for number, item in enumerate(given):
        where = f"input[{number}]"
        if not isinstance(item, dict):
            raise CallError(f"{where}: expected an object, found {kind_of(item)}", "input")
        kind = item.get("type") or "message"
        if kind == "reasoning":
            thought = _text(item.get("content") or [], where)
            continue
        message = _message(item, kind, where)
        last = messages[-1] if messages else {}
        if kind == "function_call" and last.get("role") == "assistant":
            last.setdefault("tool_calls", []).extend(message["tool_calls"])
            continue
        if thought is not None and message["role"] == "assistant":
            message["reasoning_content"], thought = thought, None
        messages.append(message)
    return messages


def _message(item: Mapping[str, Any], kind: str, where: str) -> dict[str, Any]:
    match kind:
        case "message":
            content = item.get("content")
            text = content if isinstance(content, str) else _text(content, where)
            return {"role": item.get("role"), "content": text}
        case "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            return {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}
        case "function_call_output":
            output = item.get("output")
            text = output if isinstance(output, str) else _text(output, where)
            return {"role": "tool", "tool_call_id": item.get("call_id"), "content": text}
        case _:
            raise CallError(
                f"{where}.type: expected message, function_call, function_call_output or reasoning", "input"
            )


def _text(parts: Any, where: str) -> str:
    if not isinstance(parts, list):
        raise CallError(f"{where}: expected a text or a list of parts, found {kind_of(parts)}", "input")
    for part in parts:
        if not isinstance(part, dict) or part.get("type") not in _TEXTS or not isinstance(part.get("text"), str):
            raise CallError(f"{where}: expected parts of type input_text; the model takes nothing else", "input")
    return "".join(part["text"] for part in parts)


def _tool(given: Any, number: int) -> dict[str, Any]:
    if not isinstance(given, dict) or given.get("type") != "function":
        raise CallError(f"tools[{number}]: expected one of type function; this server has none of its own", "tools")
    return {"type": "function", "function": {n: v for n, v in given.items() if n not in ("type", "strict")}}


def _form(given: Any) -> Any:
    """Return the format of a text as response_format has it."""
    if not isinstance(given, dict) or given.get("type") != "json_schema":
        return given
    return {"type": "json_schema", "json_schema": {n: v for n, v in given.items() if n != "type"}}


def told_choice(choice: str) -> str | dict[str, str]:
    """Return a chat's `tool_choice` as a response has it."""
    return choice if choice in ("none", "auto", "required") else {"type": "function", "name": choice}


class ResponseWriter:
    """The items of one answer, and the events of a stream of it."""

    def __init__(self, chat: ChatWriter, form: Mapping[str, Any]) -> None:
        """Begin.

        Args:
            chat: writes the pieces of the answer, the only choice.
            form: fields that the response has from the start.
        """
        self._chat = chat
        self.document: dict[str, Any] = {
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "output": [],
            "usage": None,
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
            **form,
        }
        self._sent = 0

    @property
    def _items(self) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = self.document["output"]
        return items

    def first(self) -> list[dict[str, Any]]:
        """Return the events that a stream begins with."""
        return [self._event(f"response.{name}", response=self.document) for name in ("created", "in_progress")]

    def events(self, said: Said) -> list[dict[str, Any]]:
        """Return what there is to say now."""
        found = []
        for piece in self._chat.pieces(said):
            delta = piece["delta"]
            for name, kind in (("reasoning_content", "reasoning"), ("content", "message")):
                if delta.get(name):
                    found += self._add(kind, delta[name])
            for call in delta.get("tool_calls", ()):
                found += [*self._end_item(), *self._call(call)]
            if piece["finish_reason"] == "length":
                self.document["incomplete_details"] = {"reason": "max_output_tokens"}
        return found

    def last(self, usage: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the events that a stream ends with; the document is whole then.

        Args:
            usage: as a chat has it.
        """
        found = [] if self._items else self._begin_item("message")
        found += self._end_item()
        status = "incomplete" if self.document["incomplete_details"] else "completed"
        self.document["status"] = status
        self.document["usage"] = {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }
        return [*found, self._event(f"response.{status}", response=self.document)]

    def failed(self, problem: Mapping[str, Any]) -> dict[str, Any]:
        """Return the event of an error, which is the last."""
        return self._event("error", **problem, **problem["error"])

    def _add(self, kind: str, text: str) -> list[dict[str, Any]]:
        """Add text to the last item, if it is of that kind, or to another."""
        found: list[dict[str, Any]] = []
        if not self._items or self._items[-1]["type"] != kind or self._items[-1]["status"] == "completed":
            found = [*self._end_item(), *self._begin_item(kind)]
        self._items[-1]["content"][0]["text"] += text
        more = _logprobs(kind)
        return [*found, self._of_item(f"response.{_part(kind)}.delta", content_index=0, delta=text, **more)]

    def _begin_item(self, kind: str) -> list[dict[str, Any]]:
        item: dict[str, Any] = {"id": f"{'msg' if kind == 'message' else 'rs'}_{secrets.token_hex(12)}", "type": kind}
        part: dict[str, Any] = {"type": _part(kind), "text": "", **_logprobs(kind)}
        if kind == "message":
            item["role"] = "assistant"
            part["annotations"] = []
        else:
            item["summary"] = []
        self._items.append({**item, "status": "in_progress", "content": []})
        added = self._added()
        self._items[-1]["content"] = [part]
        return [added, self._of_item("response.content_part.added", content_index=0, part=dict(part))]

    def _end_item(self) -> list[dict[str, Any]]:
        """End the last item, if it has not ended."""
        if not self._items or self._items[-1]["status"] == "completed":
            return []
        item = self._items[-1]
        item["status"] = "completed"
        (part,) = item["content"]
        more = _logprobs(item["type"])
        return [
            self._of_item(f"response.{part['type']}.done", content_index=0, text=part["text"], **more),
            self._of_item("response.content_part.done", content_index=0, part=part),
            self._done(),
        ]

    def _call(self, call: Mapping[str, Any]) -> list[dict[str, Any]]:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        item = {"id": f"fc_{secrets.token_hex(12)}", "type": "function_call", "call_id": call["id"], "name": name}
        self._items.append({**item, "arguments": "", "status": "in_progress"})
        added = self._added()
        self._items[-1] |= {"arguments": arguments, "status": "completed"}
        return [
            added,
            self._of_item("response.function_call_arguments.delta", delta=arguments),
            self._of_item("response.function_call_arguments.done", name=name, arguments=arguments),
            self._done(),
        ]

    def _added(self) -> dict[str, Any]:
        place = len(self._items) - 1
        return self._event("response.output_item.added", output_index=place, item=dict(self._items[-1]))

    def _done(self) -> dict[str, Any]:
        return self._event("response.output_item.done", output_index=len(self._items) - 1, item=self._items[-1])

    def _of_item(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Return an event of the last item."""
        return self._event(kind, item_id=self._items[-1]["id"], output_index=len(self._items) - 1, **fields)

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        event = {**fields, "type": kind, "sequence_number": self._sent}
        self._sent += 1
        return event


def _logprobs(kind: str) -> dict[str, list[Any]]:
    """Return what only messages have: log probabilities, of which none are given."""
    return {"logprobs": []} if kind == "message" else {}


def _part(kind: str) -> str:
    """Return the type of the text in an item."""
    return "output_text" if kind == "message" else "reasoning_text"
