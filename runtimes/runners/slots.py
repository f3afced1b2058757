"""Slots: sequences that come and go on one runner while others wait, for a server.

| call                           | takes                               | gives                                       |
|--------------------------------|-------------------------------------|---------------------------------------------|
| begin                          | token ids, any int; an adapter      | a slot; nothing is computed                 |
| extend                         | a slot, tokens at most              | float32 [vocab_size], or None: there is more|
| extend_all                     | the same                            | float32 [n, vocab_size], of each of them    |
| admit                          | token ids, any int                  | a slot, float32 [vocab_size]: begin, extend |
| step                           | slot -> token id, any int           | slot -> float32 [vocab_size]                |
| append                         | a slot, token ids, any int          | nothing: `extend` computes them             |
| copy_prefix                    | a slot, a length                    | another slot, with its first tokens         |
| truncate_slot                  | a slot, a length                    | nothing: the slot keeps its first tokens    |
| park                           | a slot                              | nothing: steps of others cost less          |
| release                        | a slot                              | nothing: it is free                         |

A prompt enters in pieces, so that those who are being answered wait for a piece and not for a prompt. A slot keeps its
number from `begin` to `release`, wherever its keys and values are moved to.

An exact runner (`open_runner(..., exact=True)`) gives each sequence the logits that it would get alone, bit for bit,
whoever else is there and however its prompt is cut. Kernels round differently for one row and for several, for few
tokens and for many; so it computes an even number of rows at each step, with the decode graph alone, and cuts prompts
at multiples of `EXACT_TOKENS`, and always before the last 8 to 15 tokens.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Protocol, TypeVar

from runtimes.errors import InputError, UsageError
from runtimes.integers import as_integer
from runtimes.runners.runner import Ids, Logits, Runner, TokenIds, check_rows

_T = TypeVar("_T")

DEFAULT_SLOTS = 8
"""slots of a runner whose graph takes any number of rows"""

EXACT_TOKENS = 8
"""an exact runner cuts prompts at multiples of it, and the last piece has no fewer if the prompt has as many"""


class Slots(Runner, Protocol):
    """A runner with slots; every one that `open_runner` opens is.

    The slots and the batch that `Runner` describes share what is held. `reset` forgets both. Where rows lie in one
    memory (the shared and the static cache), the slots are rows of the batch: any call that changes the batch takes
    them over, and whoever had them is refused from then on; calls of the batch are refused (`UsageError`) while a row
    is free. The portable graph has slots or a batch: a call of one is refused (`UsageError`) while there are others.
    """

    adapters: tuple[str, ...]
    """LoRA adapters that a sequence may have, by name"""
    exact: bool
    """whether a sequence's logits do not depend on the others nor on the pieces of its prompt"""
    max_slots: int
    """sequences at once"""

    @property
    def copies_prefixes(self) -> bool:
        """Whether `copy_prefix` copies; elsewhere it computes, all at once."""
        ...

    @property
    def slots(self) -> tuple[int, ...]:
        """Those that are taken, the lowest first."""
        ...

    def slot_tokens(self, slot: int) -> Ids:
        """Return the ids, int64 [length], whose keys and values a slot holds; only to read.

        Raises:
            InputError: the slot is free.
        """
        ...

    def begin(self, token_ids: TokenIds, adapter: str | None = None) -> int:
        """Take the lowest free slot for a new sequence. Nothing is computed.

        Args:
            token_ids: of the prompt, at least one.
            adapter: LoRA adapter of the package, which the slot keeps; None: none.

        Returns:
            The slot; `extend` it until there are logits.

        Raises:
            InputError: as `Runner.prefill`, or all slots are taken.
            ContextLengthError: the prompt does not fit, or there is no memory for another row.
            UsageError: the runner is closed, or is the portable graph's and holds a batch.
        """
        ...

    def extend(self, slot: int, budget: int | None = None) -> Logits | None:
        """Compute the next tokens of a slot's prompt.

        Args:
            slot: from `begin`.
            budget: tokens at most; None: all that are left. An exact runner computes at least `EXACT_TOKENS`, or the
                last 15 at most.

        Returns:
            float32 [vocab_size], the logits of the token after the prompt; None where there is more of it to compute.

        Raises:
            InputError: the slot is free, its prompt is complete, or budget is no integer of at least 1.
            NumericError: a logit is NaN or infinite; the piece is still to be computed.
        """
        ...

    def extend_all(self, slot: int, budget: int) -> Logits:
        """`extend` a slot, and give the logits behind each of the tokens that are computed.

        Returns:
            float32 [n, vocab_size]; `slot_tokens` tells whether the prompt is complete.

        Raises:
            UsageError: a classifier.
            InputError, NumericError: as `extend`.
        """
        ...

    def admit(self, token_ids: TokenIds, adapter: str | None = None) -> tuple[int, Logits]:
        """`begin` a sequence and `extend` it to the end of its prompt while the others wait.

        Returns:
            The slot, and the logits of the next token, float32 [vocab_size].

        Raises:
            InputError, ContextLengthError, UsageError, NumericError: as these; no slot is taken.
        """
        ...

    def step(self, token_ids: Mapping[int, int]) -> dict[int, Logits]:
        """Append one token to some of the slots; the others wait.

        Args:
            token_ids: slot -> id.

        Returns:
            slot -> logits of the next token, float32 [vocab_size].

        Raises:
            InputError: no slot, one that is free or whose prompt is not complete, or an id that is not in the
                vocabulary.
            ContextLengthError: a slot is full.
            BrokenSlotsError: logits of some slots are NaN or infinite. These are as they were, to be released; the
                others have their token, and their logits are in the error.
        """
        ...

    def append(self, slot: int, token_ids: TokenIds) -> None:
        """Have more tokens computed by `extend`, behind those of a slot: the rest of a prompt, or another turn.

        Raises:
            InputError, ContextLengthError: as `begin`.
            UsageError: an exact runner cannot compute them as if they had come at once: the slot holds generated
                tokens, or a number of tokens that is no multiple of `EXACT_TOKENS`, or these are fewer than that.
        """
        ...

    def copy_prefix(self, slot: int, length: int) -> int:
        """Take another slot, with the first tokens of one that holds them: a prompt's common beginning, or a fork.

        It has that one's adapter: keys and values that were made with one are of no use to another. An exact runner
        computes fewer than `EXACT_TOKENS` of a longer prompt again.

        Args:
            slot: which holds them.
            length: tokens, at least one.

        Returns:
            The new slot: `step` it, or `append` and `extend`.

        Raises:
            InputError: the slot is free or holds fewer, or all slots are taken.
            ContextLengthError: as `begin`.
            NumericError: a logit of what is computed again is NaN or infinite; no slot is taken.
        """
        ...

    def truncate_slot(self, slot: int, length: int) -> None:
        """Keep only the first tokens of a slot, and forget what was to be computed behind them.

        An exact runner computes fewer than `EXACT_TOKENS` of a longer prompt again.

        Raises:
            InputError: the slot is free or holds fewer.
            NumericError: a logit of what is computed again is NaN or infinite; the slot is as it was.
        """
        ...

    def park(self, slot: int) -> None:
        """Have a slot wait where the others' steps do not compute it too, until it is stepped or appended to.

        Where rows lie in one memory this takes a free row, unless all slots behind it wait as well; without one the
        slot stays where it is.

        Raises:
            InputError: it is free, or its prompt is not complete.
        """
        ...

    def release(self, slot: int) -> None:
        """Free a slot, and its memory where the system takes it back.

        Raises:
            InputError: it is free already.
        """
        ...


def piece_length(left: int, budget: int, exact: bool) -> int:
    """Return how many tokens of a prompt to compute next.

    Args:
        left: of the prompt, at least one.
        budget: as of `Slots.extend`.
        exact: cut at multiples of `EXACT_TOKENS`.

    Raises:
        InputError: budget is no integer of at least 1.
    """
    most = as_integer(budget)
    if most is None or most < 1:
        raise InputError(f"budget {budget!r}: expected an integer of at least 1")
    if not exact:
        return min(most, left)
    # The last piece, whose logits are given out, has 8 to 15 tokens whatever the budget; the others any multiple of 8.
    before_last = (left // EXACT_TOKENS - 1) * EXACT_TOKENS
    return left if before_last < EXACT_TOKENS else min(max(1, most // EXACT_TOKENS) * EXACT_TOKENS, before_last)


def check_exact_append(held: int, prompted: int, more: int) -> None:
    """Refuse tokens that an exact runner would compute otherwise if they came in one prompt with what is held.

    Args:
        held: tokens of the slot.
        prompted: of these, the first ones that were computed as a prompt.
        more: tokens to append.

    Raises:
        UsageError: see `Slots.append`.
    """
    if held > prompted:
        raise UsageError(
            f"an exact slot with {held} tokens, {prompted} of a prompt: what was generated is computed otherwise than "
            "a prompt; begin a new one, or truncate it to the prompt"
        )
    if held % EXACT_TOKENS or (held and more < EXACT_TOKENS):
        raise UsageError(
            f"an exact slot with {held} tokens and {more} to append: expected a multiple of {EXACT_TOKENS} and at "
            f"least {EXACT_TOKENS}; keep fewer"
        )


def is_computed_again(length: int, prompted: int, exact: bool) -> bool:
    """Tell whether the first tokens of a slot, to be those of a prompt of their own, have to be computed again.

    The keys and values of a prompt's piece do not depend on its length from `EXACT_TOKENS` on; below they do.

    Args:
        length: tokens that are kept or copied.
        prompted: first tokens of the slot that were computed as a prompt.
        exact: whether the runner is.
    """
    return exact and 0 < length < min(EXACT_TOKENS, prompted)


def check_slot_length(length: int, held: int, least: int = 0) -> int:
    """Check how many of a slot's tokens to keep or to copy.

    Raises:
        InputError: no integer from `least` to `held`.
    """
    count = as_integer(length)
    if count is None or not least <= count <= held:
        raise InputError(f"length {length!r}: the slot holds {held} tokens; expected an integer from {least} to {held}")
    return count


def admit(runner: Slots, token_ids: TokenIds, adapter: str | None = None) -> tuple[int, Logits]:
    """`Slots.admit` of any runner."""
    slot = runner.begin(token_ids) if adapter is None else runner.begin(token_ids, adapter)
    try:
        logits = runner.extend(slot)
    except BaseException:
        runner.release(slot)
        raise
    assert logits is not None
    return slot, logits


def find_slot(slot: int, taken: Mapping[int, _T]) -> _T:
    """Return what a runner has of a slot.

    Raises:
        InputError: it is free.
    """
    number = as_integer(slot)
    if number is None or number not in taken:
        raise InputError(f"slot {slot!r}: not admitted")
    return taken[number]


def check_slots_left(taken: int, runner: Slots) -> None:
    """Refuse one sequence more than a runner has slots.

    Raises:
        InputError: see `Slots.begin`.
    """
    if taken >= runner.max_slots:
        raise InputError(
            f"{taken + 1} rows, this runner has {runner.max_slots} slots; release one, or open it with more max_slots"
        )


def check_slot_ids(token_ids: TokenIds, held: int, name: str, runner: Slots) -> Ids:
    """Return tokens that come behind those that a slot holds.

    Args:
        token_ids: at least one.
        held: tokens, or to be computed.
        name: of what they are, for the message.
        runner: whose slot it is.

    Raises:
        InputError, ContextLengthError: see `Slots.begin`.
    """
    (ids,) = check_rows(
        [token_ids],
        vocab_size=runner.model.vocab_size,
        cache_lengths=(held,),
        max_cache_length=runner.max_cache_length,
        names=(name,),
    )
    return ids


def check_step(token_ids: Mapping[int, int], waiting: Container[int], runner: Slots) -> dict[int, Ids]:
    """Check what `step` is given.

    Args:
        token_ids: slot -> id.
        waiting: slots whose prompt is not complete.
        runner: whose slots they are.

    Returns:
        slot -> its id, int64 [1], in the mapping's order; at least one.

    Raises:
        InputError: see `Slots.step`; or no mapping, or one whose keys are no integers or twice the same.
        ContextLengthError: a slot is full.
    """
    if not isinstance(token_ids, Mapping):
        raise InputError(f"expected a mapping from slots, integers, to token ids, found {type(token_ids).__name__}")
    slots = [slot for slot in map(as_integer, token_ids) if slot is not None]
    if len(set(slots)) < len(token_ids):
        raise InputError("expected a mapping from slots, integers, each once, to token ids")
    taken = runner.slots
    free = [slot for slot in slots if slot not in taken]
    if free or not slots:
        raise InputError(f"slot {free[0] if free else '(none)'}: not admitted; admit a sequence first")
    incomplete = [slot for slot in slots if slot in waiting]
    if incomplete:
        raise InputError(f"slot {incomplete[0]}: its prompt is not complete; extend it first")
    given = check_rows(
        [[token] for token in token_ids.values()],
        vocab_size=runner.model.vocab_size,
        cache_lengths=tuple(len(runner.slot_tokens(slot)) for slot in slots),
        max_cache_length=runner.max_cache_length,
        names=[f"slot {slot}" for slot in slots],
    )
    return dict(zip(slots, given, strict=True))
