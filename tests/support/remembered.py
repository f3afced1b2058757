"""PyTorch's answers, each computed once: a bug is in a graph, and what it is compared with is what the last one was.

A question is known by the content of all that its answer depends on: the checkpoint's files, the weights that take the
place of its own, what rounds the inputs of linears, and the tokens. Nothing that a graph computes is remembered.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from olmo2_export.config import ModelConfig
from olmo2_export.truth import reference, torch_layers
from olmo2_export.verify import checks, measure, variant
from olmo2_export.verify.beside import NOTHING, Beside
from olmo2_export.views import table
from olmo2_export.weights.checkpoint import Checkpoint
from olmo2_export.weights.merged import MergedCheckpoint

MOST = 200 << 20
"""bytes of arrays that are held; the oldest go first"""


class _Answers:
    def __init__(self) -> None:
        self._held: OrderedDict[bytes, Any] = OrderedDict()

    def to(self, question: tuple[Any, ...], ask: Callable[[], Any]) -> Any:
        """Return what `ask` returned when it was asked this before, as arrays that nobody can change."""
        key = _digest(question)
        if key not in self._held:
            self._held[key] = _frozen(ask())
            while len(self._held) > 1 and sum(map(_size, self._held.values())) > MOST:
                self._held.popitem(last=False)
        self._held.move_to_end(key)
        return self._held[key]


_ANSWERS = _Answers()


def remember(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let everything that exports or verifies, in this process and test, ask PyTorch through what is held here."""
    for module in (measure, variant):
        monkeypatch.setattr(module, "open_reference", _open_reference)
        monkeypatch.setattr(module, "draw_logits", _draw_logits)
    for module in (checks, torch_layers):  # the second for those that import it where they call it
        monkeypatch.setattr(module, "reference_logits", _reference_logits)
    monkeypatch.setattr(table, "int8_blocks", _rounding(reference.int8_blocks))
    monkeypatch.setattr(table, "SCALED", {name: _rounding(make) for name, make in reference.SCALED.items()})


class _Remembered:
    """Stands for `reference.Reference`; opens it where it is asked something new."""

    def __init__(self, question: tuple[Any, ...], open_it: Callable[[], Any]) -> None:
        self._question, self._open = (_digest(question).hex(),), cache(open_it)

    def logits(self, sequences: Sequence[np.ndarray], positions: Sequence[np.ndarray] | None = None) -> Any:
        asked = (*self._question, "logits", list(sequences), positions)
        return list(_ANSWERS.to(asked, lambda: self._open().logits(sequences, positions)))

    def scores(self, ids: np.ndarray, mask: np.ndarray) -> Any:
        return _ANSWERS.to((*self._question, "scores", ids, mask), lambda: self._open().scores(ids, mask))

    def hidden_states(self, sequences: Sequence[np.ndarray], numbers: Sequence[int]) -> Any:
        asked = (*self._question, "hidden states", list(sequences), tuple(numbers))
        return _ANSWERS.to(asked, lambda: self._open().hidden_states(sequences, numbers))

    def embeddings(self, sequences: Sequence[np.ndarray], numbers: Sequence[int], poolings: Sequence[str]) -> Any:
        asked = (*self._question, "embeddings", list(sequences), tuple(numbers), tuple(poolings))
        return _ANSWERS.to(asked, lambda: self._open().embeddings(sequences, numbers, poolings))

    def mixed(self, before: np.ndarray, vectors: np.ndarray, behind: np.ndarray) -> Any:
        asked = (*self._question, "mixed", before, vectors, behind)
        return _ANSWERS.to(asked, lambda: self._open().mixed(before, vectors, behind))

    def mixed_states(self, before: np.ndarray, vectors: np.ndarray, behind: np.ndarray, numbers: Sequence[int]) -> Any:
        asked = (*self._question, "mixed states", before, vectors, behind, tuple(numbers))
        return _ANSWERS.to(asked, lambda: self._open().mixed_states(before, vectors, behind, numbers))

    def greedy(self, prompt: np.ndarray, new_tokens: int) -> Any:
        return _ANSWERS.to(
            (*self._question, "greedy", prompt, new_tokens), lambda: self._open().greedy(prompt, new_tokens)
        )


@contextmanager
def _open_reference(
    checkpoint: Checkpoint,
    precision: str,
    weights: Mapping[str, torch.Tensor] | None = None,
    rounded_inputs: Mapping[str, Any] | None = None,
) -> Iterator[Any]:
    if not _is_known(rounded_inputs):
        with reference.open_reference(checkpoint, precision, weights, rounded_inputs) as opened:
            yield opened
        return
    with ExitStack() as stack:
        question = ("reference", checkpoint, precision, weights or {}, rounded_inputs or {})

        def load() -> Any:
            return stack.enter_context(reference.open_reference(checkpoint, precision, weights, rounded_inputs))

        yield _Remembered(question, load)


def _draw_logits(
    checkpoint: Checkpoint,
    sequences: Sequence[np.ndarray],
    positions: Sequence[np.ndarray],
    weights: Mapping[str, torch.Tensor],
    rounding: Mapping[str, Any],
    beside: Beside = NOTHING,
) -> Any:
    arguments = (checkpoint, sequences, positions, weights, rounding, beside)
    if not _is_known({name: rounds for name, rounds in rounding.items() if rounds is not None}):
        return _REAL_DRAWS(*arguments)
    batches = [(batch.ids, batch.mask) for batch in beside.padded]
    asked = ("draws", *arguments[:-1], batches, beside.hidden, list(beside.rows), len(beside.mixed))
    return _ANSWERS.to(asked, lambda: _REAL_DRAWS(*arguments))


_REAL_DRAWS = measure.draw_logits


def _reference_logits(checkpoint: Checkpoint, config: ModelConfig, sequences: Collection[np.ndarray]) -> Iterator[Any]:
    def ask() -> list[np.ndarray]:
        return list(_REAL_LOGITS(checkpoint, config, sequences))

    return iter(_ANSWERS.to(("quality", checkpoint, list(sequences)), ask))


_REAL_LOGITS = torch_layers.reference_logits


def _rounding(make: Callable[[Any], Callable[[torch.Tensor], torch.Tensor]]) -> Callable[[Any], Any]:
    """Return `make`, whose results know what they were made of, so that two of one kind are one."""

    def made(size: Any) -> Any:
        return _Rounding(make.__name__, size, make(size))

    return made


@dataclasses.dataclass(frozen=True)
class _Rounding:
    kind: str
    size: Any
    rounds: Callable[[torch.Tensor], torch.Tensor]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.rounds(x)


def _is_known(rounding: Mapping[str, Any] | None) -> bool:
    return all(isinstance(rounds, _Rounding) for rounds in (rounding or {}).values())


def _digest(question: Any) -> bytes:
    state = hashlib.sha256()
    _add(state, question)
    return state.digest()


def _add(state: Any, part: Any) -> None:
    """Add a part to a hash, with its type and size, so that no two questions run together."""
    match part:
        case torch.Tensor():
            _add(state, part.detach().contiguous().view(torch.uint8).numpy() if part.ndim else part.item())
            state.update(f"{part.dtype}{tuple(part.shape)}".encode())
        case np.ndarray():
            state.update(f"array {part.dtype} {part.shape} ".encode())
            state.update(np.ascontiguousarray(part).tobytes())
        case Checkpoint():
            adapters = part.adapters if isinstance(part, MergedCheckpoint) else ()
            _add(state, [adapter.stored for adapter in adapters])
            for path in sorted(p for p in part.folder.iterdir() if p.suffix in (".json", ".safetensors")):
                _add(state, (path.name, _file(path, path.stat().st_mtime_ns, path.stat().st_size)))
        case _Rounding():
            _add(state, (part.kind, part.size))
        case Mapping():
            _add(state, sorted(part.items(), key=lambda item: item[0]))
        case list() | tuple():
            state.update(f"{len(part)} of ".encode())
            for one in part:
                _add(state, one)
        case None | str() | int() | float():
            state.update(f"{type(part).__name__} {part!r} ".encode())
        case _:
            raise TypeError(f"{type(part)}: it is not said how to tell one from another")


@cache
def _file(path: Path, _changed: int, _size: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _size(answer: Any) -> int:
    if isinstance(answer, np.ndarray):
        return answer.nbytes
    return sum(map(_size, answer)) if isinstance(answer, list | tuple) else sys.getsizeof(answer)


def _frozen(answer: Any) -> Any:
    if isinstance(answer, np.ndarray):
        answer.flags.writeable = False
        return answer
    return type(answer)(map(_frozen, answer)) if isinstance(answer, list | tuple) else answer
