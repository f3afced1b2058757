"""What passes between the edge of a server and its engine: plain values, as the engine runs in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from runtimes.errors import BusyError, ContextLengthError, InputError
from runtimes.generation.draw import Draw
from runtimes.runners.runner import check_rows, chosen_adapters
from runtimes.text.logit_rules import LogitBias, LogitRule, Penalties
from runtimes.text.logprobs import TokenLogprobs, check_top
from runtimes.text.sampling import Sampler

FormKind: TypeAlias = Literal["json_schema", "regex", "grammar"]
EndReason: TypeAlias = Literal["eos", "length"]
"""an end-of-sequence token, or as many tokens as were asked for"""
FailureKind: TypeAlias = Literal["input", "numeric", "lost"]
"""the request cannot be answered; the model broke down; the engine's process ended"""


class Form(NamedTuple):
    """What a text has to look like, see `runtimes.text.structured`."""

    kind: FormKind
    source: str


@dataclass(frozen=True)
class Capacity:
    """What a server's engine takes."""

    vocab_size: int
    max_cache_length: int
    """tokens of a prompt and its answer together"""
    max_slots: int
    """answers at once"""
    kv_tokens: int
    """tokens of all prompts and answers together that are accepted at once"""
    adapters: tuple[str, ...] = ()
    exact: bool = False
    variant: str = ""


@dataclass(frozen=True)
class Request:
    """One prompt, and what is wanted of it."""

    id: str
    """of no other request that is being answered"""
    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    choices: int = 1
    """answers to the same prompt"""
    eos_token_ids: tuple[int, ...] = ()
    """an answer ends at any of them"""
    adapter: str | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    """of the first choice; the others have those that follow"""
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    form: Form | None = None
    logprobs: int | None = None
    """note each token's log probability, and so many of the likeliest; None: note none"""
    prompt_logprobs: int | None = None
    """the same of the prompt's tokens, all of which are computed then"""

    @property
    def row_tokens(self) -> int:
        """Tokens that a choice may come to hold."""
        return len(self.prompt_ids) + self.max_new_tokens

    @property
    def tokens(self) -> int:
        """Tokens that all choices may come to hold."""
        return self.choices * self.row_tokens

    def draw(self, choice: int, vocab_size: int, forms: Sequence[LogitRule] = ()) -> Draw:
        """Return what draws the tokens of a choice.

        Args:
            choice: its number, from 0.
            vocab_size: of the logits.
            forms: rules that exclude what does not look as it has to.

        Raises:
            InputError: an option is out of its range.
        """
        seed = None if self.seed is None else self.seed + choice
        sampler = Sampler(self.temperature, self.top_k, self.top_p, seed, self.min_p)
        penalties = Penalties(self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        rules: list[LogitRule] = [] if penalties == Penalties() else [penalties]
        if self.logit_bias:
            rules.append(LogitBias(dict(self.logit_bias), vocab_size))
        draw = Draw(sampler, [*rules, *forms], check_top("logprobs", self.logprobs, vocab_size))
        draw.begin(self.prompt_ids)
        return draw


def check_request(request: Request, capacity: Capacity) -> None:
    """Refuse what the engine could never answer.

    Raises:
        InputError: an option is out of its range, an id is not in the vocabulary, there is no such adapter, or there
            are more choices than slots.
        ContextLengthError: prompt and answer do not fit.
    """
    prompt, new = len(request.prompt_ids), request.max_new_tokens
    if request.row_tokens > capacity.max_cache_length:
        raise ContextLengthError(
            f"a prompt of {prompt} tokens and {new} new ones make {request.row_tokens}: the context holds "
            f"{capacity.max_cache_length}; shorten the prompt or ask for fewer new tokens"
        )
    check_rows(
        [request.prompt_ids],
        vocab_size=capacity.vocab_size,
        cache_lengths=(),
        max_cache_length=capacity.max_cache_length,
        names=("the prompt",),
    )
    chosen_adapters(request.adapter, 1, (), capacity.adapters)
    if not 1 <= request.choices <= capacity.max_slots:
        raise InputError(f"{request.choices} choices, this server has {capacity.max_slots} slots; ask for fewer")
    if request.tokens > capacity.kv_tokens:
        raise ContextLengthError(
            f"{request.choices} answers of up to {request.row_tokens} tokens make {request.tokens}: this server holds "
            f"{capacity.kv_tokens}; ask for fewer"
        )
    request.draw(0, capacity.vocab_size)
    check_top("prompt_logprobs", request.prompt_logprobs, capacity.vocab_size)


def check_queue(waiting: int, most: int | None, more: int = 1) -> None:
    """Refuse requests where too many wait.

    Args:
        waiting: requests that wait.
        most: that may wait; None: any number.
        more: that are to wait, too.

    Raises:
        BusyError: there are too many.
    """
    if most is not None and waiting + more > most:
        raise BusyError(f"{waiting} requests wait, at most {most} may; try again later")


class Started(NamedTuple):
    """A request's prompt is being computed."""

    request: str
    reused: int
    """tokens of it that are taken over from another"""


class Scored(NamedTuple):
    """Log probabilities of some of a prompt's tokens, in their order; the first one has none."""

    request: str
    logprobs: tuple[TokenLogprobs, ...]


class Token(NamedTuple):
    """The next token of an answer."""

    request: str
    choice: int
    token_id: int | None
    """None: the answer ends with no token, as none was asked for"""
    logprobs: TokenLogprobs | None
    reason: EndReason | None
    """why the answer ends with it; None: it goes on"""


class Failed(NamedTuple):
    """A request, or one of its choices, is given up; nothing more comes of it."""

    request: str
    message: str
    kind: FailureKind


Event: TypeAlias = Started | Scored | Token | Failed
Clock: TypeAlias = Callable[[], float]
"""seconds from any point on"""
