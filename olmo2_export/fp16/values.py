"""The values of the fp16 graph under names people know, and PyTorch walking through them.

| value                                   | written by                | read by                                   |
|-----------------------------------------|---------------------------|-------------------------------------------|
| model.embed_tokens                      | Gather                    | q, k, v of layer 0; attention_residual    |
| model.layers.N.self_attn.{q,k,v}_proj   | MatMul                    | q_norm, k_norm; the attention             |
| model.layers.N.self_attn.{q,k}_norm     | RMSNormalization          | the attention                             |
| model.layers.N.self_attn.{q,k}_rotary   | the attention, inside; k's is the KV cache | the attention, inside    |
| model.layers.N.self_attn.scores         | the attention, inside, in float32 | the attention, inside             |
| model.layers.N.self_attn.attention      | GroupQueryAttention       | o_proj                                    |
| model.layers.N.self_attn.o_proj         | MatMul                    | post_attention_layernorm                  |
| model.layers.N.post_attention_layernorm | RMSNormalization          | attention_residual                        |
| model.layers.N.attention_residual       | Add                       | gate_proj, up_proj, mlp_residual          |
| model.layers.N.mlp.{gate,up}_proj       | MatMul                    | act_fn; product                           |
| model.layers.N.mlp.act_fn               | Sigmoid, Mul: SiLU        | product                                   |
| model.layers.N.mlp.product              | Mul                       | down_proj                                 |
| model.layers.N.mlp.down_proj            | MatMul                    | post_feedforward_layernorm                |
| model.layers.N.post_feedforward_layernorm | RMSNormalization        | mlp_residual                              |
| model.layers.N.mlp_residual             | Add                       | q, k, v and residual of the next; norm    |
| model.norm, lm_head                     | RMSNormalization, MatMul  | lm_head; the cast to float32              |

OLMo 2 normalises what a layer adds, not what it reads: the residual stream reaches the linears as large as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from olmo2_export.config import ModelConfig
from olmo2_export.quantize.sweep import StagedLayer, embed, staged_layers
from olmo2_export.weights.source import WeightSource
from olmo2_export.weights.stored_names import EMBEDDING, HEAD, stored_weight

Kind = Literal["gather", "linear", "norm", "attention", "add", "silu", "multiply"]
EMBED, FINAL_NORM, LOGITS = "model.embed_tokens", "model.norm", "lm_head"
SCORES = ".scores"
PARAMETERS = (".weight", ".bias")
_HEAD_ROWS = 1 << 13  # of the vocabulary at a time


@dataclass(frozen=True)
class Operation:
    """One operation of the graph; the value that it writes has its name."""

    name: str
    kind: Kind
    reads: tuple[str, ...]

    @property
    def weight(self) -> str | None:
        """The checkpoint's name of its weight."""
        return f"{self.name}.weight" if self.kind in ("gather", "linear", "norm") else None


def operations(config: ModelConfig) -> list[Operation]:
    """Return the operations that compute floats, in order; see the top of this file."""
    found = [Operation(EMBED, "gather", ())]
    x = EMBED
    for layer in range(config.num_hidden_layers):
        p = f"model.layers.{layer}."
        a, m = f"{p}self_attn.", f"{p}mlp."
        h, y = f"{p}attention_residual", f"{p}mlp_residual"
        found += [
            *(Operation(f"{a}{n}_proj", "linear", (x,)) for n in "qkv"),
            *(Operation(f"{a}{n}_norm", "norm", (f"{a}{n}_proj",)) for n in "qk"),
            Operation(f"{a}attention", "attention", (f"{a}q_norm", f"{a}k_norm", f"{a}v_proj")),
            Operation(f"{a}o_proj", "linear", (f"{a}attention",)),
            Operation(f"{p}post_attention_layernorm", "norm", (f"{a}o_proj",)),
            Operation(h, "add", (x, f"{p}post_attention_layernorm")),
            *(Operation(f"{m}{n}_proj", "linear", (h,)) for n in ("gate", "up")),
            Operation(f"{m}act_fn", "silu", (f"{m}gate_proj",)),
            Operation(f"{m}product", "multiply", (f"{m}act_fn", f"{m}up_proj")),
            Operation(f"{m}down_proj", "linear", (f"{m}product",)),
            Operation(f"{p}post_feedforward_layernorm", "norm", (f"{m}down_proj",)),
            Operation(y, "add", (h, f"{p}post_feedforward_layernorm")),
        ]
        x = y
    return [*found, Operation(FINAL_NORM, "norm", (x,)), Operation(LOGITS, "linear", (FINAL_NORM,))]


@dataclass(frozen=True)
class Wide:
    """What a float16 graph keeps in float32."""

    values: frozenset[str] = frozenset()
    """names of operations: what they write is not rounded"""
    weights: frozenset[str] = frozenset()
    """names of operations: what they multiply with is not rounded"""
    rounded: frozenset[str] = frozenset()
    """names of operations whose weight is rounded even where they compute in float32; the proof asks for that"""

    def operations(self, config: ModelConfig) -> frozenset[str]:
        """Return the operations that compute in float32: a wide value's writer and readers, a wide weight's owner."""
        return frozenset(
            op.name
            for op in operations(config)
            if op.name in self.values or op.name in self.weights or not self.values.isdisjoint(op.reads)
        )

    def without(self, name: str, *, weight: bool) -> Wide:
        """Return the same but for one value, or one weight."""
        if weight:
            return Wide(self.values, self.weights - {name}, self.rounded | {name})
        return Wide(self.values - {name}, self.weights, self.rounded)


def wide_of(names: Collection[str]) -> Wide:
    """Return what a manifest's `float32_islands` say: names of values, and of weights as the checkpoint has them."""
    weights = {name.removesuffix(".weight").removesuffix(".bias") for name in names if name.endswith(PARAMETERS)}
    return Wide(frozenset(name for name in names if not name.endswith(PARAMETERS)), frozenset(weights))


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

    def weight(self, name: str, weights: Weights) -> Tensor:
        """Return what an operation multiplies with, `name` being that of the operation or of its bias."""
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
    """One layer, seen by an observer: the operations of the table above."""

    def __init__(self, staged: StagedLayer, config: ModelConfig) -> None:
        self._staged, self._config = staged, config
        self._prefix = f"model.layers.{staged.index}."
        state = {self._prefix + name: tensor for name, tensor in staged.module.state_dict().items()}
        self._weights = Weights({name.removesuffix(".weight"): tensor for name, tensor in state.items()})
        self._biased = {name for name in state if name.endswith(".bias")}

    def __call__(self, see: Observer, x: Tensor) -> Tensor:
        """[1, S, hidden] -> [1, S, hidden]."""
        attended = self._attention(see, x)
        mixed = self._norm(see, "post_attention_layernorm", self._linear(see, "self_attn.o_proj", attended))
        h = self._see(see, "attention_residual", x + mixed)
        gate, up = self._linear(see, "mlp.gate_proj", h), self._linear(see, "mlp.up_proj", h)
        product = self._see(see, "mlp.product", self._see(see, "mlp.act_fn", F.silu(gate)) * up)
        down = self._norm(see, "post_feedforward_layernorm", self._linear(see, "mlp.down_proj", product))
        return self._see(see, "mlp_residual", h + down)

    def _attention(self, see: Observer, x: Tensor) -> Tensor:
        q, k, v = (self._linear(see, f"self_attn.{n}_proj", x) for n in "qkv")
        q, k = self._norm(see, "self_attn.q_norm", q), self._norm(see, "self_attn.k_norm", k)
        split = self._staged.module.self_attn.split_heads
        q = self._see(see, "self_attn.q_rotary", self._staged.rotate(split(q)))
        k = self._see(see, "self_attn.k_rotary", self._staged.rotate(split(k)))
        groups = self._config.num_attention_heads // self._config.num_key_value_heads
        k, v = (t.repeat_interleave(groups, dim=1) for t in (k, split(v)))  # (B, kv_heads, S, D) -> (B, heads, S, D)
        visible = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        scores = (q @ k.transpose(2, 3) * self._config.head_dim**-0.5).masked_fill(~visible, 0)  # (B, heads, S, S)
        scores = self._see(see, f"self_attn{SCORES}", scores).masked_fill(~visible, -torch.inf)
        mixed = scores.softmax(-1) @ v
        return self._see(see, "self_attn.attention", mixed.transpose(1, 2).flatten(2))

    def _see(self, see: Observer, name: str, x: Tensor) -> Tensor:
        return see.value(self._prefix + name, x)

    def _linear(self, see: Observer, name: str, x: Tensor) -> Tensor:
        full = self._prefix + name
        bias = see.weight(f"{full}.bias", self._weights) if f"{full}.bias" in self._biased else None
        return see.value(full, F.linear(x, see.weight(full, self._weights), bias))

    def _norm(self, see: Observer, name: str, x: Tensor) -> Tensor:
        weight = see.weight(self._prefix + name, self._weights)
        return self._see(see, name, F.rms_norm(x, weight.shape, weight, self._config.rms_norm_eps))


class _Head:
    """The last norm and lm_head, a part of the vocabulary at a time."""

    def __init__(self, checkpoint: WeightSource, config: ModelConfig) -> None:
        self._eps = config.rms_norm_eps
        self._norm = Weights({FINAL_NORM: checkpoint.tensor("model.norm.weight").float()})
        self._stored = stored_weight(checkpoint, config, HEAD)

    @cached_property
    def _parts(self) -> list[tuple[int, Tensor]]:
        return [(i * _HEAD_ROWS, part) for i, part in enumerate(torch.split(self._stored, _HEAD_ROWS))]

    def __call__(self, see: Observer, x: Tensor, rows: int) -> Tensor | None:
        """Return the logits of the last rows, [rows, V]; of none where `rows` is 0."""
        weight = see.weight(FINAL_NORM, self._norm)
        normed = see.value(FINAL_NORM, F.rms_norm(x, weight.shape, weight, self._eps))
        normed = normed[:, -rows:] if rows else normed
        kept: list[Tensor] = []
        for start, part in self._parts:
            head = see.weight(LOGITS, Weights({LOGITS: part.float()}))
            logits = see.value(LOGITS, F.linear(normed, head), start)
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

        through(_Embedding())
        for staged in staged_layers(checkpoint, config):
            through(_Layer(staged, config))
        head = _Head(checkpoint, config)
        for number, (walk, states) in enumerate(zip(walks, hidden, strict=True)):
            for index, x in enumerate(states):
                walk.observer.sequence = index
                logits = head(walk.observer, x, walk.logit_rows)
                bar.update()
                yield number, index, None if logits is None else logits.numpy()


class _Embedding:
    """The rows that were looked up."""

    def __call__(self, see: Observer, x: Tensor) -> Tensor:
        return see.value(EMBED, see.weight(EMBED, Weights({EMBED: x})))


def largest_weights(checkpoint: WeightSource, config: ModelConfig) -> dict[str, float]:
    """Return max |w| of the embedding and of the head; a walk sees those of the layers."""
    found: dict[str, float] = {}
    for name, tensor in ((EMBED, EMBEDDING), (LOGITS, HEAD)):
        weight = stored_weight(checkpoint, config, tensor)
        found[name] = max(float(part.float().abs().max()) for part in torch.split(weight, _HEAD_ROWS))
    return found
