"""Verify a model that is larger than memory: PyTorch and the graph, each a layer at a time.

| mode         | what is fed, always one row                                                                      |
|--------------|--------------------------------------------------------------------------------------------------|
| prefill      | each sequence whole                                                                              |
| decode       | the first sequence token by token; its long form up to the last tokens in one call, these alone  |
| chunked      | the first sequence in three pieces                                                               |
| prefix reuse | a beginning, wrong tokens behind it; then the right ones behind the beginning                    |
| score, ...   | the rows of each batch of `padded`                                                               |
| vectors, ... | each row of `beside.mixed`                                                                       |

What a graph computes of one sequence is the same bit for bit as in one session, so that nothing of the comparison is
given up but what is not fed: ragged batches, the end of a cache beyond `LONGEST_BY_LAYER` tokens, and greedy decoding,
which would read all weights for each token; and that hidden states are given, which `locate` tells. The report says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from olmo2_export.architecture import Operation, operations, tensor_shapes
from olmo2_export.config import ModelConfig
from olmo2_export.graphs.by_layer import Call, Plan, logits_by_layer
from olmo2_export.verify.beside import Mixed, halves
from olmo2_export.verify.feeds import ModeResult, short_lengths
from olmo2_export.verify.measure import Truth
from olmo2_export.verify.padded import scored_mode
from olmo2_export.views.table import View
from runtimes.errors import FailedError
from runtimes.free_memory import available_memory
from runtimes.manifest import Variant
from runtimes.package import Package
from runtimes.targets import Target

LONGEST_BY_LAYER = 256
"""tokens of the longest row, where the cache holds more"""

_WHOLE = 8 + 4  # bytes of a weight in PyTorch's float64, and of one that is read beside it
_KERNELS = 2  # times a graph's data: mapped, and as the kernels keep it
_TAIL = 9  # tokens


def why_by_layer(package: Package, entries: Iterable[Variant], config: ModelConfig, *, low_memory: bool) -> str:
    """Say why layers must run one at a time; empty where all fits in memory, or where the system does not say.

    Args:
        package: for the sizes of its files.
        entries: the variants that are verified.
        config: the model's shape.
        low_memory: it was asked for.
    """
    if low_memory:
        return "as --low-memory asks"
    weights = sum(math.prod(shape) for shape in tensor_shapes(operations(config)).values())
    graphs = max((sum(package.files_of(e)[name].size for name in e.data) for e in entries), default=0)
    needed, free = max(_WHOLE * weights, _KERNELS * graphs), available_memory()
    if free is None or needed <= free:
        return ""
    return f"the whole model needs some {needed / 1e9:,.1f} GB of memory, {free / 1e9:,.1f} GB are free"


def runs_by_layer(view: View, target: Target) -> bool:
    """Tell whether a view can be run so: on a CPU, with a cache that is not static."""
    return not target.on_gpu and view.variant.kv_cache.form != "static"


def coverage(why: str, config: ModelConfig) -> str:
    """Return what the report says of what was run."""
    return (
        f"layers one at a time, {why}; one row alone, up to {LONGEST_BY_LAYER} tokens; not run: ragged batches, the "
        "end of a longer cache, greedy decoding" + ", hidden states and embeddings" * bool(config.hidden_states)
    )


def coverage_of_whole(why: str, config: ModelConfig) -> str:
    """Return what the report says of a graph that runs whole, beside PyTorch a layer at a time."""
    left_out = "" if config.labels else "; not run: greedy decoding"
    return f"PyTorch's layers one at a time, {why}; the graph whole{left_out}"


def feed_by_layer(view: View, rows: Sequence[Operation], truth: Truth) -> Iterator[ModeResult]:
    """Run every case of a view.

    Args:
        view: one that `runs_by_layer`.
        rows: of the model.
        truth: for its sequences, and the positions that are compared.

    Yields:
        The cases, in the order of the table above.
    """
    short = short_lengths(truth.capacity)
    first, whole = truth.sequences[0][: short[0]], truth.sequences[0]
    tail = len(whole) - min(_TAIL, len(whole) - 1)
    fed = [
        ("prefill", 0, _pieces(first, [len(first)])),
        *(("prefill", row, _pieces(ids, [len(ids)])) for row, ids in enumerate(truth.sequences) if row),
        ("decode", 0, _pieces(first, range(1, len(first) + 1))),
        ("chunked", 0, _pieces(first, [len(first) // 3, len(first) // 2, len(first)])),
        ("prefix reuse", 0, _reused(first, len(first) // 2)),
        ("prefill", 0, _pieces(whole, [len(whole)])),
        ("decode", 0, _pieces(whole, range(tail, len(whole) + 1))),
        ("chunked", 0, _pieces(whole, [tail, tail + (len(whole) - tail) // 2, len(whole)])),
        ("prefix reuse", 0, _reused(whole, tail)),
    ]
    plans = [plan for _, _, plan in fed]
    plans += [_pieces(ids, [len(ids)]) for batch in truth.beside.padded for ids in batch.rows]
    plans += [_mixed(row) for row in truth.beside.mixed]
    try:
        logits = logits_by_layer(view.graph, view.variant, rows, plans, view.model)
    except FailedError as error:
        for mode, _, plan in fed:
            yield ModeResult(mode, (_length(plan),), (), (), str(error))
        return
    for (mode, row, plan), found in zip(fed, logits, strict=False):
        answers = np.concatenate(found)
        positions = np.concatenate([np.arange(c.start, c.start + len(c.ids)) for c in plan if c.wanted])
        if truth.beside.padded:  # a classifier answers of the last token of each call
            positions = np.array([c.start + len(c.ids) - 1 for c in plan if c.wanted])
        kept = np.isin(positions, truth.positions[row])
        yield ModeResult(mode, (_length(plan),), (positions[kept],), (answers[kept],), "", row)
    scores = iter(logits[len(fed) :])
    for number, batch in enumerate(truth.beside.padded):
        found = [next(scores)[0] for _ in batch.rows]
        yield ModeResult(scored_mode(batch), batch.lengths, (), (np.concatenate(found),), "", beside=number)
    for mode, start, of_half in halves(truth.beside):
        for place, given in enumerate(of_half, truth.beside.first_mixed + start):
            parts = next(scores)
            answers = parts[-1] if truth.beside.padded else np.concatenate(parts)
            length = len(given.before) + given.answered
            yield ModeResult(mode, (length,), (), (answers,), "", beside=place)


def _pieces(ids: np.ndarray, ends: Iterable[int]) -> Plan:
    stops = [end for end in ends if end]
    return [Call(ids[start:stop], start) for start, stop in zip([0, *stops[:-1]], stops, strict=True)]


def _reused(ids: np.ndarray, kept: int) -> Plan:
    return [Call(ids[:kept], 0), Call(ids[kept:][::-1], kept, wanted=False), Call(ids[kept:], kept)]


def _mixed(row: Mixed) -> Plan:
    start, end = len(row.before), len(row.before) + len(row.vectors)
    none = np.full(len(row.vectors), -1, np.int64)
    calls = [
        Call(row.before, 0, wanted=False),
        Call(none, start, vectors=row.vectors),
        Call(row.behind, end),
    ]
    return [call for call in calls if len(call.ids)]


def _length(plan: Plan) -> int:
    return plan[-1].start + len(plan[-1].ids)
