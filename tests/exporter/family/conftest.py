"""Checkpoints and packages of OLMo 1 and Olmo 3, in the sizes of `checkpoints.SHAPE`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import OLMO1, OLMO3, make_checkpoint
from support.rebuilt_packages import with_trt_graph
from support.workers import Shared

from olmo2_export.package.export import export
from olmo2_export.package.trt_variants import TrtOptions
from olmo2_export.package.weight_choice import Options
from olmo2_export.verify import variant
from olmo2_export.weights.checkpoint import open_checkpoint

FAMILY: dict[str, dict[str, Any]] = {"olmo": OLMO1, "olmo2": {}, "olmo3": OLMO3}
VARIANTS = ["fp32", "q4", "q8", "bf16", "fp16", "q4f16"]
TRT_CAPACITY = 64


@pytest.fixture(autouse=True)
def kernel_parity_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What random weights cost says nothing, and takes most of the time; PyTorch is asked the same only once."""
    from support.remembered import remember

    remember(monkeypatch)
    monkeypatch.setattr(variant, "quality_checks", lambda *_, **__: ([], None))


@pytest.fixture(scope="session")
def family_checkpoint(shared: Shared, tiny_checkpoint: Path) -> Callable[[str], Path]:
    """The checkpoint of a model type. Do not change it."""

    def of(name: str) -> Path:
        if name == "olmo2":
            return tiny_checkpoint
        return shared.made("checkpoint", name, lambda out: make_checkpoint(out, **FAMILY[name]))

    return of


@pytest.fixture(scope="session")
def family_package(
    family_checkpoint: Callable[[str], Path], package_of: Callable[[str], Path], shared: Shared
) -> Callable[[str], Path]:
    """All variants of a model type. Do not change it."""

    def of(name: str) -> Path:
        if name == "olmo2":
            return package_of("tiny_all")

        def make(out: Path) -> None:
            export(
                open_checkpoint(str(family_checkpoint(name))),
                out,
                variants=VARIANTS,
                options=Options(kv_caches=("float32",)),
            )

        return shared.made("package", f"family_{name}", make)

    return of


@pytest.fixture(scope="session")
def family_trt_package(family_package: Callable[[str], Path], shared: Shared) -> Callable[[str, str], Path]:
    """A package with one graph for TensorRT, no engine. Do not change it."""

    def of(name: str, precision: str) -> Path:
        options = TrtOptions(precision, TRT_CAPACITY)  # type: ignore[arg-type]  # a name out of the catalog
        return shared.made("trt", f"{name}_{precision}", lambda out: with_trt_graph(family_package(name), out, options))

    return of
