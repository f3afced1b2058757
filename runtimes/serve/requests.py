"""What passes between the edge of a server and its engine: plain values, as the engine runs in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from runtimes.errors import BusyError, ContextLengthError, InputError, UsageError
from runtimes.generation.draw import Draw
from runtimes.runners.embeddings import POOLINGS, Pooling
from runtimes.runners.runner import check_rows, chosen_adapters
from runtimes.text.logit_rules import LogitBias, LogitRule, Penalties
from runtimes.text.logprobs import TokenLogprobs, check_top
from runtimes.text.sampling import Sampler
from runtimes.text.structured import Form

Measure: TypeAlias = Literal["vectors", "scores"]
"""of a whole text: a vector of its hidden states, or a classifier's scores, one for each label"""
EndReason: TypeAlias = Literal["eos", "length"]
"""an end-of-sequence token, or as many tokens as were asked for"""
FailureKind: TypeAlias = Literal["input", "numeric", "lost"]
"""the request cannot be answered; the model broke down; the engine's process ended"""


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
    forms: bool = False
    """whether answers can be held to forms"""
    hidden_size: int = 0
    """numbers of a vector"""
    hidden_states: tuple[int, ...] = ()
    """numbers of those that texts may be given vectors of"""
    labels: tuple[str, ...] = ()
    """of a classifier, which scores texts and makes none"""


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
    def parts(self) -> int:
        """What is said of it that may end by itself."""
        return self.choices

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


@dataclass(frozen=True)
class Texts:
    """Whole texts, of each of which something is measured; none goes on."""

    id: str
    """of no other request that is being answered"""
    sequences: tuple[tuple[int, ...], ...]
    """their ids, at least one text"""
    measure: Measure
    pooling: Pooling = "mean"
    hidden_state: int | None = None
    """None: the last that there is"""
    normalize: bool = False
    """divide each vector by its length"""

    @property
    def parts(self) -> int:
        """What is said of it that may end by itself."""
        return len(self.sequences)


def check_request(request: Request | Texts, capacity: Capacity) -> None:
    """Refuse what the engine could never answer.

    Raises:
        InputError: an option is out of its range, an id is not in the vocabulary, there is no such adapter, or there
            are more choices than slots.
        ContextLengthError: prompt and answer, or a text, do not fit.
        UsageError: the model answers nothing of that kind.
    """
    if isinstance(request, Texts):
        _check_texts(request, capacity)
        return
    if capacity.labels:
        raise UsageError("this model is a classifier: it scores texts, and makes none")
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


def _check_texts(request: Texts, capacity: Capacity) -> None:
    known = capacity.hidden_states
    if request.measure == "scores" and not capacity.labels:
        raise UsageError("this model is no classifier: it gives no scores")
    if request.measure == "vectors" and not known:
        raise UsageError("this model gives no hidden states; export it with --hidden-states last")
    if request.hidden_state is not None and request.hidden_state not in known:
        raise InputError(f"hidden state {request.hidden_state}: this model gives {', '.join(map(str, known))}")
    if request.pooling not in POOLINGS:
        raise InputError(f"pooling {request.pooling!r}: expected {' or '.join(POOLINGS)}")
    check_rows(
        request.sequences,
        vocab_size=capacity.vocab_size,
        cache_lengths=(),
        max_cache_length=capacity.max_cache_length,
        names=tuple(f"text {number}" for number in range(len(request.sequences))),
    )


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


class Measured(NamedTuple):
    """What was measured of some of a request's texts."""

    request: str
    places: tuple[int, ...]
    """of these texts among all, from 0"""
    values: npt.NDArray[np.floating[Any]]
    """float32 [places, hidden_size or labels]"""


Event: TypeAlias = Started | Scored | Token | Measured | Failed
Clock: TypeAlias = Callable[[], float]
"""seconds from any point on"""
