"""Checkpoints that overflow float16 in one place each, and nowhere else.

Every one is the tiny random model with one channel made large where it is written and, but for what is meant to
overflow, made invisible where it is read.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from support.checkpoints import make_checkpoint
from torch import Tensor

State = dict[str, Tensor]
CHANNEL = 5
READERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")


def changed(folder: Path, change: Callable[[State], None], **fields: bool) -> Path:
    """Write the tiny model with changed weights, and changed fields of its config."""
    make_checkpoint(folder, **fields)
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def residual(state: State) -> None:
    """The MLP of layer 1 adds a channel that no linear reads, so large that the stream leaves float16 from there on.

    Channel 6 is 3 for every token and in every layer, so that what is added is as large everywhere: a number that is
    small only by cancellation would be as inexact as it is large elsewhere.
    """
    state["model.embed_tokens.weight"][:, 6] = 3
    for norm in ("post_attention_layernorm", "post_feedforward_layernorm"):
        for layer in range(3):
            state[f"model.layers.{layer}.{norm}.weight"][6] = 0
    for linear in ("gate_proj", "up_proj"):
        state[f"model.layers.1.mlp.{linear}.weight"][7] = 0
        state[f"model.layers.1.mlp.{linear}.weight"][7, 6] = 2
    state["model.layers.1.mlp.down_proj.weight"][CHANNEL] = 0
    state["model.layers.1.mlp.down_proj.weight"][CHANNEL, 7] = 1
    state["model.layers.1.post_feedforward_layernorm.weight"][CHANNEL] = 1.2e4
    for linear in READERS:
        state[f"model.layers.2.{linear}.weight"][:, CHANNEL] = 0
    state["model.norm.weight"] *= 2000
    state["model.norm.weight"][CHANNEL] *= 1e-3


def embedding(state: State) -> None:
    """One channel of the embedding is beyond float16, and so is all of the residual stream; no linear reads it."""
    state["model.embed_tokens.weight"][:, CHANNEL] = 7e4
    for layer in range(3):
        for linear in READERS:
            state[f"model.layers.{layer}.{linear}.weight"][:, CHANNEL] = 0
    state["model.norm.weight"] *= 2000
    state["model.norm.weight"][CHANNEL] *= 1e-3


def bias(state: State) -> None:
    """A bias of layer 0's o_proj is beyond float16; the norm behind it makes it small again."""
    state["model.layers.0.self_attn.o_proj.bias"][2] = 7e4
    state["model.layers.0.post_attention_layernorm.weight"] *= 1e3
    state["model.layers.0.post_attention_layernorm.weight"][2] *= 1e-3


def product(state: State) -> None:
    """gate and up of layer 0 are each well inside float16, and their product is not."""
    for linear in ("gate_proj", "up_proj"):
        state[f"model.layers.0.mlp.{linear}.weight"][7] *= 400
    state["model.layers.0.mlp.down_proj.weight"][:, 7] *= 1e-3


def scores(state: State) -> None:
    """q.k of layer 1 is beyond float16; what it is computed from is not."""
    for norm in ("q_norm", "k_norm"):
        state[f"model.layers.1.self_attn.{norm}.weight"] *= 400


def weight(state: State) -> None:
    """One weight of layer 2's o_proj is beyond float16; what it multiplies with is tiny."""
    state["model.layers.2.self_attn.v_proj.weight"][3] *= 1e-4
    state["model.layers.2.self_attn.o_proj.weight"][2, 3::16] *= 1e-4
    state["model.layers.2.self_attn.o_proj.weight"][2, 3] = 7e4


def values(state: State) -> None:
    """v of layer 1, which the attention reads, is beyond float16."""
    state["model.layers.1.self_attn.v_proj.weight"] *= 1e5
    state["model.layers.1.self_attn.o_proj.weight"] *= 1e-5


def margin(state: State) -> None:
    """down_proj of layer 1 comes close to float16's largest number, and stays below it."""
    state["model.layers.1.mlp.down_proj.weight"] *= 2500


def safe(_: State) -> None:
    """Nothing."""
