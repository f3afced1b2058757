"""A variant with several KV caches: which one a runner takes, and what is said where it cannot."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from runtimes import open_runner
from runtimes.cli import main
from runtimes.errors import BackendError, PackageError, UsageError
from runtimes.manifest import MANIFEST_NAME, OtherCache, Variant
from runtimes.ort.shared import SharedRunner
from runtimes.ort.versions import choose_cache, new_enough
from runtimes.package import open_package
from runtimes.sealed import read_sealed, seal

DECODE, PREFILL = "onnx/model_q4_shared", "onnx/model_q4_prefill"
DATA = ["onnx/model_q4.onnx_data", "onnx/model_q4_prefill.onnx_data"]
IDS = list(range(3, 40))


@pytest.fixture(scope="module")
def package(package_of: Callable[[str], Path]) -> Path:
    """q4 of the random model, whose quality is poor: float32 is the default of its two caches."""
    return package_of("tiny_q4_caches")


@pytest.fixture
def q4(package: Path) -> Variant:
    return open_package(package).manifest.variants["q4"]


@pytest.fixture
def int8_first(q4: Variant) -> Variant:
    """The same where the int8 cache passed."""
    whole, int8 = q4.each_cache
    names = ("graph", "inputs", "outputs", "kv_cache", "quality", "prefill", "min_onnxruntime")
    return replace(int8, other_caches=(OtherCache(**{name: getattr(whole, name) for name in names}),))


def test_each_cache_is_a_choice_and_the_first_is_the_default(package: Path) -> None:
    logits = {}
    for name, dtype in ((None, "float32"), ("float32", "float32"), ("int8", "int8")):
        with open_runner(package, threads=1, kv_cache=name) as runner:
            assert isinstance(runner, SharedRunner)
            assert runner.variant.kv_cache.name == dtype
            assert runner.variant.other_caches == ()
            (first,) = runner.prefill([IDS])
            logits[name] = np.concatenate([first, runner.decode([7]), runner.decode_block([8, 9])])
            assert {array.dtype.name for array in runner._buffer._arrays.values()} == {dtype}
    assert np.array_equal(logits[None], logits["float32"])
    error = np.mean((logits["int8"] - logits["float32"]) ** 2) / logits["float32"].var()
    assert 0 < error < 2e-3


def test_a_runner_opens_the_files_of_its_cache_alone(package: Path, q4: Variant, tmp_path: Path) -> None:
    for name, suffix in (("float32", ""), ("int8", "_kv_int8")):
        graphs = [f"{DECODE}{suffix}.onnx", f"{PREFILL}{suffix}.onnx"]
        own = q4.with_cache(name)
        assert [graph.graph for graph in own.each_graph] == graphs
        assert sorted(own.files) == sorted([*graphs, *DATA])
        copy = Path(shutil.copytree(package, tmp_path / name))
        for file in set(q4.files) - set(own.files):
            (copy / file).unlink()
        with open_runner(copy, threads=1, kv_cache=name) as runner:
            runner.prefill([IDS])
    assert sorted(q4.files) == sorted(
        [*DATA, *(f"{path}{suffix}.onnx" for path in (DECODE, PREFILL) for suffix in ("", "_kv_int8"))]
    )


def test_a_cache_that_is_not_there_is_named_with_those_that_are(
    package: Path, tiny_package: Path, demo_two_package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError) as caught:
        open_runner(package, kv_cache="int4")
    assert str(caught.value) == ("KV cache int4: variant q4 has float32, int8; choose one of these, or export it again")
    with pytest.raises(UsageError, match="KV cache int8: variant fp32 has float32;"):
        open_runner(tiny_package, kv_cache="int8")
    with pytest.raises(UsageError, match="KV cache int8: an engine of backend trt has that of its graph; leave it out"):
        open_runner(package, backend="trt", kv_cache="int8")
    assert main(["generate", str(demo_two_package), "--prompt", "x", "--kv-cache", "int8"]) == 2
    assert "KV cache int8: variant q4 has float32;" in capsys.readouterr().err
    command = ["generate", str(demo_two_package), "--prompt", "x", "--max-new-tokens", "2", "--stats"]
    assert main([*command, "--kv-cache", "float32"]) == 0
    assert capsys.readouterr().err.endswith("variant q4, KV cache float32\n")


def test_where_onnxruntime_is_too_old_for_the_default_the_next_is_taken_and_said(
    q4: Variant, int8_first: Variant, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert choose_cache(int8_first, None, "1.27.0") == q4.with_cache("int8")
        assert choose_cache(q4, None, "1.26.0") == q4.with_cache("float32")
    assert caplog.messages == []
    with caplog.at_level(logging.WARNING):
        assert choose_cache(int8_first, None, "1.26.0") == q4.with_cache("float32")
    assert caplog.messages == [
        "the int8 KV cache of variant q4 needs onnxruntime 1.27 or newer, this is 1.26.0: pip install --upgrade "
        "'onnxruntime>=1.27'; until then its KV cache is in float32"
    ]
    assert new_enough(int8_first, "1.26.0")
    assert not new_enough(int8_first, "1.22.1")


def test_a_cache_that_was_named_is_not_replaced(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "__version__", "1.26.0")
    with pytest.raises(BackendError, match=r"variant q4 needs onnxruntime 1\.27 or newer, this is 1\.26\.0"):
        open_runner(package, kv_cache="int8")


def test_a_package_from_before_there_was_a_choice_has_the_one_it_was_exported_with(
    package: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(package, tmp_path / "old"))
    document = read_sealed(copy / MANIFEST_NAME)
    q4 = document["variants"]["q4"]
    (other,) = q4.pop("other_caches")
    q4 |= {name: value for name, value in other.items() if name in q4}  # as `export --kv-cache int8` wrote it
    (copy / MANIFEST_NAME).write_bytes(seal(document))
    with open_runner(copy, threads=1) as runner, open_runner(package, threads=1, kv_cache="int8") as new:
        assert runner.variant == open_package(copy).manifest.variants["q4"]
        np.testing.assert_array_equal(runner.prefill([IDS])[0], new.prefill([IDS])[0])
    with open_runner(copy, kv_cache="int8") as runner:
        assert runner.variant.kv_cache.name == "int8"
    with pytest.raises(UsageError, match="KV cache float32: variant q4 has int8;"):
        open_runner(copy, kv_cache="float32")


def test_a_damaged_choice_is_refused(package: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(package, tmp_path / "bad"))
    document = read_sealed(copy / MANIFEST_NAME)
    document["variants"]["q4"]["other_caches"][0]["min_onnxruntime"] = "new"
    (copy / MANIFEST_NAME).write_bytes(seal(document))
    with pytest.raises(PackageError, match=r"\(min_onnxruntime is 'new'\)"):
        open_package(copy)
