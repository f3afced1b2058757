"""What every runner offers, and the checks that all of them make before and after a call of the graph.

| call                           | takes                               | gives                                       |
|--------------------------------|-------------------------------------|---------------------------------------------|
| prefill                        | B rows of n_b token ids, any int    | per row float32 [1, vocab_size]: the last   |
| prefill, all_positions=True    | the same                            | per row float32 [n_b, vocab_size]           |
| decode                         | B token ids, any int                | float32 [B, vocab_size]                     |
| decode_top                     | B token ids, any int                | int64, float32 [B, top_k]: the likeliest    |
| decode_block                   | n token ids, any int, for one row   | float32 [n, vocab_size]                     |
| prefill_embeds                 | B rows of vectors, float [n_b, hidden] | as prefill                               |
| prefill_hidden                 | B rows of n_b token ids, any int    | per row, by number, float32 [n_b, hidden]   |
| prefill_embeds_hidden          | as prefill_embeds                   | as prefill_hidden                           |
| score, of a classifier         | B rows of n_b token ids, any int    | float32 [B, labels]                         |
| truncate                       | B lengths, any int                  | nothing: row b keeps its first tokens       |

A classifier gives scores of the last token, [labels], where others give logits, [vocab_size], and of no other position.

The graphs behind it are described where they are called: `ort/concat.py`, `ort/shared.py`, `runners/static.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any, Protocol, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from runtimes.errors import ContextLengthError, InputError, NumericError, UsageError
from runtimes.integers import as_integer
from runtimes.manifest import ModelSpec, Variant

Logits: TypeAlias = npt.NDArray[np.float32]
TokenIds: TypeAlias = Sequence[int] | npt.NDArray[np.integer[Any]]
Ids: TypeAlias = npt.NDArray[np.int64]
AdapterChoice: TypeAlias = str | Sequence[str | None] | None
"""a LoRA adapter for all rows, or one for each; None: none"""
HiddenStates: TypeAlias = dict[int, npt.NDArray[np.float32]]
"""of one row: the number of a hidden state -> float32 [n, hidden_size]"""


class Runner(Protocol):
    """One graph of a package, loaded, with the KV cache of one batch of sequences.

    A call that raises leaves the runner as it was. A runner serves one thread at a time: a call from another one
    meanwhile raises UsageError. Threads may take turns.
    """

    variant: Variant
    model: ModelSpec
    max_cache_length: int
    """tokens a row can hold"""
    top_k: int
    """candidates that `decode_top` gives; 0: the graph picks none, use `decode`"""

    @property
    def exclusive(self) -> AbstractContextManager[object]:
        """A context in which calls of other threads are refused; entering it is refused where another one is in it."""
        ...

    @property
    def memory_note(self) -> str:
        """How the weights lie in memory, for people; empty where nothing was done about it."""
        ...

    @property
    def cache_lengths(self) -> tuple[int, ...]:
        """Tokens in the cache, per row; () when it is empty."""
        ...

    @property
    def cached_tokens(self) -> tuple[Ids, ...]:
        """Per row the ids, int64 [length], whose keys and values the cache holds; () when it is empty. Only to read."""
        ...

    @property
    def cached_adapters(self) -> tuple[str | None, ...]:
        """Per row the LoRA adapter that its keys and values were made with; None: none. () when the cache is empty."""
        ...

    def prefill(
        self, sequences: Sequence[TokenIds], *, all_positions: bool = False, adapter: AdapterChoice = None
    ) -> list[Logits]:
        """Append tokens to every row of the cache.

        The first call sets the number of rows. A later one appends to what is there: a prompt may come in chunks, and
        a conversation feeds only what is new.

        Args:
            sequences: one sequence of token ids per row; their lengths may differ.
            all_positions: return the logits of every given token, not only of each row's last.
            adapter: of the package, for all rows, or one for each; None: none, or where the cache holds rows, theirs.
                Later calls go on with it.

        Returns:
            Per row, float32 [1, vocab_size], or [n_row, vocab_size] for all positions.

        Raises:
            InputError: no row, an empty row, another number of rows than the cache has, or an id that is no integer or
                not in the vocabulary; or an adapter that the package does not have, or other than the row's.
            ContextLengthError: more tokens than `max_cache_length` in a row.
            NumericError: a logit is NaN or infinite.
        """
        ...

    def decode(self, token_ids: TokenIds) -> Logits:
        """Append one token to every row of the cache.

        Args:
            token_ids: one id per row.

        Returns:
            float32 [B, vocab_size], the logits of the next token.

        Raises:
            InputError: the cache is empty; otherwise as `prefill`.
            ContextLengthError, NumericError: as `prefill`.
        """
        ...

    def decode_top(self, token_ids: TokenIds) -> tuple[Ids, Logits]:
        """Append one token to every row of the cache, and leave the logits where they were computed.

        For graphs on a device: a step moves a few bytes instead of the logits of the whole vocabulary.

        Args:
            token_ids: one id per row.

        Returns:
            int64 and float32 [B, top_k]: the ids with the largest logits, largest first, and these; among equal
            logits the lower id is first.

        Raises:
            UsageError: the graph picks no candidates (`top_k` is 0).
            InputError, ContextLengthError, NumericError: as `decode`.
        """
        ...

    def decode_block(self, token_ids: TokenIds) -> Logits:
        """Append several tokens to the only row, computed as `decode` would compute them one by one.

        Where a package has two graphs, `prefill` may use the one that rounds more coarsely; this never does. Logits
        agree with those of `decode` but for the order of float32 sums. With quantised weights that can tip the code of
        an activation over, and two tokens that are nearly tied may change places.

        Args:
            token_ids: at least one id.

        Returns:
            float32 [n, vocab_size], the logits after each of them.

        Raises:
            InputError: the cache has another number of rows than one; otherwise as `prefill`.
            ContextLengthError, NumericError: as `prefill`.
        """
        ...

    def prefill_embeds(
        self, sequences: Sequence[npt.NDArray[np.float32]], *, all_positions: bool = False
    ) -> list[Logits]:
        """Append vectors in the place of tokens to every row of the cache; before and behind them tokens may stand.

        In `cached_tokens` each is a negative number of its own.

        Args:
            sequences: per row float [n_row, hidden_size]; their lengths may differ.
            all_positions: as `prefill`.

        Returns:
            As `prefill`.

        Raises:
            UsageError: the graph takes no vectors.
            InputError: as `prefill`, or vectors of another size, or that are not finite.
            ContextLengthError, NumericError: as `prefill`.
        """
        ...

    def prefill_hidden(self, sequences: Sequence[TokenIds]) -> list[HiddenStates]:
        """Append tokens to every row of the cache, as `prefill` does, and give their hidden states.

        Args:
            sequences: one sequence of token ids per row; their lengths may differ.

        Returns:
            Per row, all hidden states that the graph gives, of each of the given tokens.

        Raises:
            UsageError: the graph gives none.
            InputError, ContextLengthError, NumericError: as `prefill`.
        """
        ...

    def prefill_embeds_hidden(self, sequences: Sequence[npt.NDArray[np.float32]]) -> list[HiddenStates]:
        """Append vectors to every row of the cache, as `prefill_embeds` does, and give the hidden states of each.

        Args:
            sequences: as `prefill_embeds`.

        Returns:
            As `prefill_hidden`.

        Raises:
            UsageError: the graph gives no hidden states, or takes no vectors.
            InputError, ContextLengthError, NumericError: as `prefill_embeds`.
        """
        ...

    def score(self, sequences: Sequence[TokenIds]) -> Logits:
        """Score whole sequences with a classifier, each as if it were alone; the cache is empty before and after.

        Which token is scored: see `runtimes.runners.scores`.

        Args:
            sequences: token ids, padding among them or not; their lengths may differ.

        Returns:
            float32 [B, labels].

        Raises:
            UsageError: the model is no classifier, or has no id of padding and there are several sequences.
            InputError, ContextLengthError, NumericError: as `prefill`.
        """
        ...

    def truncate(self, lengths: Sequence[int]) -> None:
        """Keep only the first tokens of each row; the next call appends to these.

        Args:
            lengths: how many, one number per row. 0 in every row leaves rows without tokens, not an empty cache.

        Raises:
            InputError: another number of rows than the cache has, or a length that is no integer, negative or more than
                the row holds.
        """
        ...

    def reset(self) -> None:
        """Empty the cache; the next prefill may have another number of rows."""
        ...

    def close(self) -> None:
        """Free the model and the cache; the runner cannot be used again. Closing twice is harmless."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def chosen_adapters(
    given: AdapterChoice, rows: int, held: tuple[str | None, ...], known: Collection[str]
) -> tuple[str | None, ...]:
    """Check the adapters that a caller wants; return one for each row.

    Args:
        given: as of `Runner.prefill`.
        rows: how many there are.
        held: those of the rows in the cache; () when it is empty.
        known: those that there are.

    Raises:
        InputError: see `Runner.prefill`.
    """
    each = (given,) * rows if given is None or isinstance(given, str) else tuple(given)
    if len(each) != rows:
        raise InputError(f"{len(each)} adapters for {rows} rows; give one per row, None for none, or one for all")
    for name in each:
        if name is not None and name not in known:
            none = (
                "none; export the package with --lora-inputs as fp32, q4 or q8, and leave exact out of the latter two"
            )
            raise InputError(f"adapter {name!r}: this runner has {', '.join(known) or none}")
    if not held:
        return each
    for row, (name, before) in enumerate(zip(each, held, strict=True)):
        if name is not None and name != before:
            made = before or "no adapter"
            raise InputError(f"row {row}: its tokens were computed with {made}, found adapter {name}; reset() first")
    return held


def is_sequence(value: object) -> bool:
    """Tell whether a caller gave several of something: a 0-d array is a single one."""
    return value.ndim > 0 if isinstance(value, np.ndarray) else isinstance(value, Sequence)


def check_rows(
    sequences: Sequence[TokenIds],
    *,
    vocab_size: int,
    cache_lengths: tuple[int, ...],
    max_cache_length: int,
    names: Sequence[str] = (),
) -> list[Ids]:
    """Check what a caller wants to append, before anything runs.

    onnxruntime would wrap a negative id around, misread a big-endian array and die of a batch of none.

    Args:
        sequences: one sequence of token ids per row.
        vocab_size: ids must be below it.
        cache_lengths: tokens in the cache per row; () when it is empty.
        max_cache_length: tokens a row can hold.
        names: of the rows in messages; (): `row 0`, `row 1` and so on.

    Returns:
        Per row, int64 [n_row], contiguous and in native byte order.

    Raises:
        InputError, ContextLengthError: see `Runner.prefill`.
    """
    if not is_sequence(sequences):
        raise InputError(f"expected a sequence of rows of token ids, found {type(sequences).__name__}")
    if len(sequences) == 0:
        raise InputError("expected at least one row of token ids, found none")
    if cache_lengths and len(sequences) != len(cache_lengths):
        raise InputError(
            f"{len(sequences)} rows, but the cache holds {len(cache_lengths)}; give one per row, or reset() first"
        )
    names = names or [f"row {index}" for index in range(len(sequences))]
    rows = [_check_ids(row, name, vocab_size) for row, name in zip(sequences, names, strict=True)]
    for index, row in enumerate(rows):
        used = cache_lengths[index] if cache_lengths else 0
        if used + len(row) > max_cache_length:
            raise ContextLengthError(
                f"{names[index]}: {used} tokens in the cache and {len(row)} new ones make {used + len(row)}, "
                f"at most {max_cache_length} fit"
            )
    return rows


def check_token_ids(token_ids: TokenIds, cache_lengths: tuple[int, ...]) -> list[list[int]]:
    """Turn `decode`'s one id per row into the rows that `check_rows` takes.

    Raises:
        InputError: the cache is empty, or token_ids is no sequence.
    """
    if not cache_lengths:
        raise InputError("decode needs a cache that is not empty; prefill first")
    if not is_sequence(token_ids):
        raise InputError(f"expected a sequence with one token id per row, found {type(token_ids).__name__}")
    return [[token] for token in token_ids]


def no_candidates(variant: Variant) -> UsageError:
    """Return what `decode_top` raises on a graph that picks no candidates."""
    return UsageError(f"variant {variant.name}: its graph picks no candidates; use decode")


def check_gives_hidden(variant: Variant) -> None:
    """Refuse a graph without hidden states where they are asked for.

    Raises:
        UsageError: it gives none.
    """
    if not variant.hidden_states:
        raise UsageError(
            f"variant {variant.name}: its graph gives no hidden states; export the package with --hidden-states"
        )


def check_positions(variant: Variant) -> None:
    """Refuse a classifier where each token's answer is asked for.

    Raises:
        UsageError: it is one.
    """
    if variant.answer == "score":
        raise UsageError(f"variant {variant.name}: a classifier scores one token of a row; feed rows that end there")


def check_lengths(lengths: Sequence[int], cache_lengths: tuple[int, ...]) -> tuple[int, ...]:
    """Check what `truncate` is to keep.

    Raises:
        InputError: see `Runner.truncate`.
    """
    if not is_sequence(lengths):
        raise InputError(f"expected a sequence with one length per row, found {type(lengths).__name__}")
    if len(lengths) != len(cache_lengths):
        raise InputError(f"{len(lengths)} lengths, but the cache holds {len(cache_lengths)} rows; give one per row")
    kept = []
    for row, (given, held) in enumerate(zip(lengths, cache_lengths, strict=True)):
        length = as_integer(given)
        if length is None:
            raise InputError(f"row {row}: expected an integer length, found {type(given).__name__}")
        if not 0 <= length <= held:
            raise InputError(f"row {row}: cannot keep {length} tokens, the cache holds {held}; give 0 to {held}")
        kept.append(length)
    return tuple(kept)


class HeldText:
    """The text that a runner holds, while it is continued: refuses to go on where the cache holds another by now.

    Two texts that are continued in turns on one runner would each get the other's logits.
    """

    def __init__(self, runner: Runner) -> None:
        """Take what the cache holds now, be it nothing."""
        self._runner = runner
        self._held = runner.cached_tokens
        self._adapters = getattr(runner, "cached_adapters", ())

    @property
    def length(self) -> int:
        """Tokens of the text."""
        return sum(map(len, self._held))

    @contextmanager
    def step(self) -> Iterator[None]:
        """Change the text in the body; no other thread can.

        Raises:
            UsageError: the cache is not what the last step left, or another thread is using the runner.
        """
        with self._runner.exclusive:
            held = self._runner.cached_tokens
            same = (a is b or np.array_equal(a, b) for a, b in zip(held, self._held, strict=False))
            other = self._held and getattr(self._runner, "cached_adapters", ()) != self._adapters
            if len(held) != len(self._held) or not all(same) or other:
                found = ", ".join(str(len(row)) for row in held) or "none"
                raise UsageError(
                    f"the runner's cache was changed by somebody else (tokens: {found}, expected the {self.length} of "
                    "the text that is continued); open one runner for each text, or use admit and step"
                )
            yield
            self._held = self._runner.cached_tokens
            self._adapters = getattr(self._runner, "cached_adapters", ())


def common_prefix(held: Ids, token_ids: Sequence[int]) -> int:
    """Return how many of the first tokens in a row of the cache are the first of `token_ids`."""
    size = min(len(held), len(token_ids))
    same = held[:size] == np.asarray(token_ids[:size], np.int64)
    return size if same.all() else int(np.argmin(same))


def check_finite(
    logits: Sequence[Logits], cache_lengths: Sequence[int], row_name: str | None = None, what: str = "logits"
) -> None:
    """Refuse logits that no sampler could use.

    Args:
        logits: per row float32 [n, vocab_size], of the last n tokens of the row.
        cache_lengths: tokens of each row, those just computed included.
        row_name: of the only row in the message; None: `row 0`, `row 1` and so on.
        what: they are, for the message.

    Raises:
        NumericError: a logit is NaN or infinite; names the row and the position in it.
    """
    for row, (values, length) in enumerate(zip(logits, cache_lengths, strict=True)):
        finite = np.isfinite(values).all(axis=-1)
        if not finite.all():
            name = row_name or f"row {row}"
            first = int(np.argmin(finite))
            count = int(np.count_nonzero(~np.isfinite(values[first])))
            raise NumericError(
                f"{name}, position {length - len(values) + first}: {count} of {values.shape[-1]} {what} are NaN or "
                "infinite; the weights or this precision are broken: run olmo2-export verify on the package"
            )


def _check_ids(row: TokenIds, name: str, vocab_size: int) -> Ids:
    if not isinstance(row, (Sequence, np.ndarray)) or isinstance(row, (str, bytes)):
        raise InputError(f"{name}: expected a sequence of token ids, found {type(row).__name__}")
    ids: npt.NDArray[Any]
    if isinstance(row, np.ndarray):
        if row.ndim != 1 or row.dtype.kind not in "iu":
            raise InputError(f"{name}: expected a 1-d array of integers, found {row.ndim}-d {row.dtype}")
        ids = row
    else:
        given = [as_integer(value) for value in row]
        if None in given:
            position = given.index(None)
            raise InputError(
                f"{name}, position {position}: expected an integer token id, found {type(row[position]).__name__}"
            )
        ids = np.array(given, dtype=object)  # integers of any size, so that 2**70 gets as far as the range check
    if len(ids) == 0:
        raise InputError(f"{name}: expected at least one token id, found none")
    wrong = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if len(wrong):
        position = int(wrong[0])
        raise InputError(
            f"{name}, position {position}: token id {ids[position]}, the vocabulary has 0 to {vocab_size - 1}"
        )
    return np.ascontiguousarray(ids, dtype=np.int64)
