"""Run a checkpoint layer by layer, with the float32 weights of one layer in memory at a time.

    hidden = embed(...)
    for layer in staged_layers(...):            # reads a layer, drops it before the next
        hidden = [layer(x) for x in hidden]
    logits = Head(...).logits(hidden[0])

A layer's forward is cut where the linears' inputs are, so that whoever quantises it can look at each input and replace
each weight in between. Weights and norms are those of `model.DecoderLayer`; only the attention is computed by another
operator, as the ONNX one is slow outside a graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olmo2_export.config import ModelConfig
from olmo2_export.model.olmo import DecoderLayer, RMSNorm, rotary_tables
from olmo2_export.weights.source import WeightSource
from olmo2_export.weights.stored_names import EMBEDDING, HEAD, stored_weight

_HEAD_ROWS = 1 << 13  # of the vocabulary at a time


class StagedLayer:
    """One layer in float32, its forward in four stages."""

    def __init__(
        self, checkpoint: WeightSource, config: ModelConfig, index: int, rotary: tuple[Tensor, Tensor]
    ) -> None:
        with torch.device("meta"):
            self.module = DecoderLayer(config)
        prefix = f"model.layers.{index}."
        state = {name: checkpoint.tensor(prefix + name).float() for name in self.module.state_dict()}
        self.module.load_state_dict(state, assign=True)
        self.module.requires_grad_(False)
        self.index = index
        self._groups = config.num_attention_heads // config.num_key_value_heads
        self._cos, self._sin = rotary

    def weight(self, linear: str) -> Tensor:
        """Return a linear's weight, float32 [N, K]; `linear` as in names.GROUPS."""
        return self.module.get_parameter(f"{linear}.weight").data

    def replace(self, linear: str, weight: Tensor) -> None:
        """Compute with another weight from now on, float32 [N, K]."""
        self.module.get_submodule(linear).weight = nn.Parameter(weight, requires_grad=False)

    def attended(self, x: Tensor) -> Tensor:
        """Return o_proj's input; `x`, [B, S, hidden], is that of q, k and v."""
        attention = self.module.self_attn
        q = self.rotate(attention.split_heads(attention.q_norm(attention.q_proj(x))))
        k = self.rotate(attention.split_heads(attention.k_norm(attention.k_proj(x))))
        v = attention.split_heads(attention.v_proj(x))
        k, v = (t.repeat_interleave(self._groups, dim=1) for t in (k, v))  # (B, kv_heads, S, D) -> (B, heads, S, D)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return mixed.transpose(1, 2).flatten(2)

    def after_attention(self, x: Tensor, attended: Tensor) -> Tensor:
        """Return the input of gate and up."""
        h: Tensor = x + self.module.post_attention_layernorm(self.module.self_attn.o_proj(attended))
        return h

    def gated(self, h: Tensor) -> Tensor:
        """Return down_proj's input."""
        gated: Tensor = F.silu(self.module.mlp.gate_proj(h)) * self.module.mlp.up_proj(h)
        return gated

    def after_mlp(self, h: Tensor, gated: Tensor) -> Tensor:
        """Return the layer's output."""
        y: Tensor = h + self.module.post_feedforward_layernorm(self.module.mlp.down_proj(gated))
        return y

    def __call__(self, x: Tensor) -> Tensor:
        """Run all four stages: [B, S, hidden] -> [B, S, hidden]."""
        h = self.after_attention(x, self.attended(x))
        return self.after_mlp(h, self.gated(h))

    def rotate(self, x: Tensor) -> Tensor:
        """Apply the rotary embedding, [B, heads, S, head_dim], from position 0 on."""
        cos, sin = self._cos[: x.shape[2]], self._sin[: x.shape[2]]
        left, right = x.chunk(2, dim=-1)
        return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


class Head:
    """The last norm and lm_head, a part of the vocabulary in float32 at a time."""

    def __init__(self, checkpoint: WeightSource, config: ModelConfig) -> None:
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.norm.weight.data = checkpoint.tensor("model.norm.weight").float()
        self.norm.requires_grad_(False)
        self.weight = stored_weight(checkpoint, config, HEAD)

    def logits(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return logits: [..., hidden] -> float32 [..., V]; `weight` replaces lm_head's, [V, hidden]."""
        normed = self.norm(x)
        rows = torch.split(self.weight if weight is None else weight, _HEAD_ROWS)
        return torch.cat([normed @ part.float().T for part in rows], dim=-1)


def embed(checkpoint: WeightSource, sequences: Sequence[np.ndarray]) -> list[Tensor]:
    """Look tokens up: int64 [S] each -> float32 [1, S, hidden] each."""
    table = checkpoint.tensor(EMBEDDING)  # mapped: only the rows looked up are read
    return [table[torch.from_numpy(ids)].float()[None] for ids in sequences]


def staged_layers(checkpoint: WeightSource, config: ModelConfig) -> Iterator[StagedLayer]:
    """Read one layer after the other; drop each before asking for the next."""
    rotary = rotary_tables(config)
    for index in range(config.num_hidden_layers):
        yield StagedLayer(checkpoint, config, index, rotary)
