"""What the graphs of a package are made of: operators, weights, bits. The weights beside them are not read.

An ONNX file names its weights with dtype and shape and leaves their bytes in another file, which is not opened here, so
that a package of gigabytes is described in the memory of its graphs.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from olmo2_export.config import ModelConfig
from olmo2_export.dtypes import dtype_name, ir_dtype
from olmo2_export.fuse import op_counts
from olmo2_export.rope import LayerType
from olmo2_export.stored_graph import load_graph
from olmo2_export.weights.stored_names import EMBEDDING, HEAD, SCORED, weight_shapes
from runtimes.errors import PackageError
from runtimes.manifest import Manifest, Quantization, Role, TensorSpec, Variant

LARGEST = 8
"""rows in the list of the largest tensors"""

_PARTS = re.compile(r"\.(packed|scales|zero_points|int8|channel_scales|codes|dequantized)$")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")

_MEANINGS: dict[Role, str] = {
    "token_ids": "token ids of the new tokens",
    "embeddings": "vectors in the place of the new tokens whose ids are negative; optional but for TensorRT",
    "attention_mask": "1 for a token, cached or new; 0 for padding",
    "position_ids": "place of each new token in its sequence",
    "logit_count": "last rows that get logits; 0, the default: all",
    "write_indices": "position of each row's first new token",
    "logit_index": "the new token of each row that gets logits",
    "logits": "scores of the next token, before softmax",
    "candidate_ids": "the likeliest next tokens, best first",
    "candidate_logits": "their scores",
    "score": "of the sequence, for each label: read from its last token that is no padding",
    "hidden_state": "vectors of the new tokens",
}
_CACHE = re.compile(r"(past_key_values|present)\.(\d+)\.(key|value)")


@dataclass(frozen=True)
class WeightGroup:
    """The stored tensors of one dtype."""

    dtype: str
    tensors: int
    elements: int
    nbytes: int
    share: float
    """of all bytes of the graph's tensors"""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a graph, or those of several layers that are alike, with `N` for the layer."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    """of each"""
    count: int
    share: float
    """of all bytes of the graph's tensors"""


@dataclass(frozen=True)
class Part:
    """The embedding, one layer, or the head: how its matrices are stored."""

    name: str
    """embedding | layer N | head"""
    schemes: tuple[str, ...]
    """such as `4 bits, blocks of 128, symmetric x 7`; the dtype where nothing is quantised"""
    weights: int
    """elements of its matrices in the checkpoint"""
    nbytes: int
    """of the same as stored: codes, scales, zero points"""
    bits_per_weight: float
    worst_nmse: float | None
    """largest mean squared error / mean square of a matrix of it; None where nothing is quantised"""


@dataclass(frozen=True)
class GraphSummary:
    """One ONNX graph."""

    graph: str
    """path in the package"""
    nodes: int
    ops: dict[str, int] = field(hash=False)
    """operator -> nodes, most first; `domain::op` outside the default domain"""
    tensors: int
    nbytes: int
    """of all tensors of the graph"""
    weights: tuple[WeightGroup, ...]
    """largest first"""
    largest: tuple[StoredTensor, ...]
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class IoRow:
    """One input or output; those of the KV cache are one row for all layers."""

    direction: str
    """input | output"""
    name: str
    dtype: str
    shape: tuple[int | str, ...]
    count: int
    """tensors in this row"""
    meaning: str


@dataclass(frozen=True)
class OpChange:
    """How often an operator occurs in the portable graph and in another one."""

    op: str
    before: int
    after: int


def summarize_graph(package: Path, graph: str, config: ModelConfig, quantization: Quantization | None) -> GraphSummary:
    """Describe one graph.

    Args:
        package: the package folder, whose files were checked.
        graph: path of the ONNX file in it.
        config: the model's shape.
        quantization: what the manifest says of the weights; None: they are not quantised.

    Raises:
        PackageError: a tensor of the graph has no data.
    """
    model = load_graph(package / graph)
    stored: list[StoredTensor] = []
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            raise PackageError(f"{package / graph}: {name} has no data; export the package again")
        shape = tuple(int(d) for d in tensor.shape.numpy())
        stored.append(StoredTensor(name, dtype_name(tensor.dtype), shape, tensor.nbytes, 1, 0.0))
    total = sum(t.nbytes for t in stored)
    stored = [dataclasses.replace(t, share=t.nbytes / total if total else 0.0) for t in stored]
    counts = op_counts(model)
    return GraphSummary(
        graph=graph,
        nodes=sum(counts.values()),
        ops=dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))),
        tensors=len(stored),
        nbytes=total,
        weights=_groups(stored),
        largest=_largest(stored),
        parts=_parts(stored, config, quantization),
    )


def portable_ops(package: Path, manifest: Manifest, config: ModelConfig) -> tuple[dict[str, int], str]:
    """Return the operators of the portable graph, which every fusion starts from, and where that was seen.

    Read from the package if it has that graph. Otherwise the model is traced with one layer of each kind, without
    weights, and for each kind with one more; all others of the kind add what that one did.
    """
    if (fp32 := manifest.variants.get("fp32")) is not None:
        return dict(op_counts(load_graph(package / fp32.graph))), fp32.graph
    kinds = tuple(dict.fromkeys(config.layer_types))
    base = _traced_ops(config, kinds)
    found = base.copy()
    for kind, count in Counter(config.layer_types).items():
        if count > 1:
            more = _traced_ops(config, (*kinds, kind))
            found.update({op: (count - 1) * (more[op] - base[op]) for op in more})
    found.update("Cast" for number in config.hidden_states if number < config.num_hidden_layers)
    return dict(found), "traced anew: the package has no fp32"


def _traced_ops(config: ModelConfig, layer_types: tuple[LayerType, ...]) -> Counter[str]:
    """Return the operators of the model with other layers; of its hidden states it gives the last alone."""
    from olmo2_export.graphs.trace import trace  # torch, which a package that has the graph can do without

    count = len(layer_types)
    last = (count,) if config.num_hidden_layers in config.hidden_states else ()
    fewer = dataclasses.replace(config, num_hidden_layers=count, layer_types=layer_types, hidden_states=last)
    return op_counts(trace(fewer))


def op_changes(before: Mapping[str, int], after: Mapping[str, int]) -> tuple[OpChange, ...]:
    """Return how often each operator of either graph occurs, what is new first, then by how much it changed."""
    changes = [OpChange(op, before.get(op, 0), after.get(op, 0)) for op in {**before, **after}]
    return tuple(sorted(changes, key=lambda c: (c.before > 0, c.before - c.after < 0, -abs(c.after - c.before), c.op)))


def io_rows(variant: Variant) -> tuple[IoRow, ...]:
    """Return the I/O table; the layers' caches, which are alike, share a row for keys and one for values."""
    return (*_io("input", variant.inputs), *_io("output", variant.outputs))


def _io(direction: str, specs: Iterable[TensorSpec]) -> list[IoRow]:
    rows: dict[tuple[object, ...], IoRow] = {}
    for spec in specs:
        cache = _CACHE.fullmatch(spec.name)
        name = f"{cache[1]}.N.{cache[3]}" if cache else spec.name
        if cache:
            what = "keys" if cache[3] == "key" else "values"
            meaning = f"{what} of each layer{', new ones included' if cache[1] == 'present' else ' so far'}"
        else:
            meaning = _MEANINGS.get(spec.role, "")
        key = (name, spec.dtype, spec.shape)
        count = rows[key].count + 1 if key in rows else 1
        rows[key] = IoRow(direction, name, spec.dtype, spec.shape, count, meaning)
    return list(rows.values())


def _groups(stored: Iterable[StoredTensor]) -> tuple[WeightGroup, ...]:
    by_dtype: dict[str, list[StoredTensor]] = defaultdict(list)
    for tensor in stored:
        by_dtype[tensor.dtype].append(tensor)
    groups = [
        WeightGroup(dtype, len(ts), sum(map(_elements, ts)), sum(t.nbytes for t in ts), sum(t.share for t in ts))
        for dtype, ts in by_dtype.items()
    ]
    return tuple(sorted(groups, key=lambda g: (-g.nbytes, g.dtype)))


def _largest(stored: Iterable[StoredTensor]) -> tuple[StoredTensor, ...]:
    """Return the largest tensors, those of all layers that are alike as one: else they would be all there is."""
    rows: dict[tuple[object, ...], StoredTensor] = {}
    for tensor in stored:
        name = _LAYER.sub("model.layers.N.", tensor.name)
        key = (name, tensor.dtype, tensor.shape)
        count, share = (rows[key].count, rows[key].share) if key in rows else (0, 0.0)
        rows[key] = dataclasses.replace(tensor, name=name, count=count + 1, share=share + tensor.share)
    return tuple(sorted(rows.values(), key=lambda t: (-t.nbytes, t.name))[:LARGEST])


def _elements(tensor: StoredTensor) -> int:
    count = 1
    for size in tensor.shape:
        count *= size
    return count


def checkpoint_names(tensor: str) -> list[str]:
    """Return the checkpoint's names of the weights that a tensor of a graph holds, or a part of: merged products hold
    several, `a+b`, and of a quantised one there are codes, scales and zero points."""
    return [_PARTS.sub("", name) for name in tensor.split("+")]


def _parts(stored: Iterable[StoredTensor], config: ModelConfig, quantization: Quantization | None) -> tuple[Part, ...]:
    score = {SCORED: (len(config.labels), config.hidden_size)} if config.labels else {}
    shapes = weight_shapes(config) | score
    size: Counter[str] = Counter()
    dtypes: dict[str, Counter[str]] = defaultdict(Counter)
    held: dict[str, set[str]] = defaultdict(set)
    int8: set[str] = set()  # of a prefill graph, which does not store what the manifest's table describes
    for tensor in stored:
        names = [name for name in checkpoint_names(tensor.name) if name in shapes]
        if not names:
            continue
        part = _part_of(names[0])
        size[part] += tensor.nbytes
        held[part].update(names)
        if tensor.name.endswith(".int8"):
            int8.update(names)
        if len(tensor.shape) > 1:
            dtypes[part][tensor.dtype] += len(names)
    parts = []
    for part in ("embedding", *(f"layer {i}" for i in range(config.num_hidden_layers)), "head"):
        names = sorted(held[part])
        if not names:
            continue  # a tied head may share the embedding's tensor
        described = quantization.tensors if quantization else {}
        quantized = {n: described[n] for n in names if n in described and n not in int8}
        schemes = Counter(
            f"{q.bits} bits, {f'blocks of {q.block_size}' if q.block_size else 'per channel'}"
            f"{', symmetric' if q.symmetric else ''}"
            for q in quantized.values()
        )
        if coarse := int8.intersection(names):
            schemes["8 bits, per channel, symmetric"] += len(coarse)
        if plain := [n for n in names if n not in quantized and n not in int8]:
            schemes[max(dtypes[part], key=lambda dtype: ir_dtype(dtype).bitwidth)] += len(plain)
        weights = sum(shapes[n][0] * shapes[n][1] for n in names)
        parts.append(
            Part(
                name=part,
                schemes=tuple(f"{s} x {n}" if len(names) > 1 else s for s, n in schemes.items()),
                weights=weights,
                nbytes=size[part],
                bits_per_weight=8 * size[part] / weights,
                worst_nmse=max((q.nmse for q in quantized.values()), default=None),
            )
        )
    return tuple(parts)


def _part_of(weight: str) -> str:
    if (layer := _LAYER.match(weight)) is not None:
        return f"layer {layer[1]}"
    return {EMBEDDING: "embedding", HEAD: "head", SCORED: "head"}[weight]
