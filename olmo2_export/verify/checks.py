"""What a variant must show besides its logits in every case: calibration that repeats, and quality on text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import onnx_ir as ir

import olmo2_export.catalog as catalog
from olmo2_export.architecture import Operation, operations
from olmo2_export.config import ModelConfig
from olmo2_export.graphs.by_layer import Call, Recorded, in_pieces, logits_by_layer
from olmo2_export.measure.parity import QUALITY, Check, ParityReport, PerplexityChange
from olmo2_export.measure.quality import (
    LONG,
    PIECE,
    Measured,
    gate_of,
    measure_quality,
    perplexity_check,
    quality_check,
    quality_tokens,
    score_check,
    states_check,
)
from olmo2_export.package.trt_variants import default_text
from olmo2_export.quantize.static import static_input_scales
from olmo2_export.truth.layered import LayeredReference
from olmo2_export.truth.torch_layers import reference_logits
from olmo2_export.views.runners import open_all_positions, open_view
from olmo2_export.views.table import View
from olmo2_export.weights.checkpoint import Checkpoint
from runtimes import Package
from runtimes.errors import FailedError
from runtimes.manifest import Variant
from runtimes.ort.open import open_ort
from runtimes.runners.scores import scored_token
from runtimes.sealed import hash_file
from runtimes.targets import Target

SCORED_LENGTH = 64
"""tokens of a sequence that is scored: many short ones say more of scores than few long ones"""
_STATES = 16
"""sequences of that length whose hidden states are compared"""
QUALITY_LENGTH = 256
"""tokens of a sequence on which quality is measured, where the cache holds them"""
_CALIBRATION_RATIO = 1.15  # two steps of clipping; the same tokens, summed in another order, seldom give one


def calibration_checks(package: Package, entry: Variant, checkpoint: Checkpoint, config: ModelConfig) -> list[Check]:
    """Calibrate again where the text is at hand, and compare: quality hardly shows one scale that is off by 2."""
    quantization = entry.quantization
    if quantization is None or not quantization.input_scales:
        return []
    text = default_text(package.folder)
    if quantization.calibration != (None if text is None else hash_file(text).sha256):
        return [Check("calibration", "on a text that is not at hand: not repeated", ())]
    again = static_input_scales(checkpoint, config, entry.precision, text)
    ratios = {name: scale / again[name] for name, scale in quantization.input_scales.items()}
    off = {name: ratio for name, ratio in ratios.items() if not 1 / _CALIBRATION_RATIO < ratio < _CALIBRATION_RATIO}
    failures = [f"{name}: its input scale is {ratio:.2f} x what calibration gives" for name, ratio in off.items()]
    worst = max(max(ratio, 1 / ratio) for ratio in ratios.values())
    found = f"{len(ratios)} input scales repeated, within a factor {worst:.3f}"
    return [Check("calibration", found, tuple(failures[:5]))]


@dataclasses.dataclass(frozen=True)
class _Run:
    """One way of running a variant on text."""

    name: str
    """of its check"""
    opened: AbstractContextManager[Measured]
    alternate: bool = False
    """the decode graph reads every other piece, so that each graph reads what the other wrote"""
    judged: bool = True
    """False: of a quantised KV cache that is not the default, which is said"""


def quality_checks(
    package: Package,
    entry: Variant,
    view: View,
    report: ParityReport,
    checkpoint: Checkpoint,
    config: ModelConfig,
    target: Target,
    *,
    by_layer: bool = False,
) -> tuple[list[Check], PerplexityChange | None]:
    """Measure a variant on held-out text: each graph it has, and both in turns on one cache.

    A quantised variant has the gates of its kind; of any other the perplexity may hardly change.

    Args:
        package: the variant's.
        entry: the variant.
        view: of it, as users run it.
        report: of its cases.
        checkpoint: the original weights.
        config: their shape.
        target: where it runs.
        by_layer: with one layer in memory at a time; the graphs are not run in turns then.

    Returns:
        A check for each, and the change of perplexity of the first; None where it could not be measured.
    """
    states = [] if by_layer else _states_quality(package, entry, view, checkpoint, config, target)
    if config.labels:
        return [_score_quality(package, entry, view, checkpoint, config, target, by_layer=by_layer), *states], None
    length = LONG if entry.kv_cache.quantization is not None else min(report.max_cache_length, QUALITY_LENGTH)
    sequences, origin = quality_tokens(checkpoint, config, length=length)
    wanted = list(reference_logits(checkpoint, config, sequences))
    checks: list[Check] = []
    changes: list[PerplexityChange] = []
    runs = _runs_by_layer(view, package, entry, config, sequences) if by_layer else _runs(package, entry, view, target)
    for run in runs:
        try:
            with run.opened as runner:
                measured = measure_quality(runner, sequences, wanted, origin, alternate=run.alternate)
        except FailedError as error:
            checks.append(Check(run.name, "not measured", (str(error),), QUALITY))
            continue
        tokens = len(sequences[0])
        if entry.quantization is not None:
            check = quality_check(run.name, measured, tokens, gate_of(entry, config))
            checks.append(check if run.judged else _not_judged(check))
        else:
            checks.append(perplexity_check(measured.perplexity, tokens, report.gate))
        changes.append(measured.perplexity)
    return checks + states, changes[0] if changes else None


def _not_judged(check: Check) -> Check:
    """Say what a choice costs that nobody gets who does not ask for it."""
    if not check.failures:
        return check
    return dataclasses.replace(check, found=f"{check.found}; not the default: {'; '.join(check.failures)}", failures=())


def _states_quality(
    package: Package, entry: Variant, view: View, checkpoint: Checkpoint, config: ModelConfig, target: Target
) -> list[Check]:
    """Compare hidden states on held-out text with PyTorch's in float32."""
    if not config.hidden_states:
        return []
    length = min(SCORED_LENGTH, entry.kv_cache.max_cache_length)
    sequences, origin = quality_tokens(checkpoint, config, length=length, most=_STATES * length)
    wanted = LayeredReference(checkpoint, config, "fp32").logits_and_states(
        sequences, [np.zeros(1, np.int64)] * len(sequences), config.hidden_states
    )[1]
    try:
        with open_view(package, view, target) as runner:
            found = []
            for ids in sequences:
                runner.reset()
                found += runner.prefill_hidden([ids])
    except FailedError as error:
        return [Check("quality of hidden states", "not measured", (str(error),), QUALITY)]
    limit = catalog.find(entry.name).weights.score_error
    return [
        states_check(number, np.concatenate([row[number] for row in found]), np.concatenate(truth), limit, origin)
        for number, truth in zip(config.hidden_states, wanted, strict=True)
    ]


def _score_quality(
    package: Package,
    entry: Variant,
    view: View,
    checkpoint: Checkpoint,
    config: ModelConfig,
    target: Target,
    *,
    by_layer: bool,
) -> Check:
    """Compare a classifier's scores of held-out text with PyTorch's in float32."""
    length = min(SCORED_LENGTH, entry.kv_cache.max_cache_length)
    sequences, origin = quality_tokens(checkpoint, config, length=length)
    pad = config.pad_token_id
    wanted = [
        rows[scored_token(ids, pad)]
        for ids, rows in zip(sequences, reference_logits(checkpoint, config, sequences), strict=True)
    ]
    try:
        if by_layer:
            plans = [[Call(ids, 0)] for ids in sequences]
            found = logits_by_layer(view.graph, view.variant, operations(config), plans, view.model)
            scores = np.concatenate([answers[0] for answers in found])
        else:
            with open_view(package, view, target) as runner:
                scores = np.concatenate([runner.score([ids]) for ids in sequences])
    except FailedError as error:
        return Check("quality", "not measured", (str(error),), QUALITY)
    return score_check(scores, np.stack(wanted), catalog.find(entry.name).weights.score_error, origin)


def _runs(package: Package, entry: Variant, view: View, target: Target) -> Iterator[_Run]:
    if entry.kv_cache.form == "static" and not target.on_gpu:
        yield _Run("quality", _all_positions(package, entry))
    elif entry.quantization is None or catalog.is_for_devices(entry.name) or target.on_gpu:
        yield _Run("quality", open_view(package, view, target))
    else:
        decode = dataclasses.replace(entry, prefill=None)
        yield _Run("quality", open_ort(package.folder, decode, package.model, None))
        if entry.prefill is not None:
            for name, alternate in (("int8 quality", False), ("quality of both in turns", True)):
                yield _Run(name, open_ort(package.folder, entry, package.model, None), alternate)
        for other in entry.each_cache[1:]:
            cache = other.kv_cache
            opened = open_ort(package.folder, other, package.model, None)
            yield _Run(f"quality, {cache.name} cache", opened, other.prefill is not None, cache.quantization is None)


def _runs_by_layer(
    view: View, package: Package, entry: Variant, config: ModelConfig, sequences: Sequence[np.ndarray]
) -> Iterator[_Run]:
    rows = operations(config)
    if entry.quantization is None or catalog.is_for_devices(entry.name):
        yield _Run("quality", _recorded(view.graph, view.variant, rows, sequences, view.model))
        return
    yield _Run("quality", _recorded(package.folder / entry.graph, entry, rows, sequences))
    if entry.prefill is not None:
        yield _Run("int8 quality", _recorded(package.folder / entry.prefill.graph, entry, rows, sequences))


@contextmanager
def _recorded(
    graph: Path,
    entry: Variant,
    rows: Sequence[Operation],
    sequences: Sequence[np.ndarray],
    model: ir.Model | None = None,
) -> Iterator[Measured]:
    plans = in_pieces(sequences, PIECE)
    yield Recorded(plans, logits_by_layer(graph, entry, rows, plans, model))


@contextmanager
def _all_positions(package: Package, entry: Variant) -> Iterator[Measured]:
    yield open_all_positions(package, entry)
