"""What a model says, piece by piece -> thoughts, text and calls of tools: events, as soon as each is certain.

Markers are matched in text, not in ids, since `</think>` and `<function_calls>` are several tokens each.

    begin ----<think>----> think --</think>--> behind --any text--> text --<function_calls>--> calls
      |                      ^  (a prompt may end in <think>)         ^                          |
      +------- any text -------------------------------------------- + <---</function_calls>----+

However the text is cut into pieces, the events are the same, but that texts come in pieces, which `merged` puts
together.

Source: the form of calls is Olmo 3's, docs/olmo3.md of open-instruct.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from runtimes.chat.literals import LiteralError, parse_calls
from runtimes.errors import UsageError

THINK, THOUGHT = "<think>", "</think>"
CALLS, CALLED = "<function_calls>", "</function_calls>"


@dataclass(frozen=True)
class Thought:
    """A piece of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True)
class Text:
    """A piece of the answer."""

    text: str


@dataclass(frozen=True)
class Call:
    """A call of a tool; complete."""

    name: str
    arguments: dict[str, Any]
    """as JSON has them"""


@dataclass(frozen=True)
class BrokenCall:
    """What stands where a call should, and is none: cut off, or written otherwise."""

    text: str
    reason: str


Event: TypeAlias = Thought | Text | Call | BrokenCall
_MOST_UNCLOSED = 8  # quotes that are not closed, each of which costs another reading of what follows
_State: TypeAlias = Literal["begin", "think", "behind", "text", "calls", "ended"]


class AnswerParser:
    """Takes an answer in pieces and gives its events.

    White space between thoughts and answer belongs to neither. A marker in the string of a call is part of the string,
    unless the answer ends without another and that line is no call: a quote that was not closed would swallow the rest.
    This is mended eight times in an answer; then the rest is no call. `<think>` counts at the beginning alone.
    """

    def __init__(self, *, thinking: bool = False, tools: bool = False) -> None:
        """Begin an answer.

        Args:
            thinking: the prompt ended in `<think>`.
            tools: calls are looked for; without tools `<function_calls>` is text.
        """
        self._state: _State = "think" if thinking else "begin"
        self._tools = tools
        self._held = ""  # undecided
        self._line = _CallLine()
        self._called: list[str] = []

    @property
    def calls_text(self) -> str:
        """What stood between the markers of calls, as the model wrote it."""
        return "".join(self._called)

    def push(self, piece: str) -> list[Event]:
        """Take the next piece; return the events that are certain now.

        Raises:
            UsageError: the answer has ended.
        """
        if self._state == "ended":
            raise UsageError("the answer has ended; begin another parser")
        self._held += piece
        return self._advance(final=False)

    def finish(self) -> list[Event]:
        """End the answer; return what was left of it."""
        events = self._advance(final=True)
        for _ in range(_MOST_UNCLOSED):
            found = self._line.swallowed(CALLED) if self._state == "calls" else None
            if found is None:
                break
            events += self._line.finish(cut_off=False)
            del self._called[len(self._called) - len(CALLED) - len(found) :]
            self._state, self._held = "text", found
            events += self._advance(final=True)
        if self._state == "calls":
            events += self._line.finish()
        self._state = "ended"
        return events

    def _advance(self, *, final: bool) -> list[Event]:
        events: list[Event] = []
        while True:
            before = self._state, len(self._held)
            step = {"begin": self._begin, "think": self._think, "behind": self._behind, "text": self._text}
            events += self._calls(final) if self._state == "calls" else step[self._state](final)
            if before == (self._state, len(self._held)):
                return events

    def _begin(self, final: bool) -> list[Event]:
        rest = self._held.lstrip()
        if rest.startswith(THINK):
            self._state, self._held = "think", rest.removeprefix(THINK)
        elif final or not THINK.startswith(rest):
            self._state = "text"
        return []

    def _think(self, final: bool) -> list[Event]:
        thought, found = self._until(THOUGHT, final)
        if found:
            self._state = "behind"
        return [Thought(thought)] if thought else []

    def _behind(self, _final: bool) -> list[Event]:
        self._held = self._held.lstrip()
        if self._held:
            self._state = "text"
        return []

    def _text(self, final: bool) -> list[Event]:
        if not self._tools:
            text, self._held = self._held, ""
            return [Text(text)] if text else []
        text, found = self._until(CALLS, final)
        if found:
            self._state = "calls"
        return [Text(text)] if text else []

    def _calls(self, final: bool) -> list[Event]:
        events: list[Event] = []
        for at, char in enumerate(self._held):
            if char == "<" and not self._line.in_string:
                found = self._held[at : at + len(CALLED)]
                if found == CALLED:
                    self._held = self._held[at + len(CALLED) :]
                    self._state = "text"
                    return events + self._line.finish(cut_off=False)
                if CALLED.startswith(found):
                    self._held = "" if final else self._held[at:]  # the rest of it may come
                    return events
            self._called.append(char)
            events += self._line.push(char)
        self._held = ""
        return events

    def _until(self, marker: str, final: bool) -> tuple[str, bool]:
        """Take what stands in front of a marker, and the marker; what may be the beginning of one is left."""
        text, found, rest = self._held.partition(marker)
        if found:
            self._held = rest
            return text, True
        kept = 0 if final else _beginning(text, marker)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept], False


class _CallLine:
    """A line of calls, character by character: it ends where one does that is in no string and no bracket."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._chars: list[str] = []
        self._depth = 0
        self._quote = ""  # what ends the string: one, or three
        self._opened = 0  # where a string of one began
        self._run = ""  # quotes behind each other which together may be three
        self._escaped = False

    @property
    def in_string(self) -> bool:
        return bool(self._quote)

    def push(self, char: str) -> list[Event]:
        if char == "\n" and not self._quote and self._depth <= 0:
            return self.finish(cut_off=False)
        self._chars.append(char)
        if self._escaped:
            self._escaped = False
        elif self._quote:
            self._escaped = char == "\\"
            self._run = self._run + char if char == self._quote[0] else ""
            if self._run == self._quote:
                empty = len(self._quote) == 1 and self._opened == len(self._chars) - 1
                self._quote, self._run = "", char if empty else ""
        elif char in "'\"":
            self._quote, self._opened = char * (3 if char == self._run else 1), len(self._chars)
            self._run = ""
        else:
            self._depth += (char in "([{") - (char in ")]}")
            self._run = ""
        return []

    def swallowed(self, marker: str) -> str | None:
        """Take a marker off a line that is no call, and what is behind it; return that. None: there is no such."""
        text, found, rest = "".join(self._chars).partition(marker)
        if not found or _parses("".join(self._chars)):
            return None
        del self._chars[len(text) :]
        return rest

    def finish(self, *, cut_off: bool = True) -> list[Event]:
        """End the line; return its calls."""
        text, open_ended = "".join(self._chars), bool(self._quote) or self._depth > 0
        self._begin()
        try:
            return [Call(*call) for call in parse_calls(text)]
        except LiteralError as error:
            cut = cut_off and (open_ended or error.at_end)
            return [BrokenCall(text.strip(), "cut off" if cut else str(error))]


def _parses(text: str) -> bool:
    try:
        parse_calls(text)
    except LiteralError:
        return False
    return True


def _beginning(text: str, marker: str) -> int:
    """Return the length of the longest end of a text that a marker may begin with."""
    sizes = range(min(len(marker) - 1, len(text)), 0, -1)
    return next((n for n in sizes if marker.startswith(text[-n:])), 0)


def merged(events: Iterable[Event]) -> list[Event]:
    """Return events with texts that follow each other put together."""
    found: list[Event] = []
    for event in events:
        last = found[-1] if found else None
        if isinstance(event, Text) and isinstance(last, Text):
            found[-1] = Text(last.text + event.text)
        elif isinstance(event, Thought) and isinstance(last, Thought):
            found[-1] = Thought(last.text + event.text)
        else:
            found.append(event)
    return found
