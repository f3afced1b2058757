"""Export and evaluate several revisions of one model: how good is each, how far is it from PyTorch, how much changed?

    DIR/sweep.json sweep.csv    what was found; written after each revision, so that a sweep goes on where it ended
    DIR/packages/REVISION/      the package of the revision evaluated last

The first revision is exported; of the others only the weights are written, beside graph files that stay byte for byte
what they are. Each is compared with PyTorch on its own weights, on the same tokens, and with the same variant of the
revision before it (KL(before || this), nats per token), which says how much the model changed in between.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from olmo2_export.atomic import locked
from olmo2_export.config import ModelConfig
from olmo2_export.evaluate.evaluate import Evaluation, evaluate, token_text
from olmo2_export.evaluate.models import open_package_model, open_torch_model
from olmo2_export.evaluate.text import HELDOUT
from olmo2_export.package.export import export
from olmo2_export.package.weight_choice import Options
from olmo2_export.weights.checkpoint import Checkpoint, open_checkpoint
from runtimes import Device
from runtimes.errors import ConfigError, FailedError, PackageError, UsageError, first_names
from runtimes.package import open_package
from runtimes.sealed import hash_file, hash_files

RESULTS, TABLE = "sweep.json", "sweep.csv"
_PACKAGES = "packages"
_NAME = re.compile(r"(?P<stage>.*?)step(?P<step>\d+)(?:-tokens(?P<tokens>\d+)B)?$")
_UNSAFE = re.compile(r"[^\w.-]")


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
    evaluate_s: float


def step_of(revision: str) -> tuple[int | None, int | None]:
    """Return (steps, billions of tokens) out of a name such as `stage1-step10000-tokens21B`; None where it has none."""
    found = _NAME.match(revision)
    if found is None:
        return None, None
    tokens = found["tokens"]
    return int(found["step"]), int(tokens) if tokens else None


def in_order(revisions: Sequence[str]) -> list[str]:
    """Return revisions by their steps, where all are of one stage and have different ones; else as they were given."""
    found = [_NAME.match(revision) for revision in revisions]
    stages = {match["stage"] if match else None for match in found}
    steps = [step_of(revision)[0] for revision in revisions]
    if len(stages) > 1 or None in steps or len(set(steps)) < len(steps):
        return list(revisions)
    return sorted(revisions, key=lambda revision: step_of(revision)[0] or 0)


def open_revision(model: str, revision: str) -> Checkpoint:
    """Open one revision: of a Hub id, or the folder of that name in a local folder.

    Raises:
        CheckpointNotFoundError, CheckpointError: as `open_checkpoint`.
        UsageError: the model is the demo, which has no revisions.
    """
    folder = Path(model).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        return open_checkpoint(str(folder / revision))
    return open_checkpoint(model, revision)


def sweep(
    model: str,
    revisions: Sequence[str],
    out: Path,
    *,
    variant: str = "fp32",
    options: Options | None = None,
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
        variant: what is evaluated of each.
        options: how a quantised variant is made; None: the defaults.
        device: where onnxruntime runs it; None: on the CPU.
        text: UTF-8 text, or token ids as `.npy`.
        context, stride: as `evaluate`.
        max_tokens: of the text; None: all.
        low_memory: PyTorch with one layer in memory at a time.

    Returns:
        A result per revision, in order.

    Raises:
        UsageError: no revision, or one twice; a folder that holds a sweep of something else.
        ConfigError: a revision of another shape, or with another tokenizer, than the first.
        FailedError: a graph that is not the one of the first revision.
    """
    if not revisions or len(set(revisions)) < len(revisions):
        raise UsageError(f"revisions {', '.join(revisions) or '(none)'}: expected at least one, none of them twice")
    if len(safe := {_folder_name(name) for name in revisions}) < len(revisions):
        raise UsageError(f"revisions {', '.join(sorted(safe))}: the names differ in signs that no folder name has")
    options = options or Options()
    settings = {
        "model": model,
        "variant": variant,
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items()},
        "text_sha256": hash_file(text).sha256 if text.is_file() else None,
        "context_tokens": context,
        "stride_tokens": stride,
        "max_tokens": max_tokens,
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{out}: cannot be created ({error.strerror}); choose another --out") from error
    ordered = in_order(revisions)
    with locked(out):
        work = _Sweep(model, out, variant, options)
        known = _finished(out, settings)
        _write(out, settings, [], known)  # from now on the packages belong to these settings
        for before, revision in zip([None, *ordered], ordered, strict=False):
            if revision in known and known[revision].previous == before:
                continue
            known.pop(revision, None)
            started = time.monotonic()
            checkpoint, package = work.package(revision)
            export_s = time.monotonic() - started
            tokens = token_text(package, text, most=max_tokens)
            graph = work.graph_sha256(package)
            if others := {r.graph_sha256 for r in known.values()} - {graph}:
                raise FailedError(f"{package}: graph {graph[:12]}, the other revisions have {first_names(others)}")
            with ExitStack() as stack:
                tested = stack.enter_context(open_package_model(package, variant=variant, device=device))
                references = [stack.enter_context(open_torch_model(checkpoint, low_memory=low_memory))]
                if before is not None:
                    _, earlier = work.package(before)
                    references.append(stack.enter_context(open_package_model(earlier, variant=variant, device=device)))
                found = evaluate(tested, tokens, references=references, context=context, stride=stride)
            known[revision] = _result(revision, before, checkpoint, found, graph, export_s)
            _write(out, settings, [known[name] for name in ordered if name in known], known)
            work.forget_all_but(revision)
    results = [known[name] for name in ordered]
    _write_table(out / TABLE, results)
    return results


class _Sweep:
    """The packages of a sweep."""

    def __init__(self, model: str, out: Path, variant: str, options: Options) -> None:
        self._model, self._variant, self._options = model, variant, options
        self._folder = out / _PACKAGES

    def package(self, revision: str) -> tuple[Checkpoint, Path]:
        """Return a revision's checkpoint and package, which is made if it is not there."""
        checkpoint = open_revision(self._model, revision)
        path = self._folder / _folder_name(revision)
        others = [p for p in sorted(self._folder.glob("*")) if p != path and self._is_whole(p)]
        if others:
            self._check_same_model(others[0], checkpoint, revision)
        if not self._is_whole(path, checkpoint):
            export(
                checkpoint,
                path,
                variants=[self._variant],
                options=self._options,
                force=True,
                graphs_of=others[0] if others else None,
            )
        return checkpoint, path

    def graph_sha256(self, package: Path) -> str:
        """Return the hash of the graph file, as it is on disk."""
        return hash_file(package / open_package(package).variant(self._variant).graph).sha256

    def forget_all_but(self, revision: str) -> None:
        """Remove the packages that no later revision is compared with."""
        for path in self._folder.glob("*"):
            if path.name != _folder_name(revision) and self._is_whole(path):
                shutil.rmtree(path)

    def _is_whole(self, path: Path, checkpoint: Checkpoint | None = None) -> bool:
        """Tell whether a folder is a package of this variant, and of that checkpoint."""
        try:
            manifest = open_package(path).manifest
        except PackageError:
            return False
        if self._variant not in manifest.variants:
            return False
        if checkpoint is None:
            return True
        source = manifest.source
        if (source.model, source.revision) != (checkpoint.model, checkpoint.revision):
            return False
        return checkpoint.kind == "hub" or source.files == hash_files(checkpoint.folder, checkpoint.files)

    def _check_same_model(self, package: Path, checkpoint: Checkpoint, revision: str) -> None:
        new = ModelConfig.from_json(checkpoint.folder / "config.json")
        old = ModelConfig.from_json(package / "config.json")
        different = [
            f"{f.name} {getattr(new, f.name)!r} ({getattr(old, f.name)!r})"
            for f in fields(ModelConfig)
            if getattr(new, f.name) != getattr(old, f.name)
        ]
        if different:
            raise ConfigError(
                f"{self._model}@{revision}: not of the shape of {package.name} (in brackets): {', '.join(different)}; "
                "a sweep writes all revisions into one graph: sweep those of one shape"
            )
        files = [folder / "tokenizer.json" for folder in (checkpoint.folder, package)]
        hashes = {hash_file(file).sha256 if file.is_file() else None for file in files}
        if len(hashes) > 1:
            raise ConfigError(
                f"{self._model}@{revision}: another tokenizer.json than {package.name}; they could not be compared"
            )


def _folder_name(revision: str) -> str:
    name = _UNSAFE.sub("_", revision)
    return f"_{name}" if name.startswith(".") else name


def _result(
    revision: str, before: str | None, checkpoint: Checkpoint, found: Evaluation, graph: str, export_s: float
) -> RevisionResult:
    pytorch, *rest = found.comparisons
    step, tokens_b = step_of(revision)
    return RevisionResult(
        revision=revision,
        commit=checkpoint.revision,
        step=step,
        tokens_b=tokens_b,
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
        different = [name for name, value in settings.items() if before.get(name) != value]
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
