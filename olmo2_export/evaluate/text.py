"""A text file of any length -> token ids -> windows, in memory that does not grow with the file.

    all ids:   p a b c d e f g h      p: the token that begins a text, bos_token_id or else the first eos_token_id
    context 4, stride 4               context 4, stride 2: each token sees at least 2 before it, but at the start
    reads p a b c  scores a b c d     reads p a b c  scores a b c d
    reads d e f g  scores e f g h     reads c d e f  scores     e f
                                      reads e f g h  scores     g h

Every token is scored exactly once. The first window begins with p, so that the text's first token has something to be
predicted from; a model that has no such token begins with the first token of the text, which then is not scored. Each
later window begins with tokens of the text alone, at position 0, as the rolling windows of lm-eval do. The last window
reads a full context, too, and scores what is left.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from runtimes.errors import InputError
from runtimes.text.plain_text import read_text
from runtimes.text.tokenizer import Tokenizer

HELDOUT = Path(__file__).parents[1] / "demo" / "heldout.txt"
"""what is evaluated where no text is given"""

_READ = 1 << 16  # ids at a time
_SHOWN = 1 << 16  # bytes that show how a file's lines end
_IDS = ".npy"

logger = logging.getLogger(__name__)

TokenArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Window:
    """What is fed at once, and what it must predict."""

    ids: TokenArray
    """int64 [n]: n is at most the context"""
    targets: TokenArray
    """int64 [m]: the tokens after each of the last m ids"""

    @property
    def first(self) -> int:
        """The position of the first id whose prediction is scored."""
        return len(self.ids) - len(self.targets)


@dataclass(frozen=True)
class TokenText:
    """A file as token ids, which can be read again and again."""

    path: Path
    """UTF-8 text, or `.npy`: int [n] token ids"""
    tokenizer: Tokenizer | None
    """not needed for ids"""
    prefix: int | None
    """the id that begins a text"""
    most: int | None = None
    """ids to read; None: all"""

    def pieces(self) -> Iterator[TokenArray]:
        """Read the ids, in pieces.

        Raises:
            InputError: the file is no UTF-8, or there is no tokenizer to read text with.
        """
        left = self.most
        for ids in self._all():
            part = ids if left is None else ids[:left]
            if len(part):
                yield part
            if left is not None:
                left -= len(part)
                if left == 0:
                    return

    def count(self, vocab_size: int) -> int:
        """Read all of it and return how many tokens there are to score.

        Raises:
            InputError: as `pieces`; an id that the model does not have; nothing to score.
        """
        self._name_carriage_returns()
        total = 0
        for ids in self.pieces():
            wrong = ids[(ids < 0) | (ids >= vocab_size)]
            if len(wrong):
                raise InputError(f"{self.path}: token id {wrong[0]}, the vocabulary has 0 to {vocab_size - 1}")
            total += len(ids)
        scored = total if self.prefix is not None else max(0, total - 1)
        if scored == 0:
            why = "a text of one token, and the model has no token that begins a text" if total else "an empty text"
            raise InputError(f"{self.path}: {why}: nothing to score; give a longer one")
        return scored

    def windows(self, context: int, stride: int) -> Iterator[Window]:
        """Cut the ids into windows; see the top of this file.

        Args:
            context: tokens that a window reads at most, at least 1.
            stride: tokens that each window but the first scores, 1 to context.
        """
        held = np.zeros(0, np.int64) if self.prefix is None else np.array([self.prefix], np.int64)
        dropped, scored = 0, 0  # of all ids, in front of `held`; targets so far
        pieces = self.pieces()
        more = True
        while True:
            wanted = context if scored == 0 else stride
            while more and dropped + len(held) < scored + wanted + 1:
                piece = next(pieces, None)
                more = piece is not None
                if piece is not None:
                    held = np.concatenate([held, piece])
            count = min(wanted, dropped + len(held) - 1 - scored)
            if count < 1:
                return
            scored += count
            end = scored - dropped
            yield Window(held[max(0, end - context) : end], held[end - count + 1 : end + 1])
            spare = max(0, end - context)
            held, dropped = held[spare:], dropped + spare

    def _name_carriage_returns(self) -> None:
        """Warn of lines that end with CR LF; they are scored as they are, since a measurement is of these bytes."""
        if self.path.suffix != _IDS and self.path.is_file():
            with self.path.open("rb") as file:
                if b"\r\n" in file.read(_SHOWN):
                    logger.warning(
                        "%s: lines end with CR LF, and each CR is scored, too; without them the perplexity is another "
                        "one (tr -d '\\r' removes them)",
                        self.path,
                    )

    def _all(self) -> Iterator[TokenArray]:
        if self.path.suffix == _IDS:
            yield from _stored_ids(self.path)
            return
        if not self.path.is_file():
            raise InputError(f"{self.path}: no such file; expected UTF-8 text, or token ids as {_IDS}")
        if self.tokenizer is None:
            raise InputError(f"{self.path}: text, but there is no tokenizer.json; give token ids as a {_IDS} file")
        for ids in self.tokenizer.encode_pieces(read_text(self.path)):
            yield np.array(ids, np.int64)


def _stored_ids(path: Path) -> Iterator[TokenArray]:
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: not an array of token ids ({' '.join(str(error).split())})") from error
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise InputError(f"{path}: expected integers [n], found {ids.dtype} {list(ids.shape)}")
    for start in range(0, len(ids), _READ):
        yield np.array(ids[start : start + _READ], np.int64)
