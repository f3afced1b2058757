"""Replace a folder in one atomic step: at every moment it is the old one or the new one, whole.

The new folder is built under a hidden name beside its target and exchanged with it. A lock that the kernel holds keeps
a second writer out, and what a killed writer left behind is swept by the next.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runtimes.errors import DISK_FULL, ResourceError, UsageError, first_names
from runtimes.manifest import MANIFEST_NAME, PARITY_NAME, TRT_FOLDER


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Keep other writers of a folder out; the kernel releases the lock when the process ends, however it ends.

    Args:
        target: the folder, which need not exist; the lock is `.<name>.lock` beside it.

    Raises:
        ResourceError: another process holds it.
        UsageError: the folder around it is not writable.
    """
    path = target.parent / f".{target.name}.lock"
    while True:
        try:
            handle = path.open("a+")
        except OSError as error:
            raise UsageError(f"{target}: {target.parent} is not writable ({error.strerror})") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            handle.seek(0)
            holder = handle.read().strip() or "unknown"
            handle.close()
            raise ResourceError(f"{target}: locked by pid {holder}; wait for it, or use another folder") from error
        if path.exists() and os.fstat(handle.fileno()).st_ino == path.stat().st_ino:
            break
        handle.close()  # its last holder removed it between our open and our lock
    with handle:
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextmanager
def replace_folder(
    target: Path, *, force: bool, kind: str = "package", foreign: Callable[[Path], list[str]] | None = None
) -> Iterator[Path]:
    """Yield an empty staging folder beside `target`; swap it in on success, remove it on failure.

    The swap is one atomic exchange. A lock keeps a second writer out, and leftovers of killed writers are removed.

    Args:
        target: the folder to create or replace.
        force: replace it if it is a package of ours and holds nothing else; other non-empty folders are never replaced.
        kind: what is written, for messages.
        foreign: returns the files of a folder that are not of such a kind; None: those that are not a package's.

    Raises:
        UsageError: the target is a file, or a non-empty folder that must not be replaced.
        ResourceError: another process is writing it, or the disk is full.
    """
    target = Path.cwd() / target  # not resolved: a link must be seen as one
    foreign = foreign or _foreign_files
    check_replaceable(target, force, kind, foreign)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{target}: cannot be created ({error.strerror})") from error
    with locked(target):
        check_replaceable(target, force, kind, foreign)
        for leftover in target.parent.glob(f".{target.name}.staging-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        staging = target.parent / f".{target.name}.staging-{os.getpid()}"
        try:
            try:
                staging.mkdir()
                yield staging
                _sync(staging)
                _swap(staging, target)
            except OSError as error:
                if isinstance(error, ResourceError) or error.errno not in DISK_FULL:
                    raise
                raise resource_error(target, error) from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def resource_error(path: Path, error: OSError) -> ResourceError:
    """Return the error to raise for a failed write, with the space that is left."""
    free = shutil.disk_usage(path.parent if path.parent.exists() else path.anchor).free
    return ResourceError(f"{path}: writing failed ({error.strerror or error}); {free:,} bytes are free: disk full?")


def check_replaceable(target: Path, force: bool, kind: str, foreign: Callable[[Path], list[str]]) -> None:
    """Refuse a target that must not be replaced; see `replace_folder`.

    Raises:
        UsageError: it is a file, or a non-empty folder that is not to be replaced.
    """
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UsageError(f"{target}: exists and is not a folder; choose another --out")
    if target.resolve() in (Path.cwd().resolve(), *Path.cwd().resolve().parents):
        raise UsageError(f"{target}: the folder you are in, or one around it; choose another --out")
    if not target.exists() or not any(target.iterdir()):
        return
    if found := foreign(target):
        raise UsageError(f"{target}: not empty and not a {kind} ({first_names(found)}); choose another --out")
    if not force:
        raise UsageError(f"{target}: holds a {kind} already; --force replaces it")


def _foreign_files(folder: Path) -> list[str]:
    """Return the files of a folder that are not of our making: all of them, unless a manifest of ours is there."""
    if folder.name == TRT_FOLDER and _own_manifest(folder.parent) is not None:
        return []  # a package's engines, however damaged
    found = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_symlink() or not p.is_dir())
    manifest = _own_manifest(folder)
    if manifest is None:
        return found
    own = {MANIFEST_NAME, PARITY_NAME, *manifest["files"]}
    return [name for name in found if name not in own and not name.startswith((".", f"{TRT_FOLDER}/"))]


def _own_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a folder if this project has written it, intact or not."""
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if (
        not isinstance(manifest, dict)
        or not {"format_version", "exporter_version", "checksum", "files"} <= manifest.keys()
    ):
        return None
    return manifest


def _sync(folder: Path) -> None:
    """Force the folder to disk, so that the swap cannot survive a crash that the data does not."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _swap(staging: Path, target: Path) -> None:
    """Put staging in the place of target; what was there ends up at staging, to be removed."""
    if not target.exists():
        staging.rename(target)
        return
    if sys.platform == "linux":
        exchange, at_cwd = 2, -100  # RENAME_EXCHANGE, AT_FDCWD of renameat2(2)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.renameat2(at_cwd, os.fsencode(staging), at_cwd, os.fsencode(target), exchange) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS):  # a file system without exchange
            raise OSError(code, os.strerror(code), str(target))
    aside = staging.with_name(f"{staging.name}.old")
    target.rename(aside)
    staging.rename(target)
    aside.rename(staging)
