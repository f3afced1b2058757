"""Checkpoints and packages that several test modules share; each is made once per run, or taken from --packages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support import packages


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--packages", type=Path, help="a folder that packages.py has written; default: export them")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random OLMo 2 with grouped-query attention and sizes that all differ; no tokenizer."""
    pytest.importorskip("torch")
    from support.checkpoints import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="session")
def tiny_logits(request: pytest.FixtureRequest) -> list[np.ndarray]:
    """PyTorch's logits of `packages.sequences` on tiny_checkpoint, all positions."""
    made: Path | None = request.config.getoption("--packages")
    if made is None:
        return packages.make_logits(request.getfixturevalue("tiny_checkpoint"))
    with np.load(made / packages.LOGITS) as arrays:
        return [arrays[name] for name in arrays.files]


def _package(request: pytest.FixtureRequest, name: str) -> Path:
    made: Path | None = request.config.getoption("--packages")
    if made is not None:
        return made.resolve() / name
    out = request.getfixturevalue("tmp_path_factory").mktemp("package") / name
    packages.make_package(name, request.getfixturevalue("tiny_checkpoint"), out)
    return out


@pytest.fixture(scope="session")
def tiny_package(request: pytest.FixtureRequest) -> Path:
    """The package of tiny_checkpoint. Do not change it."""
    return _package(request, "tiny")


@pytest.fixture(scope="session")
def q8_package(request: pytest.FixtureRequest) -> Path:
    """tiny_checkpoint in one graph of 8 bits. Do not change it."""
    return _package(request, "tiny_q8")


@pytest.fixture(scope="session")
def q4_package(request: pytest.FixtureRequest) -> Path:
    """tiny_checkpoint in two graphs that share their KV cache. Do not change it."""
    return _package(request, "tiny_q4")


@pytest.fixture(scope="session")
def demo_package(request: pytest.FixtureRequest) -> Path:
    """The package of the bundled demo model. Do not change it."""
    return _package(request, "demo")


@pytest.fixture(scope="session")
def demo_two_package(request: pytest.FixtureRequest) -> Path:
    """The demo in fp32 and q4, verified by nobody. Do not change it."""
    return _package(request, "demo_two")
