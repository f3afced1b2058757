"""Verify one variant: each of its views against PyTorch, then what it stores, then what its weights cost.

| part          | what                                             | against                       | gate        |
|---------------|--------------------------------------------------|-------------------------------|-------------|
| cases, greedy | the first view, in all ways of `feeds`           | PyTorch: see `views.table`    | of the view |
| cases         | the other views; a mode bears its view's name    | the same                      | of the view |
| portable ...  | the graph for other runtimes, as in `portable`   | the same                      | of the view |
| cache N ...   | the graphs with another KV cache than by default | the same                      | of the view |
| hidden, ...   | what `beside` asks: hidden states, embeddings    | the same                      | of the view |
| graph, ...    | of a classifier: padded batches, without runner  | transformers' own choice      | of the view |
| weights ...   | `views.weight_checks`                            | the checkpoint, the manifest  | there       |
| calibration   | scales of inputs, calibrated again               | the manifest                  | 1.15 x      |
| quality       | the graph as users run it, on held-out text      | the checkpoint in float32     | quality     |
| cache scales  | those in each graph with a quantised cache       | the manifest                  | equal       |

The exact view finds bugs that no measure of quality shows, such as a norm ignored, even where rounding costs so much
that no other error is seen behind it; quality is what users get. A float16 graph on the CPU says nothing of overflows
on a GPU: the operators of this one sum in float32 there, see `graphs/device.py`; `verify --device cuda` shows it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from functools import partial

import numpy as np
import torch

import olmo2_export.catalog as catalog
from olmo2_export.architecture import operations
from olmo2_export.config import ModelConfig, config_of
from olmo2_export.fp16.simulate import simulated_answers
from olmo2_export.fp16.values import islands_of
from olmo2_export.measure.parity import CaseResult, ParityReport
from olmo2_export.truth.layered import LayeredReference
from olmo2_export.truth.reference import open_reference
from olmo2_export.verify.adapters import adapter_checks
from olmo2_export.verify.beside import HALVES, Mixed, ask_by_layer, ask_reference, pooled_states
from olmo2_export.verify.by_layer import coverage, coverage_of_whole, feed_by_layer, runs_by_layer
from olmo2_export.verify.checks import calibration_checks, quality_checks
from olmo2_export.verify.measure import (
    LONGEST,
    Draws,
    Truth,
    ask_pytorch,
    compare_fed,
    compare_padded,
    draw_by_layer,
    draw_logits,
    feed,
    measure_runner,
    report_of,
)
from olmo2_export.verify.portable import feed_portable
from olmo2_export.views.runners import open_step, open_view, open_whole
from olmo2_export.views.table import View, cache_views, portable_views, variant_views
from olmo2_export.views.weight_checks import check_cache_scales, weight_checks
from olmo2_export.weights.checkpoint import Checkpoint
from olmo2_export.weights.source import Replaced, WeightSource
from olmo2_export.weights.stored_names import EMBEDDING
from runtimes.manifest import Variant
from runtimes.package import AnyPackage, open_package
from runtimes.targets import Target, find_target

WITH_ISLANDS = "this project's layers, rounded as transformers rounds but for the float32 islands"
"""what gives the unit of error where transformers in float16 overflows"""


def measure_variant(
    package: AnyPackage,
    name: str,
    checkpoint: Checkpoint,
    *,
    truth: Truth | None = None,
    target: Target | None = None,
    longest: int = LONGEST,
    by_layer: str = "",
) -> ParityReport:
    """Run a variant through every case and check.

    Args:
        package: the package folder, or one that is open.
        name: of the variant.
        checkpoint: the reference weights.
        truth: what `ask_pytorch` found of the checkpoint itself, at the variant's precision; needed where its weights
            are not quantised.
        target: where it runs; None: onnxruntime on the CPU.
        longest: tokens of the longest rows, where the cache holds more.
        by_layer: why layers are run one at a time; empty: they are not.

    Raises:
        IntegrityError: the variant's files changed.
        PackageError: its graph is not one of this exporter.
        BackendError: the device is not there.
    """
    opened, target = open_package(package), target or find_target("ort")
    entry = opened.variant(name)
    opened.check([*entry.files, *([entry.portable.graph] if entry.portable else [])])
    config = config_of(checkpoint.folder, opened.model)
    views = variant_views(opened, entry, checkpoint, config, target)
    as_run = views[-1]
    views = _compared(views, entry)
    portable = [] if target.on_gpu else portable_views(opened, entry, views)
    others = [] if target.on_gpu else cache_views(opened, entry, views)
    views = [*views[:2], *portable, *views[2:]]
    for other in others:  # behind those that are compared with the same
        last = max(index for index, view in enumerate(views) if view.replaced is other.replaced)
        views.insert(last + 1, other)
    capacity = min(entry.kv_cache.max_cache_length, longest)
    asked: tuple[Mapping[str, torch.Tensor], Truth] | None = None
    report: ParityReport | None = None
    cases: list[CaseResult] = []
    owns: dict[tuple[int, int], list[np.ndarray]] = {}
    for view in views:
        if not view.replaced:
            assert truth is not None  # its precision is among those asked for
            found = truth
        elif asked is not None and asked[0] is view.replaced:
            found = asked[1]
        else:
            precisions = {v.precision for v in views if v.replaced is view.replaced and not v.rounding}
            found = ask_pytorch(
                opened, checkpoint, precisions, capacity, weights=view.replaced, by_layer=bool(by_layer)
            )
            asked = view.replaced, found
        arithmetic = id(view.replaced), id(view.rounding)
        if arithmetic not in owns:
            owns[arithmetic] = _own_logits(view, found, entry, checkpoint, config, by_layer=bool(by_layer))
        own = owns[arithmetic]
        draws = _draws(view, found, checkpoint, by_layer=bool(by_layer))
        if by_layer and runs_by_layer(view, target):
            more = compare_fed(
                partial(feed_by_layer, view, operations(config), found), found, found.exact, own, view.gate, draws
            )
            said = coverage(by_layer, config)
            if report is None:
                sha256, limit = opened.files_of(entry)[entry.graph].sha256, entry.kv_cache.max_cache_length
                report = report_of(found, view.gate, more, [], name, entry.precision, sha256, limit, coverage=said)
                cases += more
            else:
                cases += _labelled(view, more)
            continue
        if view in portable:
            pad = config.pad_token_id if config.labels else None
            fed = partial(feed_portable, open_step(view), found.sequences, found.capacity, found.beside, pad)
            cases += _labelled(view, compare_fed(fed, found, found.exact, own, view.gate, draws))
        else:
            with open_view(opened, view, target) as runner:
                if report is None:
                    sha256 = opened.files_of(entry)[entry.graph].sha256
                    report = measure_runner(
                        runner, found, own, view.gate, draws, name, entry.precision, sha256, target.backend
                    )
                    if by_layer:
                        report = dataclasses.replace(report, coverage=coverage_of_whole(by_layer, config))
                    cases += report.cases
                else:
                    cases += _labelled(view, feed(runner, found, found.exact, own, view.gate, draws))
        if found.beside.padded and view.variant.kv_cache.form != "static" and not target.on_gpu:
            left = view.variant.kv_cache.form == "concat"
            whole = open_whole(view)
            more = compare_padded(whole, found, found.exact, own, view.gate, draws, left=left)
            cases += more if view is views[0] else _labelled(view, more)
    assert report is not None  # there is a view of every variant
    checks = weight_checks(opened, entry, checkpoint, config)
    checks += calibration_checks(opened, entry, checkpoint, config)
    quality, change = quality_checks(
        opened,
        entry,
        as_run,
        report,
        checkpoint,
        config,
        target,
        by_layer=bool(by_layer) and runs_by_layer(as_run, target),
    )
    checks += quality
    if not target.needs_engine:
        decode = next(view for view in views if not view.label.startswith("int8"))
        checks += adapter_checks(opened, decode, checkpoint, config, found.sequences[0], target)
    if any(own.kv_cache.quantization is not None for own in entry.each_cache):
        checks.append(check_cache_scales(opened, entry))
    if entry.float32_islands:
        report = dataclasses.replace(report, own_error_of=WITH_ISLANDS)
    return dataclasses.replace(report, cases=tuple(cases), checks=tuple(checks), perplexity=change)


def _labelled(view: View, cases: Iterable[CaseResult]) -> list[CaseResult]:
    return [dataclasses.replace(case, mode=f"{view.name} {case.mode}") for case in cases]


def _compared(views: list[View], entry: Variant) -> list[View]:
    """Return the views that are compared, the one that the report's gate is of first.

    That is the exact one where weights are quantised, and else what users run. Of a graph for GPUs the exact view shows
    nothing more: it has the operators of the rounded one, and no rounding of weights to hide behind.
    """
    if catalog.is_for_devices(entry.name):
        return views[-1:]
    return views if entry.quantization is not None else views[::-1]


def _own_logits(
    view: View, truth: Truth, entry: Variant, checkpoint: Checkpoint, config: ModelConfig, *, by_layer: bool
) -> list[np.ndarray]:
    """Return PyTorch's logits in the view's own arithmetic, whose error is the unit that the view's is measured in.

    Where the graph has float32 islands they are those with the same islands: PyTorch's in float16 overflow.
    """
    if view.rounding and by_layer:
        layered = LayeredReference(checkpoint, config, view.precision, view.replaced, view.rounding)
        return ask_by_layer(layered, config, truth.sequences, truth.positions, truth.beside)
    if view.rounding:
        with open_reference(checkpoint, view.precision, view.replaced, view.rounding) as reference:
            return ask_reference(reference, truth.sequences, truth.positions, truth.beside)
    if view.precision == "fp16" and entry.float32_islands:
        source = Replaced(checkpoint, view.replaced)
        beside = truth.beside
        scored = [batch.scored_rows(config.pad_token_id) for batch in beside.padded]
        mixed = [_with_vectors(source, row) for row in beside.mixed]
        sequences = [*truth.sequences, *(row for rows in scored for row in rows), *beside.rows, *mixed]
        logits, states = simulated_answers(source, config, sequences, islands_of(entry.float32_islands), beside.hidden)
        whole = iter(logits)
        found = [next(whole)[positions] for positions in truth.positions]
        found += [np.stack([next(whole)[-1] for _ in rows]) for rows in scored]
        last = len(sequences) - len(mixed)
        first = last - len(beside.rows)
        found += pooled_states([of_number[first:last] for of_number in states])
        found += [answers[-row.answered :] for answers, row in zip(logits[last:], beside.mixed, strict=True)]
        return found + pooled_states([of_number[last:] for of_number in states], HALVES)
    return truth.own[view.precision]


def _with_vectors(source: WeightSource, row: Mixed) -> np.ndarray:
    """Return what enters the first layer, float32 [n, hidden]."""
    around = [source.picked(EMBEDDING, torch.from_numpy(ids)).float().numpy() for ids in (row.before, row.behind)]
    return np.concatenate([around[0], row.vectors, around[1]])


def _draws(view: View, truth: Truth, checkpoint: Checkpoint, *, by_layer: bool) -> Draws | None:
    if not view.drawn:
        return None
    if not view.rounding:
        return truth.draws
    draw = draw_by_layer if by_layer else draw_logits
    return partial(draw, checkpoint, truth.sequences, truth.positions, view.replaced, view.rounding, truth.beside)
