"""transformers' classes of each generation of OLMo, a row per model type, and what they are made with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeAlias

import transformers
from torch import Tensor, nn
from transformers.models.olmo import modeling_olmo as olmo
from transformers.models.olmo2 import modeling_olmo2 as olmo2
from transformers.models.olmo3 import modeling_olmo3 as olmo3

LayerNorm: TypeAlias = olmo.OlmoLayerNorm
LAYER_NORM_EPS = 1e-5
"""OlmoLayerNorm has it in its forward"""
RMSNorm: TypeAlias = olmo2.Olmo2RMSNorm | olmo3.Olmo3RMSNorm


class Rotary(Protocol):
    """transformers' rotary embedding of one layer: what gives the dtype's device, positions -> cos and sin."""

    def __call__(self, x: Tensor, position_ids: Tensor, /) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Classes:
    """transformers' classes of one generation."""

    config: type[transformers.PreTrainedConfig]
    causal_lm: type[transformers.PreTrainedModel]
    classifier: type[transformers.PreTrainedModel]
    layer: Callable[[Any, int], nn.Module]
    norm: Callable[[Any], nn.Module]
    rotary: Callable[[Any, int], Rotary]
    """the config, the layer"""


def _rms_norm(norm: type[nn.Module]) -> Callable[[Any], nn.Module]:
    return lambda config: norm(config.hidden_size, config.rms_norm_eps)


def _rotary_of_layer(config: Any, layer: int) -> Rotary:
    return partial(olmo3.Olmo3RotaryEmbedding(config), layer_type=config.layer_types[layer])


CLASSES: dict[str, Classes] = {
    "olmo": Classes(
        transformers.OlmoConfig,
        transformers.OlmoForCausalLM,
        transformers.OlmoForSequenceClassification,
        olmo.OlmoDecoderLayer,
        lambda config: olmo.OlmoLayerNorm(config.hidden_size),
        lambda config, _: olmo.OlmoRotaryEmbedding(config),
    ),
    "olmo2": Classes(
        transformers.Olmo2Config,
        transformers.Olmo2ForCausalLM,
        transformers.Olmo2ForSequenceClassification,
        olmo2.Olmo2DecoderLayer,
        _rms_norm(olmo2.Olmo2RMSNorm),
        lambda config, _: olmo2.Olmo2RotaryEmbedding(config),
    ),
    "olmo3": Classes(
        transformers.Olmo3Config,
        transformers.Olmo3ForCausalLM,
        transformers.Olmo3ForSequenceClassification,
        olmo3.Olmo3DecoderLayer,
        _rms_norm(olmo3.Olmo3RMSNorm),
        _rotary_of_layer,
    ),
}
"""model type -> its classes"""
