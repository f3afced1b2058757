"""Write checkpoints whose weights can expose bugs.

The library's default initialisation cannot: its norm weights are all ones, so a graph that ignores `q_norm` is
bit-identical to a correct one. Here every norm weight is drawn from U(0.25, 1.75), every bias from N(0, 0.1) and every
matrix from N(0, 1/fan_in). All sizes differ, so that swapped axes cannot pass.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Olmo2Config,
    Olmo2ForCausalLM,
    Olmo2ForSequenceClassification,
    Olmo3Config,
    Olmo3ForCausalLM,
    Olmo3ForSequenceClassification,
    OlmoConfig,
    OlmoForCausalLM,
    OlmoForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

SHAPE: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "bos_token_id": 130,
    "eos_token_id": 130,
    "pad_token_id": 129,
}

_FAMILY: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    "olmo": (OlmoConfig, OlmoForCausalLM),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM),
    "olmo3": (Olmo3Config, Olmo3ForCausalLM),
}
_CLASSIFIERS: dict[str, type[PreTrainedModel]] = {
    "olmo": OlmoForSequenceClassification,
    "olmo2": Olmo2ForSequenceClassification,
    "olmo3": Olmo3ForSequenceClassification,
}
OLMO1: dict[str, Any] = {"model_type": "olmo", "clip_qkv": 1.5, "rope_parameters": None}
"""fields of an OLMo 1 whose clip reaches a tenth of the queries and keys"""
YARN: dict[str, Any] = {"rope_type": "yarn", "rope_theta": 500000.0, "factor": 8.0}
OLMO3: dict[str, Any] = {
    "model_type": "olmo3",
    "num_hidden_layers": 4,
    "sliding_window": 8,
    "rope_parameters": {
        "full_attention": YARN | {"original_max_position_embeddings": 16},
        "sliding_attention": {"rope_type": "default", "rope_theta": 500000.0},
    },
}
"""fields of an Olmo 3 whose fourth layer alone sees more than 8 tokens, and has YaRN"""


def make_checkpoint(
    out: Path,
    *,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    old_config: bool = False,
    seed: int = 0,
    **fields: Any,
) -> Path:
    """Write a checkpoint of `SHAPE` with `fields` changed; return its folder.

    Args:
        out: the folder, created if needed.
        dtype: of the stored tensors.
        shards: more than 1 gives that many safetensors files or a few more, and an index.
        old_config: write config.json as transformers 4 does, with rope_theta and rope_scaling.
        seed: of the weights.
        fields: config fields; `model_type` chooses the generation, and `num_labels` makes it a classifier.
    """
    torch.manual_seed(seed)
    fields = {**SHAPE, **fields}
    name = fields.pop("model_type", "olmo2")
    config_class, model_class = _FAMILY[name]
    if "num_labels" in fields:
        model_class = _CLASSIFIERS[name]
    model: Any = model_class(config_class(**fields))  # type: ignore[arg-type]  # a class per generation
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, weight.shape[-1] ** -0.5)
            elif name.endswith("bias"):
                weight.normal_(0, 0.1)
            else:
                weight.uniform_(0.25, 1.75)
    model.to(dtype)
    total = sum(w.numel() * w.element_size() for w in model.parameters())
    model.save_pretrained(out, max_shard_size=total + 1 if shards == 1 else total // shards + 1)
    if old_config:
        path = out / "config.json"
        config = json.loads(path.read_text())
        rope = config.pop("rope_parameters")
        config |= {"rope_theta": rope["rope_theta"], "rope_scaling": None, "torch_dtype": config.pop("dtype")}
        path.write_text(json.dumps(config, indent=2))
    return out
