"""Lay a package out as tools do that keep every file once: a Hub cache, a cache by hash, hard links."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path


def hub_cache(package: Path, home: Path) -> Path:
    """Return a snapshot whose files are links into ../../blobs, as huggingface_hub makes them."""
    return _linked(package, home / "snapshots" / ("a" * 40), lambda digest: home / "blobs" / digest)


def by_hash(package: Path, home: Path) -> Path:
    """Return a folder whose files are links to cache/ab/cdef..., each in a folder of its own, as DVC makes them."""
    return _linked(package, home / "folder", lambda digest: home / "cache" / digest[:2] / digest[2:])


def on_a_data_disk(package: Path, home: Path) -> Path:
    """Return a folder whose weights alone are links."""
    folder = Path(shutil.copytree(package, home / "folder"))
    for path in folder.rglob("*_data"):
        place = home / "disk" / f"weights of {path.name}"
        place.parent.mkdir(exist_ok=True)
        path.rename(place)
        path.symlink_to(place)
    return folder


def hard_linked(package: Path, home: Path) -> Path:
    """Return a tree whose files have a second name, as cp -al makes it."""
    return Path(shutil.copytree(Path(shutil.copytree(package, home / "one")), home / "two", copy_function=os.link))


def behind_a_link(package: Path, home: Path) -> Path:
    """Return a link to a package that is itself behind one."""
    shutil.copytree(package, home / "disk" / "package")
    (home / "data").symlink_to("disk")
    (home / "link").symlink_to("data/package")
    return home / "link"


def _linked(package: Path, folder: Path, place: Callable[[str], Path]) -> Path:
    for file in sorted(p for p in package.rglob("*") if p.is_file()):
        content = file.read_bytes()
        blob = place(hashlib.sha256(content + file.name.encode()).hexdigest())
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link = folder / file.relative_to(package)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return folder


LAYOUTS = (hub_cache, by_hash, on_a_data_disk, hard_linked, behind_a_link)
