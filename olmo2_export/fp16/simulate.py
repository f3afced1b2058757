"""The model with the roundings of a float16 graph: PyTorch in float32, each value and weight rounded where the graph
rounds it, to infinity where it does not fit.

Not simulated: a product with a bias is rounded once, as if the bias were added inside the kernel; and what a kernel
rounds inside, such as the probabilities of the attention.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from olmo2_export.architecture import Operation, hidden_state_name, operations
from olmo2_export.config import ModelConfig
from olmo2_export.fp16.values import SCORES, Float32Islands, Walk, Weights, to_float16, walk_all
from olmo2_export.measure.parity import GATES, compare
from olmo2_export.weights.source import WeightSource

_PROOF_LOGITS = 1 << 23  # numbers whose float64 copies are compared: half a gigabyte


@dataclass(frozen=True)
class Simulated:
    """What the model says with every value and weight rounded to float16 but for the islands."""

    first_not_finite: str | None
    """value"""
    positions: int
    """that got logits"""
    bad_positions: int
    """whose logits are not all finite; the argmax of such a row is token 0, "!" in OLMo 2's vocabulary"""
    kl_mean: float
    """against PyTorch in float32, nats per token; NaN where logits are not finite"""
    top1: float
    failures: tuple[str, ...]
    """limits of the fp16 gate that do not hold"""

    @property
    def finite(self) -> bool:
        return self.first_not_finite is None and not self.bad_positions


class _Simulation:
    """Rounds to float16 whatever is not kept in float32."""

    def __init__(self, config: ModelConfig, wide: Float32Islands, *, round_scores: bool) -> None:
        self.sequence = 0
        self.first_not_finite: str | None = None
        self._values = wide.values
        self._exact = wide.operations(operations(config)) - wide.rounded
        self._round_scores = round_scores

    def value(self, name: str, x: Tensor, _first_channel: int = 0, /) -> Tensor:
        kept = name in self._values or (name.endswith(SCORES) and not self._round_scores)
        rounded = x if kept else to_float16(x)
        if self.first_not_finite is None and not torch.isfinite(rounded).all():
            self.first_not_finite = name
        return rounded

    def weight(self, row: Operation, name: str, weights: Weights) -> Tensor:
        return weights.exact(name) if row.name in self._exact else weights.rounded(name)


class _Float32:
    """Changes nothing."""

    sequence = 0

    def value(self, _name: str, x: Tensor, _first_channel: int = 0, /) -> Tensor:
        return x

    def weight(self, _row: Operation, name: str, weights: Weights) -> Tensor:
        return weights.exact(name)


def simulate(
    checkpoint: WeightSource,
    config: ModelConfig,
    sequences: Sequence[np.ndarray],
    settings: Sequence[Float32Islands],
    *,
    round_scores: bool = False,
) -> list[Simulated]:
    """Run the model with the roundings of float16, once for each setting; see the top of this file.

    Args:
        checkpoint: the weights.
        config: their shape.
        sequences: int64 [S] each; the last positions of each get logits, all of them where the vocabulary is small.
        settings: what each run keeps in float32.
        round_scores: round the attention scores too, as a kernel with scores in float16 does.
    """
    rows = max(1, _PROOF_LOGITS // config.vocab_size // max(1, len(sequences)))
    observers = [_Simulation(config, wide, round_scores=round_scores) for wide in settings]
    walks = [Walk(_Float32(), sequences, rows), *(Walk(o, sequences, rows) for o in observers)]
    logits: list[list[np.ndarray]] = [[] for _ in walks]
    for walk, _, rows_of in walk_all(checkpoint, config, walks, "simulating float16"):
        assert rows_of is not None  # rows is positive
        logits[walk].append(rows_of)
    return [
        _judged(observer.first_not_finite, logits[0], tested)
        for observer, tested in zip(observers, logits[1:], strict=True)
    ]


class _Recording(_Simulation):
    """Keeps some values as their readers get them."""

    def __init__(self, config: ModelConfig, wide: Float32Islands, names: Sequence[str]) -> None:
        super().__init__(config, wide, round_scores=False)
        self.kept: dict[str, list[np.ndarray]] = {name: [] for name in names}

    def value(self, name: str, x: Tensor, _first_channel: int = 0, /) -> Tensor:
        rounded = super().value(name, x, _first_channel)
        if name in self.kept:
            self.kept[name].append(rounded[0].numpy())
        return rounded


def simulated_answers(
    checkpoint: WeightSource,
    config: ModelConfig,
    sequences: Sequence[np.ndarray],
    wide: Float32Islands,
    hidden_states: Sequence[int] = (),
) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
    """Run the model of a float16 graph with islands.

    Args:
        checkpoint: the weights.
        config: their shape.
        sequences: int64 [S] each.
        wide: the islands.
        hidden_states: numbers of those that are wanted; see `ModelConfig.giving`.

    Returns:
        Per sequence its logits, float32 [S, V]; per number and sequence hidden states, float32 [S, hidden].
    """
    names = [hidden_state_name(config, number) for number in hidden_states]
    observer = _Recording(config, wide, names)
    longest = max(map(len, sequences))
    found = list(walk_all(checkpoint, config, [Walk(observer, sequences, longest)], "float16 with islands"))
    return [logits for _, _, logits in found if logits is not None], [observer.kept[name] for name in names]


def _judged(first: str | None, reference: Sequence[np.ndarray], tested: Sequence[np.ndarray]) -> Simulated:
    rows = np.concatenate([np.isfinite(x).all(axis=-1) for x in tested])
    gate = dataclasses.replace(GATES["fp16"], error_ratio=math.inf)  # nothing here to compare an error with
    case = compare("simulated", [len(x) for x in tested], tested, reference, reference, gate)
    return Simulated(first, len(rows), int((~rows).sum()), case.kl_mean, case.top1, case.failures)
