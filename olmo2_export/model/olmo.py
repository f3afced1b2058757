"""OLMo 2 for export: plain torch, in the checkpoint's tensor names, with the KV cache as inputs and outputs.

A layer, as in "2 OLMo 2 Furious" (arXiv:2501.00656), normalises after attention and after the MLP, and normalises the
full-width q and k before the heads are split:

    h = x + RMSNorm(Attention(x))
    y = h + RMSNorm(MLP(h))

RMSNormalization, RotaryEmbedding and Attention are written so that the exporter emits the standard ONNX operators of
opset 23. Instantiate under `torch.device("meta")` to trace without any weight in memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olmo2_export.config import ModelConfig

KeyValue = tuple[Tensor, Tensor]
"""the key and value of one layer, each [batch, kv_heads, length, head_dim]"""


def rotary_tables(config: ModelConfig) -> KeyValue:
    """Return cos and sin, each float32 [max_position_embeddings, head_dim / 2].

    The angles are rounded to float32 before cos and sin, as in the code the models were trained with: a more exact
    table would be further from them, by up to 1e-4 at position 4096.

    Source: transformers, Olmo2RotaryEmbedding.
    """
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    inv_freq = 1.0 / (config.rope_theta**exponent)
    positions = torch.arange(config.max_position_embeddings, dtype=torch.float32)
    angles = positions[:, None] * inv_freq
    return angles.cos(), angles.sin()


class RMSNorm(nn.Module):
    """RMSNorm whose weight is multiplied in float32, before the cast back down (Llama casts first)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention with full-width QK-norm and rotate-half RoPE."""

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
        self.q_norm = RMSNorm(q_size, config.rms_norm_eps)
        self.k_norm = RMSNorm(kv_size, config.rms_norm_eps)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)  # (B, S, H*D) -> (B, H, S, D)

    def forward(
        self, x: Tensor, position_ids: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, past: KeyValue
    ) -> tuple[Tensor, KeyValue]:
        q = self.split_heads(self.q_norm(self.q_proj(x)))
        k = self.split_heads(self.k_norm(self.k_proj(x)))
        v = self.split_heads(self.v_proj(x))
        q = torch.onnx.ops.rotary_embedding(q, cos, sin, position_ids)
        k = torch.onnx.ops.rotary_embedding(k, cos, sin, position_ids)
        y, key, value, _ = torch.onnx.ops.attention(q, k, v, mask, *past, scale=self.head_dim**-0.5)
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
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, position_ids: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, past: KeyValue
    ) -> tuple[Tensor, KeyValue]:
        attended, present = self.self_attn(x, position_ids, cos, sin, mask, past)
        h = x + self.post_attention_layernorm(attended)
        return h + self.post_feedforward_layernorm(self.mlp(h)), present


class Decoder(nn.Module):
    """Everything under the checkpoint's `model.` prefix."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Olmo2ForCausalLM(nn.Module):
    """OLMo 2 with an explicit KV cache.

    The two rotary tables are buffers; `lm_head.weight` is always a tensor of its own, also where the checkpoint ties
    it to the embedding, because the graph wants the two in different layouts.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        table = (config.max_position_embeddings, config.head_dim // 2)
        self.register_buffer("rotary_cos", torch.empty(table), persistent=False)
        self.register_buffer("rotary_sin", torch.empty(table), persistent=False)

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
            attention_mask: int64 [B, P + S]; 0 hides a slot of the cache (padding) from every query.
            position_ids: int64 [B, S], each below max_position_embeddings.
            past_key_values: per layer the key and value, each [B, kv_heads, P, head_dim].
            num_logits_to_keep: the last rows that get logits; 0 means all.

        Returns:
            logits [B, num_logits, V], and the present keys and values, each [B, kv_heads, P + S, head_dim].
        """
        slots = torch.arange(attention_mask.shape[1], device=input_ids.device)
        own_slots = slots[attention_mask.shape[1] - input_ids.shape[1] :]
        causal = slots[None, :] <= own_slots[:, None]  # (S, P + S)
        mask = causal[None, None] & attention_mask[:, None, None, :].bool()  # (B, 1, S, P + S)
        x = self.model.embed_tokens(input_ids)
        present: list[KeyValue] = []
        for layer, past in zip(self.model.layers, past_key_values, strict=True):
            x, key_value = layer(x, position_ids, self.rotary_cos, self.rotary_sin, mask, past)
            present.append(key_value)
        x = x[:, -num_logits_to_keep:]
        return self.lm_head(self.model.norm(x)), present
