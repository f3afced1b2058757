"""Checkpoints and packages of classifiers and of models that give or take vectors, in `checkpoints.SHAPE`."""

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
HIDDEN: dict[str, dict[str, Any]] = {"olmo": OLMO1, "olmo2": {}, "olmo3": OLMO3}


@pytest.fixture(autouse=True)
def asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch is asked the same only once."""
    from support.remembered import remember

    remember(monkeypatch)


Named = Callable[[str], Path]
"""a fixture that makes what a name says, once; do not change it"""


def checkpoints(shared: Shared, kind: str, shapes: dict[str, dict[str, Any]]) -> Named:
    """Return a checkpoint of each shape."""
    return lambda name: shared.made("checkpoint", f"{kind}_{name}", lambda out: make_checkpoint(out, **shapes[name]))


def packages(shared: Shared, kind: str, checkpoint: Named, options: Options | None = None) -> Named:
    """Return the package of each checkpoint."""

    def of(name: str) -> Path:
        def make(out: Path) -> None:
            variants = VARIANTS.get(name, ["fp32"])
            export(open_checkpoint(str(checkpoint(name))), out, variants=variants, options=options)

        return shared.made("package", f"{kind}_{name}", make)

    return of


def trt_graphs(shared: Shared, kind: str, package: Named) -> Named:
    """Return olmo2's package with one graph for TensorRT, of a precision, and no engine."""

    def of(precision: str) -> Path:
        options = TrtOptions(precision, TRT_CAPACITY)  # type: ignore[arg-type]  # a name out of the catalog
        plain = package("olmo2")
        return shared.made("trt", f"{kind}_{precision}", lambda out: with_trt_graph(plain, out, options))

    return of


@pytest.fixture(scope="session")
def classifier(shared: Shared) -> Named:
    """A checkpoint of `CLASSIFIERS`."""
    return checkpoints(shared, "heads", CLASSIFIERS)


@pytest.fixture(scope="session")
def classifier_package(classifier: Named, shared: Shared) -> Named:
    return packages(shared, "heads", classifier)


@pytest.fixture(scope="session")
def classifier_trt(classifier_package: Named, shared: Shared) -> Named:
    return trt_graphs(shared, "heads", classifier_package)


@pytest.fixture(scope="session")
def hidden_checkpoint(shared: Shared) -> Named:
    """A language model of a generation, of `HIDDEN`."""
    return checkpoints(shared, "hidden", HIDDEN)


@pytest.fixture(scope="session")
def hidden_package(hidden_checkpoint: Named, shared: Shared) -> Named:
    """Its graphs give hidden states."""
    return packages(shared, "hidden", hidden_checkpoint, Options(hidden_states=(0, 1, 2, -1)))


@pytest.fixture(scope="session")
def hidden_trt(hidden_package: Named, shared: Shared) -> Named:
    return trt_graphs(shared, "hidden", hidden_package)


@pytest.fixture(scope="session")
def vector_package(hidden_checkpoint: Named, shared: Shared) -> Named:
    """Its graphs take vectors in the place of tokens."""
    return packages(shared, "vectors", hidden_checkpoint, Options(inputs_embeds=True))


@pytest.fixture(scope="session")
def vector_trt(vector_package: Named, shared: Shared) -> Named:
    return trt_graphs(shared, "vectors", vector_package)


@pytest.fixture(scope="session")
def both_package(hidden_checkpoint: Named, shared: Shared) -> Path:
    """An olmo2 whose graphs take vectors and give hidden states, with one for TensorRT. Do not change it."""

    def make(out: Path) -> None:
        plain = out.with_name(f"{out.name}.plain")
        options = Options(inputs_embeds=True, hidden_states=(0, 1, -1), kv_caches=("float32",))
        export(open_checkpoint(str(hidden_checkpoint("olmo2"))), plain, variants=["fp32", "q4"], options=options)
        with_trt_graph(plain, out, TrtOptions("fp32", TRT_CAPACITY))
        shutil.rmtree(plain)

    return shared.made("package", "both", make)
