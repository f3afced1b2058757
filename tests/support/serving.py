"""A runner without a model, for servers: its answers follow from the text that its buffer holds; time is counted."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import uvicorn

from runtimes.errors import PackageError
from runtimes.runners.rows import RowRunner
from runtimes.runners.runner import Ids, Logits
from runtimes.serve.desk import Cancel, Desk, Submit, ToEngine
from runtimes.serve.engine import Engine
from runtimes.serve.requests import Request
from runtimes.text.structured import StructuredOutput
from runtimes.text.tokenizer import Tokenizer

FAKE_SIZE = 3
"""numbers of a fake hidden state"""


def fake_state(token_id: int) -> list[float]:
    """The hidden state of a token, whatever stands before it."""
    return [1.0, token_id % 7 - 3.0, token_id % 5 - 2.0]


class FakeClock:
    """Seconds that pass where somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeSlots(RowRunner):
    """Rows of a buffer written in place. The next token follows from all that a row holds, wherever it was moved to.

    A step takes `step_seconds` for each row up to the highest, a piece of a prompt 1 ms a token.
    """

    _copies_rows = True

    def __init__(
        self,
        *,
        vocab_size: int = 50,
        context: int = 64,
        max_slots: int = 4,
        exact: bool = False,
        clock: FakeClock | None = None,
        step_seconds: float = 0.01,
        hidden_states: Sequence[int] = (),
        labels: Sequence[str] = (),
        pad_token_id: int | None = 0,
    ) -> None:
        spec = SimpleNamespace(max_cache_length=context)
        variant = SimpleNamespace(
            top_k=0,
            kv_cache=spec,
            name_of=str,
            answer="score" if labels else "logits",
            inputs=(),
            name="fake",
            hidden_states={number: f"hidden_states.{number}" for number in hidden_states},
        )
        model = SimpleNamespace(
            vocab_size=vocab_size,
            hidden_size=FAKE_SIZE,
            task="sequence-classification" if labels else "language-model",
            hidden_states=tuple(hidden_states),
            labels=tuple(labels),
            pad_token_id=pad_token_id,
        )
        super().__init__(variant, model, max_slots, exact=exact)  # type: ignore[arg-type]
        self.adapters = ("first", "second")
        self.clock = clock or FakeClock()
        self.step_seconds = step_seconds
        self.buffer = np.zeros((max_slots + max_slots % 2, context), np.int64)
        self.pieces: list[int] = []
        """tokens of each piece of a prompt"""
        self.rows: list[int] = []
        """rows of each step"""
        self.batches: list[int] = []
        """texts of each batch of whole ones"""
        self.height = 5.0
        """of the likeliest token's logit; the others have 0"""
        self.broken: set[int] = set()
        """a text whose last token is one of these has logits that are NaN"""
        self.next_token: Callable[[list[int]], int] = lambda text: fake_next(text, vocab_size)

    def _compute(self, row: int, start: int, ids: Ids) -> Logits:
        logits = np.zeros((len(ids), self.model.vocab_size), np.float32)
        for n, token_id in enumerate(ids):
            self.buffer[row, start + n] = token_id
            logits[n, self.next_token(self.buffer[row, : start + n + 1].tolist())] = self.height
            if int(token_id) in self.broken:
                logits[n] = np.nan
        return logits

    def decode_block(self, token_ids: Any) -> Logits:  # noqa: ARG002
        raise AssertionError("a server does not call it")

    def _extend(self, rows: list[Ids], tokens: list[Ids], all_positions: bool) -> list[Logits]:  # noqa: ARG002
        """A classifier scores a batch; a server computes prompts otherwise."""
        assert self.model.labels
        self.batches.append(len(rows))
        return [self._measured(row)[-1:, : len(self.model.labels)] for row in rows]

    def _hidden(self, rows: list[Ids], tokens: list[Ids], wanted: Sequence[str]) -> list[list[Logits]]:  # noqa: ARG002
        self.batches.append(len(rows))
        each = [self._measured(row) for row in rows]
        return [[states * (int(name.rpartition(".")[2]) + 1) for name in wanted] for states in each]

    def _measured(self, ids: Ids) -> Logits:
        states = np.array([fake_state(token_id) for token_id in ids], np.float32)
        states[[int(token_id) in self.broken for token_id in ids]] = np.nan
        return states

    def _reserve(self, rows: int) -> None:
        assert rows <= len(self.buffer)

    def _feed(self, row: int, held: Ids, ids: Ids, all_positions: bool = False) -> Logits:
        self.clock.now += 0.001 * len(ids)
        self.pieces.append(len(ids))
        logits = self._compute(row, len(held), ids)
        return logits if all_positions else logits[-1:]

    def _step(self, ids: Ids, starts: Ids, wanted: Sequence[str]) -> list[Any]:  # noqa: ARG002
        self.clock.now += self.step_seconds * len(ids)
        self.rows.append(len(ids))
        return [np.concatenate([self._compute(row, int(start), ids[row]) for row, start in enumerate(starts)])]

    def _copy(self, source: int, target: int, ids: Ids) -> None:
        self.buffer[target, : len(ids)] = self.buffer[source, : len(ids)]

    def _give_back(self, row: int) -> None:
        self.buffer[row] = 0


def fake_next(text: Sequence[int], vocab_size: int = 50) -> int:
    """What a fake runner finds likeliest behind a text."""
    return sum((n + 1) * token for n, token in enumerate(text)) % vocab_size


def fake_text(prompt: Sequence[int], count: int, vocab_size: int = 50) -> list[int]:
    """The greedy tokens behind a prompt."""
    text = list(prompt)
    for _ in range(count):
        text.append(fake_next(text, vocab_size))
    return text[len(prompt) :]


class SlowSlots(FakeSlots):
    """One whose steps take real time, so that others may do something meanwhile."""

    def _step(self, ids: Ids, starts: Ids, wanted: Sequence[str]) -> list[Any]:
        time.sleep(0.005)
        return super()._step(ids, starts, wanted)


@contextmanager
def open_fake_engine(max_slots: int = 1, refuse: str | None = None) -> Iterator[Engine]:
    """What a child process may be told to open."""
    if refuse is not None:
        raise PackageError(refuse)
    yield Engine(SlowSlots(max_slots=max_slots, context=512), kept_rows=0)


class InlineEngine:
    """An engine in the event loop of a server: what a process would do, without one. It says what it is told to say."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        ends: int,
        max_slots: int = 4,
        context: int = 256,
        queue: int = 8,
        structured: StructuredOutput | None = None,
        **options: Any,
    ) -> None:
        self.runner = FakeSlots(vocab_size=100_352, context=context, max_slots=max_slots, **options)
        self.runner.next_token = self._next
        self.runner.height = 30.0
        self.engine = Engine(self.runner, structured=structured)
        self.desk = Desk(self._send, queue=queue)
        self.desk.ready(self.engine.capacity)
        self.script = "Hello there."
        """what every answer says"""
        self.tick_seconds = 0.0
        self.held = False
        """whether it waits"""
        self.requests: list[Request] = []
        self._tokenizer, self._ends = tokenizer, ends
        self._answers: dict[tuple[int, ...], list[int]] = {}
        self._ticking: asyncio.Task[None] | None = None

    @property
    def busy(self) -> bool:
        """Whether any answer is being made."""
        return not self.engine.idle

    def _next(self, text: list[int]) -> int:
        for prompt, answer in reversed(self._answers.items()):
            if tuple(text[: len(prompt)]) == prompt:
                place = len(text) - len(prompt)
                return answer[place] if place < len(answer) else self._ends
        return 1

    def _send(self, message: ToEngine) -> None:
        match message:
            case Submit(request):
                if isinstance(request, Request):
                    self.requests.append(request)
                    script = self._tokenizer.encode(self.script, add_special_tokens=False)
                    self._answers[request.prompt_ids] = [*script, self._ends]
                self.engine.submit(request)
            case Cancel(request_id, choice):
                self.engine.cancel(request_id, choice)
        if self._ticking is None or self._ticking.done():
            self._ticking = asyncio.get_running_loop().create_task(self._tick())

    async def _tick(self) -> None:
        while not self.engine.idle:
            await asyncio.sleep(self.tick_seconds)
            while self.held:
                await asyncio.sleep(0.002)
            self.desk.take(self.engine.tick())


@contextmanager
def listening(app: Any, http: Any = "httptools") -> Iterator[int]:
    """Serve an application in a thread; gives the port."""
    sock = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, http=http, ws="none", lifespan="off", log_config=None, access_log=False)
    config.timeout_graceful_shutdown = 1
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
        yield sock.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not become so"
        time.sleep(0.005)
