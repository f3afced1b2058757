"""Ids one by one -> the text that may be shown, and where it ends; an object per text, so that a server has many."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias

from runtimes.errors import InputError, UsageError
from runtimes.integers import as_integer
from runtimes.text.tokenizer import Tokenizer

FinishReason: TypeAlias = Literal["eos", "stop", "length", "cancelled"]
"""an end-of-sequence token, a stop string, as many tokens as were asked for or fit, or the caller wanted no more"""


class Piece(NamedTuple):
    """A piece of generated text."""

    text: str
    """whole characters; empty only in the last piece"""
    finish_reason: FinishReason | None
    """set in the last piece"""


class _Held:
    """Text that is not given out yet, and the names of special tokens in it, which are never given out.

    Stop strings are looked for in the text, as it is given out; those that hold the name of a special token in the text
    with these names in their places.
    """

    def __init__(self, stop: Sequence[str], special_tokens: Mapping[int, str]) -> None:
        self._stop = stop
        self._stop_with_names = [s for s in stop if any(name in s for name in special_tokens.values())]
        self._names = special_tokens if self._stop_with_names else {}
        self._parts: list[tuple[str, bool]] = []  # (text, whether it is given out)
        self.stopped: str | None = None
        """the text in front of the first stop string that is complete"""
        self.stop_string: str | None = None
        """that one"""

    @property
    def text(self) -> str:
        """What would be given out."""
        return "".join(text for text, shown in self._parts if shown)

    def hidden(self, token_id: int) -> str:
        """Return the name of a special token, where a stop string holds any."""
        return self._names.get(token_id, "")

    def push(self, text: str, hidden: str = "") -> None:
        """Add what a token gives, and its name if it is special."""
        self._parts += [part for part in ((text, True), (hidden, False)) if part[0]]
        cuts = [cut for cut in (_find_stop(self.text, self._stop), self._find_with_names()) if cut is not None]
        if cuts:
            at, self.stop_string = min(cuts)
            self.stopped = self.text[:at]

    def free(self) -> str:
        """Drop and return the text that can be no part of a stop string."""
        text, names = self.text, self._with_names()
        kept = len(names) - _undecided(names, self._stop_with_names)
        count = min(len(text) - _undecided(text, self._stop), self._shown(kept))
        free, left = text[:count], count
        while self._parts:  # what is given out, and the names in front that can be no part of a stop string
            part, shown = self._parts[0]
            gone = min(left, len(part)) if shown else len(part)
            if not gone or (not shown and not left and gone > kept):
                break
            self._parts[:1] = [(part[gone:], True)] if gone < len(part) else []
            left -= gone if shown else 0
            kept -= gone
        return free

    def _with_names(self) -> str:
        return "".join(text for text, _ in self._parts) if self._stop_with_names else ""

    def _find_with_names(self) -> tuple[int, str] | None:
        cut = _find_stop(self._with_names(), self._stop_with_names)
        return None if cut is None else (self._shown(cut[0]), cut[1])

    def _shown(self, length: int) -> int:
        """Return how many characters are given out of the first `length` with names; all where there are no names."""
        if not self._stop_with_names:
            return len(self.text)
        count = 0
        for text, shown in self._parts:
            part = min(length, len(text))
            count += part if shown else 0
            length -= part
        return count


def _find_stop(text: str, stop: Sequence[str]) -> tuple[int, str] | None:
    """Return where the stop string begins that is complete first, and it; the longest, if several end there."""
    ends = [(at + len(s), at, s) for s in stop if (at := text.find(s)) >= 0]
    return min(ends)[1:] if ends else None


def _undecided(text: str, stop: Sequence[str]) -> int:
    """Return the length of the longest end of `text` that could become a stop string."""
    longest = max((len(s) for s in stop), default=1) - 1
    sizes = range(min(longest, len(text)), 0, -1)
    return next((n for n in sizes if any(s.startswith(text[-n:]) for s in stop)), 0)


class TextState:
    """One text while it is generated.

    Text that could be the beginning of a stop string is held back until it is decided, so no part of one is given out;
    nor is half a character. Special tokens give no text; a stop string that holds the name of one is found where the
    token is, be it the one that ends the text.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, stop: Sequence[str] = (), eos_token_ids: Collection[int] | None = None
    ) -> None:
        """Begin a text.

        Args:
            tokenizer: of the package.
            stop: the text ends before the first of them to be complete.
            eos_token_ids: the text ends at any of these ids; None means the tokenizer's, () none.

        Raises:
            InputError: stop is no list of strings, or holds an empty one.
        """
        if not isinstance(stop, Sequence) or isinstance(stop, str) or not all(isinstance(s, str) and s for s in stop):
            raise InputError(f"stop {stop!r}: expected a list of strings, none of them empty")
        self.finish_reason: FinishReason | None = None
        """why the text has ended; None: it has not"""
        self._eos_token_ids = tokenizer.eos_token_ids if eos_token_ids is None else eos_token_ids
        self._stream = tokenizer.stream()
        self._held = _Held(stop, tokenizer.special_tokens)

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the text, if one did."""
        return self._held.stop_string

    def push(self, token_id: int) -> str:
        """Take the next id.

        Returns:
            The text that is decided now and was not given out before, in whole characters; it may be empty. If the text
            has ended, see `finish_reason`, all that was left of it.

        Raises:
            UsageError: it has ended before.
            InputError: no integer of at least 0.
        """
        self._refuse_ended()
        found = as_integer(token_id)
        if found is None or found < 0:
            raise InputError(f"token id {token_id!r}: expected an integer of at least 0")
        token_id = found
        ends = token_id in self._eos_token_ids
        # What ends a text is not text, whatever the tokenizer makes of it; but half a character in front of it is.
        self._held.push(self._stream.flush() if ends else self._stream.push(token_id), self._held.hidden(token_id))
        return self._last("eos") if ends else self._given()

    def finish(self) -> str:
        """End the text where no more ids are to come.

        Returns:
            What was left of it: what was held back, and U+FFFD for half a character.

        Raises:
            UsageError: it has ended before.
        """
        self._refuse_ended()
        self._held.push(self._stream.flush())
        return self._last("length")

    def _given(self) -> str:
        return self._held.free() if self._held.stopped is None else self._last("stop")

    def _last(self, reason: FinishReason) -> str:
        stopped = self._held.stopped
        self.finish_reason = reason if stopped is None else "stop"
        return self._held.text if stopped is None else stopped

    def _refuse_ended(self) -> None:
        if self.finish_reason is not None:
            raise UsageError(f"the text has ended ({self.finish_reason}); begin another")
