"""A conversation with a model: messages, the answers it gives, and the tools that it may call.

    with open_runner(package) as runner, ChatTemplate.from_package(package) as template:
        chat = Conversation(runner, Tokenizer.from_package(package), template, system="Be brief.")
        print(chat.ask("What is an ocean?", sampler=Sampler()).text)

    chat = Conversation(runner, tokenizer, template, tools=tools)
    answer = chat.ask("How warm is it in Oslo?", sampler=Sampler())
    while answer.calls:
        chat.add_results([call_it(call.name, call.arguments) for call in answer.calls])
        answer = chat.ask(sampler=Sampler())

Each turn is rendered from the first message on, and its ids are those of transformers, but that the last answer stays
the ids that the model gave, where the template shows it as it was given: encoded anew, they may be others. So the
runner computes only what is new. Thoughts are not shown again, unless the template does so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from runtimes.chat import json_tools
from runtimes.chat.answers import AnswerParser, BrokenCall, Call, Event, Text, Thought
from runtimes.chat.messages import Message, checked_messages, checked_tools
from runtimes.chat.template import ChatTemplate
from runtimes.errors import InputError, UsageError
from runtimes.generation.generate import Generation, generate
from runtimes.integers import as_integer
from runtimes.runners.runner import Runner
from runtimes.speculate.drafters import Drafter
from runtimes.text.logit_rules import LogitRule
from runtimes.text.sampling import Sampler
from runtimes.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Answer:
    """What a model answered."""

    text: str
    """without thoughts and calls"""
    thought: str
    """what it thought before; empty where it did not"""
    calls: tuple[Call, ...]
    """tools that it calls, in order"""
    broken_calls: tuple[BrokenCall, ...]
    """what stood in the place of calls and is none"""
    message: Mapping[str, Any]
    """as it was added to the conversation"""
    generation: Generation
    """ids, times, and why it ended"""


class Conversation:
    """Messages, and a model that answers them. It belongs to one runner of one row.

    A call that raises leaves the messages as they were.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        *,
        system: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        name: str | None = None,
    ) -> None:
        """Begin a conversation.

        Args:
            runner: any.
            tokenizer: of the same package.
            template: of the same package; it stays open, whoever opened it closes it.
            system: the system prompt; None: the template's own, if it has one.
            tools: that the model may call, see `runtimes.chat.messages.checked_tools`. Where the template shows none to
                the model, they are asked for in JSON: see `runtimes.chat.json_tools`.
            name: of the template, where a package has several.

        Raises:
            InputError: a tool has no name, or there is no such template.
            TemplateError: the template does not work.
            BackendError: jinja2 is not installed.
        """
        self._runner = runner
        self._tokenizer = tokenizer
        self._template = template
        self._name = name
        self._tools = checked_tools(tools)
        self._in_json = self._tools is not None and not template.takes_tools(name=name)
        self._thinks = template.begins_thinking(name=name)
        self._ends = tuple(dict.fromkeys([*tokenizer.eos_token_ids, *template.turn_ends(tokenizer, name=name)]))
        self._waiting: tuple[Call, ...] = ()
        self._said: tuple[str, list[int]] = ("", [])
        self.messages: list[dict[str, Any]] = []
        """from the first to the last, the system prompt in front if there is one; may be changed"""
        self.system = system

    @property
    def context_length(self) -> int:
        """Tokens that the conversation and an answer may take together."""
        return self._runner.max_cache_length

    @property
    def system(self) -> str | None:
        """The system prompt; may be set."""
        first = self.messages[0] if self.messages else {}
        return first.get("content") if first.get("role") == "system" else None

    @system.setter
    def system(self, text: str | None) -> None:
        kept = self.messages[1:] if self.system is not None else self.messages
        self.messages = kept if text is None else [{"role": "system", "content": text}, *kept]

    def prompt_ids(self) -> list[int]:
        """Return the ids that an answer to the messages begins after.

        Raises:
            InputError: no message, or the template refuses or ignores one.
            TemplateError: the template does not work.
        """
        return self._encoded(self._prompt())

    def ask(
        self,
        text: str | None = None,
        *,
        sampler: Sampler,
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
        on_event: Callable[[Event], object] | None = None,
        speculate: Drafter | None = None,
        rules: Sequence[LogitRule] = (),
        adapter: str | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Answer:
        """Add what a user says, and the model's answer, to the messages.

        It ends at the ids that end a text, and at those that the template writes behind an answer.

        Args:
            text: what the user says; special text in it is text. None: nothing, as behind the results of calls.
            sampler: picks each next id.
            max_new_tokens: fewer where no more fit; None means as many as fit.
            stop: the answer ends before the first of them to be complete.
            on_event: called with each event as soon as it is certain: pieces of thoughts and text, calls.
            speculate: guesses ids; see `generate`.
            rules, adapter: see `generate`.
            cancelled: asked after each id; True ends the answer, and what was said of it is kept.

        Raises:
            InputError, TemplateError: as `prompt_ids`.
            ContextLengthError: the conversation does not fit.
            UsageError: calls wait for their results, or as `generate`.
            NumericError: the model broke down.
        """
        parser = self._parser()
        events: list[Event] = []

        def take(found: list[Event]) -> None:
            events.extend(found)
            for event in found:
                if on_event is not None:
                    on_event(event)

        with self._asked(text):
            prompt = self._prompt()
            prompt_ids = self._encoded(prompt)
            asked, room = as_integer(max_new_tokens), self._runner.max_cache_length - len(prompt_ids)
            generation = generate(
                self._runner,
                self._tokenizer,
                prompt_ids,
                sampler=sampler,
                max_new_tokens=room if asked is not None and 0 <= room < asked else max_new_tokens,
                stop=stop,
                eos_token_ids=self._ends,
                on_text=lambda piece: take(parser.push(piece)),
                speculate=speculate,
                rules=rules,
                adapter=adapter,
                cancelled=cancelled,
            )
            take(parser.finish())
        self._remember(prompt, generation)
        said = "".join(event.text for event in events if isinstance(event, Text))
        thought = "".join(event.text for event in events if isinstance(event, Thought))
        calls = tuple(event for event in events if isinstance(event, Call))
        message = self._message(said, thought, calls, parser.calls_text)
        self.messages.append(message)
        self._waiting = calls
        broken = tuple(event for event in events if isinstance(event, BrokenCall))
        return Answer(said, thought, calls, broken, message, generation)

    def add_results(self, results: Sequence[str]) -> None:
        """Add what the tools gave that the last answer called.

        Args:
            results: a text for each call, in order.

        Raises:
            UsageError: the last message calls none.
            InputError: another number of results than there are calls, or one is no text.
        """
        if not self._waiting or not self.messages or self.messages[-1]["role"] != "assistant":
            raise UsageError("the last message calls no tool; ask first")
        if isinstance(results, str) or not all(isinstance(text, str) for text in results):
            raise InputError(
                "results: expected a list of strings, one for each call; json.dumps makes one of an object"
            )
        if len(results) != len(self._waiting):
            raise InputError(f"{len(results)} results of {len(self._waiting)} calls; give one for each, in order")
        pairs = list(zip(self._waiting, results, strict=True))
        if self._in_json:
            content = "\n\n".join(json_tools.result(call.name, text) for call, text in pairs)
            self.messages.append({"role": "user", "content": content})
        else:
            role = self._template.result_role(name=self._name)
            self.messages += [{"role": role, "name": call.name, "content": text} for call, text in pairs]
        self._waiting = ()

    def load(self, messages: Sequence[Message]) -> None:
        """Replace all messages.

        Raises:
            InputError: one is not what `runtimes.chat.messages` says.
        """
        checked_messages(messages)
        self.messages = [dict(message) for message in messages]
        self._waiting = ()

    def reset(self) -> None:
        """Forget all messages but the system prompt."""
        system = self.system
        self.messages, self._waiting = [], ()
        self.system = system

    @contextmanager
    def _asked(self, text: str | None) -> Iterator[None]:
        """Let the body answer what a user says; where it raises, nothing was said."""
        if text is None and self._waiting and self.messages and self.messages[-1]["role"] == "assistant":
            raise UsageError(f"{len(self._waiting)} calls wait for their results; add_results first")
        turn = [] if text is None else [{"role": "user", "content": text}]
        self.messages += turn
        try:
            yield
        except BaseException:
            del self.messages[len(self.messages) - len(turn) :]
            raise

    def _prompt(self) -> str:
        messages: Sequence[Message] = self.messages
        tools = self._tools
        if self._in_json and tools is not None:
            messages = [m for m in messages if m["role"] != "system"]
            messages = [{"role": "system", "content": json_tools.instructions(tools, self.system)}, *messages]
            tools = None
        return self._template.marked_text(self._tokenizer, messages, tools=tools, name=self._name)

    def _encoded(self, text: str) -> list[int]:
        """Return the ids of a prompt; those of its beginning as they were given, where they end in front of a token."""
        said, ids = self._said
        rest = text.removeprefix(said)
        if said and len(rest) < len(text) and rest.startswith(tuple(self._tokenizer.special_tokens.values())):
            return [*ids, *self._template.encode_marked(self._tokenizer, rest)]
        return self._template.encode_marked(self._tokenizer, text)

    def _remember(self, prompt: str, made: Generation) -> None:
        """Keep the ids of a prompt and its answer, unless these say something else than the answer's text does."""
        ids = made.token_ids[:-1] if made.finish_reason == "eos" else made.token_ids
        special = self._tokenizer.special_tokens
        same = self._tokenizer.decode(ids) == made.text and not any(i in special for i in ids)
        self._said = (prompt + made.text, [*made.prompt_token_ids, *ids]) if same else ("", [])

    def _parser(self) -> AnswerParser | json_tools.JsonCallParser:
        if self._in_json and self._tools is not None:
            return json_tools.JsonCallParser(self._tools)
        return AnswerParser(thinking=self._thinks, tools=self._tools is not None)

    def _message(self, text: str, thought: str, calls: Sequence[Call], calls_text: str) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if self._in_json:
            message["content"] += calls_text
        elif calls_text:
            message["function_calls"] = calls_text
        if calls:
            message["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": call.arguments}} for call in calls
            ]
        return message if not thought else {**message, "reasoning_content": thought}
