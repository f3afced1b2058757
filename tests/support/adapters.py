"""LoRA adapters as PEFT saves them, written without it."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from olmo2_export.architecture import operations
from olmo2_export.config import ModelConfig

PREFIX = "base_model.model."
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def settings(**fields: Any) -> dict[str, Any]:
    """adapter_config.json of rank 4 and scale 2, `fields` changed."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "owner/base",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": list(LINEARS),
        "init_lora_weights": True,
        "bias": "none",
        "modules_to_save": None,
    } | fields


def factors(base: Path, linears: Collection[str] = LINEARS, *, rank: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random A and B of some linears of a model, in every layer, by the names that PEFT gives them."""
    torch.manual_seed(seed)
    found: dict[str, torch.Tensor] = {}
    for row in operations(ModelConfig.from_json(base / "config.json")):
        if row.kind == "linear" and row.name.rpartition(".")[2] in linears:
            out, into = row.shape
            found[f"{PREFIX}{row.name}.lora_A.weight"] = torch.randn(rank, into) * 0.2
            found[f"{PREFIX}{row.name}.lora_B.weight"] = torch.randn(out, rank) * 0.05
    return found


def write_adapter(out: Path, tensors: Mapping[str, torch.Tensor], **fields: Any) -> Path:
    """Write an adapter of `settings`; return its folder."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "adapter_config.json").write_text(json.dumps(settings(**fields)))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "adapter_model.safetensors")
    return out
