"""Documents that carry their own checksum, and the files they vouch for by size and sha256. Standard library only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtimes.errors import IntegrityError, PackageError, broken_link

FORMAT_VERSION = 4
"""what is written"""
READABLE_VERSIONS = (3, 4)
"""what is read: format 3 does not say which onnxruntime a graph needs, nor the roles of its inputs and outputs"""

_HASH_CHUNK = 1 << 20


@dataclass(frozen=True)
class FileEntry:
    """What one file of the package must be."""

    sha256: str
    size: int
    """bytes"""


def seal(document: Mapping[str, Any]) -> bytes:
    """Return the JSON bytes of a document with its checksum; the same document gives the same bytes."""
    body = {k: v for k, v in document.items() if k != "checksum"}
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    sealed = {**body, "checksum": hashlib.sha256(canonical).hexdigest()}
    return (json.dumps(sealed, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def read_sealed(path: Path) -> dict[str, Any]:
    """Read a document written with `seal`.

    Raises:
        IntegrityError: a byte differs from what was written.
        PackageError: the document is of another format version.
    """
    raw = path.read_bytes()
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{path}: not valid JSON ({error}); export the package again") from error
    if not isinstance(document, dict):
        raise IntegrityError(f"{path}: expected a JSON object; export the package again")
    version = document.get("format_version")
    if type(version) is not int or version not in READABLE_VERSIONS:
        known = " and ".join(map(str, READABLE_VERSIONS))
        raise PackageError(
            f"{path}: format_version {version!r}, this version reads {known}; update olmo2-export, or export the "
            "package again"
        )
    try:
        intact = seal(document) == raw
    except ValueError:  # NaN or Infinity
        intact = False
    if not intact:
        raise IntegrityError(f"{path}: changed since it was written (checksum mismatch); export the package again")
    return document


def hash_file(path: Path) -> FileEntry:
    """Return the sha256 and size of a file, read in pieces."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return FileEntry(digest.hexdigest(), size)


def hash_files(folder: Path, names: Iterable[str]) -> dict[str, FileEntry]:
    """Return the entries of several files of a folder, hashed on all cores, in the order given."""
    names = list(names)
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(hash_file, [folder / n for n in names]), strict=True))


def check_files(
    package: Path,
    files: Mapping[str, FileEntry],
    names: Iterable[str] | None = None,
    *,
    hashes: bool = True,
    remedy: str = "export the package again",
    hashed: Callable[[Path, Iterable[str]], Mapping[str, FileEntry]] = hash_files,
) -> None:
    """Compare files with what the manifest says of them: presence and size first, then sha256.

    Args:
        package: the package folder.
        files: the manifest's table.
        names: which of them; None means all.
        hashes: False stops after presence and size, without reading the files.
        remedy: what the message tells the user to do.
        hashed: reads files of the folder and returns their entries; `hash_files`, or what remembers them.

    Raises:
        IntegrityError: naming every file that differs.
    """
    wanted = list(files) if names is None else list(names)
    problems: list[str] = []
    to_hash: list[str] = []
    for name in wanted:
        path = package / name
        if name not in files:
            problems.append(f"{name}: not in the manifest")
        elif not path.is_file():
            problems.append(f"{name}: {broken_link(path) or 'missing'}")
        elif (size := path.stat().st_size) != files[name].size:
            problems.append(f"{name}: {size} bytes, the manifest says {files[name].size}")
        else:
            to_hash.append(name)
    for name, entry in hashed(package, to_hash if hashes else ()).items():
        if entry.sha256 != files[name].sha256:
            problems.append(f"{name}: sha256 {entry.sha256[:12]}..., the manifest says {files[name].sha256[:12]}...")
    if problems:
        raise IntegrityError(f"{package}: {'; '.join(problems)}; {remedy}")
