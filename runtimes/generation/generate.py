"""Prompt -> text, in layers: `generate_tokens` (ids) -> `stream_text` (pieces of text) -> `generate` (the result).

Time to first token is measured here: from the call of `generate` until the first new id is known, so it holds the
prefill and one sampling.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

from runtimes.errors import ContextLengthError, InputError
from runtimes.generation.draw import Draw
from runtimes.generation.text_state import FinishReason, Piece, TextState
from runtimes.integers import as_integer
from runtimes.runners.runner import HeldText, Runner, check_rows, chosen_adapters, common_prefix
from runtimes.runners.scores import check_logits
from runtimes.speculate.drafters import Drafter
from runtimes.speculate.speculation import Speculation, speculate_tokens
from runtimes.text.logit_rules import LogitRule
from runtimes.text.logprobs import TokenLogprobs, check_top, token_logprobs
from runtimes.text.sampling import Sampler
from runtimes.text.tokenizer import Tokenizer

_PIECE = 64  # tokens of a prompt whose logits are in memory at once, 25 MB at a vocabulary of 100,352


@dataclass(frozen=True)
class Generation:
    """What `generate` made and how long it took."""

    text: str
    """without the prompt, the stop string and special tokens"""
    token_ids: tuple[int, ...]
    """every id that was sampled, also the end-of-sequence token and those of the stop string"""
    prompt_token_ids: tuple[int, ...]
    finish_reason: FinishReason
    time_to_first_token: float | None
    """seconds; None if no token was asked for"""
    decode_seconds: float
    """from the first id to the last"""
    reused_tokens: int
    """of the prompt, whose keys and values the runner held already"""
    drafted: int
    """guesses that the model checked"""
    accepted: int
    """of these, the right ones"""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """of every id that was sampled, where they were asked for"""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """of the prompt's ids but the first, which nothing is in front of; where they were asked for"""

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Tokens after the first, per second; None if there is only one."""
        after_first = len(self.token_ids) - 1
        return after_first / self.decode_seconds if after_first > 0 and self.decode_seconds > 0 else None


def encode_prompt(tokenizer: Tokenizer, prompt: str, *, parse_special: bool = False) -> list[int]:
    """Return the ids of a prompt, at least one.

    Args:
        tokenizer: of the package.
        prompt: text.
        parse_special: names of special tokens in it are these tokens; see `Tokenizer.encode`. A token that begins a
            text is not put in front of one that the prompt begins with.

    Raises:
        InputError: the text is not valid Unicode, or is empty and the model has no token that begins a text.
    """
    ids = tokenizer.encode(prompt, parse_special=parse_special)
    if parse_special and len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        plain = tokenizer.encode(prompt, add_special_tokens=False, parse_special=True)
        ids = plain if plain[:1] == ids[:1] and len(plain) < len(ids) else ids
    if ids:
        return ids
    if tokenizer.bos_token_id is None:
        raise InputError("empty prompt, and the model has no bos_token_id to begin with; give some text")
    return [tokenizer.bos_token_id]


def generate_tokens(
    runner: Runner,
    prompt_ids: Sequence[int],
    *,
    sampler: Sampler,
    max_new_tokens: int | None = None,
    speculate: Drafter | None = None,
    eos_token_ids: Collection[int] = (),
    rules: Sequence[LogitRule] = (),
) -> Generator[int, None, None]:
    """Append a prompt to what the runner holds and sample new ids, forever or until the limit.

    The caller ends it by not asking for more: an id is fed to the model only when the next one is wanted, so the last
    id is in no cache. With a drafter close the iterator, which drops what was fed too early.

    Args:
        runner: with an empty cache, or one of a single row.
        prompt_ids: at least one id.
        sampler: picks each next id.
        max_new_tokens: None means as many as fit.
        speculate: guesses ids, which are checked several at a time; the ids have the same distribution as without.
        eos_token_ids: nothing after them is guessed; they do not end the iterator.
        rules: change the logits before the sampler, in their order; of this text alone, as they see the prompt's ids
            and every id that is sampled.

    Returns:
        An iterator of ids; the model runs when it is advanced.

    Raises:
        InputError: no prompt id, or max_new_tokens is no integer of at least 0. At once.
        ContextLengthError: prompt and new tokens together do not fit. At once.
        UsageError: a classifier, or the drafter cannot guess for this model: at once. Somebody else has changed what
            the runner holds since the last id, or is using it now: in the iterator.
        NumericError: the model broke down; in the iterator.
    """
    check_logits(runner.variant)
    if len(prompt_ids) == 0:
        raise InputError("expected at least one prompt id, found none")
    used = len(prompt_ids) + sum(runner.cache_lengths)
    limit = new_token_limit(runner, used, max_new_tokens)
    draw = Draw(sampler, rules)
    draw.begin(prompt_ids)
    return _sample(runner, prompt_ids, draw, limit, _speculation(runner, speculate), eos_token_ids)


def stream_text(
    tokenizer: Tokenizer,
    token_ids: Iterable[int],
    *,
    stop: Sequence[str] = (),
    eos_token_ids: Collection[int] | None = None,
) -> Iterator[Piece]:
    """Turn ids into text as they come; ask for no id after the end of the text.

    See `TextState` for what is held back, and where a text ends.

    Args:
        tokenizer: of the package.
        token_ids: as from `generate_tokens`.
        stop: the text ends before the first of them to be complete.
        eos_token_ids: the text ends at any of these ids; None means the tokenizer's, () none.

    Returns:
        An iterator of pieces; the last one, and only it, has a finish_reason.

    Raises:
        InputError: as `TextState`, at once.
    """
    return _pieces(TextState(tokenizer, stop=stop, eos_token_ids=eos_token_ids), token_ids)


def _pieces(state: TextState, token_ids: Iterable[int]) -> Iterator[Piece]:
    for token_id in token_ids:
        text = state.push(token_id)
        if state.finish_reason is not None:
            yield Piece(text, state.finish_reason)
            return
        if text:
            yield Piece(text, None)
    text = state.finish()
    yield Piece(text, state.finish_reason)


def generate(
    runner: Runner,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    *,
    sampler: Sampler,
    max_new_tokens: int | None = None,
    stop: Sequence[str] = (),
    eos_token_ids: Collection[int] | None = None,
    on_text: Callable[[str], object] | None = None,
    speculate: Drafter | None = None,
    parse_special: bool = False,
    rules: Sequence[LogitRule] = (),
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    adapter: str | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Generation:
    """Generate the continuation of one prompt.

    Of what the runner holds, as much is kept as the prompt begins with, so that a conversation's next turn computes
    only what is new; the rest is forgotten. Until it is done other threads cannot use the runner.

    Args:
        runner: any.
        tokenizer: of the same package.
        prompt: text, or ids.
        sampler: picks each next id.
        max_new_tokens: None means as many as fit.
        stop: the text ends before the first of them to be complete.
        eos_token_ids: the text ends at any of these ids; None means the tokenizer's, () none.
        on_text: called with each piece of text as soon as it is there.
        speculate: guesses ids, which are checked several at a time; the text has the same distribution as without.
        parse_special: names of special tokens in the prompt are these tokens; see `Tokenizer.encode`.
        rules: change the logits before the sampler, in their order; of this text alone, as they see the prompt's ids
            and every id that is sampled.
        logprobs: give each new token's log probability, and so many of the likeliest in its place.
        prompt_logprobs: the same of the prompt's tokens, which are all computed then, whatever the runner holds.
        adapter: LoRA adapter of the package; None: none. What the runner holds of another is forgotten.
        cancelled: asked after each id; True ends the text there, and what there is of it is returned.

    Raises:
        InputError, ContextLengthError, UsageError: as `encode_prompt`, `generate_tokens` and `stream_text`, or another
            thread is using the runner; before the model runs or forgets.
        NumericError: the model broke down.
    """
    started = time.perf_counter()
    check_logits(runner.variant)
    if isinstance(prompt, str):
        prompt_ids = encode_prompt(tokenizer, prompt, parse_special=parse_special)
    else:
        prompt_ids = list(prompt)
    if not prompt_ids:
        raise InputError("expected at least one prompt id, found none")
    limit = new_token_limit(runner, len(prompt_ids), max_new_tokens)
    (checked,) = check_rows(
        [prompt_ids],
        vocab_size=runner.model.vocab_size,
        cache_lengths=(),
        max_cache_length=runner.max_cache_length,
    )
    prompt_ids = checked.tolist()
    draw = Draw(sampler, rules, check_top("logprobs", logprobs, runner.model.vocab_size))
    top_of_prompt = check_top("prompt_logprobs", prompt_logprobs, runner.model.vocab_size)
    chosen_adapters(adapter, 1, (), getattr(runner, "adapters", ()))
    speculation = _speculation(runner, speculate)
    ends = tokenizer.eos_token_ids if eos_token_ids is None else eos_token_ids
    of_prompt: list[TokenLogprobs] = []
    sampled: list[int] = []
    times: list[float] = []
    reused, cut = 0, False

    def recorded() -> Generator[int, None, None]:
        nonlocal reused, cut
        fed = reused = 0
        if top_of_prompt is None:
            fed = reused = _keep_common_prefix(runner, prompt_ids, adapter)
        else:
            of_prompt[:] = _prompt_logprobs(runner, prompt_ids, top_of_prompt, adapter)
            fed = len(prompt_ids) - 1
        draw.begin(prompt_ids)
        with closing(_sample(runner, prompt_ids[fed:], draw, limit, speculation, ends, adapter)) as ids:
            for token_id in ids:
                times.append(time.perf_counter())
                sampled.append(token_id)
                yield token_id
                cut = cancelled is not None and cancelled()
                if cut:
                    return

    text: list[str] = []
    reason: FinishReason = "length"
    with runner.exclusive, closing(recorded()) as ids:
        for piece in stream_text(tokenizer, ids, stop=stop, eos_token_ids=ends):
            if piece.text:
                text.append(piece.text)
                if on_text is not None:
                    on_text(piece.text)
            reason = piece.finish_reason or reason
    return Generation(
        text="".join(text),
        token_ids=tuple(sampled),
        prompt_token_ids=tuple(prompt_ids),
        finish_reason="cancelled" if cut else reason,
        time_to_first_token=times[0] - started if times else None,
        decode_seconds=times[-1] - times[0] if times else 0.0,
        reused_tokens=reused,
        drafted=speculation.drafted if speculation else 0,
        accepted=speculation.accepted if speculation else 0,
        logprobs=tuple(draw.noted),
        prompt_logprobs=tuple(of_prompt),
    )


def _prompt_logprobs(runner: Runner, prompt_ids: Sequence[int], top: int, adapter: str | None) -> list[TokenLogprobs]:
    """Compute a prompt but its last token, some tokens at a time; return the log probabilities of those behind."""
    runner.reset()
    found: list[TokenLogprobs] = []
    for start in range(0, len(prompt_ids) - 1, _PIECE):
        piece = prompt_ids[start : min(start + _PIECE, len(prompt_ids) - 1)]
        more = {} if adapter is None else {"adapter": adapter}
        (logits,) = runner.prefill([piece], all_positions=True, **more)
        following = prompt_ids[start + 1 : start + 1 + len(piece)]
        found += [token_logprobs(row, token_id, top) for row, token_id in zip(logits, following, strict=True)]
    return found


def new_token_limit(runner: Runner, used: int, max_new_tokens: int | None) -> int:
    """Return how many tokens may be generated behind `used` ones.

    Raises:
        InputError: max_new_tokens is no integer of at least 0.
        ContextLengthError: so many do not fit.
    """
    asked = as_integer(max_new_tokens)
    if max_new_tokens is not None and (asked is None or asked < 0):
        raise InputError(f"max_new_tokens {max_new_tokens!r}: expected an integer of at least 0")
    if used + (asked or 0) > runner.max_cache_length:
        new = "" if asked is None else f" and {asked} new ones make {used + asked}"
        raise ContextLengthError(
            f"a prompt of {used} tokens{new}: the context holds {runner.max_cache_length}; "
            "shorten the prompt or ask for fewer new tokens"
        )
    return runner.max_cache_length - used if asked is None else asked


def _speculation(runner: Runner, drafter: Drafter | None) -> Speculation | None:
    if drafter is None:
        return None
    drafter.check(runner)
    return Speculation(drafter)


def _keep_common_prefix(runner: Runner, prompt_ids: Sequence[int], adapter: str | None) -> int:
    """Forget what the runner holds from where the prompt differs; return how many tokens are left.

    One token of the prompt is always left to feed, since the cache has no logits. An exact runner computes everything
    anew: what was generated, or fed in other pieces, would differ by rounding from the same prompt at once. Keys and
    values that were made with another adapter are those of another model.
    """
    other = getattr(runner, "cached_adapters", (None,)) != (adapter,)
    held = () if getattr(runner, "exact", False) or other else runner.cached_tokens
    kept = common_prefix(held[0], prompt_ids[:-1]) if len(held) == 1 else 0
    if kept:
        runner.truncate([kept])
    else:
        runner.reset()
    return kept


def _sample(
    runner: Runner,
    prompt_ids: Sequence[int],
    draw: Draw,
    limit: int,
    speculation: Speculation | None,
    eos_token_ids: Collection[int],
    adapter: str | None = None,
) -> Generator[int, None, None]:
    """Return the iterator of ids; what the runner holds now, not when it is first advanced, is what they continue."""
    return _continue(runner, HeldText(runner), prompt_ids, draw, limit, speculation, eos_token_ids, adapter)


def _continue(
    runner: Runner,
    text: HeldText,
    prompt_ids: Sequence[int],
    draw: Draw,
    limit: int,
    speculation: Speculation | None,
    eos_token_ids: Collection[int],
    adapter: str | None,
) -> Generator[int, None, None]:
    if limit == 0:
        return
    with text.step():
        logits = runner.prefill([prompt_ids]) if adapter is None else runner.prefill([prompt_ids], adapter=adapter)
        token_id = draw(logits[0][-1])
    yield token_id
    if speculation is not None:
        yield from speculate_tokens(
            runner,
            token_id,
            limit - 1,
            sampler=draw,
            speculation=speculation,
            eos_token_ids=eos_token_ids,
            text=text,
        )
        return
    for _ in range(limit - 1):
        with text.step():
            token_id = _next(runner, draw, token_id)
        yield token_id


def _next(runner: Runner, draw: Draw, token_id: int) -> int:
    """Append an id to the only row and sample the next, from candidates that the graph picked where these will do."""
    if 0 < draw.candidates <= runner.top_k:
        ids, logits = runner.decode_top([token_id])
        chosen = draw.sampler.choose(ids[0], logits[0])
        if chosen is not None:
            return chosen
        runner.truncate([runner.cache_lengths[0] - 1])  # undecided: compute it again, for all logits
    return draw(runner.decode([token_id])[0])
