"""Run a checkpoint layer by layer, with the float32 weights of one layer in memory at a time.

    hidden = embed(...)
    for layer in walked_layers(...):            # reads a layer, drops it before the next
        hidden = [layer(x) for x in hidden]
    logits = Head(...).logits(hidden[0])

A layer runs its rows of `architecture`, from any value to any other, so that whoever quantises it can look at the
inputs of each group of linears and replace its weights before the next. The arithmetic is that of `model`; only the
attention is computed by another operator, as the ONNX one is slow outside a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from olmo2_export.architecture import (
    Operation,
    after_layers,
    between,
    input_groups,
    of_layer,
    operations,
    tensor_shapes,
)
from olmo2_export.config import ModelConfig
from olmo2_export.model.rotary import model_tables, table_names
from olmo2_export.weights.source import WeightSource
from olmo2_export.weights.stored_names import EMBEDDING, HEAD, head_weight, stored_weight

Compute = Callable[[Operation, Sequence[Tensor]], Tensor]
"""an operation and what it reads -> what it writes"""
_HEAD_ROWS = 1 << 13  # of the vocabulary at a time


@dataclass(frozen=True)
class Arithmetic:
    """Every kind of operation in PyTorch, on whole sequences from position 0 on."""

    config: ModelConfig
    tables: Mapping[str, Tensor]
    """as `model.rotary.model_tables` returns them"""

    def __call__(self, row: Operation, inputs: Sequence[Tensor], weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Compute one operation.

        Args:
            row: the operation.
            inputs: what it reads, float32 [B, S, size]; rotated [B, heads, S, head_dim].
            weight: what it multiplies with, where it does.
            bias: what it adds, where it does.
        """
        x = inputs[0]
        match row.kind:
            case "gather":
                raise AssertionError(f"{row.name}: tokens are looked up by embed()")
            case "linear":
                assert weight is not None  # its row names one
                return F.linear(x, weight, bias)
            case "rms_norm":
                return F.rms_norm(x, x.shape[-1:], weight, self.config.norm_eps)
            case "layer_norm":
                return F.layer_norm(x, x.shape[-1:], weight, bias, self.config.norm_eps)
            case "clip":
                assert row.limit is not None  # its row has one
                return x.clamp(-row.limit, row.limit)
            case "rotary":
                return self._rotated(self.heads(x), row.rope)
            case "attention":
                query, key, value = self.query_key_value(inputs)
                if row.window is None or row.window >= x.shape[2]:
                    return self.joined(F.scaled_dot_product_attention(query, key, value, is_causal=True))
                seen = visible(query.shape[2], row.window)
                return self.joined(F.scaled_dot_product_attention(query, key, value, attn_mask=seen))
            case "add":
                return x + inputs[1]
            case "silu":
                return F.silu(x)
            case "multiply":
                return x * inputs[1]

    def heads(self, x: Tensor) -> Tensor:
        """[B, S, heads * head_dim] -> [B, heads, S, head_dim]; rotated ones are so already."""
        return x if x.ndim == 4 else x.view(*x.shape[:2], -1, self.config.head_dim).transpose(1, 2)

    def joined(self, x: Tensor) -> Tensor:
        """[B, heads, S, head_dim] -> [B, S, heads * head_dim]."""
        return x.transpose(1, 2).flatten(2)

    def query_key_value(self, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return what an attention reads, each [B, heads, S, head_dim]: keys and values once per query head."""
        query, key, value = map(self.heads, inputs)
        groups = self.config.num_attention_heads // self.config.num_key_value_heads
        return query, key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)

    def _rotated(self, x: Tensor, rope: str) -> Tensor:
        cos, sin = (self.tables[name][: x.shape[2]] for name in table_names(self.config)[rope])
        left, right = x.chunk(2, dim=-1)
        return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


def visible(length: int, window: int | None) -> Tensor:
    """Return which tokens each token sees in an attention: bool [length, length]."""
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    return seen if window is None else seen.triu(1 - window)


class WalkedLayer:
    """One layer in float32."""

    def __init__(self, checkpoint: WeightSource, rows: Sequence[Operation], index: int, arithmetic: Arithmetic) -> None:
        self.rows, self.index, self.arithmetic = tuple(rows), index, arithmetic
        self.input_groups = input_groups(rows)
        self.reads, self.writes = rows[0].reads[0], rows[-1].name
        self.weights = {name: checkpoint.tensor(name).float() for name in tensor_shapes(rows)}

    def replace(self, name: str, weight: Tensor) -> None:
        """Compute with another weight from now on, float32 [N, K]; `name` is the checkpoint's."""
        self.weights[name] = weight

    def run(
        self, x: Tensor, wanted: Collection[str], start: str | None = None, compute: Compute | None = None
    ) -> dict[str, Tensor]:
        """Compute values, and nothing that they do not need.

        Args:
            x: the layer's input, or another value from which alone those can be computed: [B, S, size].
            wanted: names of values.
            start: the name of `x`; None: the layer's input.
            compute: in the place of this layer's own arithmetic.

        Returns:
            The wanted values by name. What is not wanted is dropped when its last reader has run.
        """
        start = start or self.reads
        rows = between(self.rows, start, wanted)
        last_reader = {name: row.name for row in rows for name in row.reads}
        values = {start: x}
        for row in rows:
            values[row.name] = (compute or self.compute)(row, [values[name] for name in row.reads])
            for name in set(row.reads):
                if last_reader[name] == row.name and name not in wanted:
                    del values[name]
        return {name: values[name] for name in wanted}

    def value(self, x: Tensor, name: str, start: str | None = None) -> Tensor:
        """Compute one value; arguments as in `run`."""
        return self.run(x, [name], start)[name]

    def __call__(self, x: Tensor) -> Tensor:
        """Run the layer: [B, S, hidden] -> [B, S, hidden]."""
        return self.value(x, self.writes)

    def compute(self, row: Operation, inputs: Sequence[Tensor]) -> Tensor:
        """Compute one operation with the layer's weights."""
        weight, bias = (None if name is None else self.weights[name] for name in (row.weight, row.bias))
        return self.arithmetic(row, inputs, weight, bias)


class Head:
    """The last norm and lm_head, a part of the vocabulary in float32 at a time; or the last norm and score."""

    def __init__(self, checkpoint: WeightSource, config: ModelConfig) -> None:
        *self._norms, _ = after_layers(operations(config))
        self._weights = {name: checkpoint.tensor(name).float() for name in tensor_shapes(self._norms)}
        self._arithmetic = Arithmetic(config, model_tables(config))
        name = head_weight(config)
        self.scores = name != HEAD
        """whether it gives scores, in the place of logits"""
        self.weight = stored_weight(checkpoint, config, name)

    def norm(self, x: Tensor) -> Tensor:
        """Return lm_head's input: [..., hidden] -> [..., hidden]."""
        for row in self._norms:
            weight, bias = (None if name is None else self._weights[name] for name in (row.weight, row.bias))
            x = self._arithmetic(row, [x], weight, bias)
        return x

    def logits(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return logits: [..., hidden] -> float32 [..., V]; `weight` replaces lm_head's, [V, hidden]."""
        normed = self.norm(x)
        rows = torch.split(self.weight if weight is None else weight, _HEAD_ROWS)
        return torch.cat([normed @ part.float().T for part in rows], dim=-1)


def embed(checkpoint: WeightSource, sequences: Sequence[np.ndarray]) -> list[Tensor]:
    """Look tokens up: int64 [S] each -> float32 [1, S, hidden] each; float32 [S, hidden] is taken as it is."""
    return [
        (checkpoint.picked(EMBEDDING, torch.from_numpy(x)).float() if x.ndim == 1 else torch.from_numpy(x))[None]
        for x in sequences
    ]


def walked_layers(checkpoint: WeightSource, config: ModelConfig, *, backwards: bool = False) -> Iterator[WalkedLayer]:
    """Read one layer after the other; drop each before asking for the next."""
    rows, arithmetic = operations(config), Arithmetic(config, model_tables(config))
    for index in sorted(range(config.num_hidden_layers), reverse=backwards):
        yield WalkedLayer(checkpoint, of_layer(rows, index), index, arithmetic)
