"""The engine of one of many packages that differ in weights: refitted where the target can do that, else built.

A build measures kernels for minutes; a refit copies weights. Which of them it will be is decided before either begins.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from olmo2_export.catalog import static_row
from olmo2_export.engine.build import BuildReport, build, refit
from olmo2_export.engine.options import EngineOptions, resolve_options
from runtimes.errors import EngineBuildError, PackageError
from runtimes.manifest import ModelSpec
from runtimes.package import open_package
from runtimes.targets import find_target

logger = logging.getLogger(__name__)

_OF_THE_ENGINE = (
    *("compute_capabilities", "profile", "max_batch_size", "max_cache_length", "prefill_chunk"),
    "flags",
)
"""what `Engine` and `ResolvedOptions` both have, and a refit leaves as it is"""


@dataclass(frozen=True)
class Renewed:
    """An engine that a package has now."""

    report: BuildReport
    refitted: bool


def renew(package: Path, source: Path | None, options: EngineOptions, *, progress: bool = True) -> Renewed:
    """Put an engine into a package: that of another package with this one's weights, or, failing that, a new one.

    Args:
        package: a package folder with the variant fp32.
        source: a package of another revision of the model; None: there is none.
        options: what to build; `refit` is added where its weights can be replaced, for the packages after this one.
        progress: show a bar on standard error.

    Raises:
        Olmo2ExportError: as `build`; a refit that fails is said in a warning, and the engine is built.
    """
    wanted = as_built(options)
    if source is not None and wanted.refit:
        why = why_another(source, wanted, open_package(package).model)
        taken = EngineOptions(wanted.precision, wanted.backend, recipe=wanted.recipe, calibration=wanted.calibration)
        try:
            if why is None:
                return Renewed(refit(package, source, taken, progress=progress), refitted=True)
        except EngineBuildError as error:
            why = str(error)
        logger.warning("%s: its engine is built, not refitted: %s", package, why)
    return Renewed(build(package, wanted, progress=progress), refitted=False)


def as_built(options: EngineOptions) -> EngineOptions:
    """Return the options with which `renew` builds: for refitting, where the weights can be replaced."""
    return replace(options, refit=why_never_refitted(options) is None)


def why_never_refitted(options: EngineOptions) -> str | None:
    """Return why no engine of this kind can be refitted with the weights of another revision; None: it can.

    Raises:
        UsageError, BackendError: there is no such precision or backend.
    """
    target, weights = find_target(options.backend), static_row(options.precision).weights
    if not target.refits:
        return f"{target.backend_words} cannot replace the weights of an engine"
    if weights.inputs is not None:
        return f"{options.precision} rounds inputs with scales that follow from the weights and are part of the graph"
    return None


def why_another(package: Path, options: EngineOptions, model: ModelSpec) -> str | None:
    """Return why the engine of a package is not the one that the options say; None: it is, but for its weights.

    Args:
        package: any that was exported.
        options: what the engine shall be; see `as_built`.
        model: the shape of the model.

    Raises:
        UsageError, BackendError: as `resolve_options`.
    """
    wanted = resolve_options(options, model)
    name = f"{options.backend}_{options.precision}"
    try:
        engines = open_package(package).trt
    except PackageError as error:
        return str(error)
    if engines is None or name not in engines.engines:
        return f"{package} has no engine {name}"
    engine = engines.engines[name]
    different = [
        f"{part} {getattr(engine, part)} (wanted: {getattr(wanted, part)})"
        for part in _OF_THE_ENGINE
        if getattr(engine, part) != getattr(wanted, part)
    ]
    if not model.labels and engines.variants[engine.variant].top_k != options.top_k:
        different.append(f"top_k {engines.variants[engine.variant].top_k} (wanted: {options.top_k})")
    return f"the engine of {package} has {', '.join(different)}" if different else None
