"""Slots of answers that have ended, kept for prompts that begin like them: a conversation's next turn, a shared system
prompt. There are a few at most; the one that was used longest ago goes first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from runtimes.runners.runner import Ids, common_prefix
from runtimes.runners.slots import EXACT_TOKENS, Slots

LEAST_REUSED = 8
"""tokens; fewer are computed as fast as they are copied"""


class Text(NamedTuple):
    """What is known of a slot beside its tokens."""

    prompted: int
    """its first tokens that were computed as a prompt"""
    adapter: str | None


class KeptRows:
    """The slots, in the order in which they were last of use."""

    def __init__(self, runner: Slots, most: int) -> None:
        """Take whose slots they are, and how many to keep."""
        self._runner = runner
        self._most = most
        self.texts: dict[int, Text] = {}
        """slot -> what it is of, the one used longest ago first"""

    @property
    def tokens(self) -> int:
        """Tokens that they hold."""
        return sum(len(self._runner.slot_tokens(slot)) for slot in self.texts)

    def keep(self, slot: int, text: Text) -> None:
        """Keep a slot, be it in another's place; or release it."""
        if len(self._runner.slot_tokens(slot)) < LEAST_REUSED or self._most == 0:
            self._runner.release(slot)
            return
        # A free slot is left, so that those that are being answered can have the lowest rows.
        while len(self.texts) >= self._most or len(self._runner.slots) >= self._runner.max_slots:
            if not self.drop():
                break
        if 1 < len(self._runner.slots) == self._runner.max_slots:
            self._runner.release(slot)
            return
        self._runner.park(slot)
        self.texts[slot] = text

    def used(self, slot: int) -> None:
        """Take note that a slot, if it is one of them, was of use."""
        if slot in self.texts:
            self.texts[slot] = self.texts.pop(slot)

    def take(self, slot: int) -> None:
        """Keep a slot no longer: somebody goes on with it."""
        del self.texts[slot]

    def drop(self, but: int | None = None) -> bool:
        """Release the slot that was used longest ago; tell whether there was one.

        Args:
            but: not this one.
        """
        slot = next((slot for slot in self.texts if slot != but), None)
        if slot is None:
            return False
        del self.texts[slot]
        self._runner.release(slot)
        return True


def longest_prefix(
    runner: Slots, texts: Mapping[int, Text], prompt_ids: Sequence[int], adapter: str | None
) -> tuple[int | None, int]:
    """Return which slot holds most of a prompt's beginning, and how many tokens of it; None and 0: none holds any.

    Args:
        runner: whose slots.
        texts: slots to look at.
        prompt_ids: the prompt; one token of it, or as many as an exact runner computes at once, are left to compute.
        adapter: of the prompt; keys and values of another are those of another model.
    """
    best: tuple[int | None, int] = None, 0
    for slot, text in texts.items():
        if text.adapter == adapter:
            length = _reusable(runner.slot_tokens(slot), text.prompted, prompt_ids, exact=runner.exact)
            best = (slot, length) if length > best[1] else best
    return best


def _reusable(held: Ids, prompted: int, prompt_ids: Sequence[int], *, exact: bool) -> int:
    length = common_prefix(held, prompt_ids[:-1])
    if exact:  # what was generated was computed otherwise than a prompt, and prompts are cut at multiples
        length = max(0, min(length, prompted, len(prompt_ids) - EXACT_TOKENS)) // EXACT_TOKENS * EXACT_TOKENS
    return length if length >= LEAST_REUSED else 0
