"""Checkpoints and packages that several test modules share; each is made once per run, or taken from --packages.

Numpy is imported where it is used, and so is what imports it: before that, `take_one_cpu`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.slow import mark_slow
from support.workers import Shared, long_first, shared_by, take_one_cpu

if TYPE_CHECKING:
    import numpy as np


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--packages", type=Path, help="a folder that packages.py has written; default: export them")
    parser.addoption("--shared", type=Path, help="a folder for what is made once, which another run goes on with")

    parser.addoption(
        "--support", choices=("check", "part", "write"), help="compare the support matrix, or write it anew"
    )


def pytest_configure(config: pytest.Config) -> None:
    take_one_cpu()
    mode: str | None = config.getoption("--support")
    if mode is not None and not hasattr(config, "workerinput"):  # the process that hears of all tests
        from support.matrix import Matrix

        config.pluginmanager.register(Matrix(mode, config.rootpath))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Where the tests marked alone are asked for, import no file that has none."""
    if config.option.markexpr.split()[:1] != ["alone"] or collection_path.suffix != ".py":
        return None
    return None if "pytest.mark.alone" in collection_path.read_text(encoding="utf-8") else True


@pytest.hookimpl(tryfirst=True)  # before marks are looked at
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_slow(items)
    long_first(items)


def pytest_collection_finish() -> None:
    """What all tests have imported is garbage to nobody: a collection, as after each PyTorch model, passes over it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """What is made once for all processes of the run."""
    home: Path | None = request.config.getoption("--shared")
    return shared_by(tmp_path_factory) if home is None else Shared(home.resolve())


@pytest.fixture(scope="session")
def traces(shared: Shared) -> Iterator[None]:
    """Each shape is traced once for all processes of the run."""
    from support.traces import share

    with pytest.MonkeyPatch.context() as monkeypatch:
        share(shared, monkeypatch)
        yield


@pytest.fixture(scope="session")
def tiny_checkpoint(shared: Shared) -> Path:
    """A random OLMo 2 with grouped-query attention and sizes that all differ; no tokenizer. Do not change it."""
    pytest.importorskip("torch")
    from support.checkpoints import make_checkpoint

    return shared.made("checkpoint", "tiny", make_checkpoint)


@pytest.fixture(scope="session")
def tiny_logits(request: pytest.FixtureRequest) -> list[np.ndarray]:
    """PyTorch's logits of `packages.sequences` on tiny_checkpoint, all positions."""
    import numpy as np
    from support import packages

    made: Path | None = request.config.getoption("--packages")
    if made is None:
        return packages.make_logits(request.getfixturevalue("tiny_checkpoint"))
    with np.load(made / packages.LOGITS) as arrays:
        return [arrays[name] for name in arrays.files]


def _package(request: pytest.FixtureRequest, name: str) -> Path:
    from support import packages

    made: Path | None = request.config.getoption("--packages")
    if made is not None:
        return made.resolve() / name
    tiny = request.getfixturevalue("tiny_checkpoint")
    request.getfixturevalue("traces")
    shared: Shared = request.getfixturevalue("shared")
    return shared.made("package", name, lambda out: packages.make_package(name, tiny, out))


@pytest.fixture(scope="session")
def package_of(request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """The packages of `packages.PACKAGES`, by name. Do not change them."""
    return lambda name: _package(request, name)


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


@pytest.fixture
def remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch is asked the same only once, see `support.remembered`."""
    from support.remembered import remember

    remember(monkeypatch)


@pytest.fixture
def little_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """verify measures quality on one sequence instead of 4096 tokens: for tests that look at something else."""
    from functools import partial

    from olmo2_export.verify import checks

    monkeypatch.setattr(checks, "quality_tokens", partial(checks.quality_tokens, most=1))


@pytest.fixture
def hardly_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """export measures quality on 64 tokens instead of 4096: for tests that look at something else."""
    from olmo2_export.measure import quality

    monkeypatch.setattr(quality, "_MOST_TOKENS", 64)
    monkeypatch.setattr(quality, "_LENGTH", 64)


@pytest.fixture
def short_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """verify's short rows have 15 tokens instead of 61, and 8 follow freely: its time goes into tokens one by one."""
    from olmo2_export.verify import feeds, measure

    monkeypatch.setattr(feeds, "LENGTHS", (15, 13, 11))
    monkeypatch.setattr(measure, "GREEDY_TOKENS", 8)


@pytest.fixture(scope="session")
def trt_package(tiny_package: Path, shared: Shared) -> Callable[[str], Path]:
    """tiny_package with a graph for TensorRT of a precision and a cache of 64 tokens, no engine. Do not change it."""
    from support.rebuilt_packages import with_trt_graph

    from olmo2_export.package.trt_variants import TrtOptions

    def of(precision: str) -> Path:
        return shared.made("trt", precision, lambda out: with_trt_graph(tiny_package, out, TrtOptions(precision, 64)))

    return of
