"""The oldest onnxruntime of each graph: what the manifest says, and the one sentence that an older one gets."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from runtimes import open_runner
from runtimes.cli import main
from runtimes.errors import BackendError, PackageError
from runtimes.manifest import MANIFEST_NAME, KVCacheQuantization, KVCacheSpec, Variant
from runtimes.ort.concat import ConcatRunner
from runtimes.ort.shared import SharedRunner
from runtimes.ort.versions import oldest_onnxruntime, release, without_too_new
from runtimes.package import open_package
from runtimes.sealed import read_sealed, seal

PIP = "pip install --upgrade 'onnxruntime>="


def cache(form: str, bits: int | None = None) -> KVCacheSpec:
    quantization = None if bits is None else KVCacheQuantization(bits, 8, {})
    return KVCacheSpec(form, "float32", 3, 2, 16, 256, quantization)


@pytest.fixture
def q4(q4_package: Path) -> Variant:
    """A variant with a prefill graph."""
    variant = open_package(q4_package).manifest.variants["q4"]
    assert variant.prefill is not None
    return variant


@pytest.fixture
def on_1_23_2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "__version__", "1.23.2")


def rewrite(package: Path, out: Path, version: int, *, says: str | None) -> Path:
    """Copy a package with its manifest in another format; `says` goes in as min_onnxruntime, None leaves it out."""
    copy = Path(shutil.copytree(package, out))
    document = read_sealed(copy / MANIFEST_NAME) | {"format_version": version}
    for variant in document["variants"].values():
        for graph in filter(None, (variant, variant["prefill"])):
            del graph["min_onnxruntime"]
            if says is not None:
                graph["min_onnxruntime"] = says
    (copy / MANIFEST_NAME).write_bytes(seal(document))
    return copy


@pytest.mark.parametrize(
    ("form", "bits", "prefill", "oldest"),
    [
        ("concat", None, False, "1.23.1"),
        ("shared", None, False, "1.23"),
        ("shared", None, True, "1.24"),
        ("shared", 8, False, "1.27"),
        ("shared", 4, True, "1.27"),
        ("static", None, False, "1.25"),
    ],
)
def test_oldest_onnxruntime_of_each_form(form: str, bits: int | None, prefill: bool, oldest: str) -> None:
    assert oldest_onnxruntime(cache(form, bits), prefill=prefill) == oldest


def test_1_9_is_older_than_1_23_and_1_23_0_than_1_23_1() -> None:
    versions = ["2.0", "1.24", "1.23.1", "1.32.0.dev20261101", "1.23.0", "1.9.0", "1.23"]
    ordered = ["1.9.0", "1.23", "1.23.0", "1.23.1", "1.24", "1.32.0.dev20261101", "2.0"]
    assert sorted(versions, key=release) == ordered


def test_the_manifest_says_what_each_graph_needs(tiny_package: Path, q4: Variant) -> None:
    assert open_package(tiny_package).manifest.variants["fp32"].min_onnxruntime == "1.23.1"
    assert q4.min_onnxruntime == "1.23"
    assert q4.prefill is not None
    assert q4.prefill.min_onnxruntime == "1.24"


def test_an_old_onnxruntime_gets_one_sentence_and_no_internal_error(
    demo_package: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort, "__version__", "1.22.1")
    assert main(["generate", str(demo_package), "--prompt", "x"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"olmo2-run: error: variant fp32 needs onnxruntime 1.23.1 or newer, this is 1.22.1: {PIP}1.23.1'"
    )


def test_the_onnxruntime_that_is_silently_wrong_is_refused(tiny_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "__version__", "1.23.0")
    with pytest.raises(BackendError, match=r"fp32 needs onnxruntime 1\.23\.1 or newer, this is 1\.23\.0"):
        open_runner(tiny_package)


@pytest.mark.usefixtures("on_1_23_2")
def test_without_the_onnxruntime_for_it_the_prefill_graph_is_left_out_with_a_warning(
    q4_package: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ids = list(range(40))
    with caplog.at_level(logging.WARNING), open_runner(q4_package, threads=1) as runner:
        assert isinstance(runner, SharedRunner)
        assert runner.variant.prefill is None
        (logits,) = runner.prefill([ids])
        runner.reset()
        np.testing.assert_array_equal(runner.decode_block(ids)[-1:], logits)  # as the decode graph computes it
    assert caplog.messages == [
        f"the prefill graph of variant q4 needs onnxruntime 1.24 or newer, this is 1.23.2: {PIP}1.24', or export it "
        "with --no-prefill-graph; until then it runs without, and reads prompts more slowly"
    ]


def test_a_new_enough_onnxruntime_keeps_the_prefill_graph_and_says_nothing(
    q4: Variant, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert without_too_new(q4, "1.24.0", "cpu") is q4
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("form", "bits", "device", "message"),
    [
        ("shared", 8, "cpu", f"variant x needs onnxruntime 1.27 or newer, this is 1.22.1: {PIP}1.27', or export "
         "and run it with --kv-cache float32"),
        ("static", None, "cpu", f"variant x needs onnxruntime 1.25 or newer, this is 1.22.1: {PIP}1.25', or run an "
         "engine of it with --backend trt_rtx or trt"),
        ("shared", None, "cuda", "variant x needs onnxruntime 1.23 or newer, this is 1.22.1: "
         "pip install --upgrade 'onnxruntime-gpu>=1.23'"),
        ("shared", None, "nv-rtx", f"device nv-rtx needs onnxruntime 1.28 or newer, this is 1.22.1: {PIP}1.28'"),
    ],
)  # fmt: skip
def test_the_sentence_says_what_to_install_or_to_do_instead(
    q4: Variant, form: str, bits: int | None, device: str, message: str
) -> None:
    variant = replace(q4, name="x", kv_cache=cache(form, bits), min_onnxruntime=None)
    with pytest.raises(BackendError) as caught:
        without_too_new(variant, "1.22.1", device)
    assert str(caught.value) == message


@pytest.mark.usefixtures("on_1_23_2")
def test_a_padded_batch_on_an_onnxruntime_that_gives_nan_is_refused_and_nothing_changes(tiny_package: Path) -> None:
    with open_runner(tiny_package, variant="fp32", threads=1) as runner:
        assert isinstance(runner, ConcatRunner)
        runner.prefill([[1, 2, 3], [4, 5, 6]])
        with pytest.raises(BackendError, match=r"in a batch of several lengths, needs onnxruntime 1\.24 or newer"):
            runner.prefill([[1, 2, 3], [4, 5]])
        assert runner.cache_lengths == (3, 3)
        runner.decode([7, 8])
        assert runner.cache_lengths == (4, 4)


def test_a_package_of_format_3_runs_and_an_old_onnxruntime_gets_the_same_sentence(
    tiny_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = rewrite(tiny_package, tmp_path / "old", 3, says=None)
    assert open_package(old).manifest.variants["fp32"].min_onnxruntime is None
    with open_runner(tiny_package, threads=1) as new, open_runner(old, threads=1) as runner:
        np.testing.assert_array_equal(runner.prefill([[1, 2]])[0], new.prefill([[1, 2]])[0])
    monkeypatch.setattr(ort, "__version__", "1.22.1")
    with pytest.raises(BackendError, match=r"fp32 needs onnxruntime 1\.23\.1 or newer, this is 1\.22\.1"):
        open_runner(old)


def test_the_manifest_goes_before_what_this_version_knows(tiny_package: Path, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"fp32 needs onnxruntime 9\.1 or newer"):
        open_runner(rewrite(tiny_package, tmp_path / "later", 4, says="9.1"))
    with pytest.raises(PackageError, match=r"not the fields of format 4 \(min_onnxruntime is 'new'\)"):
        open_package(rewrite(tiny_package, tmp_path / "damaged", 4, says="new"))


def test_another_format_is_refused_with_the_remedy(tiny_package: Path, tmp_path: Path) -> None:
    for version in (2, 5):
        copy = rewrite(tiny_package, tmp_path / str(version), version, says="1.24")
        with pytest.raises(PackageError) as caught:
            open_package(copy)
        assert str(caught.value) == (
            f"{copy / MANIFEST_NAME}: format_version {version}, this version reads 3 and 4; update olmo2-export, or "
            "export the package again"
        )
