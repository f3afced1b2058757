"""The checkpoint's names of the tensors that are quantised."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from olmo2_export.config import ModelConfig
from olmo2_export.weights.source import WeightSource
from runtimes.errors import CheckpointError, NumericError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# The linears of a layer that see the same input, in the order in which the layer runs them.
GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


def weight_name(layer: int, linear: str) -> str:
    """Return the checkpoint's name of a linear's weight, such as model.layers.3.mlp.up_proj.weight."""
    return f"model.layers.{layer}.{linear}.weight"


def linear_names(config: ModelConfig) -> list[str]:
    """Return the names of the layers' weights, in the order in which the model runs them."""
    return [weight_name(i, linear) for i in range(config.num_hidden_layers) for group in GROUPS for linear in group]


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Return name -> [N, K] of everything that can be quantised: embedding, the layers' weights, head."""
    q_size = config.num_attention_heads * config.head_dim
    kv_size = config.num_key_value_heads * config.head_dim
    hidden, intermediate = config.hidden_size, config.intermediate_size
    shapes = {
        "q_proj": (q_size, hidden),
        "k_proj": (kv_size, hidden),
        "v_proj": (kv_size, hidden),
        "o_proj": (hidden, q_size),
        "gate_proj": (intermediate, hidden),
        "up_proj": (intermediate, hidden),
        "down_proj": (hidden, intermediate),
    }
    table = (config.vocab_size, hidden)
    return {EMBEDDING: table, **{name: shapes[name.split(".")[-2]] for name in linear_names(config)}, HEAD: table}


def stored_weight(checkpoint: WeightSource, config: ModelConfig, name: str) -> Tensor:
    """Read one weight as it is stored; a tied head is the embedding."""
    return checkpoint.tensor(EMBEDDING if name == HEAD and config.tie_word_embeddings else name)


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Put the tensor's name before what is wrong with it."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from error
    except NumericError as error:
        raise NumericError(f"{name}: {error}") from error
