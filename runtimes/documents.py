"""Texts that a command reads one by one, and what it writes of each: lines, or JSON documents a line.

| a line of JSON                            | is                                           |
|-------------------------------------------|----------------------------------------------|
| "a text"                                  | a text                                       |
| {"text": "a text", "id": 7}               | a text; other fields are written again       |
| {"token_ids": [3, 1, 4], "id": 8}         | ids, as they stand                           |

Each line that is read is answered by one, so that the two files can be laid side by side.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from runtimes.errors import ContextLengthError, InputError, first_names
from runtimes.generation.generate import encode_prompt
from runtimes.runners.runner import check_rows
from runtimes.text.tokenizer import Tokenizer

_TEXT, _IDS, _TOKENS = "text", "token_ids", "tokens"


@dataclass(frozen=True)
class Document:
    """A text, as ids."""

    line: int
    """of the input, from 1"""
    token_ids: Sequence[int]
    fields: Mapping[str, Any] = field(hash=False)
    """what is written again"""


def read_documents(
    text: str,
    tokenizer: Callable[[], Tokenizer],
    *,
    jsonl: bool,
    vocab_size: int,
    longest: int,
    found: str,
    parse_special: bool = False,
) -> Iterator[Document]:
    """Read texts, one a line.

    Args:
        text: the whole input, its lines ended by LF.
        tokenizer: returns that of the package; called for texts alone.
        jsonl: each line is JSON; else each is a text.
        vocab_size: ids must be below it.
        longest: tokens that fit.
        found: the field of what will be found of each, which no line may have.
        parse_special: names of special tokens in a text are these tokens.

    Raises:
        InputError: a line is blank, which is said before the first is read, or not what the table says.
        ContextLengthError: a text does not fit.
    """
    lines = text.removesuffix("\n").split("\n") if text else []
    blank = [str(number) for number, line in enumerate(lines, 1) if not line.strip()]
    if blank:
        raise InputError(
            f"line {first_names(blank)}: blank; each line is a text, and is answered by a line: leave out what is none"
        )
    for number, line in enumerate(lines, 1):
        try:
            given: dict[str, Any] = _document(line) if jsonl else {_TEXT: line}
            taken = [f'"{name}"' for name in (_TOKENS, found) if name in given]
            if taken:
                raise InputError(f"{' and '.join(taken)}: what is written of a text has that name; rename the field")
            if _IDS in given:
                ids = _checked(given[_IDS], vocab_size)
            else:
                ids = encode_prompt(tokenizer(), given[_TEXT], parse_special=parse_special)
        except InputError as error:
            raise InputError(f"line {number}: {error}") from error
        if len(ids) > longest:
            raise ContextLengthError(f"line {number}: {len(ids)} tokens, at most {longest} fit; shorten the text")
        yield Document(number, ids, {name: value for name, value in given.items() if name != _IDS})


def _checked(ids: Sequence[int], vocab_size: int) -> Sequence[int]:
    check_rows([ids], vocab_size=vocab_size, cache_lengths=(), max_cache_length=len(ids), names=(_IDS,))
    return ids


def _document(line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"no JSON ({error}); without --jsonl each line is a text") from error
    given = {_TEXT: found} if isinstance(found, str) else found
    if not isinstance(given, dict) or (_TEXT in given) == (_IDS in given):
        raise InputError(f'expected a text, or an object with one of "{_TEXT}" and "{_IDS}", found {line[:60]!r}')
    if not isinstance(given.get(_TEXT, ""), str):
        raise InputError(f'"{_TEXT}" is {type(given[_TEXT]).__name__}, expected a string')
    if not isinstance(given.get(_IDS, []), list):
        raise InputError(f'"{_IDS}" is {type(given[_IDS]).__name__}, expected a list of ids')
    return given


def in_groups(documents: Iterable[Document], size: int) -> Iterator[list[Document]]:
    """Return documents so many at a time."""
    group: list[Document] = []
    for document in documents:
        group.append(document)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def written(document: Document, name: str, found: Any) -> str:
    """Return the line that says what was found of a document."""
    fields = {**document.fields, _TOKENS: len(document.token_ids), name: found}
    return json.dumps(fields, ensure_ascii=False) + "\n"
