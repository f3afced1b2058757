"""Checkpoints and packages that several test modules share; each is made once per run."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import make_checkpoint

from olmo2_export.checkpoint import open_checkpoint
from olmo2_export.package import export


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random OLMo 2 with grouped-query attention and sizes that all differ; no tokenizer."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="session")
def tiny_package(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package of tiny_checkpoint. Do not change it."""
    out = tmp_path_factory.mktemp("package") / "tiny"
    export(open_checkpoint(str(tiny_checkpoint)), out)
    return out


@pytest.fixture(scope="session")
def demo_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package of the bundled demo model. Do not change it."""
    out = tmp_path_factory.mktemp("package") / "demo"
    export(open_checkpoint("demo"), out)
    return out
