"""OLMo 1, 2 and 3 for export: plain torch, in the checkpoint's tensor names, with the KV cache as inputs and outputs.

OLMo 2 and 3, as in "2 OLMo 2 Furious" (arXiv:2501.00656), normalise after attention and after the MLP, and the
full-width q and k before the heads are split:

    h = x + RMSNorm(Attention(x))
    y = h + RMSNorm(MLP(h))

OLMo 1, as in "OLMo: Accelerating the Science of Language Models" (arXiv:2402.00838), normalises before both, by a
LayerNorm without weight and bias, and clips q, k and v where its config says so:

    h = x + Attention(LayerNorm(x))
    y = h + MLP(LayerNorm(h))

In some layers of Olmo 3 a token sees itself and the sliding_window - 1 tokens before it, and these may have another
RoPE than the others.

RMSNormalization, LayerNormalization, RotaryEmbedding and Attention are written so that the exporter emits the standard
ONNX operators of opset 23. Instantiate under `torch.device("meta")` to trace without any weight in memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olmo2_export.architecture import head
from olmo2_export.config import ModelConfig
from olmo2_export.model.rotary import table_names

KeyValue = tuple[Tensor, Tensor]
"""the key and value of one layer, each [batch, kv_heads, length, head_dim]"""
UNIT = "unit"
"""the last part of the name of a LayerNorm's scale, which is all ones, as ONNX wants one"""


class Places(NamedTuple):
    """Where tokens are, and what they see, for one kind of layer."""

    position_ids: Tensor
    """int64 [B, S]"""
    cos: Tensor
    sin: Tensor
    """float32 [max_position_embeddings, head_dim / 2]"""
    mask: Tensor
    """bool [B, 1, S, P + S]"""


class RMSNorm(nn.Module):
    """RMSNorm whose weight is multiplied in float32, before the cast back down (Llama casts first)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class LayerNorm(nn.Module):
    """LayerNorm in float32, without weight and bias; the scale of ones is no parameter and in no checkpoint."""

    unit: Tensor

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.register_buffer(UNIT, torch.ones(size), persistent=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.unit.shape, self.unit, None, self.eps).to(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention with rotate-half RoPE; q and k are normalised in full width, or clipped."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=bias)
        self.clip = config.clip_qkv
        self.normed = not config.norms_first
        if self.normed:
            self.q_norm = RMSNorm(q_size, config.norm_eps)
            self.k_norm = RMSNorm(kv_size, config.norm_eps)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)  # (B, S, H*D) -> (B, H, S, D)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.clip is not None:
            q, k, v = (y.clamp(-self.clip, self.clip) for y in (q, k, v))
        return (self.q_norm(q), self.k_norm(k), v) if self.normed else (q, k, v)

    def forward(self, x: Tensor, at: Places, past: KeyValue) -> tuple[Tensor, KeyValue]:
        q, k, v = map(self.split_heads, self.project(x))
        q = torch.onnx.ops.rotary_embedding(q, at.cos, at.sin, at.position_ids)
        k = torch.onnx.ops.rotary_embedding(k, at.cos, at.sin, at.position_ids)
        y, key, value, _ = torch.onnx.ops.attention(q, k, v, at.mask, *past, scale=self.head_dim**-0.5)
        return self.o_proj(y.transpose(1, 2).flatten(2)), (key, value)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return down


class DecoderLayer(nn.Module):
    """One layer; see the equations at the top."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.norms_first = config.norms_first
        if self.norms_first:
            self.input_layernorm = LayerNorm(config.hidden_size, config.norm_eps)
            self.post_attention_layernorm: nn.Module = LayerNorm(config.hidden_size, config.norm_eps)
        else:
            self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
            self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, x: Tensor, at: Places, past: KeyValue) -> tuple[Tensor, KeyValue]:
        if self.norms_first:
            attended, present = self.self_attn(self.input_layernorm(x), at, past)
            h = x + attended
            return h + self.mlp(self.post_attention_layernorm(h)), present
        attended, present = self.self_attn(x, at, past)
        h = x + self.post_attention_layernorm(attended)
        return h + self.post_feedforward_layernorm(self.mlp(h)), present


class Decoder(nn.Module):
    """Everything under the checkpoint's `model.` prefix."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        norm = LayerNorm if config.norms_first else RMSNorm
        self.norm = norm(config.hidden_size, config.norm_eps)


class OlmoForCausalLM(nn.Module):
    """An OLMo with an explicit KV cache; a classifier gives a score for each label in the place of logits.

    The rotary tables are buffers; `lm_head.weight` is always a tensor of its own, also where the checkpoint ties it to
    the embedding, because the graph wants the two in different layouts.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self._head, size = head(config)
        self.add_module(self._head, nn.Linear(config.hidden_size, size, bias=False))
        table = (config.max_position_embeddings, config.head_dim // 2)
        for names in table_names(config).values():
            for name in names:
                self.register_buffer(name, torch.empty(table), persistent=False)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_values: list[KeyValue],
        num_logits_to_keep: int,
    ) -> tuple[Tensor, list[KeyValue]]:
        """Run S tokens per row after a past of P.

        Args:
            input_ids: int64 [B, S].
            attention_mask: int64 [B, P + S]; 0 hides a position of the cache (padding) from every query.
            position_ids: int64 [B, S], each below max_position_embeddings.
            past_key_values: per layer the key and value, each [B, kv_heads, P, head_dim].
            num_logits_to_keep: the last rows that get logits; 0 means all.

        Returns:
            logits [B, num_logits, V], and the present keys and values, each [B, kv_heads, P + S, head_dim].
        """
        places = self._places(input_ids, attention_mask, position_ids)
        x = self.model.embed_tokens(input_ids)
        present: list[KeyValue] = []
        for index, (layer, past) in enumerate(zip(self.model.layers, past_key_values, strict=True)):
            x, key_value = layer(x, places[self.config.rope_of(index), self.config.window(index)], past)
            present.append(key_value)
        x = x[:, -num_logits_to_keep:]
        return self.get_submodule(self._head)(self.model.norm(x)), present

    def _places(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor
    ) -> dict[tuple[str, int | None], Places]:
        """Return what each kind of layer needs, by its RoPE and its window."""
        cached = torch.arange(attention_mask.shape[1], device=input_ids.device)
        first = attention_mask.shape[1] - input_ids.shape[1]
        causal = cached[None, :] <= cached[first:][:, None]  # (S, P + S)
        whole = causal[None, None] & attention_mask[:, None, None, :].bool()  # (B, 1, S, P + S)
        layers = range(self.config.num_hidden_layers)
        masks: dict[int | None, Tensor] = {None: whole}
        for window in dict.fromkeys(map(self.config.window, layers)):
            if window is not None:
                counts = attention_mask.cumsum(1)  # tokens of the row up to each position: padding is in no window
                recent = counts[:, None, :] > counts[:, first:][:, :, None] - window  # (B, S, P + S)
                masks[window] = whole & recent[:, None]
        kinds = dict.fromkeys((self.config.rope_of(i), self.config.window(i)) for i in layers)
        tables = table_names(self.config)
        found: dict[tuple[str, int | None], Places] = {}
        for rope, window in kinds:
            cos, sin = (self.get_buffer(name) for name in tables[rope])
            found[rope, window] = Places(position_ids, cos, sin, masks[window])
        return found
