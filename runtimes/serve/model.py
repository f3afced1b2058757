"""What a server serves: names, texts and limits of a package, as its edge needs them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from runtimes import Package
from runtimes.chat.template import ChatTemplate
from runtimes.errors import PackageError
from runtimes.serve.problems import CallError
from runtimes.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Chat:
    """The chat template of a model, and what was found out of it once."""

    template: ChatTemplate
    eos_token_ids: tuple[int, ...]
    """an answer ends at any of them"""
    thinks: bool
    """an answer begins with thoughts"""
    takes_tools: bool
    result_role: str
    """of what a tool gave"""

    @classmethod
    def of(cls, template: ChatTemplate, tokenizer: Tokenizer) -> Chat:
        """Ask a template, which its process renders for.

        Raises:
            TemplateError, BackendError: as `ChatTemplate.render`.
        """
        ends = dict.fromkeys([*tokenizer.eos_token_ids, *template.turn_ends(tokenizer)])
        return cls(template, tuple(ends), template.begins_thinking(), template.takes_tools(), template.result_role())


@dataclass(frozen=True)
class ServedModel:
    """A package under a name."""

    name: str
    checksum: str
    """of the package"""
    tokenizer: Tokenizer
    chat: Chat | None = None
    """None: the package has no chat template"""
    adapters: tuple[str, ...] = ()
    hidden_states: tuple[int, ...] = ()
    """numbers of those that it gives"""
    labels: tuple[str, ...] = ()
    """of a classifier, which makes no texts"""
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def fingerprint(self) -> str:
        """What an answer says of the model that gave it."""
        return f"fp_{self.checksum[:16]}"

    @property
    def names(self) -> Mapping[str, str | None]:
        """Name of a model -> LoRA adapter; the package without any comes first."""
        return {self.name: None, **{name: name for name in self.adapters}}

    def adapter(self, name: str) -> str | None:
        """Return the LoRA adapter of a model's name.

        Raises:
            CallError: there is no such model.
        """
        if name not in self.names:
            known = ", ".join(self.names)
            raise CallError(
                f"model: there is no {name[:128]!r}; there is {known}", "model", status=404, code="model_not_found"
            )
        return self.names[name]

    def check_generates(self) -> None:
        """Refuse a classifier where texts are asked for.

        Raises:
            CallError: it is one.
        """
        if self.labels:
            raise CallError(
                "this model is a classifier, which makes no texts; use /v1/score", status=404, code="not_served"
            )


def served_model(package: Package, name: str, *, check_hashes: bool = True) -> ServedModel:
    """Read the texts of a package.

    Args:
        package: which.
        name: under which it is served.
        check_hashes: compare the files with the manifest first.

    Raises:
        PackageError: it has no tokenizer, or a file is damaged; a chat template that does not work.
        BackendError: it has a chat template, and jinja2 is not installed.
    """
    tokenizer = Tokenizer.from_package(package, check_hashes=check_hashes)
    chat = None
    if (template := _template(package, check_hashes)) is not None:
        try:
            chat = Chat.of(template, tokenizer)
        except BaseException:
            template.close()
            raise
    spec = package.model
    return ServedModel(name, package.checksum, tokenizer, chat, hidden_states=spec.hidden_states, labels=spec.labels)


def _template(package: Package, check_hashes: bool) -> ChatTemplate | None:
    try:
        return ChatTemplate.from_package(package, check_hashes=check_hashes)
    except PackageError as error:
        if "no chat template" in str(error):
            return None
        raise
