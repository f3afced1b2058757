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
from olmo2_export.quantize.walk import Head, WalkedLayer, embed, walked_layers
from olmo2_export.weights.source import WeightSource
from olmo2_export.weights.stored_names import EMBEDDING, HEAD, naming


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
    layers = walked_layers(checkpoint, config)
    for layer in tqdm(layers, total=config.num_hidden_layers, desc="GPTQ", unit="layer", leave=False):
        start = layer.reads
        for group in layer.input_groups:
            if group.start != start:
                hidden = [layer.value(x, group.start, start) for x in hidden]
                start = group.start
            names = [row.weight for row in group.linears if row.weight is not None]
            _quantize_group(layer, names, (layer.value(x, group.reads, start) for x in hidden), formats, spool)
        hidden = [layer.value(x, layer.writes, start) for x in hidden]
    if HEAD not in formats:
        return
    head = Head(checkpoint, config)
    hessian = Hessian(config.hidden_size)
    for x in hidden:
        hessian.add(head.norm(x))
    with naming(HEAD):
        spool.save(HEAD, gptq_factored(head.weight, factor(hessian.mean), formats[HEAD]))


def _quantize_group(
    layer: WalkedLayer,
    names: Sequence[str],
    inputs: Iterable[Tensor],
    formats: Mapping[str, BlockFormat],
    spool: Spool,
) -> None:
    """Quantise the weights that share those inputs, and let the layer compute with the result."""
    hessian = Hessian(layer.weights[names[0]].shape[1])
    for x in inputs:
        hessian.add(x)
    with naming(names[0]):
        factored = factor(hessian.mean)
    for name in names:
        with naming(name):
            matrix = gptq_factored(layer.weights[name], factored, formats[name])
        spool.save(name, matrix)
        layer.replace(name, matrix.dequantize())
