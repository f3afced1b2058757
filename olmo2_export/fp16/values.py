"""The values of the fp16 graph under names people know, and PyTorch walking through them.

A value has the name of the operation that writes it, a row of `architecture`. In a float16 graph the attention rotates
queries and keys itself, and holds the scores in float32: `self_attn.{q,k}_rotary` and `self_attn.scores` are seen here,
but are no values of the graph. k's rotated is what the KV cache holds.

OLMo 2 and 3 normalise what a layer adds, not what it reads: the residual stream reaches the linears as large as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from olmo2_export.architecture import Operation, after_layers, operations, tensor_shapes
from olmo2_export.config import ModelConfig
from olmo2_export.model.rotary import model_tables
from olmo2_export.quantize.walk import Arithmetic, WalkedLayer, embed, visible, walked_layers
from olmo2_export.weights.source import WeightSource
from olmo2_export.weights.stored_names import EMBEDDING, head_weight, stored_weight

SCORES = ".scores"
PARAMETERS = (".weight", ".bias")
_HEAD_ROWS = 1 << 13  # of the vocabulary at a time


@dataclass(frozen=True)
class Float32Islands:
    """What a float16 graph keeps in float32."""

    values: frozenset[str] = frozenset()
    """names of operations: what they write is not rounded"""
    weights: frozenset[str] = frozenset()
    """names of operations: what they multiply with is not rounded"""
    rounded: frozenset[str] = frozenset()
    """names of operations whose weight is rounded even where they compute in float32; the proof asks for that"""

    def operations(self, rows: Iterable[Operation]) -> frozenset[str]:
        """Return the operations that compute in float32: a wide value's writer and readers, a wide weight's owner."""
        return frozenset(
            row.name
            for row in rows
            if row.name in self.values or row.name in self.weights or not self.values.isdisjoint(row.reads)
        )

    def without(self, name: str, *, weight: bool) -> Float32Islands:
        """Return the same but for one value, or one weight."""
        if weight:
            return Float32Islands(self.values, self.weights - {name}, self.rounded | {name})
        return Float32Islands(self.values - {name}, self.weights, self.rounded)


def islands_of(names: Collection[str]) -> Float32Islands:
    """Return what a manifest's `float32_islands` say: names of values, and of weights as the checkpoint has them."""
    weights = {name.removesuffix(".weight").removesuffix(".bias") for name in names if name.endswith(PARAMETERS)}
    return Float32Islands(frozenset(name for name in names if not name.endswith(PARAMETERS)), frozenset(weights))


class Weights:
    """The weights of a layer, as they are stored and rounded to float16; rounded once, whoever asks."""

    def __init__(self, exact: dict[str, Tensor]) -> None:
        self._exact = exact
        self._rounded: dict[str, Tensor] = {}

    def exact(self, name: str) -> Tensor:
        """Return a weight in float32."""
        return self._exact[name]

    def rounded(self, name: str) -> Tensor:
        """Return it rounded to float16, in float32; what is beyond float16 is infinite."""
        if name not in self._rounded:
            self._rounded[name] = to_float16(self._exact[name])
        return self._rounded[name]


def to_float16(x: Tensor) -> Tensor:
    """Round to float16 as hardware does, to infinity where it does not fit; the result is float32."""
    return x.half().float()


class Observer(Protocol):
    """Sees, and may replace, every value and every weight of a walk."""

    sequence: int
    """which one is walked; set by the walk"""

    def value(self, name: str, x: Tensor, first_channel: int = 0, /) -> Tensor:
        """Return what the readers of a value get; of a part of it, from that channel on."""
        ...

    def weight(self, row: Operation, name: str, weights: Weights) -> Tensor:
        """Return what an operation multiplies with, or its bias; `name` is the checkpoint's."""
        ...


@dataclass
class Walk:
    """One observer on its sequences."""

    observer: Observer
    sequences: Sequence[np.ndarray]
    """int64 [S] each"""
    logit_rows: int
    """the last positions of each sequence that get logits which are kept; 0: those of all positions, none kept"""


class _Layer:
    """One layer, seen by an observer: its rows, and the scores inside the attention."""

    def __init__(self, walked: WalkedLayer) -> None:
        self._walked, self._weights = walked, Weights(walked.weights)

    def __call__(self, see: Observer, x: Tensor) -> Tensor:
        """[1, S, hidden] -> [1, S, hidden]."""
        layer = self._walked

        def compute(row: Operation, inputs: Sequence[Tensor]) -> Tensor:
            if row.kind == "attention":
                return see.value(row.name, self._attention(see, row, inputs))
            return _seen(see, row, inputs, self._weights, layer.arithmetic)

        return layer.run(x, [layer.writes], compute=compute)[layer.writes]

    def _attention(self, see: Observer, row: Operation, inputs: Sequence[Tensor]) -> Tensor:
        arithmetic = self._walked.arithmetic
        q, k, v = arithmetic.query_key_value(inputs)
        length, head_dim = q.shape[2:]
        hidden = ~visible(length, row.window)
        scores = (q @ k.transpose(2, 3) * head_dim**-0.5).masked_fill(hidden, 0)  # (B, heads, S, S)
        scores = see.value(row.name.rpartition(".")[0] + SCORES, scores).masked_fill(hidden, -torch.inf)
        return arithmetic.joined(scores.softmax(-1) @ v)


def _seen(see: Observer, row: Operation, inputs: Sequence[Tensor], weights: Weights, arithmetic: Arithmetic) -> Tensor:
    bias = None if row.bias is None else see.weight(row, row.bias, weights)
    weight = None if row.weight is None else see.weight(row, row.weight, weights)
    return see.value(row.name, arithmetic(row, inputs, weight, bias))


class _Head:
    """The last norm and lm_head, a part of the vocabulary at a time; or the last norm and score."""

    def __init__(self, checkpoint: WeightSource, config: ModelConfig) -> None:
        *self._norms, self._linear = after_layers(operations(config))
        self._weights = Weights({name: checkpoint.tensor(name).float() for name in tensor_shapes(self._norms)})
        self._arithmetic = Arithmetic(config, model_tables(config))
        self._name = head_weight(config)
        self._stored = stored_weight(checkpoint, config, self._name)

    @cached_property
    def _parts(self) -> list[tuple[int, Tensor]]:
        return [(i * _HEAD_ROWS, part) for i, part in enumerate(torch.split(self._stored, _HEAD_ROWS))]

    def __call__(self, see: Observer, x: Tensor, rows: int) -> Tensor | None:
        """Return the logits of the last rows, [rows, V]; of none where `rows` is 0."""
        for row in self._norms:
            x = _seen(see, row, [x], self._weights, self._arithmetic)
        normed = x[:, -rows:] if rows else x
        kept: list[Tensor] = []
        for start, part in self._parts:
            head = see.weight(self._linear, self._name, Weights({self._name: part.float()}))
            logits = see.value(self._linear.name, F.linear(normed, head), start)
            if rows:
                kept.append(logits[0])
        return torch.cat(kept, dim=-1) if kept else None


@torch.no_grad()
def walk_all(
    checkpoint: WeightSource, config: ModelConfig, walks: Sequence[Walk], title: str
) -> Iterator[tuple[int, int, np.ndarray | None]]:
    """Take several walks at once, with the float32 weights of one layer in memory at a time.

    Args:
        checkpoint: the weights.
        config: their shape.
        walks: each with its own observer.
        title: of the progress bar.

    Yields:
        Walk, sequence, and its logits, float32 [rows, V]; None where none are kept. One at a time: they are large.
    """
    hidden = [embed(checkpoint, walk.sequences) for walk in walks]
    steps = (config.num_hidden_layers + 1) * sum(len(walk.sequences) for walk in walks)
    with tqdm(total=steps, desc=title, unit="step", leave=False) as bar:

        def through(step: _Embedding | _Layer) -> None:
            for walk, states in zip(walks, hidden, strict=True):
                for index, x in enumerate(states):
                    walk.observer.sequence = index
                    states[index] = step(walk.observer, x)
                    bar.update(isinstance(step, _Layer))

        through(_Embedding(config))
        for walked in walked_layers(checkpoint, config):
            through(_Layer(walked))
        head = _Head(checkpoint, config)
        for number, (walk, states) in enumerate(zip(walks, hidden, strict=True)):
            for index, x in enumerate(states):
                walk.observer.sequence = index
                logits = head(walk.observer, x, walk.logit_rows)
                bar.update()
                yield number, index, None if logits is None else logits.numpy()


class _Embedding:
    """The rows that were looked up."""

    def __init__(self, config: ModelConfig) -> None:
        self._row = operations(config)[0]

    def __call__(self, see: Observer, x: Tensor) -> Tensor:
        return see.value(self._row.name, see.weight(self._row, EMBEDDING, Weights({EMBEDDING: x})))


def largest_weights(checkpoint: WeightSource, config: ModelConfig) -> dict[str, float]:
    """Return max |w| of the embedding and of the head; a walk sees those of the layers."""
    found: dict[str, float] = {}
    for name in (EMBEDDING, head_weight(config)):
        weight = stored_weight(checkpoint, config, name)
        found[name] = max(float(part.float().abs().max()) for part in torch.split(weight, _HEAD_ROWS))
    return found
