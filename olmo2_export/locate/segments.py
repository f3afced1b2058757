"""Run a graph segment by segment on a sequence, in several calls, and give its tensors under their canonical names.

The calls are a prefill, a chunk and a single token, the later ones on the cache that the graph itself has written; each
segment starts from what the one before gave. So the graph computes what it computes as a whole, with the weights of one
segment in memory.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from olmo2_export.architecture import Operation
from olmo2_export.debug.debug import tensorrt_runner
from olmo2_export.graphs.files import save_graph
from olmo2_export.locate.taps import HIDDEN, Segment, cut, find_segments
from olmo2_export.views.first_call import first_call
from runtimes import Device
from runtimes.errors import PackageError
from runtimes.manifest import TensorSpec, Variant
from runtimes.ort.devices import find_device
from runtimes.ort.session import open_session
from runtimes.trt.nvidia import TensorRTBackend

Arrays = dict[str, np.ndarray]
Run = Callable[[Mapping[str, np.ndarray]], Arrays]
"""inputs by name -> outputs by name"""
Opener = Callable[[ir.Model], AbstractContextManager[Run]]
"""makes a segment ready to run"""


@dataclasses.dataclass(frozen=True)
class Calls:
    """A sequence, and how it is cut into calls."""

    ids: np.ndarray
    """int64 [S]"""
    sizes: tuple[int, ...]
    """tokens of each call"""

    def spans(self) -> Iterator[tuple[int, int]]:
        """Return where each call starts and ends."""
        end = 0
        for size in self.sizes:
            yield end, end + size
            end += size

    def logit_index(self, size: int) -> int:
        """Return the token of a call whose logits are asked for, where a graph gives one: not the last, if it can."""
        return max(size - 3, 0)


def onnxruntime_opener(graph: Path, variant: Variant, device: Device = "cpu") -> Opener:
    """Return what opens segments on a provider of onnxruntime; the weights stay in the graph's file.

    Raises:
        BackendError: the device is not there.
    """

    @contextmanager
    def open_segment(part: ir.Model) -> Iterator[Run]:
        inputs, outputs = (tuple(_spec(v) for v in values) for values in (part.graph.inputs, part.graph.outputs))
        entry = dataclasses.replace(variant, inputs=inputs, outputs=outputs)
        proto = ir.to_proto(part).SerializeToString()
        session = open_session(graph, entry, None, proto, device=find_device(device))
        names = [spec.name for spec in outputs]
        yield lambda feeds: dict(zip(names, session.run(names, dict(feeds)), strict=True))

    return open_segment


def _spec(value: ir.Value) -> TensorSpec:
    """Return what `open_session` compares of a tensor, its name; what it is, nobody asks."""
    return TensorSpec(str(value.name), "float32", (), "hidden_state")


def tensorrt_opener(backend: TensorRTBackend, runner: Callable[[Path], Any] | None = None) -> Opener:
    """Return what compiles segments of a graph's first call for the GPU at hand.

    Args:
        backend: which TensorRT.
        runner: path of an ONNX file -> Polygraphy's runner of it; None: that TensorRT's.

    Raises:
        BackendError: the library is not installed, or there is no GPU.
    """
    make = runner or tensorrt_runner(backend)

    @contextmanager
    def open_segment(part: ir.Model) -> Iterator[Run]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "segment.onnx"
            save_graph(part, path)
            with make(path) as running:
                yield lambda feeds: {k: np.array(v) for k, v in running.infer(dict(feeds)).items()}

    return open_segment


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


def _check_caches(part: ir.Model, segment: Segment) -> None:
    names = [str(value.name) for value in part.graph.inputs]
    for name in names:
        if name.startswith("past_key_values.") and name.split(".")[1] != str(segment.layer):
            raise PackageError(f"the attention of layer {segment.layer} reads {name}, the KV cache of another layer")


def one_call(model: ir.Model, tokens: int) -> ir.Model:
    """Return a static-cache graph at its first call, which knows nothing of a cache that is written in place."""
    form = model.clone()
    first_call(form, tokens)
    return form


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
