"""The chat templates of a package: messages -> text -> token ids.

    with ChatTemplate.from_package(package) as template:
        ids = template.encode(tokenizer, [{"role": "user", "content": "Hello"}])

What a user wrote stays text: `<|im_end|>` in a message becomes the tokens of these characters, and only what the
template itself writes is the special token. As transformers' `apply_chat_template(..., sanitize_control_tokens=True)`,
token by token: names of special tokens in messages and tools are marked before the template sees them, and marked
pieces are encoded apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from runtimes.chat.messages import RESULTS, Message, checked_messages, checked_tools
from runtimes.chat.renderer import Renderer, TemplateError
from runtimes.errors import InputError, PackageError
from runtimes.package import AnyPackage, open_package
from runtimes.text.config_file import read_config, token_text
from runtimes.text.tokenizer import Tokenizer

_MAIN = "chat_template.jinja"
_MORE = "additional_chat_templates"
_CONFIG = "tokenizer_config.json"
_OLD_MAP = "special_tokens_map.json"
_DEFAULT, _WITH_TOOLS = "default", "tool_use"
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_BEGIN, _END = "\U000f0000", "\U000f0001"
"""around the name of a token that a user wrote: of a private-use plane, as in transformers"""
_PROBE = "\u241e a probe \u241e"


@dataclass(frozen=True)
class ChatTemplate:
    """The chat templates of a package, by name, and the tokens that they may name.

    They are rendered in a process of their own, which `close`, or the end of a `with`, ends; see `Renderer`.
    """

    templates: Mapping[str, str]
    """name -> source; the one that is taken where nothing else is said is `default`"""
    tokens: Mapping[str, str] = field(default_factory=dict)
    """`bos_token`, `eos_token` and others -> text, of tokenizer_config.json"""
    renderer: Renderer = field(default_factory=Renderer, repr=False, compare=False)
    _heeded: set[tuple[str, str]] = field(default_factory=set, init=False, repr=False, compare=False)
    """(source, what): seen to change the text"""

    @classmethod
    def from_package(cls, package: AnyPackage, *, check_hashes: bool = True) -> Self:
        """Read the chat templates of a package.

        Args:
            package: the package folder, or one that is open.
            check_hashes: compare the files with the manifest first.

        Raises:
            PackageNotFoundError: the folder is not a package.
            IntegrityError: a file is not the one that was exported.
            PackageError: the package has no chat template, or a file cannot be read.
        """
        opened = open_package(package)
        files = [name for name in opened.manifest.files if name in (_MAIN, _CONFIG, _OLD_MAP) or _is_more(name)]
        if check_hashes:
            opened.check(files)
        else:
            opened.provide(files)
        return cls.from_folder(opened.folder)

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Read the chat templates of any folder that has the files of a tokenizer; nothing is vouched for.

        Files that end in .jinja count before the field of tokenizer_config.json, as in transformers.

        Raises:
            PackageError: there is none, or a file cannot be read.
        """
        config = read_config(folder / _CONFIG)
        templates = {path.stem: _read_text(path) for path in sorted((folder / _MORE).glob("*.jinja"))}
        if (folder / _MAIN).is_file():
            templates[_DEFAULT] = _read_text(folder / _MAIN)
        templates = templates or _templates_of(config.get("chat_template"), folder / _CONFIG)
        if not templates:
            raise PackageError(
                f"{folder}: no chat template; olmo2-run generate continues a text without one. For a chat model, put "
                f"{_MAIN} beside the checkpoint's tokenizer.json and export the package again"
            )
        old = read_config(folder / _OLD_MAP)
        said = {name: token_text({**old, **config}.get(name)) for name in _SPECIAL}
        return cls(templates, {name: text for name, text in said.items() if text is not None})

    def source(self, name: str | None = None, *, with_tools: bool = False) -> str:
        """Return a template.

        Args:
            name: of the template; None takes `tool_use` where there are tools and such a one, else `default`.
            with_tools: whether there are tools.

        Raises:
            InputError: there is none of that name.
        """
        wanted = name or (_WITH_TOOLS if with_tools and _WITH_TOOLS in self.templates else _DEFAULT)
        if wanted not in self.templates:
            raise InputError(f"no chat template {wanted!r}; there are {', '.join(self.templates)}; name one of them")
        return self.templates[wanted]

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        name: str | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the text of a chat: to read, not to encode, as a user's `<|im_end|>` looks as the template's own.

        Args:
            messages: see `runtimes.chat.messages`.
            tools: see `checked_tools`.
            documents: for templates that take some.
            add_generation_prompt: end with what an answer begins after.
            name: of the template; see `source`.
            variables: others that the template may name.

        Raises:
            InputError: messages or tools are not what they must be, or the template refuses or ignores some.
            TemplateError: the template does not work.
            BackendError: jinja2 is not installed.
        """
        given = _given(messages, tools, documents, add_generation_prompt, variables)
        return self._rendered(self.source(name, with_tools=bool(tools)), given)

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        name: str | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Return the token ids of a chat, in which special text of messages and tools is text.

        Args:
            tokenizer: of the same package.
            messages, tools, documents, add_generation_prompt, name, variables: as `render`.

        Raises:
            InputError, TemplateError, BackendError: as `render`; or a text holds a token that the template uses and the
                tokenizer reads as one wherever it stands.
        """
        text = self.marked_text(
            tokenizer,
            messages,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            name=name,
            variables=variables,
        )
        return self.encode_marked(tokenizer, text)

    def marked_text(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        name: str | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the text of a chat, marks around each name of a token that is text; for `encode_marked` alone.

        Args:
            tokenizer, messages, tools, documents, add_generation_prompt, name, variables: as `encode`.

        Raises:
            InputError, TemplateError, BackendError: as `render`.
        """
        source = self.source(name, with_tools=bool(tools))
        given = _given(messages, tools, documents, add_generation_prompt, variables)
        return self._rendered(source, _marked(given, _one_of(self._control_tokens(source, tokenizer))))

    def marked(self, tokenizer: Tokenizer, text: str, *, name: str | None = None) -> str:
        """Return what goes on behind a text from `marked_text`, marks around each name of a token, which is text.

        Raises:
            InputError, TemplateError, BackendError: as `render`.
        """
        marked: str = _marked(text, _one_of(self._control_tokens(self.source(name), tokenizer)))
        return marked

    def encode_marked(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """Return the token ids of a text from `marked_text`.

        Raises:
            InputError: as `encode`.
        """
        return list(_encoded_pieces(tokenizer, text))

    def begins_thinking(self, *, name: str | None = None) -> bool:
        """Tell whether what an answer begins after ends in `<think>`, so that an answer begins with thoughts.

        Raises:
            TemplateError, BackendError: as `render`.
        """
        return self.render([{"role": "user", "content": _PROBE}], name=name).rstrip().endswith("<think>")

    def turn_ends(self, tokenizer: Tokenizer, *, name: str | None = None) -> tuple[int, ...]:
        """Return the ids of the special tokens that the template writes right behind an answer.

        Olmo 3's writes `<|im_end|>` behind those in the middle and `<|endoftext|>` behind the last one: its model may
        end an answer with either, whatever generation_config.json says.

        Raises:
            TemplateError, BackendError: as `render`.
        """
        asked = {"role": "user", "content": "x"}
        ids = {text: token_id for token_id, text in tokenizer.special_tokens.items()}
        found = dict[int, None]()
        for messages in (
            [asked, {"role": "assistant", "content": _PROBE}, asked],
            [asked, {"role": "assistant", "content": _PROBE}],
        ):
            _, _, behind = self.render(messages, add_generation_prompt=False, name=name).partition(_PROBE)
            found.update({ids[text]: None for text in ids if behind.startswith(text)})
        return tuple(found)

    def takes_tools(self, *, name: str | None = None) -> bool:
        """Tell whether the template shows tools to the model; OLMo 2's does not, see `runtimes.chat.json_tools`.

        Raises:
            TemplateError, BackendError: as `render`.
        """
        tool = {"type": "function", "function": {"name": "a_probe", "description": "", "parameters": {}}}
        given = _given([{"role": "user", "content": "x"}], [tool], None, True, None)
        return "a_probe" in self.renderer.render(self.source(name, with_tools=True), {**self.tokens, **given})

    def result_role(self, *, name: str | None = None) -> str:
        """Return the role in which the template takes what a tool gave: `environment` where it knows that word."""
        return (self.renderer.words_in(self.source(name, with_tools=True), ["environment"]) or ["tool"])[0]

    def close(self) -> None:
        """End the process that renders."""
        self.renderer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _rendered(self, source: str, given: Mapping[str, Any]) -> str:
        """Render, and refuse what the template would drop without a word."""
        text = self.renderer.render(source, {**self.tokens, **given})
        for what, others in _without(given):
            if (source, what) in self._heeded:
                continue
            try:
                ignored = self.renderer.render(source, {**self.tokens, **others}) == text
            except (InputError, TemplateError):  # it wants them
                ignored = False
            if ignored:
                raise InputError(
                    f"the chat template ignores {what}: this model was not trained with them; for tools see "
                    "runtimes.chat.json_tools"
                )
            self._heeded.add((source, what))
        return text

    def _control_tokens(self, source: str, tokenizer: Tokenizer) -> list[str]:
        """Return the tokens that only the template may write: the special ones, and others that it names."""
        special = set(tokenizer.special_tokens.values())
        others = [text for text in tokenizer.added_tokens.values() if text not in special and not text.isspace()]
        return [*special, *(self.renderer.words_in(source, others) if others else ())]


def _given(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    documents: Sequence[Mapping[str, Any]] | None,
    add_generation_prompt: bool,
    variables: Mapping[str, Any] | None,
) -> dict[str, Any]:
    return {
        **(variables or {}),
        "messages": checked_messages(messages),
        "tools": checked_tools(tools),
        "documents": None if documents is None else list(documents),
        "add_generation_prompt": add_generation_prompt,
    }


def _without(given: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Return the same without tools, without what tools gave, and without system prompts, where there are any."""
    if given["tools"]:
        yield "tools", {**given, "tools": None}
    for what, roles in (("messages of the roles tool and environment", RESULTS), ("system prompts", ("system",))):
        others = [message for message in given["messages"] if message["role"] not in roles]
        if 0 < len(others) < len(given["messages"]):
            yield what, {**given, "messages": others}


# What a user wrote


def _one_of(words: Sequence[str]) -> re.Pattern[str]:
    """Return a pattern of any of the words, a longer one before those it contains."""
    longest_first = sorted(words, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _marked(value: Any, control: re.Pattern[str]) -> Any:
    """Put marks around the control tokens of all texts but the keys of objects; no text keeps a mark of its own."""
    if isinstance(value, str):
        plain = value.replace(_BEGIN, "").replace(_END, "")
        return control.sub(f"{_BEGIN}\\g<0>{_END}", plain)
    if isinstance(value, Mapping):
        return {key: _marked(inner, control) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_marked(inner, control) for inner in value]
    return value


def _encoded_pieces(tokenizer: Tokenizer, text: str) -> Iterator[int]:
    """Encode a rendered chat: marked tokens as text, the others as they are.

    Lone marks, which a template's `split` may leave, are dropped, and the text is cut there nevertheless.
    """
    ids = {name: token_id for token_id, name in tokenizer.added_tokens.items()}
    known = _one_of(list(ids))
    first, *others = re.split(f"{_BEGIN}({known.pattern}){_END}|[{_BEGIN}{_END}]", text)
    newline = tokenizer.encode("\n", add_special_tokens=False)
    yield from tokenizer.encode(first, add_special_tokens=False, parse_special=True)
    for number, piece in enumerate(others, 1):
        if not piece:
            continue
        as_text = number % 2 == 1
        # Behind a newline, as transformers does: some tokenizers put a space in front of what begins a text.
        found = tokenizer.encode("\n" + piece, add_special_tokens=False, parse_special=not as_text)
        if found[: len(newline)] == newline:
            found = found[len(newline) :]
        else:
            found = tokenizer.encode(piece, add_special_tokens=False, parse_special=not as_text)
        if as_text and ids[piece] in found:
            raise InputError(
                f"a message holds {piece!r}, which the tokenizer takes for a token wherever it stands and the chat "
                "template uses; leave it out"
            )
        yield from found


# Files


def _is_more(name: str) -> bool:
    return name.startswith(f"{_MORE}/")


def _templates_of(value: Any, path: Path) -> dict[str, str]:
    """Return the templates of tokenizer_config.json: one text, or a list of named ones."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {_DEFAULT: value}
    found = {v["name"]: v["template"] for v in value if _is_named(v)} if isinstance(value, list) else {}
    if not found or len(found) < len(value) or not all(isinstance(text, str) for text in found.values()):
        raise PackageError(
            f"{path}: chat_template is neither a text nor a list of named ones; export the package again"
        )
    return found


def _is_named(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("name"), str) and "template" in value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PackageError(f"{path}: byte {error.start} is not UTF-8; save it as UTF-8 and export again") from error
