"""manifest.json and trt/manifest.json on disk: read, checked field by field, and written. Standard library only.

A document has the fields that the annotations in `manifest.py` say, no more, all the way down; what has a default may
lack, so that older packages are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from runtimes.errors import IntegrityError, PackageError, PackageNotFoundError, first_names
from runtimes.manifest import MANIFEST_NAME, PARITY_NAME, TRT_FOLDER, Manifest, TrtManifest, role_of
from runtimes.sealed import read_sealed

_T = TypeVar("_T")


@cache
def _fields(kind: type) -> dict[str, tuple[Any, bool]]:
    """Return field -> its annotation, and whether a document must have it."""
    hints = get_type_hints(kind)
    return {
        entry.name: (hints[entry.name], entry.default is MISSING and entry.default_factory is MISSING)
        for entry in fields(kind)
    }


def _build(hint: Any, value: Any, where: str) -> Any:
    """Build a value from its JSON form by its annotation, all the way down; integers are sizes or counts, not negative.

    Raises:
        TypeError: naming the field.
    """
    kind, arguments = get_origin(hint), get_args(hint)
    if isinstance(hint, type) and is_dataclass(hint) and isinstance(value, Mapping):
        hints = _fields(hint)
        unknown = [name for name in value if name not in hints]
        missing = [name for name, (_, needed) in hints.items() if needed and name not in value]
        if unknown or missing:
            said = [f"lacks {first_names(missing)}"] if missing else []
            said += [f"has {first_names(unknown)}, which this version does not know"] if unknown else []
            raise TypeError(f"{where} {' and '.join(said)}")
        return hint(**{name: _build(hints[name][0], item, f"{where}.{name}") for name, item in value.items()})
    if kind is dict and isinstance(value, Mapping):
        return {name: _build(arguments[1], item, f"{where}[{name}]") for name, item in value.items()}
    if kind is tuple and isinstance(value, list):
        return tuple(_build(arguments[0], item, f"{where}[{n}]") for n, item in enumerate(value))
    if kind is Literal:
        if any(type(value) is type(known) and value == known for known in arguments):
            return value
        raise TypeError(f"{where} is {value!r:.80}, expected {' or '.join(map(str, arguments))}")
    if kind in (Union, UnionType):
        if value is None and NoneType in arguments:
            return None
        others = [other for other in arguments if other is not NoneType]
        return _build(type(value) if type(value) in others else others[0], value, where)
    if type(value) is hint and (hint is not int or value >= 0):
        return value
    raise TypeError(f"{where} is {value!r:.80}")


def _with_roles(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a document in which each input and output has a role: format 3 has none, nor had format 4 at first."""

    def tensor(spec: Any) -> Any:
        role = role_of(spec["name"]) if isinstance(spec, Mapping) and isinstance(spec.get("name"), str) else None
        return spec if role is None or "role" in spec else {**spec, "role": role}

    def variant(entry: Any) -> Any:
        if not isinstance(entry, Mapping):
            return entry
        tables = {kind: entry[kind] for kind in ("inputs", "outputs") if isinstance(entry.get(kind), list)}
        return {**entry, **{kind: [tensor(spec) for spec in specs] for kind, specs in tables.items()}}

    variants = document.get("variants")
    if not isinstance(variants, Mapping):
        return dict(document)
    return {**document, "variants": {name: variant(entry) for name, entry in variants.items()}}


def _check_names(names: Iterable[str]) -> None:
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name:
            raise PackageError(f"manifest: file name {name!r} leads out of the package")


def _check(manifest: object) -> None:
    """Check what annotations do not say.

    Raises:
        PackageError: a file name leads out of the package.
        ValueError: no version, or an engine whose plan nothing vouches for.
    """
    assert isinstance(manifest, Manifest | TrtManifest)
    _check_names(manifest.files)
    if isinstance(manifest, Manifest):
        _check_names(manifest.source.files)
        for adapter in (*manifest.source.adapters, *(entry.source for entry in manifest.adapters.values())):
            _check_names(adapter.files)
        if lost := [entry.file for entry in manifest.adapters.values() if entry.file not in manifest.files]:
            raise ValueError(f"adapter {lost[0]!r} is not among its files")
    for variant in manifest.variants.values():
        windows = variant.kv_cache.windows
        if windows and len(windows) != variant.kv_cache.num_layers:
            raise ValueError(f"kv_cache.windows has {len(windows)} layers, expected {variant.kv_cache.num_layers}")
        for graph in variant.each_graph:
            oldest = graph.min_onnxruntime
            if oldest is not None and re.fullmatch(r"\d+(\.\d+){1,2}", oldest) is None:
                raise ValueError(f"min_onnxruntime is {oldest!r}")
    for engine in manifest.engines.values() if isinstance(manifest, TrtManifest) else ():
        if engine.plan not in manifest.files:
            raise ValueError(f"plan {engine.plan!r} is not among its files")


def _parse(path: Path, kind: type[_T], document: Mapping[str, Any], remedy: str) -> _T:
    """Build a manifest from its document.

    Raises:
        PackageError: a field is missing, unknown, or not what its annotation says.
    """
    body = {name: value for name, value in document.items() if name != "checksum"}
    try:
        manifest: _T = _build(kind, _with_roles(body), "manifest")
        _check(manifest)
    except (TypeError, ValueError) as error:
        if isinstance(error, PackageError):
            raise
        version = document["format_version"]
        raise PackageError(f"{path}: not the fields of format {version} ({error}); {remedy}") from error
    return manifest


def _read(package: Path, name: str) -> dict[str, Any]:
    path = package / name
    if not package.is_dir():
        raise PackageNotFoundError(
            f"{package}: no such folder; make a package with: olmo2-export export MODEL --out DIR"
        )
    if not path.is_file():
        raise PackageNotFoundError(
            f"{package}: not a package (no {name}); make one with: olmo2-export export MODEL --out DIR"
        )
    return read_sealed(path)


def to_document(manifest: Manifest | TrtManifest) -> dict[str, Any]:
    """Return the JSON form of a manifest, ready for `seal`."""
    return asdict(manifest)


def read_manifest(package: Path) -> tuple[Manifest, str]:
    """Return manifest.json and its checksum, which identifies the whole export.

    Raises:
        PackageNotFoundError: no such folder, or no manifest in it.
        IntegrityError: the manifest was changed.
        PackageError: it is of a version that is not read, or damaged otherwise.
    """
    document = _read(package, MANIFEST_NAME)
    manifest = _parse(package / MANIFEST_NAME, Manifest, document, "export it again")
    return manifest, str(document["checksum"])


def read_trt_manifest(package: Path, checksum: str) -> TrtManifest | None:
    """Return trt/manifest.json; None if nothing was built yet.

    Args:
        package: the package folder.
        checksum: of the export that it must be built from.

    Raises:
        IntegrityError: the manifest was changed, or was built from another export than this.
    """
    path = package / TRT_FOLDER / MANIFEST_NAME
    if not path.is_file():
        return None
    manifest = _parse(path, TrtManifest, _read(package, f"{TRT_FOLDER}/{MANIFEST_NAME}"), "build it again")
    if manifest.package_checksum != checksum:
        raise IntegrityError(
            f"{path}: built from another export than {MANIFEST_NAME} beside it; run: olmo2-export build {package}"
        )
    return manifest


def package_checksum(package: Path) -> str:
    """Return the checksum of the package's manifest as it is now, which identifies the whole export."""
    return str(_read(package, MANIFEST_NAME)["checksum"])


def read_reports(package: Path, checksum: str) -> dict[str, dict[str, Any]]:
    """Return what parity.json says of an export, by its checksum: variant -> its part of the report.

    It is a report and no part of the contract: where it is not there, damaged or of another export, it says nothing.
    """
    try:
        document = read_sealed(package / PARITY_NAME)
        known = document["package_checksum"] == checksum
        found = {str(name): dict(entry) for name, entry in document["variants"].items()} if known else {}
    except (OSError, PackageError, KeyError, TypeError, ValueError, AttributeError):
        return {}
    return found if all("passed" in entry for entry in found.values()) else {}
