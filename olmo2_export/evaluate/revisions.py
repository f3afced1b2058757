"""Export and evaluate several revisions of one model: how good is each, how far is it from PyTorch, how much changed?

    DIR/sweep.json sweep.csv    what was found; written after each revision, so that a sweep goes on where it ended
    DIR/packages/REVISION/      the package of the revision evaluated last

The first revision is exported; of the others only the weights are written, beside graph files that stay byte for byte
what they are. Engines are likewise built once and refitted, where full TensorRT runs them. Each revision is compared
with PyTorch on its own weights, on the same tokens, and with the same variant of the revision before it
(KL(before || this), nats per token), which says how much the model changed in between.
"""

from __future__ import annotations

import csv
import json
import os
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from olmo2_export.atomic import locked
from olmo2_export.evaluate.evaluate import Evaluation, evaluate, token_text
from olmo2_export.evaluate.models import PackageModel, open_package_model, open_torch_model
from olmo2_export.evaluate.revision_packages import (
    EngineOrigin,
    RevisionPackage,
    RevisionPackages,
    engine_options,
    folder_name,
)
from olmo2_export.evaluate.text import HELDOUT
from olmo2_export.package.weight_choice import Options
from olmo2_export.weights.revision_names import read_name
from runtimes import Backend, Device
from runtimes.errors import FailedError, UsageError, first_names
from runtimes.sealed import hash_file

RESULTS, TABLE = "sweep.json", "sweep.csv"


@dataclass(frozen=True)
class RevisionResult:
    """One revision."""

    revision: str
    """as it was asked for"""
    commit: str | None
    """what it was resolved to, on the Hub"""
    step: int | None
    """optimiser steps, read from the name"""
    tokens_b: int | None
    """billions of training tokens, read from the name"""
    perplexity: float
    """of the variant"""
    perplexity_se: float | None
    pytorch_perplexity: float
    pytorch_perplexity_se: float | None
    kl_mean_nats: float
    """per token: KL(PyTorch || variant), both of this revision"""
    kl_mean_se_nats: float | None
    kl_p99_nats: float
    top1_share: float
    previous: str | None
    """the revision before, which the next two are against; None for the first"""
    change_kl_mean_nats: float | None
    """per token: KL(the variant of the revision before || this one)"""
    change_kl_mean_se_nats: float | None
    evaluated_tokens: int
    graph_sha256: str
    """of the graph file: the same for all"""
    export_s: float
    """of the package, engine included"""
    evaluate_s: float
    engine: EngineOrigin | None = None
    """how the engine was made, where one was evaluated; None: it was there, from an earlier start"""


def in_order(revisions: Sequence[str]) -> list[str]:
    """Return revisions by their steps, where all are of one stage and have different ones; else as they were given."""
    steps = {revision: read_name(revision).step for revision in revisions}
    known = {step for step in steps.values() if step is not None}
    if len({revision.partition("step")[0] for revision in revisions}) > 1 or len(known) < len(revisions):
        return list(revisions)
    return sorted(revisions, key=lambda revision: steps[revision] or 0)


def sweep(
    model: str,
    revisions: Sequence[str],
    out: Path,
    *,
    variant: str = "fp32",
    options: Options | None = None,
    backend: Backend = "ort",
    device: Device | None = None,
    text: Path = HELDOUT,
    context: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    low_memory: bool = False,
) -> list[RevisionResult]:
    """Export and evaluate revisions of a model; those that DIR/sweep.json has already are not evaluated again.

    Args:
        model: a Hub id, or a folder with one folder per revision.
        revisions: their names, at least one, in any order; see `in_order`.
        out: the folder for results and packages.
        variant: what is evaluated of each; with a TensorRT backend a graph for it, such as trt_bf16.
        options: how a quantised variant is made; None: the defaults. Of an engine recipe and calibration alone.
        backend: what runs it. Of a TensorRT backend the first revision's engine is built here, on the GPU; those of the
            others are that one with other weights, where the backend can do that, and built where it cannot.
        device: where onnxruntime runs it; None: on the CPU.
        text: UTF-8 text, or token ids as `.npy`.
        context, stride: as `evaluate`.
        max_tokens: of the text; None: all.
        low_memory: PyTorch with one layer in memory at a time.

    Returns:
        A result per revision, in order.

    Raises:
        UsageError: no revision, or one twice; a folder that holds a sweep of something else; options that mean nothing.
        BackendError: the TensorRT backend is not installed, or there is no GPU for its engines.
        ConfigError: a revision of another shape, or with another tokenizer, than the first.
        FailedError: a graph that is not the one of the first revision.
    """
    if not revisions or len(set(revisions)) < len(revisions):
        raise UsageError(f"revisions {', '.join(revisions) or '(none)'}: expected at least one, none of them twice")
    if len(safe := {folder_name(name) for name in revisions}) < len(revisions):
        raise UsageError(f"revisions {', '.join(sorted(safe))}: the names differ in signs that no folder name has")
    options = options or Options()
    engine = engine_options(variant, backend, options, context)
    settings = {
        "model": model,
        "variant": variant,
        "options": json.loads(json.dumps(asdict(options), default=str)),  # as they are read again
        "text_sha256": hash_file(text).sha256 if text.is_file() else None,
        "context_tokens": context,
        "stride_tokens": stride,
        "max_tokens": max_tokens,
    } | ({} if engine is None else {"backend": backend})
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{out}: cannot be created ({error.strerror}); choose another --out") from error
    ordered = in_order(revisions)
    with locked(out):
        work = RevisionPackages(model, out, variant, options, engine)
        known = _finished(out, settings)
        _write(out, settings, [], known)  # from now on the packages belong to these settings
        for before, revision in zip([None, *ordered], ordered, strict=False):
            if revision in known and known[revision].previous == before:
                continue
            known.pop(revision, None)
            started = time.monotonic()
            made = work.package(revision)
            checkpoint, package = made.checkpoint, made.folder
            export_s = time.monotonic() - started
            tokens = token_text(package, text, most=max_tokens)
            graph = work.graph_sha256(package)
            if others := {r.graph_sha256 for r in known.values()} - {graph}:
                raise FailedError(f"{package}: graph {graph[:12]}, the other revisions have {first_names(others)}")
            with ExitStack() as stack:
                tested = stack.enter_context(_open(package, variant, backend, device))
                references = [stack.enter_context(open_torch_model(checkpoint, low_memory=low_memory))]
                if before is not None:
                    earlier = work.package(before).folder
                    references.append(stack.enter_context(_open(earlier, variant, backend, device)))
                found = evaluate(tested, tokens, references=references, context=context, stride=stride)
            known[revision] = _result(revision, before, made, found, graph, export_s)
            _write(out, settings, [known[name] for name in ordered if name in known], known)
            work.forget_all_but(revision)
    results = [known[name] for name in ordered]
    _write_table(out / TABLE, results)
    return results


def _open(package: Path, variant: str, backend: Backend, device: Device | None) -> AbstractContextManager[PackageModel]:
    return open_package_model(package, variant=variant, backend=backend, device=device)


def _result(
    revision: str, before: str | None, made: RevisionPackage, found: Evaluation, graph: str, export_s: float
) -> RevisionResult:
    pytorch, *rest = found.comparisons
    training = read_name(revision)
    return RevisionResult(
        revision=revision,
        commit=made.checkpoint.revision,
        step=training.step,
        tokens_b=training.tokens_b,
        perplexity=found.perplexity.value,
        perplexity_se=found.perplexity.se,
        pytorch_perplexity=pytorch.perplexity.value,
        pytorch_perplexity_se=pytorch.perplexity.se,
        kl_mean_nats=pytorch.kl.value,
        kl_mean_se_nats=pytorch.kl.se,
        kl_p99_nats=pytorch.kl_p99,
        top1_share=pytorch.top1,
        previous=before,
        change_kl_mean_nats=rest[0].kl.value if rest else None,
        change_kl_mean_se_nats=rest[0].kl.se if rest else None,
        evaluated_tokens=found.tokens,
        graph_sha256=graph,
        export_s=export_s,
        evaluate_s=found.seconds,
        engine=made.engine,
    )


def _finished(out: Path, settings: dict[str, Any]) -> dict[str, RevisionResult]:
    """Return what an earlier sweep with the same settings has found, by revision."""
    path = out / RESULTS
    if not path.is_file():
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        results = {entry["revision"]: RevisionResult(**entry) for entry in document["revisions"]}
        before = document["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: not a sweep's results ({type(error).__name__}); use another --out") from error
    if before != settings:
        different = [name for name in {**settings, **before} if before.get(name) != settings.get(name)]
        raise UsageError(f"{path}: a sweep with other settings ({', '.join(different)}); use another --out")
    return results


def _write(
    out: Path, settings: dict[str, Any], ordered: Sequence[RevisionResult], known: dict[str, RevisionResult]
) -> None:
    """Write all that is known, in one step; results of revisions that were not asked for today are kept."""
    rest = [result for result in known.values() if result not in ordered]
    document = {"settings": settings, "revisions": [asdict(result) for result in [*ordered, *rest]]}
    _replace(out / RESULTS, json.dumps(document, indent=2) + "\n")
    _write_table(out / TABLE, ordered)


def _write_table(path: Path, results: Sequence[RevisionResult]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(RevisionResult)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(result) for result in results)
    temporary.replace(path)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
