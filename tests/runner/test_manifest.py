"""Manifests are built from their annotations: what differs is named by its field, and old ones get their roles."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.static_model import write_package

from runtimes.errors import PackageError
from runtimes.manifest import MANIFEST_NAME, TRT_FOLDER, Manifest
from runtimes.manifest_file import to_document
from runtimes.package import open_package
from runtimes.sealed import read_sealed, seal

Document = dict[str, Any]


@pytest.fixture
def reload(tiny_package: Path, tmp_path: Path) -> Callable[[Callable[[Document], object]], Manifest]:
    """Load a manifest that was changed and sealed again."""
    shutil.copyfile(tiny_package / MANIFEST_NAME, tmp_path / MANIFEST_NAME)
    original = read_sealed(tmp_path / MANIFEST_NAME)

    def changed(change: Callable[[Document], object]) -> Manifest:
        document = copy.deepcopy(original)
        change(document)
        (tmp_path / MANIFEST_NAME).write_bytes(seal(document))
        return open_package(tmp_path).manifest

    return changed


def test_a_manifest_comes_back_as_it_was_written(tiny_package: Path, q4_package: Path) -> None:
    for package in (tiny_package, q4_package):
        raw = (package / MANIFEST_NAME).read_bytes()
        assert seal(to_document(open_package(package).manifest)) == raw


@pytest.mark.parametrize("version", [3, 4])
def test_a_manifest_without_roles_gets_them_from_the_names(reload: Any, tiny_package: Path, version: int) -> None:
    def change(document: Document) -> None:
        document["format_version"] = version
        for spec in (*document["variants"]["fp32"]["inputs"], *document["variants"]["fp32"]["outputs"]):
            del spec["role"]

    variant = reload(change).variants["fp32"]
    assert variant == open_package(tiny_package).manifest.variants["fp32"]
    assert {spec.name.partition(".")[0]: spec.role for spec in (*variant.inputs, *variant.outputs)} == {
        "input_ids": "token_ids",
        "attention_mask": "attention_mask",
        "position_ids": "position_ids",
        "num_logits_to_keep": "logit_count",
        "past_key_values": "past",
        "logits": "logits",
        "present": "present",
    }


def test_a_tensor_whose_role_nothing_says_is_refused(reload: Any) -> None:
    spec = {"name": "hidden", "dtype": "float32", "shape": ["batch_size", 96]}
    with pytest.raises(PackageError, match=r"manifest\.variants\[fp32\]\.outputs\[7\] lacks role\); export it again"):
        reload(lambda document: document["variants"]["fp32"]["outputs"].append(spec))


FIRST = r"manifest\.variants\[fp32\]"


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("variants", "fp32", "inputs", 0, "role"), "tokens", FIRST + r"\.inputs\[0\]\.role is 'tokens', expected to"),
        (("variants", "fp32", "inputs", 0, "dtype"), "int65", FIRST + r"\.inputs\[0\]\.dtype is 'int65', expected fl"),
        (("variants", "fp32", "inputs", 0, "shape"), [1, -2], FIRST + r"\.inputs\[0\]\.shape\[1\] is -2"),
        (("variants", "fp32", "inputs", 0, "shape"), [1.0], FIRST + r"\.inputs\[0\]\.shape\[0\] is 1\.0"),
        (("variants", "fp32", "inputs"), {"a": 1}, FIRST + r"\.inputs is {'a': 1}"),
        (("variants", "fp32", "precision"), "fp33", FIRST + r"\.precision is 'fp33', expected fp32 or fp16 or bf16"),
        (("variants", "fp32", "kv_cache", "form"), "paged", FIRST + r"\.kv_cache\.form is 'paged', expected concat or"),
        (("variants", "fp32", "kv_cache", "quantization"), {}, FIRST + r"\.kv_cache\.quantization lacks bits, calib"),
        (("variants", "fp32", "op_counts"), {"Attention": True}, FIRST + r"\.op_counts\[Attention\] is True"),
        (("variants", "fp32", "speed"), 3, FIRST + r" has speed, which this version does not know"),
        (("variants", "fp32"), None, FIRST + " is None"),
        (("variants",), [], r"manifest\.variants is \[\]"),
        (("source", "kind"), "web", r"manifest\.source\.kind is 'web', expected hub or folder or demo"),
        (("source", "revision"), 7, r"manifest\.source\.revision is 7"),
        (("exporter",), "x", r"manifest has exporter, which this version does not know"),
        (("exporter_version",), ["x" * 999], r"manifest\.exporter_version is \['x{70,80}\)"),
    ],
)  # fmt: skip
def test_what_is_no_manifest_is_named_by_its_field(reload: Any, path: tuple[Any, ...], value: Any, said: str) -> None:
    def change(document: Document) -> None:
        *parents, last = path
        place: Any = document
        for name in parents:
            place = place[name]
        place[last] = value

    with pytest.raises(PackageError, match=rf"manifest\.json: not the fields of format 4 \({said}.*; export it again"):
        reload(change)


def test_a_field_that_is_missing_is_named(reload: Any) -> None:
    with pytest.raises(PackageError, match=r"\(manifest\.model lacks hidden_size, head_dim\); export it again"):
        reload(lambda document: [document["model"].pop(name) for name in ("hidden_size", "head_dim")])


def test_a_role_that_is_there_twice_or_never_is_refused_where_it_is_asked_for(reload: Any) -> None:
    def change(document: Document) -> None:
        for spec in document["variants"]["fp32"]["outputs"][:2]:
            spec["role"] = "score"

    variant = reload(change).variants["fp32"]
    with pytest.raises(PackageError, match=r"fp32: no input or output of role logits, expected one; export the pack"):
        variant.name_of("logits")
    with pytest.raises(PackageError, match=r"fp32: logits, present\.0\.key of role score, expected one"):
        variant.name_of("score")


def test_a_manifest_of_engines_with_other_fields_says_so(tmp_path: Path) -> None:
    path = write_package(tmp_path) / TRT_FOLDER / MANIFEST_NAME
    document = read_sealed(path)
    engine, *_ = document["engines"].values()
    for field, value in (("backend", "tensorrt"), ("profile", "fast"), ("flags", ["quick"])):
        engine[field], before = value, engine[field]
        path.write_bytes(seal(document))
        with pytest.raises(PackageError, match=rf"\(manifest\.engines\[\w+\]\.{field}.* is .*; build it again"):
            _ = open_package(tmp_path).trt
        engine[field] = before
