"""LoRA adapters that a package takes at run time, in mixed batches, against PyTorch with the same adapter merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial

import numpy as np
import torch

from olmo2_export.config import ModelConfig
from olmo2_export.graphs.lazy_tensors import LazyTensors
from olmo2_export.measure.parity import Check
from olmo2_export.truth.layered import LayeredReference
from olmo2_export.views.runners import open_form
from olmo2_export.views.table import View, has_rounded_form
from olmo2_export.weights.checkpoint import Checkpoint
from olmo2_export.weights.lora import Adapter
from olmo2_export.weights.merged import switchable_adapters
from olmo2_export.weights.source import Replaced
from olmo2_export.weights.stored_names import stored_weight
from runtimes import Package, Runner, open_runner
from runtimes.errors import FailedError
from runtimes.ort.adapters import Adapters
from runtimes.targets import Target, find_target

PROMPT, TOKENS = 5, 21
"""tokens of a row that are prefilled, fewer than a prefill graph is for; and all, the others decoded one by one"""
WORSE = 3.0
"""most: a row's error, in units of that of the same row without an adapter"""
FLOOR = 1e-4
"""of the logits' size: an error that is none whatever the other is"""


def adapter_checks(
    package: Package,
    view: View,
    checkpoint: Checkpoint,
    config: ModelConfig,
    sequence: np.ndarray,
    target: Target | None = None,
) -> list[Check]:
    """Run one text in a batch of a row without an adapter, rows with each, and one without again.

    Adapters that are swapped between rows, scaled otherwise, or of another layer are off by what an adapter does, which
    is far more than rounding.

    Args:
        package: with adapters or without.
        view: of the decode graph, its weights dequantised; the package's own graph is run, but where the CPU has no
            kernels for it.
        checkpoint: the reference weights, and the adapters.
        config: their shape.
        sequence: int64 ids.
        target: where it runs; None: onnxruntime on the CPU.

    Returns:
        A check for each adapter.
    """
    adapters = switchable_adapters(checkpoint)
    if not adapters or config.labels:
        return []
    ids = sequence[:TOKENS]
    want: dict[str | None, np.ndarray] = {None: _logits(checkpoint, config, view.replaced, ids)}
    for adapter in adapters:
        want[adapter.name] = _logits(checkpoint, config, _adapted(view, checkpoint, config, adapter), ids)
    rows = (None, *(adapter.name for adapter in adapters), None)
    try:
        found = _run(package, view, ids, rows, target or find_target("ort"))
    except FailedError as failed:
        return [Check("adapters", "not measured", (str(failed),))]
    own = max(_distance(logits, want[None]) for logits, name in zip(found, rows, strict=True) if name is None)
    checks = []
    for logits, name in zip(found, rows, strict=True):
        if name is None:
            continue
        error, effect = _distance(logits, want[name]), _distance(want[None], want[name])
        limit = max(WORSE * own, FLOOR)
        failures = () if error <= limit else (f"off by {error:.1e} of the logits, at most {limit:.1e}",)
        said = f"{error:.1e} of the logits, {own:.1e} without it; it changes them by {effect:.1e}"
        checks.append(Check(f"adapter {name}", said, failures))
    return checks


def _logits(
    checkpoint: Checkpoint, config: ModelConfig, weights: Mapping[str, torch.Tensor], ids: np.ndarray
) -> np.ndarray:
    """Return PyTorch's logits of every position from the last of the prompt on, [n, V]."""
    (logits,) = LayeredReference(checkpoint, config, "fp32", weights).logits([ids])
    return logits[PROMPT - 1 :]


def _adapted(view: View, checkpoint: Checkpoint, config: ModelConfig, adapter: Adapter) -> Mapping[str, torch.Tensor]:
    """Return the view's weights, those that the adapter has changed by it."""
    source = Replaced(checkpoint, view.replaced)

    def adapted(name: str) -> torch.Tensor:
        weight = stored_weight(source, config, name)
        return adapter.change(name)(weight, slice(None)).float() if name in adapter.changed else weight

    return LazyTensors({name: partial(adapted, name) for name in {*view.replaced, *adapter.changed}})


def _run(package: Package, view: View, ids: np.ndarray, rows: Sequence[str | None], target: Target) -> list[np.ndarray]:
    """Feed one text to every row, its first tokens at once; return per row the same logits as `_logits`."""
    with _opened(package, view, len(rows), target) as runner:
        found = [np.stack(runner.prefill([ids[:PROMPT]] * len(rows), adapter=rows))[:, -1]]
        found += [runner.decode([token] * len(rows)) for token in ids[PROMPT:]]
    return list(np.stack(found, axis=1))


def _opened(package: Package, view: View, slots: int, target: Target) -> AbstractContextManager[Runner]:
    name = view.variant.name
    if target.on_gpu or not has_rounded_form(package.variant(name)):
        return open_runner(package, variant=name, backend=target.backend, device=target.device, max_slots=slots)
    files = {adapter: entry.file for adapter, entry in package.manifest.adapters.items()}
    adapters = Adapters(package.folder, files, view.variant, package.check)
    return open_form(view.graph, view.model, view.variant, package.model, max_slots=slots, adapters=adapters)


def _distance(logits: np.ndarray, want: np.ndarray) -> float:
    """Return the root of the mean squared difference, in units of the logits' own size."""
    off = np.sqrt(np.mean(np.square(logits.astype(np.float64) - want)))
    return float(off / np.sqrt(np.mean(np.square(want, dtype=np.float64))))
