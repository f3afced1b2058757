"""GPTQ over a whole checkpoint: each linear is measured on what the quantised part before it gives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from olmo2_export.catalog import BlockFormat
from olmo2_export.config import ModelConfig
from olmo2_export.quantize.gptq import Hessian, factor, gptq_factored
from olmo2_export.quantize.search import search
from olmo2_export.quantize.spool import Spool
from olmo2_export.quantize.sweep import Head, StagedLayer, embed, staged_layers
from olmo2_export.weights.source import WeightSource
from olmo2_export.weights.stored_names import EMBEDDING, GROUPS, HEAD, naming, weight_name


@torch.no_grad()
def gptq_checkpoint(
    checkpoint: WeightSource,
    config: ModelConfig,
    sequences: Sequence[np.ndarray],
    formats: Mapping[str, BlockFormat],
    spool: Spool,
) -> None:
    """Quantise every tensor of `formats` into the spool.

    The embedding is searched, if it is quantised at all, as it has no inputs; q, k and v share a Hessian, and so do
    gate and up. In memory are one layer, its Hessians, and the hidden states: tokens x hidden x 4 bytes.

    Args:
        checkpoint: the weights.
        config: their shape.
        sequences: int64 [S] each.
        formats: name -> format; layers' linears, head and, unless it stays as it is, the embedding.
        spool: takes each finished matrix.

    Raises:
        CheckpointError: a weight is NaN, Inf or beyond 1e36.
        NumericError: activations that are not finite.
    """
    if EMBEDDING in formats:
        with naming(EMBEDDING):
            embedding = search(checkpoint.tensor(EMBEDDING), formats[EMBEDDING])
        spool.save(EMBEDDING, embedding)
        hidden = [torch.cat([embedding.dequantize(i, i + 1) for i in ids.tolist()])[None] for ids in sequences]
    else:
        hidden = embed(checkpoint, sequences)
    layers = staged_layers(checkpoint, config)
    qkv, o, gate_up, down = GROUPS
    for layer in tqdm(layers, total=config.num_hidden_layers, desc="GPTQ", unit="layer", leave=False):
        _quantize_group(layer, qkv, hidden, formats, spool)
        _quantize_group(layer, o, map(layer.attended, hidden), formats, spool)
        hidden = [layer.after_attention(x, layer.attended(x)) for x in hidden]
        _quantize_group(layer, gate_up, hidden, formats, spool)
        _quantize_group(layer, down, map(layer.gated, hidden), formats, spool)
        hidden = [layer.after_mlp(h, layer.gated(h)) for h in hidden]
    head = Head(checkpoint, config)
    hessian = Hessian(config.hidden_size)
    for x in hidden:
        hessian.add(head.norm(x))
    with naming(HEAD):
        spool.save(HEAD, gptq_factored(head.weight, factor(hessian.mean), formats[HEAD]))


def _quantize_group(
    layer: StagedLayer,
    group: Sequence[str],
    inputs: Iterable[Tensor],
    formats: Mapping[str, BlockFormat],
    spool: Spool,
) -> None:
    """Quantise the linears that share those inputs, and let the layer compute with the result."""
    hessian = Hessian(layer.weight(group[0]).shape[1])
    for x in inputs:
        hessian.add(x)
    with naming(weight_name(layer.index, group[0])):
        factored = factor(hessian.mean)
    for linear in group:
        name = weight_name(layer.index, linear)
        with naming(name):
            matrix = gptq_factored(layer.weight(linear), factored, formats[name])
        spool.save(name, matrix)
        layer.replace(linear, matrix.dequantize())
