"""Change a package the way a bug in the exporter would: the graph is wrong, and the manifest vouches for it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

from olmo2_export.package import save_graph
from runtimes.manifest import MANIFEST_NAME, hash_files, read_sealed, seal


def rebuilt(package: Path, out: Path, change: Callable[[ir.Model], object]) -> Path:
    """Copy a package with a changed fp32 graph; every hash is right.

    Args:
        package: the original.
        out: the copy, which must not exist.
        change: edits the graph in place.
    """
    shutil.copytree(package, out)
    model = ir.load(package / "onnx" / "model.onnx")
    change(model)
    save_graph(model, out / "onnx" / "model.onnx")
    document = read_sealed(out / MANIFEST_NAME)
    entries = hash_files(out, document["files"])
    document["files"] = {name: vars(entry) for name, entry in entries.items()}
    (out / MANIFEST_NAME).write_bytes(seal(document))
    return out
