"""A package opened once: its variants, its two manifests, its verdicts, and files that are hashed once."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path

import pytest

import runtimes.sealed as sealed
from runtimes import open_runner
from runtimes.errors import IntegrityError, PackageNotFoundError, VariantNotFoundError
from runtimes.manifest import PARITY_NAME, TRT_FOLDER
from runtimes.package import open_package
from runtimes.sealed import FileEntry, seal


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """File name -> how often it was read to be hashed."""
    counts: Counter[str] = Counter()
    hash_file = sealed.hash_file

    def counting(path: Path) -> FileEntry:
        counts[path.name] += 1
        return hash_file(path)

    monkeypatch.setattr(sealed, "hash_file", counting)
    return counts


@pytest.fixture
def copy(tiny_package: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_package, tmp_path / "copy"))


def test_what_a_package_says(tiny_package: Path) -> None:
    package = open_package(tiny_package)
    assert open_package(package) is package
    assert package.folder == tiny_package
    assert package.manifest == open_package(tiny_package).manifest
    assert package.model is package.manifest.model
    assert package.trt is None
    assert package.verdicts == {}
    variant = package.variant("fp32")
    assert package.variant() is package.variant(None) is variant
    assert package.files_of(variant) is package.manifest.files
    with pytest.raises(VariantNotFoundError, match="no variant 'q9'; it has fp32"):
        package.variant("q9")
    with pytest.raises(PackageNotFoundError, match="no such folder"):
        open_package(tiny_package / "nowhere")


def test_verdicts_are_those_of_the_export_that_was_opened(copy: Path) -> None:
    checksum = open_package(copy).checksum
    for other, expected in ((checksum, {"fp32": True}), ("of another", {})):
        document = {"format_version": 4, "package_checksum": other, "variants": {"fp32": {"passed": True}}}
        (copy / PARITY_NAME).write_bytes(seal(document))
        assert open_package(copy).verdicts == expected


def test_a_damaged_tensorrt_manifest_stops_only_who_needs_it(copy: Path) -> None:
    (copy / TRT_FOLDER).mkdir()
    (copy / TRT_FOLDER / "manifest.json").write_text("{}")
    package = open_package(copy)
    package.check(package.variant("fp32").files)
    for needs in (lambda: package.trt, lambda: package.variant("trt_fp16"), lambda: package.check(["trt/model.onnx"])):
        with pytest.raises(ValueError, match=r"trt/manifest.json: format_version None"):
            needs()


def test_each_file_is_hashed_once(tiny_package: Path, hashed: Counter[str]) -> None:
    package = open_package(tiny_package)
    package.check(hashes=False)
    assert not hashed
    package.check()
    package.check(package.variant("fp32").files)
    package.check()
    assert hashed == Counter(Path(name).name for name in package.manifest.files)


def test_runners_of_one_package_hash_each_file_once(tiny_package: Path, hashed: Counter[str]) -> None:
    package = open_package(tiny_package)
    for _ in range(2):
        with open_runner(package) as runner:
            assert runner.prefill([[5, 6]])[0].shape == (1, package.model.vocab_size)
    assert hashed == Counter(Path(name).name for name in package.variant("fp32").files)


def test_a_file_that_changed_meanwhile_is_hashed_again(copy: Path, hashed: Counter[str]) -> None:
    """Also where its size and its time of change are what they were."""
    package = open_package(copy)
    package.check()
    weights = copy / package.variant("fp32").data[0]
    before, raw = weights.stat(), weights.read_bytes()
    weights.write_bytes(bytes([raw[0] ^ 1]) + raw[1:])
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(IntegrityError, match=r"model.onnx_data: sha256 .*; build it again"):
        package.check(remedy="build it again")
    assert hashed["model.onnx_data"] == 2
    assert hashed["model.onnx"] == 1


def test_a_file_that_was_replaced_is_hashed_again(copy: Path, tmp_path: Path) -> None:
    package = open_package(copy)
    package.check(["config.json"])
    (tmp_path / "other").write_bytes(b"x" * package.manifest.files["config.json"].size)
    (tmp_path / "other").replace(copy / "config.json")
    with pytest.raises(IntegrityError, match=r"config.json: sha256"):
        package.check(["config.json"])


def test_a_file_that_neither_manifest_has_is_refused(tiny_package: Path) -> None:
    with pytest.raises(IntegrityError, match=r"other.bin: not in the manifest"):
        open_package(tiny_package).check(["other.bin"])
