"""Open a view of a variant as a runner, so that it is fed as users feed the package."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import onnx_ir as ir

from olmo2_export.measure.quality import Measured
from olmo2_export.stored_graph import load_graph
from olmo2_export.views.static_forms import all_positions, rounded_form
from olmo2_export.views.table import View, has_rounded_form, in_float32
from runtimes import Device, Package, Runner, open_runner
from runtimes.errors import FailedError, UsageError
from runtimes.manifest import ModelSpec, Variant
from runtimes.ort.adapters import Adapters
from runtimes.ort.devices import find_device
from runtimes.ort.open import open_ort
from runtimes.ort.session import one_line, open_session
from runtimes.ort.shared import SharedRunner
from runtimes.ort.static_session import OrtStaticSession
from runtimes.runners.runner import Logits, TokenIds
from runtimes.runners.slots import DEFAULT_SLOTS
from runtimes.runners.static import StaticRunner
from runtimes.targets import Target

Arrays: TypeAlias = dict[str, np.ndarray]


class Stepped(NamedTuple):
    """What a call of a graph gives."""

    answer: np.ndarray
    """logits float32 [B, S, V], of a classifier scores [B, labels]"""
    states: tuple[np.ndarray, ...]
    """its hidden states, float32 [B, S, hidden] each, in the order of their numbers"""
    cache: Arrays
    """by past's names"""


class Step(Protocol):
    """One call of a graph."""

    def __call__(
        self, ids: np.ndarray, mask: np.ndarray, cache: Mapping[str, np.ndarray], vectors: np.ndarray | None = None
    ) -> Stepped:
        """Run it.

        Args:
            ids: of new tokens, int64 [B, S]; negative where a vector stands.
            mask: int64 [B, P + S].
            cache: as the call before gave it; {} at first.
            vectors: float32 [B, S, hidden]; None: there are none.
        """
        ...


@contextmanager
def open_view(package: Package, view: View, target: Target) -> Iterator[Runner]:
    """Open a view.

    Args:
        package: the view's.
        view: one of `variant_views` there.
        target: where it runs.

    Raises:
        Olmo2ExportError: as `open_runner`.
    """
    if not view.as_stored:
        with open_form(view.graph, view.model, view.variant, package.model, target.device) as runner:
            yield runner
    elif view.variant == package.variant(view.variant.name).with_cache(None):
        name = view.variant.name
        with open_runner(package, variant=name, backend=target.backend, device=target.device) as runner:
            yield runner
    else:  # one of its two graphs alone
        with open_ort(package.folder, view.variant, package.model, None) as runner:
            yield runner


@contextmanager
def open_form(
    graph: Path,
    form: ir.Model,
    variant: Variant,
    model: ModelSpec,
    device: Device = "cpu",
    *,
    max_slots: int = DEFAULT_SLOTS,
    adapters: Adapters | None = None,
) -> Iterator[Runner]:
    """Run a form of a stored graph that is made in memory.

    Args:
        graph: the stored one; the weights stay in its files.
        form: of it.
        variant: its cache as the form has it.
        model: the model's shape.
        device: of onnxruntime.
        max_slots: sequences at once; of a form with a shared cache.
        adapters: that it takes at run time; likewise.

    Raises:
        PackageError: onnxruntime cannot load it.
        BackendError: the device is not there.
    """
    session = _session(graph, form, variant, device)
    if variant.kv_cache.form == "static":
        memory = find_device(device).memory
        with StaticRunner(OrtStaticSession(session, variant, memory=memory), variant, model) as static:
            yield static
    else:
        with SharedRunner(session, None, variant, model, max_slots, adapters=adapters) as shared:
            yield shared


@contextmanager
def open_measured(package: Package, entry: Variant) -> Iterator[Measured]:
    """Open what the CPU can run of a variant: its graph, or where that has no kernels there its rounded form.

    Args:
        package: the variant's.
        entry: the variant. Of a static-cache graph all positions are given in one call.

    Raises:
        PackageError: the graph does not load.
    """
    package.provide(entry.files)
    if entry.kv_cache.form == "static":
        yield open_all_positions(package, entry)
    elif has_rounded_form(entry):
        graph = package.folder / entry.graph
        with open_form(graph, rounded_form(load_graph(graph)), in_float32(entry), package.model) as rounded:
            yield rounded
    else:
        with open_runner(package, variant=entry.name, device="cpu") as runner:
            yield runner


def open_step(view: View) -> Step:
    """Run a view on the CPU as other runtimes do: padding and all in one call, present values as the past of the next.

    Raises:
        PackageError: the graph does not load.
    """
    variant, spec = view.variant, view.variant.kv_cache
    session = _session(view.graph, view.model, variant, "cpu")
    names = [variant.name_of(variant.answer), *variant.hidden_states.values(), *variant.caches.values()]

    def run(
        ids: np.ndarray, mask: np.ndarray, cache: Mapping[str, np.ndarray], vectors: np.ndarray | None = None
    ) -> Stepped:
        empty = np.zeros((len(ids), spec.num_key_value_heads, 0, spec.stored_head_dim), np.dtype(spec.dtype))
        feeds = {
            "token_ids": ids,
            "attention_mask": mask,
            "position_ids": np.maximum(mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :],
            "past": empty,
        }
        if vectors is not None:
            feeds["embeddings"] = vectors
        given = {t.name: feeds[t.role] for t in variant.inputs if t.role in feeds} | dict(cache)
        try:
            answer, *rest = session.run(names, given)
        except RuntimeError as error:
            raise FailedError(f"onnxruntime failed in {variant.graph}: {one_line(error)}") from error
        count = len(variant.hidden_states)
        return Stepped(answer, tuple(rest[:count]), dict(zip(variant.caches, rest[count:], strict=True)))

    return run


def open_whole(view: View) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Run a view of a classifier as `open_step` does, without any cache before.

    Returns:
        A function of ids and mask, int64 [B, S], that gives the graph's scores, float32 [B, labels].

    Raises:
        PackageError: the graph does not load.
    """
    step = open_step(view)
    return lambda ids, mask: step(ids, mask, {}).answer


def open_all_positions(package: Package, entry: Variant) -> AllPositions:
    """Run the rounded form of a static-cache graph on the CPU, all positions in one call.

    Raises:
        PackageError: the graph does not load.
    """
    graph = package.folder / entry.graph
    inputs = tuple(spec for spec in entry.inputs if spec.name != "logit_index")
    outputs = tuple(spec for spec in entry.outputs if not spec.name.startswith("top_"))
    variant = dataclasses.replace(in_float32(entry), inputs=inputs, outputs=outputs)
    return AllPositions(_session(graph, all_positions(rounded_form(load_graph(graph))), variant, "cpu"), variant)


class AllPositions:
    """Feeds one sequence to a static-cache graph that gives all positions; implements `quality.Measured`."""

    def __init__(self, session: Any, variant: Variant) -> None:
        self._session = session
        spec = variant.kv_cache
        shape = (1, spec.num_key_value_heads, spec.max_cache_length, spec.head_dim)
        self._empty = np.zeros(shape, np.float32)
        self._vectors = {t.name: int(t.shape[2]) for t in variant.inputs if t.role == "embeddings"}
        self._names = [f"{n}.{kind}" for n in range(spec.num_layers) for kind in ("key", "value")]
        self.reset()

    def reset(self) -> None:
        self._length = 0
        self._caches = dict.fromkeys(self._names, self._empty)

    def prefill(self, sequences: Sequence[TokenIds], *, all_positions: bool = False) -> list[Logits]:
        if len(sequences) != 1 or not all_positions:
            raise UsageError("this graph is for one sequence, and gives all of its positions")
        feeds = {
            "input_ids": np.asarray(sequences[0], np.int64)[None],
            "write_indices": np.array([self._length], np.int64),
            **{f"past_key_values.{name}": array for name, array in self._caches.items()},
            **{n: np.zeros((1, len(sequences[0]), size), np.float32) for n, size in self._vectors.items()},
        }
        wanted = ["logits", *(f"present.{name}" for name in self._names)]
        logits, *presents = self._session.run(wanted, feeds)
        self._caches = dict(zip(self._names, presents, strict=True))
        self._length += len(sequences[0])
        return [logits[0]]

    def decode_block(self, token_ids: TokenIds) -> Logits:
        return self.prefill([token_ids], all_positions=True)[0]


def _session(graph: Path, form: ir.Model, variant: Variant, device: Device) -> Any:
    proto = ir.to_proto(form).SerializeToString()
    return open_session(graph, variant, None, proto, device=find_device(device))
