"""Structured output: a text that a JSON schema, a regular expression, a choice or a grammar allows, and no other.

At each step llguidance says which tokens can still lead to such a text, and a rule excludes the others; where the text
is complete and nothing may follow, only the tokens that end it are left. What a schema asks for and llguidance cannot
enforce is refused by name before the first token, never dropped. The library is loaded when it is first asked for.

Source: llguidance, https://github.com/guidance-ai/llguidance
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from runtimes.errors import BackendError, InputError
from runtimes.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

FormKind: TypeAlias = Literal["json_schema", "regex", "grammar"]
_ONE_LINE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Form(NamedTuple):
    """What a text has to look like, as plain values."""

    kind: FormKind
    source: str
    """JSON, a regular expression, or a grammar in llguidance's dialect of Lark"""
    parts: tuple[tuple[str, Form], ...] = ()
    """of a grammar: forms that it names, `@name`; they have no parts"""


def json_rule(schema: Mapping[str, Any]) -> str:
    """Return what stands in a Lark grammar for JSON of a schema, on one line."""
    return f"%json {json.dumps({**schema, 'x-guidance': _ONE_LINE})}"


class StructuredOutput:
    """Makes rules for the texts of one model; make one and keep it: a vocabulary of 100,000 takes 2 to 3 seconds."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """Prepare the tokens of a model.

        Args:
            tokenizer: of the package.
            vocab_size: of the logits.

        Raises:
            BackendError: llguidance is not installed.
            InputError: the model has no token that ends a text, or llguidance cannot read the tokenizer.
        """
        try:
            import llguidance
        except ImportError as error:
            way_out = "pip install 'olmo2-export[structured]'"
            raise BackendError(f"structured output: llguidance is not installed; run: {way_out}") from error
        if not tokenizer.eos_token_ids:
            raise InputError("structured output: the model has no eos_token_id, so no text could end; give it one")
        self._matcher = llguidance.LLMatcher
        try:
            self._tokens = llguidance.LLTokenizer(
                tokenizer.to_json(), n_vocab=vocab_size, eos_token=list(tokenizer.eos_token_ids)
            )
        except ValueError as error:
            raise InputError(f"structured output: llguidance cannot read the tokenizer ({_line(error)})") from error
        self._vocab_size = vocab_size

    def of(self, form: Form) -> GrammarRule:
        """Return a rule for texts of a form.

        Raises:
            InputError: as the method of its kind; or a form among its parts has parts.
        """
        match form.kind:
            case "json_schema":
                return self.json_schema(form.source)
            case "regex":
                return self.regex(form.source)
            case "grammar" if form.parts:
                parts = [{**self._part(part), "name": name} for name, part in form.parts]
                return self._rule("grammar", json.dumps({"grammars": [{"lark_grammar": form.source}, *parts]}))
            case "grammar":
                return self.grammar(form.source)

    def _part(self, form: Form) -> dict[str, Any]:
        """Check a form, and return it as one among several of a grammar."""
        if form.parts:
            raise InputError("grammar: a part of it has parts of its own")
        self.of(form)
        if form.kind == "grammar":
            return {"lark_grammar": form.source}
        made = (
            self._matcher.grammar_from_json_schema(form.source, overrides=_ONE_LINE)
            if form.kind == "json_schema"
            else self._matcher.grammar_from_regex(form.source)
        )
        (found,) = json.loads(made)["grammars"]
        return dict(found)

    def json_schema(self, schema: str | Mapping[str, Any]) -> GrammarRule:
        """Return a rule for texts that are JSON of a schema, on one line: ", " and ": " are all the space there is.

        A model that may put spaces wherever JSON allows them can go on with them forever.

        Args:
            schema: JSON Schema, as JSON or parsed; `{}` allows any JSON.

        Raises:
            InputError: no JSON, no schema, one that allows nothing, or one with a key that cannot be enforced.
        """
        try:
            parsed = json.loads(schema) if isinstance(schema, str) else schema
        except (ValueError, RecursionError) as error:
            raise InputError(f"JSON schema: not valid JSON ({error})") from error
        if not isinstance(parsed, Mapping):
            raise InputError(f"JSON schema: expected an object, found {type(parsed).__name__}")
        return self._rule(
            "JSON schema", self._matcher.grammar_from_json_schema(json.dumps(parsed), overrides=_ONE_LINE)
        )

    def regex(self, pattern: str) -> GrammarRule:
        """Return a rule for texts that a regular expression matches from end to end; it has no look-around.

        Raises:
            InputError: it is not a regular expression of that kind.
        """
        return self._rule("regex", self._matcher.grammar_from_regex(pattern))

    def choice(self, texts: Sequence[str]) -> GrammarRule:
        """Return a rule for texts that are one of some.

        Raises:
            InputError: none is given, or one is empty or no string.
        """
        if isinstance(texts, str) or not texts or not all(isinstance(text, str) and text for text in texts):
            raise InputError(f"choice {texts!r}: expected a list of strings, none of them empty")
        alternatives = " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
        return self._rule("choice", self._matcher.grammar_from_lark(f"start: {alternatives}"))

    def grammar(self, lark: str) -> GrammarRule:
        """Return a rule for texts of a context-free grammar.

        Args:
            lark: in llguidance's dialect of Lark; the text is the rule `start`.

        Raises:
            InputError: it is not such a grammar.
        """
        return self._rule("grammar", self._matcher.grammar_from_lark(lark))

    def _rule(self, name: str, grammar: str) -> GrammarRule:
        wrong, messages = self._matcher.validate_grammar_with_warnings(grammar, self._tokens)
        if wrong or messages:  # a warning says that something in it is not enforced
            raise InputError(f"{name}: {_line(messages[0])}; change it, nothing of it is left out silently")
        matcher = self._matcher(self._tokens, grammar, log_level=0)
        if matcher.is_error():
            raise InputError(f"{name}: {_line(matcher.get_error())}")
        return GrammarRule(name, matcher, self._vocab_size)


class GrammarRule:
    """Excludes the tokens that a grammar does not allow next; belongs to one text. From `StructuredOutput`."""

    def __init__(self, name: str, matcher: LLMatcher, vocab_size: int) -> None:
        self._name = name
        self._matcher = matcher
        self._mask = np.zeros((vocab_size + 31) // 32, np.int32)

    def fork(self) -> GrammarRule:
        """Return the same rule for another text, at its beginning."""
        matcher = self._matcher.deep_copy()
        matcher.reset()
        return GrammarRule(self._name, matcher, 32 * len(self._mask))

    @property
    def complete(self) -> bool:
        """Whether the text so far is one that the grammar allows."""
        return bool(self._matcher.is_accepting())

    def begin(self, prompt_ids: Sequence[int]) -> None:  # noqa: ARG002
        """Begin a text; the prompt is no part of it."""
        self._matcher.reset()

    def apply(self, logits: npt.NDArray[np.floating[Any]]) -> None:
        """Exclude tokens, in place.

        Args:
            logits: float [vocab_size].

        Raises:
            InputError: the grammar has become too complex for llguidance.
        """
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        self._check()
        allowed = np.unpackbits(self._mask.view(np.uint8), bitorder="little", count=len(logits)).view(np.bool_)
        np.copyto(logits, -np.inf, where=~allowed)

    def push(self, token_id: int) -> None:
        """Take a token that was generated.

        Raises:
            InputError: as `apply`, or it is one that was excluded.
        """
        self._matcher.consume_token(token_id)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise InputError(f"{self._name}: {_line(self._matcher.get_error())}; give a simpler one")


def _line(reason: object) -> str:
    """Return what llguidance says, which may be several lines, in one."""
    return " ".join(str(reason).split())[:300]
