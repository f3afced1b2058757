"""Text <-> token ids, with the tokenizer.json of a package, and which ids end a text.

Which, generation_config.json says, as in transformers and in genai_config.json; where it says none, or null,
config.json does. tokenizer_config.json's `eos_token` ends nothing, but a chat template may end a turn with it: one that
the ids lack is named in a warning, and so is an id of config.json.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.decoders import DecodeStream

from runtimes.errors import InputError, PackageError
from runtimes.package import AnyPackage, open_package
from runtimes.text.config_file import read_config, token_text

logger = logging.getLogger(__name__)

_TOKENIZER = "tokenizer.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_CONFIGS = ("generation_config.json", "config.json")
"""where the special ids are: the first that says one, and not null, counts"""
_UNSURE_WORDS = (
    8  # at the end of a piece: what follows may still change where words end, a lookahead or a run of spaces
)
_MOST_HELD = 1 << 20  # characters; a word that is longer than this is cut


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer of a package and the ids that begin, end and pad its sequences."""

    _backend: tokenizers.Tokenizer = field(repr=False)
    eos_token_ids: tuple[int, ...] = ()
    """any of them ends a text; may be empty"""
    bos_token_id: int | None = None
    pad_token_id: int | None = None

    @classmethod
    def from_package(cls, package: AnyPackage, *, check_hashes: bool = True) -> Tokenizer:
        """Read the tokenizer of a package.

        Args:
            package: the package folder, or one that is open.
            check_hashes: compare the files with the manifest first.

        Raises:
            PackageNotFoundError: the folder is not a package.
            IntegrityError: a file is not the one that was exported.
            PackageError: the package has no tokenizer, or a file cannot be read.
        """
        opened = open_package(package)
        folder, files = opened.folder, opened.manifest.files
        if _TOKENIZER not in files:
            raise PackageError(f"{folder}: no {_TOKENIZER}; add it to the checkpoint and export the package again")
        names = [name for name in (_TOKENIZER, _TOKENIZER_CONFIG, *_CONFIGS) if name in files]
        opened.provide(names)
        if check_hashes:
            opened.check(names)
        tokenizer = cls.from_folder(folder)
        tokenizer._name_other_ends(folder)
        return tokenizer

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Read the tokenizer of any folder that has the files of one, a checkpoint for example; nothing is vouched for.

        Raises:
            PackageError: there is no tokenizer, or a file cannot be read.
        """
        if not (folder / _TOKENIZER).is_file():
            raise PackageError(f"{folder}: no {_TOKENIZER}; text cannot be turned into tokens without it")
        configs = [read_config(folder / name) for name in _CONFIGS]
        bos, eos, pad = (_special_ids(folder, configs, f"{kind}_token_id") for kind in ("bos", "eos", "pad"))
        return cls(_load(folder / _TOKENIZER), eos, bos[0] if bos else None, pad[0] if pad else None)

    @cached_property
    def special_tokens(self) -> Mapping[int, str]:
        """The tokens that are no text, such as `<|endoftext|>`, by id."""
        added = self._backend.get_added_tokens_decoder()
        return {token_id: token.content for token_id, token in added.items() if token.special and token.content}

    @cached_property
    def added_tokens(self) -> Mapping[int, str]:
        """The tokens that are found in a text before it is split into words, special or not, by id."""
        added = self._backend.get_added_tokens_decoder()
        return {token_id: token.content for token_id, token in added.items() if token.content}

    @cached_property
    def _parsing_backend(self) -> tokenizers.Tokenizer:
        """The same tokenizer, for which special tokens in a text are special; made when it is first asked for."""
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.encode_special_tokens = False
        return backend

    def to_json(self) -> str:
        """Return tokenizer.json, for a library that reads it itself."""
        text: str = self._backend.to_str()
        return text

    def special_in(self, text: str) -> list[str]:
        """Return the special tokens whose names stand in a text."""
        return [name for name in self.special_tokens.values() if name in text]

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = False) -> list[int]:
        """Return the ids of a text, with what tokenizer.json itself adds unless `add_special_tokens` is False.

        The text is only text: `<|endoftext|>` in it becomes the tokens of these characters, not the special token,
        unless `parse_special` is True: for a prompt that a chat template has rendered, never for what a user wrote.

        Raises:
            InputError: the text holds half of a surrogate pair, which no UTF-8 can express.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"text: character {error.start} is the lone surrogate U+{ord(text[error.start]):04X}; "
                "expected valid Unicode"
            ) from error
        backend = self._parsing_backend if parse_special else self._backend
        ids: list[int] = backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def encode_pieces(self, pieces: Iterable[str], *, piece_length: int = 1 << 16) -> Iterator[list[int]]:
        """Encode a text of any length in little memory; the ids are those of the whole text, nothing added.

        It is cut only between words, as the tokenizer itself cuts a text, and before a space where what follows can no
        longer change the words in front. A word of more than a million characters is cut nevertheless.

        Args:
            pieces: the text, in pieces of any length.
            piece_length: characters that are encoded at a time, at least.

        Yields:
            Ids, at least one at a time.

        Raises:
            InputError: as `encode`.
        """
        held, wanted = "", piece_length
        for piece in pieces:
            held += piece
            if len(held) < wanted:
                continue
            cut = self._safe_cut(held)
            if cut == 0:  # one long word so far: ask again when there is much more of it
                wanted = 2 * len(held)
                if len(held) < _MOST_HELD:
                    continue
                cut = len(held)
            yield self.encode(held[:cut], add_special_tokens=False)
            held, wanted = held[cut:], piece_length
        if held:
            yield self.encode(held, add_special_tokens=False)

    def _safe_cut(self, text: str) -> int:
        """Return the last place at which a text can be cut so that both parts have the ids of the whole; 0: nowhere."""
        splitter = self._backend.pre_tokenizer
        if splitter is None:
            return 0
        starts = [start for _, (start, _) in splitter.pre_tokenize_str(text)][:-_UNSURE_WORDS]
        return next((s for s in reversed(starts) if s and not text[s - 1].isspace() and text[s].isspace()), 0)

    def _name_other_ends(self, folder: Path) -> None:
        """Warn of ids that end a text by one file, and do not by the file that counts."""
        own = _special_ids(folder, [read_config(folder / _CONFIGS[-1])], "eos_token_id")
        others = dict.fromkeys(own, _CONFIGS[-1])
        token = _eos_token(folder / _TOKENIZER_CONFIG)
        token_id = None if token is None else self._backend.token_to_id(token)
        if token_id is not None:
            others.setdefault(token_id, _TOKENIZER_CONFIG)
        left_out = {i: name for i, name in others.items() if i not in self.eos_token_ids}
        if left_out:
            named = ", ".join(f"{i} ({self._backend.id_to_token(i)}) of {name}" for i, name in left_out.items())
            logger.warning(
                "%s: a text ends at token id %s, not at %s; to end it there too, give that as a stop string",
                folder,
                ", ".join(map(str, self.eos_token_ids)) or "none",
                named,
            )

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of ids, without special tokens; bytes that are no UTF-8 become U+FFFD."""
        text: str = self._backend.decode(list(token_ids))
        return text

    def stream(self) -> TextStream:
        """Return a decoder that takes ids one by one."""
        return TextStream(self._backend)


class TextStream:
    """Ids one by one -> text, in whole characters.

    All that `push` returned and `flush` at the end make up exactly what `Tokenizer.decode` gives for the same ids.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._given = 0  # characters

    def push(self, token_id: int) -> str:
        """Add one id; return the text that is complete now, which may be empty."""
        self._ids.append(token_id)
        text: str = self._stream.step(self._backend, token_id) or ""
        self._given += len(text)
        return text

    def flush(self) -> str:
        """Return what is left at the end: U+FFFD for each piece of a character that was never completed."""
        text: str = self._backend.decode(self._ids)[self._given :]
        self._given += len(text)
        return text


def _load(path: Path) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except BaseException as error:
        # tokenizers raises a bare Exception, or pyo3's PanicException: a BaseException that cannot be imported.
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        reason = str(error).strip().replace("\n", " ")[:200]
        raise PackageError(f"{path}: tokenizers cannot load it ({reason}); export the package again") from error
    backend.encode_special_tokens = True  # text from users never becomes a special token
    backend.no_truncation()  # both may be left in the file from training
    backend.no_padding()
    return backend


def _special_ids(folder: Path, configs: Sequence[dict[str, Any]], name: str) -> tuple[int, ...]:
    """Return a field's ids from the first file that says it, () if none does; an id that the model lacks is none."""
    value: Any = next((config[name] for config in configs if config.get(name) is not None), [])
    ids = value if isinstance(value, list) else [value]
    if not all(type(i) is int for i in ids):
        raise PackageError(f"{folder}: {name} {value!r} is neither a token id nor a list of them")
    sizes = [config["vocab_size"] for config in configs if type(config.get("vocab_size")) is int]
    return tuple(i for i in ids if i >= 0 and all(i < size for size in sizes))


def _eos_token(path: Path) -> str | None:
    """Return the eos_token of tokenizer_config.json; None too where that cannot be read, since it ends nothing."""
    try:
        return token_text(read_config(path).get("eos_token"))
    except PackageError:
        return None
