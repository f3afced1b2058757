"""What is said of an answer, in the forms of OpenAI's API: pieces for a stream, which `merged_*` puts together."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from runtimes.chat.answers import AnswerParser, BrokenCall, Call, Event, Text, Thought
from runtimes.generation.text_state import FinishReason
from runtimes.serve.requests import Request, Scored
from runtimes.serve.texts import Said
from runtimes.text.logprobs import TokenLogprobs
from runtimes.text.tokenizer import Tokenizer

_LOWEST = -9999.0  # JSON has no -inf
_REASONS: Mapping[FinishReason, str] = {"eos": "stop", "stop": "stop", "length": "length", "cancelled": "stop"}


@dataclass
class _Pending:
    """Tokens of a choice whose text is not decided yet."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)

    def add(self, said: Said) -> None:
        if said.token_id is not None:
            self.token_ids.append(said.token_id)
        if said.logprobs is not None:
            self.logprobs.append(said.logprobs)

    def take(self) -> tuple[list[int], list[TokenLogprobs]]:
        taken = self.token_ids, self.logprobs
        self.token_ids, self.logprobs = [], []
        return taken


def usage(prompt_tokens: int, new_tokens: int, reused_tokens: int) -> dict[str, Any]:
    """Return what a call has used."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new_tokens,
        "total_tokens": prompt_tokens + new_tokens,
        "prompt_tokens_details": {"cached_tokens": reused_tokens},
    }


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """Return a token as text: the name of a special one, U+FFFD where it is no whole character."""
    return tokenizer.special_tokens.get(token_id) or tokenizer.decode([token_id])


class CompletionWriter:
    """The choices of a completion."""

    def __init__(
        self,
        requests: Sequence[Request],
        tokenizer: Tokenizer,
        *,
        echo: Sequence[str] | None = None,
        token_ids: bool = False,
    ) -> None:
        """Begin.

        Args:
            requests: one for each prompt, in order.
            tokenizer: of the model.
            echo: the prompts' texts, with which answers begin; None: they do not.
            token_ids: tell the tokens' ids, too.
        """
        self._requests = {request.id: (number, request) for number, request in enumerate(requests)}
        self._tokenizer, self._echo, self._token_ids = tokenizer, echo, token_ids
        self._pending: dict[int, _Pending] = {}
        self._offsets: dict[int, int] = {}
        self._scored: dict[str, list[TokenLogprobs]] = {}

    def score(self, scored: Scored) -> None:
        """Take note of log probabilities of a prompt."""
        self._scored.setdefault(scored.request, []).extend(scored.logprobs)

    def pieces(self, said: Said) -> list[dict[str, Any]]:
        """Return what there is to say now: choices, with what is new of each."""
        number, request = self._requests[said.request]
        index = number * request.choices + said.choice
        begins = index not in self._pending
        pending = self._pending.setdefault(index, _Pending())
        pending.add(said)
        if not (said.text or said.reason or (begins and self._echo is not None)):
            return []
        token_ids, logprobs = pending.take()
        text, noted = said.text, None
        if request.logprobs is not None:
            noted = _Noted(self._offsets.get(index, 0))
        if begins and self._echo is not None:
            text = self._echo[number] + text
            if noted is not None:
                noted.add(self._tokenizer, request.prompt_ids[0], None)
                for token in self._scored.get(said.request, []):
                    noted.add(self._tokenizer, token.token_id, token)
        if noted is not None:
            for token in logprobs:
                noted.add(self._tokenizer, token.token_id, token)
            self._offsets[index] = noted.offset
        piece: dict[str, Any] = {
            "index": index,
            "text": text,
            "logprobs": None if noted is None else noted.document,
            "finish_reason": None if said.reason is None else _REASONS[said.reason],
        }
        if self._token_ids:
            piece["token_ids"] = token_ids
        return [piece]


class _Noted:
    """The log probabilities of a completion: four lists, an entry a token."""

    def __init__(self, offset: int) -> None:
        self.offset = offset
        self.document: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }

    def add(self, tokenizer: Tokenizer, token_id: int, found: TokenLogprobs | None) -> None:
        text = token_text(tokenizer, token_id)
        top: dict[str, float] | None = None
        if found is not None:
            top = {}
            for other, logprob in (*found.top, (found.token_id, found.logprob)):
                top.setdefault(token_text(tokenizer, other), _finite(logprob))
        self.document["tokens"].append(text)
        self.document["token_logprobs"].append(None if found is None else _finite(found.logprob))
        self.document["top_logprobs"].append(top)
        self.document["text_offset"].append(self.offset)
        self.offset += len(text)


def merged_completion(pieces: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return whole choices, in order."""
    found: dict[int, dict[str, Any]] = {}
    for piece in pieces:
        choice = found.setdefault(piece["index"], piece)
        if choice is piece:
            continue
        choice["text"] += piece["text"]
        choice["finish_reason"] = piece["finish_reason"]
        if choice["logprobs"] is not None:
            for name, values in piece["logprobs"].items():
                choice["logprobs"][name] += values
        if "token_ids" in choice:
            choice["token_ids"] += piece["token_ids"]
    return [found[index] for index in sorted(found)]


class ChatWriter:
    """The choices of a chat."""

    def __init__(
        self, request: Request, tokenizer: Tokenizer, *, thinking: bool, tools: bool, token_ids: bool = False
    ) -> None:
        """Begin.

        Args:
            request: the only one.
            tokenizer: of the model.
            thinking: answers begin with thoughts.
            tools: calls of tools are looked for.
            token_ids: tell the tokens' ids, too.
        """
        self._tokenizer, self._token_ids = tokenizer, token_ids
        self._noting = request.logprobs is not None
        self._parsers = [AnswerParser(thinking=thinking, tools=tools) for _ in range(request.choices)]
        self._pending = [_Pending() for _ in self._parsers]
        self._calls = [0] * request.choices

    def first(self) -> list[dict[str, Any]]:
        """Return what a stream begins with."""
        delta = {"role": "assistant", "content": ""}
        return [self._piece(n, delta, [], [], None) for n in range(len(self._parsers))]

    def pieces(self, said: Said) -> list[dict[str, Any]]:
        """Return what there is to say now: choices, with what is new of each."""
        number, parser, pending = said.choice, self._parsers[said.choice], self._pending[said.choice]
        pending.add(said)
        events = parser.push(said.text) if said.text else []
        if said.reason is not None:
            events += parser.finish()
        deltas = [self._delta(number, event) for event in events]
        reason = None
        if said.reason is not None:
            reason = "tool_calls" if self._calls[number] else _REASONS[said.reason]
            deltas = deltas or [{}]
        found = []
        for place, delta in enumerate(deltas):
            token_ids, logprobs = pending.take()
            last = place == len(deltas) - 1
            found.append(self._piece(number, delta, token_ids, logprobs, reason if last else None))
        return found

    def _delta(self, number: int, event: Event) -> dict[str, Any]:
        match event:
            case Thought(text):
                return {"reasoning_content": text}
            case Text(text) | BrokenCall(text):
                return {"content": text}
            case Call(name, arguments):
                call = {
                    "index": self._calls[number],
                    "id": f"call_{secrets.token_hex(12)}",
                    "type": "function",
                    "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)},
                }
                self._calls[number] += 1
                return {"tool_calls": [call]}

    def _piece(
        self,
        number: int,
        delta: dict[str, Any],
        token_ids: list[int],
        logprobs: list[TokenLogprobs],
        reason: str | None,
    ) -> dict[str, Any]:
        content = [self._noted(token) for token in logprobs]
        piece: dict[str, Any] = {
            "index": number,
            "delta": delta,
            "logprobs": {"content": content, "refusal": None} if self._noting else None,
            "finish_reason": reason,
        }
        if self._token_ids:
            piece["token_ids"] = token_ids
        return piece

    def _noted(self, found: TokenLogprobs) -> dict[str, Any]:
        top = [self._entry(token_id, logprob) for token_id, logprob in found.top]
        return {**self._entry(found.token_id, found.logprob), "top_logprobs": top}

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = token_text(self._tokenizer, token_id)
        whole = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": _finite(logprob), "bytes": whole}


def merged_chat(pieces: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return whole choices, in order."""
    found: dict[int, dict[str, Any]] = {}
    for piece in pieces:
        delta = piece.pop("delta")
        choice = found.setdefault(piece["index"], piece)
        message = choice.setdefault("message", {"role": "assistant", "content": None, "refusal": None})
        for name in ("content", "reasoning_content"):
            if delta.get(name):
                message[name] = (message.get(name) or "") + delta[name]
        for call in delta.get("tool_calls", ()):
            message.setdefault("tool_calls", []).append({n: v for n, v in call.items() if n != "index"})
        if choice is piece:
            continue
        choice["finish_reason"] = piece["finish_reason"]
        if choice["logprobs"] is not None:
            choice["logprobs"]["content"] += piece["logprobs"]["content"]
        if "token_ids" in choice:
            choice["token_ids"] += piece["token_ids"]
    for choice in found.values():
        if choice["message"]["content"] is None and "tool_calls" not in choice["message"]:
            choice["message"]["content"] = ""
    return [found[index] for index in sorted(found)]


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _LOWEST
