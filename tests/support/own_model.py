"""Our equations, run eagerly on a checkpoint's weights."""

from __future__ import annotations

from pathlib import Path

from olmo2_export.config import ModelConfig
from olmo2_export.model.olmo import OlmoForCausalLM
from olmo2_export.model.rotary import model_tables
from olmo2_export.weights.checkpoint import open_checkpoint


def load_model(folder: Path) -> tuple[OlmoForCausalLM, ModelConfig]:
    """Return the model of a checkpoint in float32, and its config."""
    checkpoint, config = open_checkpoint(str(folder)), ModelConfig.from_json(folder / "config.json")
    model = OlmoForCausalLM(config).eval()
    state = {name: checkpoint.tensor(name).float() for name in checkpoint.tensors}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    for name, table in model_tables(config).items():
        setattr(model, name, table)
    return model, config
