"""The model -> token sequences that it wrote itself: text for a recipe, where there is no calibration file.

Sampled at temperature 1 from the float32 model, so that tokens have the model's own distribution. Each sequence begins
with bos, or with eos where there is none; one that ends goes on with the next text, as in training.

Source: Liu et al., "LLM-QAT: Data-Free Quantization Aware Training for Large Language Models", arXiv:2305.17888.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from olmo2_export.architecture import Operation
from olmo2_export.config import ModelConfig, token_ids
from olmo2_export.model.rotary import table_names
from olmo2_export.quantize.walk import Head, WalkedLayer, embed, walked_layers
from olmo2_export.weights.source import WeightSource
from runtimes.errors import NumericError, UsageError

_CACHE_BYTES = 1 << 31  # of keys and values at a time: more sequences at once read the weights less often


def check_writes(config: ModelConfig) -> None:
    """Refuse a model that writes no text.

    Raises:
        UsageError: a classifier.
    """
    if config.labels:
        raise UsageError("recipe distill: a classifier writes no text to learn from; take search or gptq")


@torch.no_grad()
def self_text(
    checkpoint: WeightSource, config: ModelConfig, *, sequences: int, length: int, seed: int = 0
) -> list[np.ndarray]:
    """Sample sequences; equal at every call on one machine with one number of threads.

    In memory are one layer, the head as it is stored, and keys and values of as many sequences as fit into 2 GiB.

    Args:
        checkpoint: the weights, and config.json with its token ids.
        config: the shape.
        sequences: how many.
        length: tokens of each, at most; never more than the context.
        seed: of the draws.

    Returns:
        int64 [length] each.

    Raises:
        UsageError: see `check_writes`.
        NumericError: logits that are not finite.
    """
    check_writes(config)
    length = min(length, config.max_position_embeddings)
    per_sequence = 8 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * length
    at_once = max(1, min(sequences, _CACHE_BYTES // per_sequence))
    generator = torch.Generator().manual_seed(seed)
    groups = [min(at_once, sequences - start) for start in range(0, sequences, at_once)]
    found: list[np.ndarray] = []
    head = Head(checkpoint, config)
    with tqdm(total=len(groups) * (length - 1), desc="writing text", unit="step", leave=False) as bar:
        for count in groups:
            ids = _first(checkpoint, config, count, generator)
            caches = [_Cache(config, count, length) for _ in range(config.num_hidden_layers)]
            for _ in range(length - 1):
                following = _next(checkpoint, config, ids[:, -1], caches, head, generator)
                ids = torch.cat([ids, following[:, None]], dim=1)
                bar.update()
            found += list(ids.numpy())
    return found


def _first(checkpoint: WeightSource, config: ModelConfig, count: int, generator: torch.Generator) -> Tensor:
    """int64 [count, 1]"""
    raw = json.loads((checkpoint.folder / "config.json").read_text(encoding="utf-8"))
    known = [*token_ids(raw, "bos_token_id"), *token_ids(raw, "eos_token_id")]
    if not known:
        return torch.randint(config.vocab_size, (count, 1), generator=generator)
    return torch.full((count, 1), known[0])


def _next(
    checkpoint: WeightSource,
    config: ModelConfig,
    last: Tensor,
    caches: Sequence[_Cache],
    head: Head,
    generator: torch.Generator,
) -> Tensor:
    """Draw one token more for each sequence: int64 [B] -> int64 [B]."""
    (x,) = embed(checkpoint, [last.numpy()])
    x = x.transpose(0, 1)  # (B, 1, hidden)
    for layer, cache in zip(walked_layers(checkpoint, config), caches, strict=True):
        x = cache.run(layer, x)
    logits = head.logits(x)[:, 0]
    if not bool(torch.isfinite(logits).all()):
        raise NumericError("logits of the model's own text are NaN or Inf; it has no text to learn from")
    # Gumbel: the largest of logit - log(exponential) is a draw from the softmax.
    noise = torch.empty_like(logits).exponential_(generator=generator).clamp_(min=1e-30)
    return (logits - noise.log_()).argmax(dim=-1)


class _Cache:
    """Keys and values of one layer, float32 [B, kv_heads, length, head_dim]."""

    def __init__(self, config: ModelConfig, count: int, length: int) -> None:
        shape = (count, config.num_key_value_heads, length, config.head_dim)
        self._key, self._value = torch.empty(shape), torch.empty(shape)
        self._config = config
        self.used = 0

    def run(self, layer: WalkedLayer, x: Tensor) -> Tensor:
        """Run a layer on the next token of each sequence: [B, 1, hidden] -> [B, 1, hidden]."""
        arithmetic, names = layer.arithmetic, table_names(self._config)

        def compute(row: Operation, inputs: Sequence[Tensor]) -> Tensor:
            if row.kind == "rotary":
                cos, sin = (arithmetic.tables[name][self.used] for name in names[row.rope])
                left, right = arithmetic.heads(inputs[0]).chunk(2, dim=-1)
                return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)
            if row.kind == "attention":
                query, key, value = map(arithmetic.heads, inputs)
                self._key[:, :, self.used], self._value[:, :, self.used] = key[:, :, 0], value[:, :, 0]
                stop = self.used + 1
                start = 0 if row.window is None else max(0, stop - row.window)
                seen = (self._key[:, :, start:stop], self._value[:, :, start:stop])
                return arithmetic.joined(F.scaled_dot_product_attention(query, *seen, enable_gqa=True))
            return layer.compute(row, inputs)

        result = layer.run(x, [layer.writes], compute=compute)[layer.writes]
        self.used += 1
        return result
