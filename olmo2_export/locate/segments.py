"""Run a graph segment by segment on a sequence, in several calls, and give its tensors under their canonical names.

The calls are a prefill, a chunk and a single token, the later ones on the cache that the graph itself has written; each
segment starts from what the one before gave. So the graph computes what it computes as a whole, with the weights of one
segment in memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from olmo2_export.architecture import Operation
from olmo2_export.config import ModelConfig
from olmo2_export.graphs.taps import HIDDEN, Segment, cut, find_segments
from olmo2_export.views.openers import Arrays, Opener
from runtimes.errors import PackageError
from runtimes.manifest import EMBEDDINGS, Variant

_VECTOR = 0.02  # the size of embeddings in trained models
_SHORTER = 3  # tokens


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows that come to the end of a graph together."""

    ids: np.ndarray
    """int64 [B, S]"""
    hidden: np.ndarray
    """[B, S, hidden]: what the last layer gives"""
    asked: tuple[int, ...]
    """per row the token that is asked for, where a graph gives the answer of one"""


@dataclasses.dataclass(frozen=True)
class Calls:
    """A sequence, and how it is cut into calls."""

    ids: np.ndarray
    """int64 [S]"""
    sizes: tuple[int, ...]
    """tokens of each call"""
    unanswered: int = 2
    """tokens behind the one whose logits are asked for, where a graph gives those of one and there are so many"""
    vectors: np.ndarray | None = None
    """float32 [S, hidden]: those in the place of tokens with a negative id; None: there are none"""
    pad: int | None = None
    """the id of padding, where a classifier goes by it"""

    def spans(self) -> Iterator[tuple[int, int]]:
        """Return where each call starts and ends."""
        end = 0
        for size in self.sizes:
            yield end, end + size
            end += size

    def logit_index(self, size: int) -> int:
        """Return the token of a call whose logits are asked for, where a graph gives one: not the last, if it can."""
        return max(size - 1 - self.unanswered, 0)

    def batch(self, hidden: np.ndarray) -> Batch:
        """Return a batch of two rows: what the first call makes of its tokens, [1, S, hidden], and the same backwards.

        The second is asked of an earlier token, where a graph can tell.
        """
        size = hidden.shape[1]
        last = self.logit_index(size)
        asked = last, max(last - _SHORTER, 0) if self.unanswered else last
        ids = np.stack([self.ids[:size]] * 2)
        if self.pad is not None:
            ids[1, asked[1] + 1 :] = self.pad
        return Batch(ids, np.concatenate([hidden, hidden[:, ::-1]]), asked)


def random_calls(config: ModelConfig, sizes: tuple[int, ...], seed: int, *, vectors: bool) -> Calls:
    """Return a sequence of random ids; to a classifier each call ends with padding, which it must pass over.

    Args:
        config: of the package.
        sizes: tokens of each call.
        seed: of the ids.
        vectors: every third token is a vector.
    """
    calls = _random_tokens(config, sizes, seed)
    if not vectors:
        return calls
    given = np.random.default_rng(seed).normal(0, _VECTOR, (len(calls.ids), config.hidden_size)).astype(np.float32)
    places = np.arange(len(calls.ids)) % 3 == 1
    if config.labels:
        places &= calls.ids != config.pad_token_id
    calls.ids[places] = -1
    return dataclasses.replace(calls, vectors=given)


def _random_tokens(config: ModelConfig, sizes: tuple[int, ...], seed: int) -> Calls:
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, sum(sizes), dtype=np.int64)
    calls = Calls(ids, sizes)
    if not config.labels:
        return calls
    pad = config.pad_token_id
    if pad is None or not 0 <= pad < config.vocab_size:
        return dataclasses.replace(calls, unanswered=0)
    ids[ids == pad] = (pad + 1) % config.vocab_size
    for start, stop in calls.spans():
        ids[start + 1 + calls.logit_index(stop - start) : stop] = pad
    return dataclasses.replace(calls, pad=pad)


def run_segments(
    model: ir.Model,
    variant: Variant,
    rows: Sequence[Operation],
    calls: Calls,
    opener: Opener,
    *,
    first_call_only: bool = False,
) -> Iterator[tuple[Segment, list[Arrays]]]:
    """Run all segments, one after the other.

    Args:
        model: the graph, in any form that the opener runs; left as it is.
        variant: its KV cache's heads and form.
        rows: of the model.
        calls: what is fed.
        opener: what runs a segment.
        first_call_only: the graph has been through `first_call` and takes no cache; one call.

    Raises:
        PackageError: a layer reads the cache of another, or the pieces do not run by themselves.

    Yields:
        The segment, and per call its tensors by canonical name; `HIDDEN` is what it starts from.
    """
    hidden: list[np.ndarray] = []
    for segment in find_segments(model, rows):
        part = cut(model, segment, hidden[0].shape if hidden else None)
        _check_caches(part, segment)
        found: list[Arrays] = []
        following: list[np.ndarray] = []
        caches: Arrays = {}
        with opener(part) as run:
            for index, (start, stop) in enumerate(calls.spans()):
                feeds = _feeds(part, variant, calls, start, stop, caches, first_call_only)
                if segment.source is not None:
                    feeds[HIDDEN] = hidden[index]
                outputs = run({str(v.name): feeds[str(v.name)] for v in part.graph.inputs})
                caches = {n.replace("present.", "past_key_values."): a for n, a in outputs.items() if "present." in n}
                if segment.source is not None:
                    outputs |= {segment.source: hidden[index]}
                taps = {name: outputs[value] for name, value in segment.taps.items()}
                if segment.source is not None:
                    taps[HIDDEN] = hidden[index]
                if segment.result is not None:
                    following.append(outputs[segment.result])
                found.append(taps)
        hidden = following
        yield segment, found


def run_batch(model: ir.Model, segment: Segment, batch: Batch, opener: Opener) -> np.ndarray:
    """Run the last segment on several rows; return the input of its norm, [B, n, hidden] or [B, hidden].

    Args:
        model: as `run_segments`.
        segment: its last.
        batch: what is fed.
        opener: what runs it.
    """
    count, size, width = batch.hidden.shape
    part = cut(model, segment, ("batch_size", "sequence_length", width))
    feeds = {
        "input_ids": batch.ids,
        "attention_mask": np.ones((count, size), np.int64),
        "logit_index": np.array(batch.asked)[:, None],
        "num_logits_to_keep": np.array(0),
        HIDDEN: batch.hidden,
    }
    with opener(part) as run:
        outputs = run({str(v.name): feeds[str(v.name)] for v in part.graph.inputs})
    taken = segment.taps["model.norm_input"]
    return batch.hidden if taken == segment.source else outputs[taken]


def _check_caches(part: ir.Model, segment: Segment) -> None:
    names = [str(value.name) for value in part.graph.inputs]
    for name in names:
        if name.startswith("past_key_values.") and name.split(".")[1] != str(segment.layer):
            raise PackageError(f"the attention of layer {segment.layer} reads {name}, the KV cache of another layer")


def _feeds(
    part: ir.Model, variant: Variant, calls: Calls, start: int, stop: int, caches: Arrays, first_call_only: bool
) -> Arrays:
    """Return everything that a graph of any form can take in this call."""
    size = stop - start
    feeds = {
        "input_ids": calls.ids[None, start:stop],
        "attention_mask": np.ones((1, stop), np.int64),
        "position_ids": np.arange(start, stop)[None],
        "write_indices": np.array([start]),
        "logit_index": np.array([[calls.logit_index(size)]]),
        "num_logits_to_keep": np.array(0),
    }
    vectors = next((v for v in part.graph.inputs if v.name == EMBEDDINGS), None)
    if vectors is not None and vectors.shape is not None:
        none = np.zeros((1, size, int(str(vectors.shape[2]))), np.float32)
        feeds[EMBEDDINGS] = none if calls.vectors is None else calls.vectors[None, start:stop]
    if first_call_only:
        return feeds
    spec = variant.kv_cache
    length = spec.max_cache_length if spec.form == "static" else 0
    for value in part.graph.inputs:
        name = str(value.name)
        if name.startswith("past_key_values."):
            assert value.dtype is not None  # an input has one
            width = int(str(value.shape[3])) if value.shape is not None else spec.head_dim
            empty = np.zeros((1, spec.num_key_value_heads, length, width), value.dtype.numpy())
            feeds[name] = caches.get(name, empty)
    return feeds


def joined(found: Sequence[Arrays], name: str) -> np.ndarray:
    """Return a tensor of all calls, along the tokens: axis 1 of three, axis 2 of four."""
    arrays = [call[name] for call in found]
    return np.concatenate(arrays, axis=2 if arrays[0].ndim == 4 else 1)
