"""A chat in a terminal or a pipe: what a user types, what is shown, and the commands that begin with a slash.

In a terminal an answer is shown as it is made, thoughts dim in front of it; Ctrl-C ends the answer, at the prompt what
is typed, at an empty one twice the chat, as Ctrl-D does. In a pipe each line of stdin is a turn and stdout has the
answers alone; what else there is to say goes to stderr, and what is wrong ends the program.

A turn of several lines: a line that ends in a backslash goes on in the next, and what begins with three quotes ends
with three; a line end next to them is not of it. A turn that begins with a slash begins with two.
"""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO, Protocol, TextIO

from runtimes.chat.answers import Event, Text, Thought
from runtimes.chat.conversation import Answer, Conversation
from runtimes.command import expanded
from runtimes.errors import ContextLengthError, InputError, Olmo2ExportError, UsageError
from runtimes.generation.generate import Generation
from runtimes.signals import Interrupted
from runtimes.text.plain_text import plain_lines, plain_text, read_text

_QUOTES = '"""'
_DIM, _PLAIN = "\x1b[2m", "\x1b[22m"
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # what steers a terminal, but for lines and tabs

COMMANDS = {
    "help": ("", "this list"),
    "system": ("[TEXT | -]", "show the system prompt, set it, or take it away"),
    "reset": ("", "forget what was said; the system prompt stays"),
    "save": ("FILE", "write the messages, a line of JSON each"),
    "load": ("FILE", "go on with messages that were saved"),
    "stats": ("", "tokens and times of the last answer, and how full the context is"),
    "quit": ("", "end the chat, as Ctrl-D does"),
}
"""name -> (its argument, what it does)"""


class Asks(Protocol):
    """Asks the model, with the sampler and the limits of the command line."""

    def __call__(
        self, text: str, *, on_event: Callable[[Event], object], cancelled: Callable[[], bool] | None
    ) -> Answer: ...


class AtPrompt(BaseException):
    """Ctrl-C while nothing is answered; not an Exception, so that nothing takes it for an error."""

    def __init__(self, typed: bool) -> None:
        super().__init__()
        self.typed = typed
        """something stood behind the prompt"""


class Interrupts:
    """Ctrl-C: while a model answers it asks it to stop, twice it ends the program; else it is `AtPrompt`."""

    def __init__(self, typed: Callable[[], bool]) -> None:
        """Begin; `typed` tells whether something stands behind the prompt."""
        self._typed = typed
        self._answering = False
        self._stopped = False

    def stopped(self) -> bool:
        """Tell whether the answer is to stop."""
        return self._stopped

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Take SIGINT in the body; the previous handler comes back at the end."""
        before = signal.signal(signal.SIGINT, self._on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Let the body, which answers, ask `stopped`."""
        self._answering, self._stopped = True, False
        try:
            yield
        finally:
            self._answering = False

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if not self._answering:
            raise AtPrompt(self._typed())
        if self._stopped:
            raise Interrupted(number)
        self._stopped = True


def read_turn(read_line: Callable[[bool], str | None]) -> str | None:
    """Read a turn of one line or several.

    Args:
        read_line: returns the next line, without its end, or None where there is none; it is told whether the turn has
            begun already.

    Returns:
        The turn; None at the end of the input.
    """
    line = read_line(False)
    if line is None:
        return None
    if line.lstrip().startswith(_QUOTES):
        lines = [line.lstrip().removeprefix(_QUOTES)]
        while not lines[-1].rstrip().endswith(_QUOTES) and (more := read_line(True)) is not None:
            lines.append(more)
        return "\n".join(lines).rstrip().removesuffix(_QUOTES).removeprefix("\n").removesuffix("\n")
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        more = read_line(True)
        if more is None:
            break
        lines.append(more)
    return "\n".join(lines)


def pipe_lines(stream: BinaryIO) -> Iterator[str]:
    """Read lines as they come.

    Raises:
        InputError: one is not UTF-8.
    """
    for number, line in enumerate(iter(stream.readline, b""), 1):
        yield plain_text(line, f"stdin, line {number}").removesuffix("\n")


class Terminal:
    """A user at a terminal: lines with a prompt, edited and remembered where there is readline."""

    def __init__(self, history: Path | None = None) -> None:
        """Begin.

        Args:
            history: a file that keeps what was typed for the next time; None: nothing is kept.

        Raises:
            UsageError: this Python has no readline, so that nothing can be kept.
        """
        self._history = history
        self._readline: Any = None
        with suppress(ImportError):  # Windows; then lines are edited as the terminal does
            import readline

            self._readline = readline
            readline.set_completer_delims("")
            readline.set_completer(_completed)
            readline.parse_and_bind("tab: complete")
            if history is not None and history.is_file():
                readline.read_history_file(history)
        if history is not None and self._readline is None:
            raise UsageError(f"--history {history}: this Python has no readline; leave it out")

    def read_line(self, begun: bool) -> str | None:
        """Read a line; None where the user has ended the input."""
        try:
            return plain_lines(input("... " if begun else "> "))
        except EOFError:
            return None

    def typed(self) -> bool:
        """Tell whether something stands behind the prompt, where that can be known."""
        return self._readline is not None and bool(self._readline.get_line_buffer())

    def close(self) -> None:
        """Keep what was typed, where that is wanted."""
        if self._history is not None and self._readline is not None:
            self._readline.write_history_file(self._history)


def _completed(text: str, state: int) -> str | None:
    found = [f"/{name}" for name in COMMANDS if f"/{name}".startswith(text)] if text.startswith("/") else []
    return found[state] if state < len(found) else None


class Screen:
    """What is shown of answers, and of all else."""

    def __init__(self, out: TextIO, notes: TextIO, *, terminal: bool, messages: bool = False) -> None:
        """Begin.

        Args:
            out: has the answers.
            notes: has the rest.
            terminal: thoughts are shown, dim, and nothing that steers a terminal is let through.
            messages: answers are not shown as they are made, but messages, a line of JSON each.
        """
        self._out = out
        self._notes = notes
        self._terminal = terminal
        self._messages = messages
        self._last: type[Event] | None = None
        self._space = ""  # at the end of a thought; what begins and ends it is not shown

    def event(self, event: Event) -> None:
        """Show a piece of an answer."""
        if self._messages or not isinstance(event, Text | Thought):
            return
        if isinstance(event, Thought):
            text = self._space + event.text if self._last is Thought else event.text.lstrip()
            shown = text.rstrip()
            if self._terminal and shown:
                self._write(f"{_DIM}{_safe(shown)}{_PLAIN}")
                self._last, self._space = Thought, text[len(shown) :]
            elif self._last is Thought:
                self._space = text
            return
        self._write("\n\n" if self._last is Thought else "")
        self._write(_safe(event.text) if self._terminal else event.text)
        self._last = Text

    def answered(self, message: Mapping[str, Any]) -> None:
        """End an answer."""
        self.message(message)
        if not self._messages:
            self._write("\n\n" if self._terminal else "\n")
        self._last = None

    def message(self, message: Mapping[str, Any]) -> None:
        """Show a message, where messages are shown."""
        if self._messages:
            self._write(_json_line(message))

    def note(self, text: str) -> None:
        """Say something that is no answer."""
        text = _safe(text)
        self._out.flush()
        self._notes.write(f"{_DIM}{text}{_PLAIN}\n\n" if self._terminal else f"{text}\n")
        self._notes.flush()

    def line(self) -> None:
        """End the line of a prompt that nothing was typed at."""
        self._notes.write("\n")

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


class Session:
    """A chat: turns and commands, until there are no more."""

    def __init__(self, chat: Conversation, ask: Asks, screen: Screen, *, stats: bool = False) -> None:
        """Begin.

        Args:
            chat: goes on from the messages that it has.
            ask: asks `chat`.
            screen: shows what is said.
            stats: say tokens and times of each answer.
        """
        self._chat = chat
        self._ask = ask
        self._screen = screen
        self._stats = stats
        self._last: Generation | None = None
        self._own_files: set[Path] = set()

    def run_pipe(self, stream: BinaryIO) -> None:
        """Take a turn from each line, until the end.

        Raises:
            Olmo2ExportError: whatever is wrong with one.
        """
        lines = pipe_lines(stream)
        self._show_system()
        while (turn := read_turn(lambda _begun: next(lines, None))) is not None:
            if not self._take(turn, None):
                return

    def run_terminal(self, read_line: Callable[[bool], str | None], typed: Callable[[], bool] = lambda: False) -> None:
        """Take turns until the user ends the chat; what is wrong with one is said, and the next is asked for.

        Args:
            read_line: see `read_turn`.
            typed: tells, of a line that was interrupted, whether something was typed.
        """
        interrupts, begun, again = Interrupts(typed), False, False

        def read(more: bool) -> str | None:
            nonlocal begun
            begun = more
            return read_line(more)

        self._show_system()
        with interrupts.installed():
            while True:
                try:
                    turn = read_turn(read)
                    if turn is None:
                        self._screen.line()
                        return
                    again = False
                    if not self._take(turn, interrupts):
                        return
                except AtPrompt as interrupted:
                    self._screen.line()
                    nothing = not (begun or interrupted.typed)
                    if nothing and again:
                        return
                    if nothing:
                        self._screen.note("Ctrl-C again, or Ctrl-D, ends the chat")
                    again = nothing
                except (Olmo2ExportError, OSError) as error:
                    self._screen.note(str(error))

    def _show_system(self) -> None:
        for message in self._chat.messages:
            self._screen.message(message)

    def _take(self, turn: str, interrupts: Interrupts | None) -> bool:
        """Do what a turn says; return whether another one is to come."""
        if not turn.strip():
            return True
        if turn.startswith("/") and not turn.startswith("//"):
            return self._command(turn)
        self._answer(turn.removeprefix("/") if turn.startswith("//") else turn, interrupts)
        return True

    def _answer(self, text: str, interrupts: Interrupts | None) -> None:
        self._screen.message({"role": "user", "content": text})
        try:
            if interrupts is None:
                answer = self._ask(text, on_event=self._screen.event, cancelled=None)
            else:
                with interrupts.answering():
                    answer = self._ask(text, on_event=self._screen.event, cancelled=interrupts.stopped)
        except ContextLengthError as error:
            found, _, _ = str(error).partition(";")
            raise ContextLengthError(
                f"context full: {found}; /reset begins anew, /save FILE keeps what was said"
            ) from error
        self._last = made = answer.generation
        self._screen.answered(answer.message)
        if made.finish_reason == "cancelled":
            self._screen.note("stopped")
        elif made.finish_reason == "length":
            full = self._used(made) >= self._chat.context_length
            why = "context full; /reset begins anew, /save FILE keeps what was said"
            self._screen.note(f"cut off after {len(made.token_ids)} tokens: {why if full else '--max-new-tokens'}")
        if self._stats:
            self._screen.note(_described(made))

    def _command(self, turn: str) -> bool:
        name, _, argument = turn[1:].partition(" ")
        name, argument = name.strip(), argument.strip()
        if name not in COMMANDS:
            raise UsageError(f"/{name}: no such command; /help lists them, and // begins a turn with a slash")
        wanted = COMMANDS[name][0]
        if argument and not wanted:
            raise UsageError(f"/{name} takes nothing, found {argument[:60]!r}")
        if wanted == "FILE" and not argument:
            raise UsageError(f"/{name} FILE: which file?")
        if name == "quit":
            return False
        said = {"help": self._help, "reset": self._reset, "stats": self._stats_of_chat}
        of_argument = {"system": self._system, "save": self._save, "load": self._load}
        self._screen.note(said[name]() if name in said else of_argument[name](argument))
        return True

    def _help(self) -> str:
        rows = [(f"/{name} {argument}".rstrip(), words) for name, (argument, words) in COMMANDS.items()]
        lines = [f"{usage:<20}{words}" for usage, words in rows]
        return "\n".join(
            [*lines, f"A line that ends in \\ goes on in the next; {_QUOTES} begins and ends a turn of several lines."]
        )

    def _reset(self) -> str:
        self._chat.reset()
        self._last = None
        return "what was said is forgotten"

    def _system(self, text: str) -> str:
        if text:
            self._chat.system = None if text == "-" else text
        system = self._chat.system
        return "no system prompt, but the template may have one" if system is None else f"system prompt: {system}"

    def _save(self, name: str) -> str:
        path = expanded(name)
        if path.exists() and path.resolve() not in self._own_files:
            raise InputError(f"{name}: there is such a file already; name another")
        if not path.parent.is_dir():
            raise InputError(f"{name}: no folder {path.parent}; make it, or name another")
        part = path.with_name(f"{path.name}.part")  # an interruption leaves what was saved before
        part.write_text("".join(map(_json_line, self._chat.messages)), encoding="utf-8")
        part.replace(path)
        self._own_files.add(path.resolve())
        return f"{len(self._chat.messages)} messages in {name}"

    def _load(self, name: str) -> str:
        path = expanded(name)
        self._chat.load(read_messages(path))
        self._own_files.add(path.resolve())
        self._last = None
        return f"{len(self._chat.messages)} messages from {name}"

    def _stats_of_chat(self) -> str:
        holds = f"{len(self._chat.messages)} messages; the context holds {self._chat.context_length} tokens"
        if self._last is None:
            return holds
        return f"{holds}, {self._used(self._last)} are used\n{_described(self._last)}"

    @staticmethod
    def _used(made: Generation) -> int:
        return len(made.prompt_token_ids) + len(made.token_ids)


def read_messages(path: Path) -> list[dict[str, Any]]:
    """Read messages that were saved, a line of JSON each.

    Raises:
        InputError: no such file, or a line is no JSON object.
    """
    messages = []
    for number, line in enumerate(plain_lines("".join(read_text(path))).split("\n"), 1):
        if not line.strip():
            continue
        try:
            message = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: no JSON ({error}); expected what /save writes") from error
        if not isinstance(message, dict):
            raise InputError(f"{path}, line {number}: expected an object, found {type(message).__name__}")
        messages.append(message)
    return messages


def _json_line(message: Mapping[str, Any]) -> str:
    return json.dumps(message, ensure_ascii=False) + "\n"


def _described(made: Generation) -> str:
    first, rate = made.time_to_first_token, made.decode_tokens_per_second
    return ", ".join(
        [
            f"prompt {len(made.prompt_token_ids)} tokens ({made.reused_tokens} reused)",
            f"answer {len(made.token_ids)}",
            f"first after {'-' if first is None else f'{first * 1000:.1f}'} ms",
            f"{'-' if rate is None else f'{rate:.1f}'} tokens/s",
            f"end: {made.finish_reason}",
        ]
    )


def _safe(text: str) -> str:
    """Return a text in which what steers a terminal is shown as its code."""
    return _CONTROLS.sub(lambda match: ascii(match[0])[1:-1], text)


def streams_are_terminals() -> bool:
    """Tell whether a user sits in front of stdin and stdout."""
    return sys.stdin.isatty() and sys.stdout.isatty()
