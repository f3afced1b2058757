"""Some requests from their submission to their last word: events of the engine -> pieces of text."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from runtimes.errors import EngineLostError, FailedError, InputError, NotReadyError, NumericError, Olmo2ExportError
from runtimes.generation.text_state import FinishReason, TextState
from runtimes.serve.desk import Desk, Feed
from runtimes.serve.metrics import Metrics
from runtimes.serve.progress import Progress
from runtimes.serve.requests import Clock, Event, Failed, Measured, Request, Scored, Started, Texts, Token
from runtimes.text.logprobs import TokenLogprobs
from runtimes.text.tokenizer import Tokenizer

_PING_SECONDS = 15.0  # after which a client that hears nothing is told that there is still somebody


@dataclass(frozen=True)
class Patience:
    """Seconds that things may take."""

    queue: float = 30.0
    """until a request is begun"""
    generation: float = 300.0
    """from its submission to its end"""


class Said(NamedTuple):
    """What a token adds to an answer."""

    request: str
    choice: int
    text: str
    """decided now; may be empty"""
    token_id: int | None
    logprobs: TokenLogprobs | None
    reason: FinishReason | None
    """set with the last"""
    stop: str | None = None
    """which stop string it was, if it was one"""


class Ping(NamedTuple):
    """Nothing, for some time."""


News: TypeAlias = Started | Scored | Said | Ping


async def measured(
    desk: Desk,
    request: Texts,
    *,
    progress: Progress,
    metrics: Metrics,
    patience: Patience,
    clock: Clock = time.monotonic,
) -> npt.NDArray[np.floating[Any]]:
    """Have whole texts measured; whoever gives it up gives up the request.

    Args:
        desk: takes the request.
        request: at least one text.
        progress: of the request; is told of times.
        metrics: are told of times and tokens.
        patience: how long it may take.
        clock: tells the time, of the event loop.

    Returns:
        float32 [texts, hidden_size or labels].

    Raises:
        Olmo2ExportError: it is refused, fails, or takes too long.
    """
    began, found = clock(), dict[int, npt.NDArray[np.floating[Any]]]()
    feed = desk.submit([request])
    progress.submitted = began
    failed = False
    try:
        while len(found) < len(request.sequences):
            least = patience.queue if progress.started is None else patience.generation
            async with asyncio.timeout(max(0.0, began + least - clock())):
                event = await feed.get()
            match event:
                case Failed():
                    failed = True
                    metrics.failed(event.kind)
                    raise error_of(event)
                case Started():
                    progress.started = clock()
                    metrics.started(progress.started - began, progress.prompt_tokens, 0)
                case Measured():
                    found.update(zip(event.places, event.values, strict=True))
                    progress.last = clock()
                    progress.reasons += ["stop"] * len(event.places)
    except TimeoutError as error:
        if progress.started is not None:
            raise FailedError(f"the texts took longer than {patience.generation:g} s; give fewer") from error
        raise NotReadyError(f"the request waited {patience.queue:g} s and was not begun; try again later") from error
    finally:
        if len(found) < len(request.sequences) and not failed:
            metrics.cancelled()
            desk.cancel(request.id)
    metrics.ended("stop", clock() - began)
    return np.stack([found[place] for place in range(len(found))])


def error_of(event: Failed) -> Olmo2ExportError:
    """Return why a request failed, as an error."""
    match event.kind:
        case "input":
            return InputError(event.message)
        case "numeric":
            return NumericError(event.message)
        case _:
            return EngineLostError(event.message)


class Answering:
    """Some requests of one call; whoever begins it closes it, which gives up what is not answered."""

    def __init__(
        self,
        desk: Desk,
        tokenizer: Tokenizer,
        requests: Sequence[Request],
        *,
        stop: Sequence[str] = (),
        metrics: Metrics,
        patience: Patience,
        clock: Clock = time.monotonic,
    ) -> None:
        """Submit nothing yet.

        Args:
            desk: takes the requests.
            tokenizer: of the model.
            requests: at least one.
            stop: texts before which an answer ends.
            metrics: are told of times and tokens.
            patience: how long things may take.
            clock: tells the time, of the event loop.
        """
        self._desk, self._metrics, self._patience, self._clock = desk, metrics, patience, clock
        self.progress = {request.id: Progress(request) for request in requests}
        self._texts = {
            (request.id, choice): TextState(tokenizer, stop=stop, eos_token_ids=request.eos_token_ids)
            for request in requests
            for choice in range(request.choices)
        }
        self._feed: Feed = asyncio.Queue()
        self._first: Event | None = None
        self._began = clock()
        self._last: dict[tuple[str, int], float] = {}
        self._requests = requests

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(one.prompt_tokens for one in self.progress.values())

    @property
    def new_tokens(self) -> int:
        """Tokens of all answers so far."""
        return sum(one.new_tokens for one in self.progress.values())

    @property
    def reused_tokens(self) -> int:
        """Tokens of prompts that were not computed, so far."""
        return sum(one.reused_tokens for one in self.progress.values())

    async def begin(self) -> None:
        """Submit the requests, and wait until the first is begun.

        Raises:
            Olmo2ExportError: they are refused, the first one fails, or it is not begun in time.
        """
        self._feed = self._desk.submit(self._requests)
        for one in self.progress.values():
            one.submitted = self._began
        try:
            async with asyncio.timeout(self._patience.queue):
                self._first = await self._feed.get()
            self._check(self._first)
        except TimeoutError as error:
            self.close()
            raise NotReadyError(
                f"the request waited {self._patience.queue:g} s and was not begun; try again later"
            ) from error
        except BaseException:
            self.close()
            raise

    async def news(self) -> AsyncIterator[News]:
        """Yield what comes of them, until all have ended.

        Raises:
            Olmo2ExportError: one has failed, or they took too long.
        """
        while self._texts:
            left = self._began + self._patience.generation - self._clock()
            if left <= 0:
                raise FailedError(f"the answer took longer than {self._patience.generation:g} s; ask for less")
            event, self._first = self._first, None
            if event is None and not self._feed.empty():
                event = self._feed.get_nowait()
            elif event is None:
                try:
                    async with asyncio.timeout(min(left, _PING_SECONDS)):
                        event = await self._feed.get()
                except TimeoutError:
                    yield Ping()
                    continue
            self._check(event)
            match event:
                case Started():
                    one = self.progress[event.request]
                    one.started, one.reused_tokens = self._clock(), event.reused
                    self._metrics.started(one.started - self._began, one.prompt_tokens, event.reused)
                    yield event
                case Scored():
                    yield event
                case Token():
                    if (event.request, event.choice) in self._texts:
                        yield self._said(event)

    def close(self) -> None:
        """Give up what is not answered."""
        if self._texts:
            self._metrics.cancelled()
        for request_id in {request_id for request_id, _ in self._texts}:
            self._desk.cancel(request_id)
        self._texts.clear()

    def _said(self, token: Token) -> Said:
        key = token.request, token.choice
        state, progress = self._texts[key], self.progress[token.request]
        text = ""
        if token.token_id is not None:
            self._count(key, progress)
            text = state.push(token.token_id)
        if state.finish_reason is None and token.reason is not None:
            text += state.finish()
        if state.finish_reason is not None:
            del self._texts[key]
            progress.reasons.append(state.finish_reason)
            progress.last = self._clock()
            if token.reason is None:  # a stop string, of which the engine knows nothing
                self._desk.cancel(*key)
            self._metrics.ended(state.finish_reason, progress.last - self._began)
        return Said(
            token.request, token.choice, text, token.token_id, token.logprobs, state.finish_reason, state.stop_string
        )

    def _count(self, key: tuple[str, int], progress: Progress) -> None:
        now = self._clock()
        progress.new_tokens += 1
        progress.first, progress.last = now if progress.first is None else progress.first, now
        if key in self._last:
            self._metrics.token(now - self._last[key])
        else:
            self._metrics.first_token(now - self._began)
        self._last[key] = now

    def _check(self, event: Event) -> None:
        if not isinstance(event, Failed):
            return
        for key in [key for key in self._texts if key[0] == event.request]:
            del self._texts[key]
        self._metrics.failed(event.kind)
        raise error_of(event)
