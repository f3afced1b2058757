"""Run a graph of a package layer by layer, so that a model larger than memory can be measured.

Each segment of `taps` is a session of its own, on the weights in the graph's file; all that is to be computed goes
through it before the next is opened. Between two segments hidden states are kept, and nothing else: each layer reads
the KV cache that it has written itself. So a sequence is computed as it is by the whole graph, kernel for kernel and,
in float32, bit for bit; a float16 graph is rounded between two segments, where a CPU runs the whole of it partly in
float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from olmo2_export.architecture import SCORE, Operation, after_layers
from olmo2_export.graphs.taps import HIDDEN, cut, find_segments
from olmo2_export.stored_graph import load_graph
from runtimes.errors import FailedError, PackageError
from runtimes.manifest import EMBEDDINGS, TensorSpec, Variant
from runtimes.ort.session import one_line, open_session
from runtimes.runners.runner import Logits, TokenIds


@dataclass(frozen=True)
class Call:
    """Tokens of one sequence that enter the graph together."""

    ids: np.ndarray
    """int64 [n]"""
    start: int
    """tokens of the cache that they stand behind; what the cache holds beyond is dropped"""
    wanted: bool = True
    """its logits are asked for"""
    vectors: np.ndarray | None = None
    """float32 [n, hidden]: stand in the place of all ids, which are negative then; None: there are none"""


Plan = Sequence[Call]
"""the calls of one sequence, in order, on one KV cache"""
Arrays = dict[str, np.ndarray]


def logits_by_layer(
    graph: Path, variant: Variant, rows: Sequence[Operation], plans: Sequence[Plan], model: ir.Model | None = None
) -> list[list[np.ndarray]]:
    """Compute the logits of all calls.

    Args:
        graph: the stored graph, portable, shared-cache or device; its weights stay in its file.
        variant: its KV cache.
        rows: of the model.
        plans: what is fed.
        model: a form of the graph to run instead, on the same weights.

    Returns:
        Per plan, and per call whose logits are wanted, float32 [n, vocab_size]; of a classifier [1, labels].

    Raises:
        PackageError: it is no graph of this exporter, or one with a static cache.
        FailedError: onnxruntime failed.
    """
    if variant.kv_cache.form == "static":
        raise PackageError(f"{graph}: a static cache; expected a graph that is fed one sequence")
    model = load_graph(graph) if model is None else model
    states: list[list[np.ndarray]] = [[np.empty(0)] * len(plan) for plan in plans]
    answer = "score" if after_layers(rows)[-1].name == SCORE else "logits"
    for segment in find_segments(model, rows):
        last = segment.result is None
        shape = None if segment.source is None else (1, "sequence_length", states[0][0].shape[-1])
        part = _only(cut(model, segment, shape), segment.result or answer)
        inputs, outputs = (tuple(map(_spec, values)) for values in (part.graph.inputs, part.graph.outputs))
        entry = dataclasses.replace(variant, inputs=inputs, outputs=outputs)
        session = open_session(graph, entry, None, ir.to_proto(part).SerializeToString())
        result = segment.result or answer
        for plan, hidden in zip(plans, states, strict=True):
            caches: Arrays = {}
            for index, call in enumerate(plan):
                if last and not call.wanted:
                    continue
                feeds = _feeds(part, variant, call, caches)
                if segment.source is not None:
                    feeds[HIDDEN] = hidden[index]
                try:
                    found = session.run([spec.name for spec in outputs], feeds)
                except RuntimeError as error:
                    raise FailedError(f"onnxruntime failed in {graph.name}: {one_line(error)}") from error
                named = dict(zip([spec.name for spec in outputs], found, strict=True))
                caches |= {n.replace("present.", "past_key_values."): a for n, a in named.items() if "present." in n}
                hidden[index] = named[result]
        del session
    return [
        [x if answer == "score" else x[0] for x, call in zip(found, plan, strict=True) if call.wanted]
        for found, plan in zip(states, plans, strict=True)
    ]


def _only(part: ir.Model, result: str) -> ir.Model:
    """Keep the outputs that are needed: the result, and the caches of the layer."""
    for value in list(part.graph.outputs):
        if value.name != result and not str(value.name).startswith("present."):
            part.graph.outputs.remove(value)
    return part


def _feeds(part: ir.Model, variant: Variant, call: Call, caches: Arrays) -> Arrays:
    stop = call.start + len(call.ids)
    known = {
        "input_ids": call.ids[None],
        "attention_mask": np.ones((1, stop), np.int64),
        "position_ids": np.arange(call.start, stop)[None],
        "num_logits_to_keep": np.array(0),
    }
    if call.vectors is not None:
        known[EMBEDDINGS] = call.vectors[None]
    feeds: Arrays = {}
    for value in part.graph.inputs:
        name = str(value.name)
        if name.startswith("past_key_values."):
            assert value.dtype is not None  # an input has one
            assert value.shape is not None
            shape = (1, variant.kv_cache.num_key_value_heads, 0, int(str(value.shape[3])))
            feeds[name] = caches.get(name, np.empty(shape, value.dtype.numpy()))[:, :, : call.start]
        elif name in known:
            feeds[name] = known[name]
    return feeds


def _spec(value: ir.Value) -> TensorSpec:
    """Return what `open_session` compares of a tensor, its name; what it is, nobody asks."""
    return TensorSpec(str(value.name), "float32", (), "hidden_state")


class Recorded:
    """Answers calls in their order with logits that were computed before; implements `measure.quality.Measured`."""

    def __init__(self, plans: Sequence[Plan], logits: Sequence[Sequence[np.ndarray]]) -> None:
        self._answers = [
            pair
            for plan, found in zip(plans, logits, strict=True)
            for pair in zip([call.ids for call in plan if call.wanted], found, strict=True)
        ]
        self._next = 0

    def reset(self) -> None:
        """Begin another sequence."""

    def prefill(self, sequences: Sequence[TokenIds], *, all_positions: bool = False) -> list[Logits]:
        """Return the logits of the next call, which must have these tokens."""
        ids, logits = self._answers[self._next]
        assert all_positions
        assert np.array_equal(sequences[0], ids)
        self._next += 1
        return [logits]

    def decode_block(self, token_ids: TokenIds) -> Logits:
        """Return the logits of the next call, likewise."""
        return self.prefill([token_ids], all_positions=True)[0]


def in_pieces(sequences: Sequence[np.ndarray], piece: int) -> list[Plan]:
    """Return plans that feed each sequence in pieces of so many tokens."""
    return [[Call(ids[at : at + piece], at) for at in range(0, len(ids), piece)] for ids in sequences]
