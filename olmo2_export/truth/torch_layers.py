"""transformers' own OLMo, a layer at a time: each operation by itself, the layer as it runs it, and all of them.

The modules, the rotary embedding and the order of operations are those of transformers' decoder layers, so that a bug
in this project's model is not one here too. One layer's weights are in memory, in one dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.olmo2.modeling_olmo2 import apply_rotary_pos_emb, repeat_kv

from olmo2_export.architecture import head
from olmo2_export.config import ModelConfig
from olmo2_export.dtypes import float_dtype
from olmo2_export.truth.classes import CLASSES
from olmo2_export.truth.reference import Rounding, reference_config, use_float64_norms
from olmo2_export.weights.checkpoint import Checkpoint
from olmo2_export.weights.stored_names import EMBEDDING, head_weight, stored_head, stored_weight

Weights = Callable[[str], Tensor]
"""a weight by the checkpoint's name, in the checkpoint's layout"""
_ROWS = 1 << 13  # of the vocabulary at a time
_NORM = "model.norm.weight"


@dataclass(frozen=True)
class StoredTables:
    """Embedding and head of a checkpoint, read in parts: neither is in memory as a whole."""

    checkpoint: Checkpoint
    stored_head: str
    """the name of the head's weight: the embedding's where they are one"""

    def embedding(self, ids: Tensor) -> Tensor:
        """Return the rows of tokens: int64 [S] -> [S, hidden], as they are stored."""
        return self.checkpoint.picked(EMBEDDING, ids)

    def head(self) -> Iterator[Tensor]:
        """Yield the rows of the head, [n, hidden], as they are stored; a part is overwritten by the next."""
        return self.checkpoint.rows(self.stored_head)


class TorchModel:
    """Makes layers and the head of one model, in one dtype."""

    def __init__(
        self,
        folder: Path,
        weights: Weights,
        precision: str,
        rounding: Mapping[str, Rounding] | None = None,
        tables: torch.dtype = torch.float32,
        stored: StoredTables | None = None,
    ) -> None:
        """See `views.View`; `tables` is the dtype that a graph's rotary tables have.

        `stored` reads embedding and head in parts; without it they come whole from `weights`.
        """
        self.config: Any = reference_config(folder)
        self.classes = CLASSES[self.config.model_type]
        self.config._attn_implementation = "sdpa"
        self.norm_eps: float | None = None if self.config.model_type == "olmo" else self.config.rms_norm_eps
        """of RMS norms; None: the model has layer norms"""
        self.dtype = float_dtype(precision).torch
        self.rounding = dict(rounding or {})
        self.weights = weights
        own = ModelConfig.from_json(folder / "config.json")
        self._head, self._answers = head_weight(own), head(own)[1]
        self.tables = tables
        self.stored = stored

    def embed(self, ids: Tensor) -> Tensor:
        """Look tokens up: int64 [S] -> [1, S, hidden]."""
        rows = self.weights(EMBEDDING)[ids] if self.stored is None else self.stored.embedding(ids)
        return rows.to(self.dtype)[None]

    def layer(self, index: int) -> TorchLayer:
        """Read one layer."""
        return TorchLayer(self, index)

    def norm(self, x: Tensor, eps: float | None = None) -> Tensor:
        """Apply the last norm."""
        config = copy(self.config)
        if eps is not None:
            config.rms_norm_eps = eps
        holder = nn.ModuleDict({"norm": self.classes.norm(config)})
        if "weight" in holder["norm"].state_dict():
            holder["norm"].weight = _parameter(self.weights(_NORM), self.dtype)
        if self.dtype == torch.float64:
            use_float64_norms(holder)
        normed: Tensor = holder["norm"](x.to(self.dtype))
        return normed

    def head(self, x: Tensor) -> Tensor:
        """Return logits, or a classifier's scores: [..., hidden] -> [..., V]."""
        rounding = self.rounding.get(self._head)
        x = x.to(self.dtype) if rounding is None else rounding(x.to(self.dtype))
        parts = torch.split(self.weights(self._head), _ROWS) if self.stored is None else self.stored.head()
        logits = x.new_empty(*x.shape[:-1], self._answers)
        end = 0
        for part in parts:
            start, end = end, end + len(part)
            logits[..., start:end] = F.linear(x, part.to(self.dtype))
        return logits


class TorchLayer:
    """One decoder layer. Arguments of any float dtype are cast to the model's; batch size 1."""

    def __init__(self, model: TorchModel, index: int) -> None:
        config = model.config
        self.dtype, self._rounding = model.dtype, model.rounding
        self._prefix = f"model.layers.{index}."
        with torch.device("meta"):
            self.module = model.classes.layer(config, index)
        for name in self.module.state_dict():
            owner, _, attribute = name.rpartition(".")
            weight = _parameter(model.weights(self._prefix + name), self.dtype)
            setattr(self.module.get_submodule(owner), attribute, weight)
        if self.dtype == torch.float64:
            use_float64_norms(self.module)
        self.module.eval()
        for name in self._rounding:
            if name.startswith(self._prefix):
                linear = self.module.get_submodule(name.removeprefix(self._prefix).removesuffix(".weight"))
                linear.register_forward_pre_hook(self._rounded(self._rounding[name]))
        self._rotary, self._tables = model.classes.rotary(config, index), model.tables
        self.heads = config.num_attention_heads
        self.kv_heads: int = config.num_key_value_heads or self.heads
        attention: Any = self.module.self_attn
        self._activation: Callable[[Tensor], Tensor] = self.module.get_submodule("mlp.act_fn")
        self.head_dim: int = attention.head_dim
        self.scale: float = attention.scaling
        rope = config.rope_parameters  # transformers has filled it in
        by_kind = config.model_type == "olmo3"
        kinds = dict(zip(config.layer_types, range(len(config.layer_types)), strict=True)) if by_kind else {}
        self.kind: str | None = config.layer_types[index] if by_kind else None
        """the type of its attention, where the model has several"""
        self.other_kinds = {kind: model.classes.rotary(config, i) for kind, i in kinds.items() if kind != self.kind}
        """the rotary embeddings of the other types"""
        self.limit = float(getattr(config, "clip_qkv", None) or 0.0)
        """of the clip of queries, keys and values, where the model has one"""
        self.theta = float((rope[self.kind] if by_kind else rope)["rope_theta"])
        self.eps = model.norm_eps or 0.0
        """of RMS norms"""
        self.window: int | None = getattr(attention, "sliding_window", None)
        """tokens that each sees, itself among them; None: all up to itself"""

    @staticmethod
    def _rounded(rounding: Rounding) -> Callable[[nn.Module, tuple[Tensor]], tuple[Tensor]]:
        def hook(_: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
            x = arguments[0]
            return (rounding(x if x.dtype == torch.float64 else x.float()).to(x.dtype),)

        return hook

    def __call__(self, x: Tensor) -> Tensor:
        """Run the layer as transformers does, on a whole sequence: [1, S, hidden] -> the same."""
        positions = torch.arange(x.shape[1])[None]
        x = x.to(self.dtype)
        mask = None
        if self.window is not None and self.window < x.shape[1]:
            seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril().triu(1 - self.window)
            mask = seen[None, None]
        y: Tensor = self.module(x, attention_mask=mask, position_embeddings=self._cos_sin(x, positions))
        return y

    def _cos_sin(self, x: Tensor, positions: Tensor, kind: str | None = None) -> tuple[Tensor, Tensor]:
        rotary = self._rotary if kind is None else self.other_kinds[kind]
        cos, sin = (table.to(self._tables).float() for table in rotary(x, positions))
        return cos, sin

    def weight(self, linear: str) -> Tensor:
        """Return a linear's weight, [N, K]."""
        return self.module.get_parameter(f"{linear}.weight")

    def linear(self, name: str, x: Tensor) -> Tensor:
        """Apply a linear with its bias; its input is rounded where the variant rounds it."""
        y: Tensor = self.module.get_submodule(name)(x.to(self.dtype))
        return y

    def norm(self, name: str, x: Tensor, eps: float | None = None) -> Tensor:
        """Apply a norm, or the same with another epsilon."""
        module = self.module.get_submodule(name)
        if eps is not None:
            wide, weight = x.double(), module.get_parameter("weight").double()
            return weight * wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        y: Tensor = module(x.to(self.dtype))
        return y

    def split(self, x: Tensor) -> Tensor:
        """[1, S, heads * head_dim] -> [1, heads, S, head_dim]."""
        return x.to(self.dtype).view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)

    def clip(self, x: Tensor) -> Tensor:
        """Clip queries, keys or values."""
        return x.to(self.dtype).clamp(-self.limit, self.limit)

    def rotate(self, x: Tensor, *, theta: float | None = None, shift: int = 0, kind: str | None = None) -> Tensor:
        """Rotate heads, [1, heads, S, head_dim], that stand at positions 0, 1, ... + shift; `kind`: as other layers."""
        positions = torch.arange(x.shape[2])[None] + shift
        cos, sin = self._cos_sin(x, positions, kind)
        if theta is not None:
            inverse = theta ** -(torch.arange(0, self.head_dim, 2).double() / self.head_dim)
            angles = (positions[..., None] * inverse).repeat(1, 1, 2)
            cos, sin = angles.cos(), angles.sin()
        rotated: Tensor = apply_rotary_pos_emb(x.to(self.dtype), x.to(self.dtype), cos, sin)[0]
        return rotated

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        visible: Tensor,
        scale: float = 1.0,
        *,
        kv_heads: Sequence[int] | None = None,
    ) -> Tensor:
        """Return o_proj's input, [1, S, heads * head_dim].

        Args:
            query: rotated, [1, heads, S, head_dim].
            key: rotated, [1, kv_heads, C, head_dim].
            value: the same shape.
            visible: bool [S, C].
            scale: in units of the right one.
            kv_heads: the KV head that each query head reads; None: the right ones.
        """
        groups = self.heads // self.kv_heads
        query, key, value = (t.to(self.dtype) for t in (query, key, value))
        keys, values = (repeat_kv(t, groups) if kv_heads is None else t[:, list(kv_heads)] for t in (key, value))
        mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=visible, scale=scale * self.scale)
        return mixed.transpose(1, 2).flatten(2)

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return down_proj's input."""
        y: Tensor = self._activation(gate.to(self.dtype)) * up.to(self.dtype)
        return y


def open_layers(checkpoint: Checkpoint, config: ModelConfig) -> TorchModel:
    """Return transformers' float32 model of a checkpoint, whose layers are read when they are asked for."""
    weights, stored = partial(stored_weight, checkpoint, config), StoredTables(checkpoint, stored_head(config))
    return TorchModel(checkpoint.folder, weights, "fp32", stored=stored)


@torch.inference_mode()
def reference_logits(
    checkpoint: Checkpoint, config: ModelConfig, sequences: Sequence[np.ndarray]
) -> Iterator[np.ndarray]:
    """Run each sequence alone through transformers in float32, with one layer in memory at a time.

    The logits are those of transformers' whole model, bit for bit.

    Args:
        checkpoint: the weights.
        config: their shape.
        sequences: int64 [S] each.

    Yields:
        Per sequence the logits of all positions, float32 [S, V]; one at a time, for they are large.
    """
    model = open_layers(checkpoint, config)
    hidden = [model.embed(torch.from_numpy(ids)) for ids in sequences]
    for index in range(config.num_hidden_layers):
        layer = model.layer(index)
        hidden = [layer(x) for x in hidden]
        del layer
    for x in hidden:
        yield model.head(model.norm(x))[0].numpy()


def rotary_tables(folder: Path, layer: int, positions: int) -> tuple[Tensor, Tensor]:
    """Return transformers' cos and sin of a layer's first positions, float32 [positions, head_dim / 2] both."""
    config: Any = reference_config(folder)
    rotary = CLASSES[config.model_type].rotary(config, layer)
    cos, sin = rotary(torch.zeros(1), torch.arange(positions)[None])
    half = cos.shape[-1] // 2
    return cos[0, :, :half], sin[0, :, :half]


def _parameter(weight: Tensor, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(weight.to(dtype), requires_grad=False)
