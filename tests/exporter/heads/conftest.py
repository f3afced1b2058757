"""Checkpoints and packages of classifiers, in the sizes of `checkpoints.SHAPE`."""

from __future__ import annotations

import shutil
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
from olmo2_export.weights.checkpoint import open_checkpoint

LABELS = 3
CLASSIFIERS: dict[str, dict[str, Any]] = {
    "olmo": OLMO1 | {"num_labels": LABELS},
    "olmo2": {"num_labels": LABELS},
    "olmo2_reward": {"num_labels": 1, "num_hidden_layers": 1},
    "olmo2_null": {"num_labels": 2, "num_hidden_layers": 1, "pad_token_id": None},
    "olmo3": OLMO3 | {"num_labels": LABELS},
}
VARIANTS = {"olmo": ["fp32"], "olmo2": ["fp32", "q4", "q8", "bf16", "fp16", "q4f16"], "olmo3": ["fp32", "q4"]}
TRT_CAPACITY = 64


@pytest.fixture(autouse=True)
def asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch is asked the same only once."""
    from support.remembered import remember

    remember(monkeypatch)


@pytest.fixture(scope="session")
def classifier(shared: Shared) -> Callable[[str], Path]:
    """A checkpoint of `CLASSIFIERS`. Do not change it."""
    return lambda name: shared.made(
        "checkpoint", f"heads_{name}", lambda out: make_checkpoint(out, **CLASSIFIERS[name])
    )


@pytest.fixture(scope="session")
def classifier_package(classifier: Callable[[str], Path], shared: Shared) -> Callable[[str], Path]:
    """Its package. Do not change it."""

    def of(name: str) -> Path:
        def make(out: Path) -> None:
            export(open_checkpoint(str(classifier(name))), out, variants=VARIANTS.get(name, ["fp32"]))

        return shared.made("package", f"heads_{name}", make)

    return of


@pytest.fixture(scope="session")
def classifier_trt(classifier_package: Callable[[str], Path], shared: Shared) -> Callable[[str], Path]:
    """olmo2 with one graph for TensorRT, no engine. Do not change it."""

    def of(precision: str) -> Path:
        options = TrtOptions(precision, TRT_CAPACITY)  # type: ignore[arg-type]  # a name out of the catalog
        package = classifier_package("olmo2")
        return shared.made("trt", f"heads_{precision}", lambda out: with_trt_graph(package, out, options))

    return of


HIDDEN: dict[str, dict[str, Any]] = {"olmo": OLMO1, "olmo2": {}, "olmo3": OLMO3}


@pytest.fixture(scope="session")
def hidden_checkpoint(shared: Shared) -> Callable[[str], Path]:
    """A language model of a generation. Do not change it."""
    return lambda name: shared.made("checkpoint", f"hidden_{name}", lambda out: make_checkpoint(out, **HIDDEN[name]))


@pytest.fixture(scope="session")
def hidden_package(hidden_checkpoint: Callable[[str], Path], shared: Shared) -> Callable[[str], Path]:
    """Its package, whose graphs give hidden states. Do not change it."""

    def of(name: str) -> Path:
        def make(out: Path) -> None:
            options = Options(hidden_states=(0, 1, 2, -1))
            export(open_checkpoint(str(hidden_checkpoint(name))), out, variants=VARIANTS[name], options=options)

        return shared.made("package", f"hidden_{name}", make)

    return of


@pytest.fixture(scope="session")
def hidden_trt(hidden_package: Callable[[str], Path], shared: Shared) -> Callable[[str], Path]:
    """olmo2 with one graph for TensorRT, no engine. Do not change it."""

    def of(precision: str) -> Path:
        options = TrtOptions(precision, TRT_CAPACITY)  # type: ignore[arg-type]  # a name out of the catalog
        package = hidden_package("olmo2")
        return shared.made("trt", f"hidden_{precision}", lambda out: with_trt_graph(package, out, options))

    return of


@pytest.fixture(scope="session")
def vector_package(hidden_checkpoint: Callable[[str], Path], shared: Shared) -> Callable[[str], Path]:
    """A package whose graphs take vectors in the place of tokens. Do not change it."""

    def of(name: str) -> Path:
        def make(out: Path) -> None:
            options = Options(inputs_embeds=True)
            export(open_checkpoint(str(hidden_checkpoint(name))), out, variants=VARIANTS[name], options=options)

        return shared.made("package", f"vectors_{name}", make)

    return of


@pytest.fixture(scope="session")
def vector_trt(vector_package: Callable[[str], Path], shared: Shared) -> Callable[[str], Path]:
    """olmo2 with one graph for TensorRT, no engine. Do not change it."""

    def of(precision: str) -> Path:
        options = TrtOptions(precision, TRT_CAPACITY)  # type: ignore[arg-type]  # a name out of the catalog
        package = vector_package("olmo2")
        return shared.made("trt", f"vectors_{precision}", lambda out: with_trt_graph(package, out, options))

    return of


@pytest.fixture(scope="session")
def both_package(hidden_checkpoint: Callable[[str], Path], shared: Shared) -> Path:
    """An olmo2 whose graphs take vectors and give hidden states, with one for TensorRT. Do not change it."""

    def make(out: Path) -> None:
        plain = out.with_name(f"{out.name}.plain")
        options = Options(inputs_embeds=True, hidden_states=(0, 1, -1), kv_caches=("float32",))
        export(open_checkpoint(str(hidden_checkpoint("olmo2"))), plain, variants=["fp32", "q4"], options=options)
        with_trt_graph(plain, out, TrtOptions("fp32", TRT_CAPACITY))
        shutil.rmtree(plain)

    return shared.made("package", "both", make)
