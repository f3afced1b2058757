"""Change a package the way a bug in the exporter would: the graph is wrong, and the manifest vouches for it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

from olmo2_export.graphs.files import save_graph
from olmo2_export.package.trt_variants import TrtOptions, write_trt_variant
from runtimes.manifest import MANIFEST_NAME, TRT_FOLDER, Precision, TrtManifest
from runtimes.manifest_file import package_checksum, to_document
from runtimes.package import open_package
from runtimes.sealed import FORMAT_VERSION, hash_files, read_sealed, seal


def rebuilt(package: Path, out: Path, change: Callable[[ir.Model], object], graph: str = "onnx/model.onnx") -> Path:
    """Copy a package with a changed graph, that of fp32 unless another is named; every hash is right.

    Args:
        package: the original.
        out: the copy, which must not exist.
        change: edits the graph in place.
        graph: which, by its path in the package.
    """
    return _rebuilt(package, out, change, graph, MANIFEST_NAME)


def with_int8_cache_alone(package: Path, out: Path) -> Path:
    """Copy a package of q4 with a float32 and an int8 cache, in which the latter alone can be chosen."""
    shutil.copytree(package, out)
    document = read_sealed(out / MANIFEST_NAME)
    entry = document["variants"]["q4"]
    (other,) = entry["other_caches"]
    assert other["kv_cache"]["dtype"] == "int8"
    entry |= {name: value for name, value in other.items() if name in entry} | {"other_caches": []}
    (out / MANIFEST_NAME).write_bytes(seal(document))
    return out


def with_trt_graph(package: Path, out: Path, options: TrtOptions) -> Path:
    """Copy a package and add a graph for TensorRT, without an engine.

    Args:
        package: the original.
        out: the copy, which must not exist.
        options: of the graph.
    """
    shutil.copytree(package, out)
    folder = out / TRT_FOLDER
    folder.mkdir()
    variant = write_trt_variant(out, open_package(out).manifest, folder, options)
    version = open_package(out).manifest.exporter_version
    files = hash_files(out, variant.files)
    manifest = TrtManifest(FORMAT_VERSION, version, package_checksum(out), {variant.name: variant}, {}, files)
    (folder / MANIFEST_NAME).write_bytes(seal(to_document(manifest)))
    return out


def rebuilt_trt(package: Path, out: Path, change: Callable[[ir.Model], object], precision: Precision = "fp32") -> Path:
    """Copy a package with a changed graph for TensorRT; every hash is right.

    The plan stays as it was: it is for a runner of the graph, onnxruntime.

    Args:
        package: the original, with that graph.
        out: the copy, which must not exist.
        change: edits the graph in place.
        precision: of the graph.
    """
    return _rebuilt(package, out, change, f"{TRT_FOLDER}/model_{precision}.onnx", f"{TRT_FOLDER}/{MANIFEST_NAME}")


def _rebuilt(package: Path, out: Path, change: Callable[[ir.Model], object], graph: str, manifest: str) -> Path:
    shutil.copytree(package, out)
    model = ir.load(package / graph)
    change(model)
    save_graph(model, out / graph)
    document = read_sealed(out / manifest)
    entries = hash_files(out, document["files"])
    document["files"] = {name: vars(entry) for name, entry in entries.items()}
    (out / manifest).write_bytes(seal(document))
    return out
