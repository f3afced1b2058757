"""The packages of a sweep: the first is exported whole, of the others only weights are written; the same of engines."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, TypeAlias

from olmo2_export.catalog import VARIANTS, known
from olmo2_export.config import ModelConfig
from olmo2_export.engine.options import CURRENT, EngineOptions, gpu_at_hand
from olmo2_export.engine.renew import as_built, renew, why_another
from olmo2_export.package.export import export
from olmo2_export.package.weight_choice import Options
from olmo2_export.weights.checkpoint import Checkpoint, open_checkpoint
from runtimes.command import expanded
from runtimes.errors import BackendError, ConfigError, IntegrityError, PackageError, UsageError
from runtimes.package import open_package
from runtimes.sealed import hash_file, hash_files
from runtimes.targets import find_target
from runtimes.trt.nvidia import check_installed, load_tensorrt, tensorrt_backend

EngineOrigin: TypeAlias = Literal["built", "refitted"]

_PACKAGES = "packages"
_UNSAFE = re.compile(r"[^\w.-]")
_SOURCE = "fp32"
"""the variant that engines are built from"""


@dataclass(frozen=True)
class RevisionPackage:
    """The package of one revision."""

    checkpoint: Checkpoint
    folder: Path
    engine: EngineOrigin | None
    """how its engine was made just now; None: it has none, or had it"""


def open_revision(model: str, revision: str) -> Checkpoint:
    """Open one revision: of a Hub id, or the folder of that name in a local folder.

    Raises:
        CheckpointNotFoundError, CheckpointError: as `open_checkpoint`.
        UsageError: the model is the demo, which has no revisions.
    """
    folder = expanded(model)
    if folder.is_dir() and not (folder / "config.json").is_file():
        return open_checkpoint(str(folder / revision))
    return open_checkpoint(model, revision)


def engine_options(variant: str, backend: str, options: Options, context: int | None) -> EngineOptions | None:
    """Return the engine that a sweep makes of each revision; None for a backend that runs the graph itself.

    Args:
        variant: what is evaluated; with an engine a graph for TensorRT, such as trt_bf16.
        backend: what runs it.
        options: recipe and calibration are the engine's too.
        context: tokens of a window, which are what the cache has to hold; None: what the engine has by default.

    Raises:
        UsageError: a variant or an option that is not for an engine.
        BackendError: the library is not installed, or there is no GPU to run engines on.
    """
    if not find_target(backend).needs_engine:
        return None
    kind = tensorrt_backend(backend)
    rows = {row.name: row for row in VARIANTS if row.graph == "static"}
    if variant not in rows:
        raise UsageError(f"variant {variant}: backend {backend} runs engines of {', '.join(rows)}")
    if replace(options, recipe=None, calibration=None) != Options():
        raise UsageError(f"backend {backend}: of an engine recipe and calibration can be chosen; leave the others out")
    check_installed(kind)
    try:
        gpu_at_hand(kind)
    except BackendError as error:
        raise BackendError(
            f"backend {backend}: a sweep runs its engines on this machine, and it has no GPU "
            f"({error.__cause__ or error}); without --backend it evaluates the graphs on the CPU"
        ) from error
    return EngineOptions(
        rows[variant].weights.precision,
        kind,
        compute_capabilities=[CURRENT],
        max_batch_size=2,  # the least that holds weights once
        max_cache_length=context,
        recipe=options.recipe,
        calibration=options.calibration,
    )


class RevisionPackages:
    """The packages of a sweep, one folder each."""

    def __init__(self, model: str, out: Path, variant: str, options: Options, engine: EngineOptions | None) -> None:
        """Take what is the same for all of them.

        Args:
            model: as `open_revision`.
            out: the sweep's folder.
            variant: what is evaluated.
            options: how it is exported.
            engine: what is built of each; None: nothing.
        """
        self._model, self._engine = model, engine
        self._exported = variant if engine is None else _SOURCE
        self._options = options if engine is None else Options()
        row = known(variant)
        if engine is None and row is not None and row.quantized_cache and not options.kv_caches:
            # which one is the default is a matter of quality, and revisions are to be compared in the same
            self._options = replace(options, kv_caches=("float32",))
        self._folder = out / _PACKAGES

    def package(self, revision: str) -> RevisionPackage:
        """Return a revision's package, which is made if it is not there.

        Raises:
            ConfigError: the revision is of another shape, or has another tokenizer, than a package that is there.
            Olmo2ExportError: as `export` and `renew`.
        """
        checkpoint = open_revision(self._model, revision)
        path = self._folder / folder_name(revision)
        others = [p for p in sorted(self._folder.glob("*")) if p != path and self._is_whole(p)]
        if others:
            self._check_same_model(others[0], checkpoint, revision)
        if not self._is_whole(path, checkpoint):
            export(
                checkpoint,
                path,
                variants=[self._exported],
                options=self._options,
                force=True,
                graphs_of=others[0] if others else None,
            )
        if self._engine is None or self._has_engine(path):
            return RevisionPackage(checkpoint, path, None)
        source = next((other for other in others if self._has_engine(other)), None)
        made = renew(path, source, self._engine)
        return RevisionPackage(checkpoint, path, "refitted" if made.refitted else "built")

    def graph_sha256(self, package: Path) -> str:
        """Return the hash of the graph file that was exported, as it is on disk."""
        return hash_file(package / open_package(package).variant(self._exported).graph).sha256

    def forget_all_but(self, revision: str) -> None:
        """Remove the packages that no later revision is compared with."""
        for path in self._folder.glob("*"):
            if path.name != folder_name(revision) and self._is_whole(path):
                shutil.rmtree(path)

    def _has_engine(self, path: Path) -> bool:
        """Tell whether a package has the engine that is evaluated, for this GPU and TensorRT, intact."""
        assert self._engine is not None
        opened = open_package(path)
        if why_another(path, as_built(self._engine), opened.model) is not None:
            return False
        assert opened.trt is not None
        engine = opened.trt.engines[f"{self._engine.backend}_{self._engine.precision}"]
        if engine.backend_version != load_tensorrt(engine.backend).version:
            return False
        try:
            opened.check([engine.plan, *opened.trt.variants[engine.variant].files])
        except IntegrityError:
            return False
        return True

    def _is_whole(self, path: Path, checkpoint: Checkpoint | None = None) -> bool:
        """Tell whether a folder is a package of this variant, and of that checkpoint."""
        try:
            manifest = open_package(path).manifest
        except PackageError:
            return False
        if self._exported not in manifest.variants:
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


def folder_name(revision: str) -> str:
    """Return the name of a revision's folder; two revisions may have one, which the caller refuses."""
    name = _UNSAFE.sub("_", revision)
    return f"_{name}" if name.startswith(".") else name
