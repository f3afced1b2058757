"""Packages of links run, are verified and built from; what the links lead to is checked, and never written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from support.linked_packages import LAYOUTS, by_hash, hub_cache, on_a_data_disk

from olmo2_export import cli
from olmo2_export.engine.build import build
from olmo2_export.engine.options import EngineOptions
from olmo2_export.package.export import export
from olmo2_export.package.weight_choice import Options
from olmo2_export.stored_graph import load_graph
from olmo2_export.weights.checkpoint import open_checkpoint
from runtimes import open_runner
from runtimes.errors import IntegrityError, PackageError
from runtimes.linked_data import follow_link
from runtimes.package import open_package

Layout = Callable[[Path, Path], Path]


@pytest.fixture(scope="module")
def package(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a portable graph, a quantised one with its prefill graph, and one for TensorRT with its engine."""
    out = tmp_path_factory.mktemp("linked") / "tiny"
    export(open_checkpoint(str(tiny_checkpoint)), out, variants=["fp32", "q4"], options=Options(kv_caches=("float32",)))
    build(out, EngineOptions(precision="fp32", compute_capabilities=["8.9"], max_cache_length=72), progress=False)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def logits(package: Path, variant: str) -> np.ndarray:
    ids = np.arange(70, dtype=np.int64) % 131  # enough for a prefill graph
    with open_runner(package, variant=variant) as runner:
        return np.concatenate([*runner.prefill([ids[:64]]), runner.decode(ids[64:65])])


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("variant", ["fp32", "q4", "trt_fp32"])
def test_it_computes_what_the_package_does(package: Path, tmp_path: Path, layout: Layout, variant: str) -> None:
    np.testing.assert_array_equal(logits(layout(package, tmp_path), variant), logits(package, variant))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_it_is_described(package: Path, tmp_path: Path, layout: Layout, capsys: pytest.CaptureFixture[str]) -> None:
    linked = layout(package, tmp_path)
    assert cli.main(["inspect", str(linked)]) == 0
    assert "engine trt_rtx_fp32" in capsys.readouterr().out


@pytest.mark.parametrize("layout", [hub_cache, by_hash], ids=lambda layout: layout.__name__)
def test_it_is_verified_located_and_evaluated(
    package: Path, tiny_checkpoint: Path, tmp_path: Path, layout: Layout, capsys: pytest.CaptureFixture[str]
) -> None:
    linked = layout(package, tmp_path / "cache")
    before = contents(tmp_path)
    reference = ["--reference", str(tiny_checkpoint)]
    choice = ["--variant", "fp32", "--variant", "trt_fp32"]
    assert cli.main(["verify", str(linked), *reference, *choice, "--longest", "64"]) == 0
    assert cli.main(["verify", str(linked), *reference, *choice, "--locate"]) == 0
    assert cli.main(["debug", "capability", str(linked), "--variant", "trt_fp32"]) == 0
    assert cli.main(["debug", "compare", str(linked), "--variant", "trt_fp32"]) == 0
    ids = tmp_path / "ids.npy"
    np.save(ids, np.arange(200) % 131)
    assert cli.main(["evaluate", str(linked), "--variant", "q4", "--text", str(ids)]) == 0
    assert "internal error" not in capsys.readouterr().err
    after = contents(tmp_path)
    written = {name for name in after.keys() - before.keys() if not name.endswith("ids.npy")}
    assert written == {(linked / "parity.json").relative_to(tmp_path).as_posix()}
    assert {name: after[name] for name in before} == before


def test_a_build_in_a_hub_cache_keeps_links_and_blobs(package: Path, tmp_path: Path) -> None:
    linked = hub_cache(package, tmp_path)
    blobs, kept = contents(tmp_path / "blobs"), (linked / "trt" / "model_fp32.onnx_data").readlink()
    build(linked, EngineOptions(precision="bf16", compute_capabilities=["8.9"], max_cache_length=72), progress=False)
    assert contents(tmp_path / "blobs") == blobs
    assert (linked / "trt" / "model_fp32.onnx_data").readlink() == kept
    assert not (linked / "trt" / "model_bf16.onnx_data").is_symlink()
    assert (linked / "manifest.json").is_symlink()
    np.testing.assert_array_equal(logits(linked, "trt_fp32"), logits(package, "trt_fp32"))
    assert cli.main(["inspect", str(linked)]) == 0


def test_a_build_without_hard_links_copies(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: Path) -> None:
        raise PermissionError(1, "Operation not permitted")  # as FAT says

    copy = Path(shutil.copytree(package, tmp_path / "copy"))
    monkeypatch.setattr("olmo2_export.engine.build.os.link", link)
    build(copy, EngineOptions(precision="bf16", compute_capabilities=["8.9"], max_cache_length=72), progress=False)
    assert (copy / "trt" / "model_fp32.onnx_data").read_bytes() == (
        package / "trt" / "model_fp32.onnx_data"
    ).read_bytes()
    assert cli.main(["inspect", str(copy)]) == 0


def test_an_export_over_a_hub_cache_leaves_the_blobs(package: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    linked = hub_cache(package, tmp_path)
    blobs = contents(tmp_path / "blobs")
    export(open_checkpoint(str(tiny_checkpoint)), linked, force=True)
    assert contents(tmp_path / "blobs") == blobs
    assert not any(p.is_symlink() for p in linked.rglob("*"))


@pytest.mark.parametrize("layout", [hub_cache, by_hash, on_a_data_disk], ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("variant", ["fp32", "q4", "trt_fp32"])
def test_a_link_to_something_else_is_refused(package: Path, tmp_path: Path, layout: Layout, variant: str) -> None:
    """Of the right size; only the bytes tell."""
    linked = layout(package, tmp_path)
    folder, name = (
        ("trt", "model_fp32") if variant == "trt_fp32" else ("onnx", {"fp32": "model"}.get(variant, "model_q4"))
    )
    data = linked / folder / f"{name}.onnx_data"
    other = tmp_path / "other"
    other.write_bytes(bytes(data.stat().st_size))
    data.unlink()
    data.symlink_to(other)
    with pytest.raises(IntegrityError, match=rf"{name}.onnx_data: sha256"):
        open_runner(linked, variant=variant)


def test_a_link_to_nothing_is_refused_by_name(package: Path, tmp_path: Path) -> None:
    linked = hub_cache(package, tmp_path)
    (linked / "onnx" / "model.onnx_data").resolve().unlink()
    with pytest.raises(IntegrityError, match=r"onnx/model\.onnx_data: a link to .*, which is not there"):
        open_runner(linked, variant="fp32")


def test_only_the_name_of_the_weights_changes(package: Path, tmp_path: Path) -> None:
    graph = by_hash(package, tmp_path) / "onnx" / "model.onnx"
    model, folder = follow_link(graph)
    real = graph.with_name("model.onnx_data").resolve()
    assert model is not None
    assert folder == real.parent
    assert len(real.name) == 62
    assert real.name.encode() in model
    assert model.replace(b"model.onnx_data", b"") == model
    renamed = ir.from_proto(ir.serde.onnx.ModelProto.FromString(model)).graph.initializers
    for name, value in ir.load(graph).graph.initializers.items():
        old, new = value.const_value, renamed[name].const_value
        assert old is not None
        assert new is not None
        assert (old.dtype, old.shape) == (new.dtype, new.shape)
        if isinstance(old, ir.ExternalTensor):
            assert isinstance(new, ir.ExternalTensor)
            assert (new.location, new.offset, new.length) == (real.name, old.offset, old.length)


def test_a_graph_beside_its_weights_is_opened_as_a_file(package: Path) -> None:
    assert follow_link(package / "onnx" / "model.onnx") == (None, package / "onnx")
    assert follow_link(package / "onnx" / "model.onnx", b"x") == (b"x", package / "onnx")


@pytest.mark.parametrize("content", [b"\x3f", b"\x3a", b"\x0f\x0f"], ids=["a type", "no length", "garbage"])
def test_a_link_to_no_graph_is_refused(package: Path, tmp_path: Path, content: bytes) -> None:
    graph = hub_cache(package, tmp_path) / "onnx" / "model.onnx"
    with pytest.raises(PackageError, match="not an ONNX graph"):
        follow_link(graph, content)


def test_weights_are_read_through_links(package: Path, tmp_path: Path) -> None:
    name = open_package(package).manifest.variants["fp32"].graph
    plain, linked = load_graph(package / name), load_graph(by_hash(package, tmp_path) / name)
    for key, value in plain.graph.initializers.items():
        a, b = value.const_value, linked.graph.initializers[key].const_value
        assert a is not None
        assert b is not None
        np.testing.assert_array_equal(a.numpy(), b.numpy())
