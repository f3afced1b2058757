"""A runner without a model, for servers: its answers follow from the text that its buffer holds; time is counted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np

from runtimes.errors import PackageError
from runtimes.runners.rows import RowRunner
from runtimes.runners.runner import Ids, Logits
from runtimes.serve.engine import Engine


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
    ) -> None:
        spec = SimpleNamespace(max_cache_length=context)
        variant = SimpleNamespace(
            top_k=0, kv_cache=spec, name_of=str, answer="logits", inputs=(), name="fake", hidden_states={}
        )
        model = SimpleNamespace(vocab_size=vocab_size, hidden_size=0, task="language-model", hidden_states=())
        super().__init__(variant, model, max_slots, exact=exact)  # type: ignore[arg-type]
        self.adapters = ("first", "second")
        self.clock = clock or FakeClock()
        self.step_seconds = step_seconds
        self.buffer = np.zeros((max_slots + max_slots % 2, context), np.int64)
        self.pieces: list[int] = []
        """tokens of each piece of a prompt"""
        self.rows: list[int] = []
        """rows of each step"""
        self.broken: set[int] = set()
        """a text whose last token is one of these has logits that are NaN"""
        self.next_token: Callable[[list[int]], int] = lambda text: fake_next(text, vocab_size)

    def _compute(self, row: int, start: int, ids: Ids) -> Logits:
        logits = np.zeros((len(ids), self.model.vocab_size), np.float32)
        for n, token_id in enumerate(ids):
            self.buffer[row, start + n] = token_id
            logits[n, self.next_token(self.buffer[row, : start + n + 1].tolist())] = 5
            if int(token_id) in self.broken:
                logits[n] = np.nan
        return logits

    def decode_block(self, token_ids: Any) -> Logits:  # noqa: ARG002
        raise AssertionError("a server does not call it")

    def _extend(self, rows: list[Ids], tokens: list[Ids], all_positions: bool) -> list[Logits]:  # noqa: ARG002
        raise AssertionError("a server does not call it")

    def _hidden(self, rows: list[Ids], tokens: list[Ids], wanted: Sequence[str]) -> list[list[Logits]]:  # noqa: ARG002
        raise AssertionError("it gives none")

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
