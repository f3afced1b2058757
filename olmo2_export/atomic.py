"""Replace a folder: at every moment it is the old one or the new one, whole.

The new folder is built under a hidden name beside its target and exchanged with it in one step. A lock that the kernel
holds keeps a second writer out, and what a killed writer left behind is swept by the next.

A folder that cannot be exchanged, as a mount point, or one in a folder that may not be written, is built inside the
target and then moved up, entry by entry: first the old manifest goes, last the new one comes. There, and where a system
cannot exchange two folders in one step, the promise is less: a killed writer leaves the old package, the new one, or
none: a folder without a manifest, which nothing takes for a package and the next writer replaces.

Links are followed: the folder that one leads to is replaced, and the link stays. On a file system without locks nothing
keeps a second writer out, and on one that cannot force files to disk a power cut may undo what was written: that is
logged, once. On Windows nothing is locked or forced, and nothing said.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, Any

from runtimes.errors import DISK_FULL, ResourceError, UsageError, first_names
from runtimes.manifest import MANIFEST_NAME, PARITY_NAME, TRT_FOLDER

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

_NOT_SUPPORTED = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS})
_NOT_MOVABLE = frozenset({errno.EXDEV, errno.EBUSY, errno.EPERM, errno.EACCES})
_PREVIOUS = "previous-manifest.json"  # in a staging folder: it is being moved up
_MOUNTS = Path("/proc/self/mountinfo")
_LONGEST_NAME = 200  # bytes: file systems allow 255, and what is written beside a folder has its name and more
_OF_THE_FILE_SYSTEM = "lost+found"


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Keep other writers of a folder out; the kernel releases the lock when the process ends, however it ends.

    Args:
        target: the folder, which need not exist; the lock is `.<name>.lock` beside it, or in it if it is a mount point
            or the folder around it may not be written.

    Raises:
        ResourceError: another process holds it.
        UsageError: neither the folder nor the one around it is writable.
    """
    if fcntl is None:
        yield
        return
    place = _real(target)
    path = _hidden(place, "lock")
    while True:
        try:
            handle = path.open("a+")
        except OSError as error:
            where = "it" if path.parent == place else path.parent
            raise UsageError(
                f"{target}: {where} is not writable ({error.strerror}); choose another folder, or copy it to one"
            ) from error
        _lock(handle, target)
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


def _lock(handle: IO[str], target: Path) -> None:
    """Lock an open file, which is closed if that fails.

    Raises:
        ResourceError: another process has locked it.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        handle.seek(0)
        holder = handle.read().strip() or "unknown"
        handle.close()
        raise ResourceError(f"{target}: locked by pid {holder}; wait for it, or use another folder") from error
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            handle.close()
            raise
        _warn(f"a file system without locks ({error.strerror}): nothing keeps a second writer out")


@contextmanager
def replace_folder(
    target: Path, *, force: bool, kind: str = "package", foreign: Callable[[Path], list[str]] | None = None
) -> Iterator[Path]:
    """Yield an empty staging folder; put it in the place of `target` on success, remove it on failure.

    Where it can be, that is one atomic exchange; see the top of this file. A lock keeps a second writer out, and
    leftovers of killed writers are removed.

    Args:
        target: the folder to create or replace; a link to one stays, and what it leads to is replaced.
        force: replace it if it is a package of ours and holds nothing else; other non-empty folders are never replaced.
        kind: what is written, for messages.
        foreign: returns the files of a folder that are not of such a kind; None: those that are not a package's.

    Raises:
        UsageError: the target is a file, a non-empty folder that must not be replaced, or cannot be written.
        ResourceError: another process is writing it, or the disk is full.
    """
    target = Path.cwd() / target
    check_replaceable(target, force, kind, foreign)
    place = _real(target)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{target}: cannot be created ({error.strerror})") from error
    with locked(target):
        check_replaceable(target, force, kind, foreign)
        staging = _hidden(place, f"staging-{os.getpid()}")
        _sweep(place)
        try:
            try:
                staging.mkdir()
                yield staging
                for path in [*staging.rglob("*"), staging]:
                    _sync(path)
                if staging.parent == place:
                    _move_up(staging)
                else:
                    _swap(staging, place)
            except OSError as error:
                if isinstance(error, ResourceError) or error.errno not in DISK_FULL:
                    raise
                raise resource_error(target, error) from error
        finally:
            if not (staging / _PREVIOUS).exists():  # else the next writer needs it
                shutil.rmtree(staging, ignore_errors=True)


def can_write(path: Path) -> bool:
    """Tell whether `write_file` can write a file."""
    if path.is_dir():
        return False
    return os.access(path if _in_place(path) else path.parent, os.W_OK)


def write_file(path: Path, content: bytes) -> None:
    """Write a file in one step: it is the old one or the new one, whole; a link is replaced, not what it leads to.

    What is no plain file, such as /dev/stdout, and a file in a folder that may not be written, are written as they are.

    Raises:
        ResourceError: the disk is full.
    """
    temporary = path
    if not _in_place(path):
        prefix = f".{path.name if len(os.fsencode(path.name)) <= _LONGEST_NAME else 'report'}."
        for leftover in path.parent.iterdir():  # of a killed process
            if leftover.name.startswith(prefix) and leftover.name.removeprefix(prefix).isdecimal():
                leftover.unlink(missing_ok=True)
        temporary = path.with_name(f"{prefix}{os.getpid()}")
    try:
        temporary.write_bytes(content)
        if temporary != path:
            temporary.replace(path)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise resource_error(path, error) from error
    finally:
        if temporary != path:
            temporary.unlink(missing_ok=True)


def _in_place(path: Path) -> bool:
    """Tell whether a file cannot be replaced by another, but can be written."""
    return path.exists() and (not path.is_file() or not os.access(path.parent, os.W_OK))


def resource_error(path: Path, error: OSError) -> ResourceError:
    """Return the error to raise for a failed write, with the space that is left."""
    free = shutil.disk_usage(next(p for p in (path, *path.parents) if p.is_dir())).free
    return ResourceError(f"{path}: writing failed ({error.strerror or error}); {free:,} bytes are free: disk full?")


def check_replaceable(
    target: Path, force: bool, kind: str = "package", foreign: Callable[[Path], list[str]] | None = None
) -> None:
    """Refuse a target that must not be replaced, or cannot be; see `replace_folder`.

    Raises:
        UsageError: it is a file, a non-empty folder that is not to be replaced, or may not be written.
    """
    if target.is_symlink() and not target.exists():
        raise UsageError(f"{target}: a link to {target.readlink()}, which is not there; choose another --out")
    if target.exists() and not target.is_dir():
        raise UsageError(f"{target}: exists and is not a folder; choose another --out")
    place = _real(target)
    if place in (Path.cwd().resolve(), *Path.cwd().resolve().parents):
        raise UsageError(f"{target}: the folder you are in, or one around it; choose another --out")
    home = _hidden(place, "lock").parent
    nearest = next(folder for folder in (home, *home.parents) if folder.exists())
    if not os.access(nearest, os.W_OK):
        where = "it" if nearest == place else nearest
        raise UsageError(f"{target}: {where} is not writable; choose another --out")
    if not target.exists() or not _entries(place):
        return
    if found := [
        name for name in (foreign or _foreign_files)(target) if not _is_writers(place, name.partition("/")[0])
    ]:
        raise UsageError(f"{target}: not empty and not a {kind} ({first_names(found)}); choose another --out")
    if not force:
        raise UsageError(f"{target}: holds a {kind} already; --force replaces it")


def _real(target: Path) -> Path:
    """Return where a folder is; two names of one folder have one lock."""
    return (Path.cwd() / target).resolve()


def _hidden(place: Path, suffix: str) -> Path:
    """Return the hidden path that goes with a folder: beside it, or in it where only that can be written."""
    name = place.name
    if len(os.fsencode(name)) > _LONGEST_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    inside = place.is_dir() and (_is_mount(place) or not os.access(place.parent, os.W_OK))
    return (place if inside else place.parent) / f".{name}.{suffix}"


def _is_mount(place: Path) -> bool:
    """Tell whether a folder is a mount point; of a bind mount in one file system only the kernel's table says it."""
    if os.path.ismount(place):
        return True
    try:
        lines = _MOUNTS.read_bytes().splitlines()
    except OSError:  # not Linux
        return False
    escaped = b"".join(b"\\%03o" % c if c in b" \t\n\\" else bytes([c]) for c in os.fsencode(place))
    return any(line.split()[4] == escaped for line in lines)


def _is_writers(place: Path, name: str) -> bool:
    """Tell whether an entry of a folder, or one beside it, is what a writer of that folder has there."""
    return name == _hidden(place, "lock").name or name.startswith(_hidden(place, "staging-").name)


def _entries(place: Path) -> list[Path]:
    """Return what is in a folder, but for what a writer has there, and what the file system itself has."""
    return [p for p in place.iterdir() if not _is_writers(place, p.name) and p.name != _OF_THE_FILE_SYSTEM]


def _staged(folder: Path, place: Path) -> list[Path]:
    """Return the staging folders of a place that are in a folder."""
    if not folder.is_dir() or not os.access(folder, os.R_OK):
        return []
    return [p for p in folder.iterdir() if _is_writers(place, p.name) and p.is_dir()]


def _sweep(place: Path) -> None:
    """Remove what killed writers left behind; also a part of a folder, if one was killed while it moved that up."""
    for leftover in [*_staged(place.parent, place), *_staged(place, place)]:
        if (leftover / _PREVIOUS).exists() and leftover.parent == place and not (place / MANIFEST_NAME).exists():
            for old in _entries(place):
                _remove(old)
        shutil.rmtree(leftover, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _foreign_files(folder: Path) -> list[str]:
    """Return the files of a folder that are not of our making: all of them, unless a manifest of ours is there."""
    if folder.name == TRT_FOLDER and _own_manifest(folder.parent) is not None:
        return []  # a package's engines, however damaged
    found = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_symlink() or not p.is_dir())
    manifests = _own_manifests(folder)
    if not manifests:
        return found
    own = {MANIFEST_NAME, PARITY_NAME, *(name for manifest in manifests for name in manifest["files"])}
    return [name for name in found if name not in own and not name.startswith((".", f"{TRT_FOLDER}/"))]


def _own_manifests(folder: Path) -> list[dict[str, Any]]:
    """Return a folder's manifest; where a writer was killed while it moved a package up, those of both packages."""
    staged = _staged(folder, folder.resolve())
    found = [_own_manifest(folder), *(_own_manifest(p, n) for p in staged for n in (MANIFEST_NAME, _PREVIOUS))]
    return [manifest for manifest in found if manifest is not None]


def _own_manifest(folder: Path, name: str = MANIFEST_NAME) -> dict[str, Any] | None:
    """Return the manifest of a folder if this project has written it, intact or not."""
    try:
        manifest = json.loads((folder / name).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if (
        not isinstance(manifest, dict)
        or not {"format_version", "exporter_version", "checksum", "files"} <= manifest.keys()
    ):
        return None
    return manifest


def _sync(path: Path) -> None:
    """Force a file or folder to disk, so that a swap cannot survive a crash that the data does not."""
    if os.name == "nt" or path.is_symlink():  # it opens no folders, and forces no file that was opened to be read
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
        _warn(f"a file system that cannot force files to disk ({error.strerror}): a power cut may undo what is written")
    finally:
        os.close(handle)


def _swap(staging: Path, target: Path) -> None:
    """Put staging in the place of target; what was there ends up at staging, to be removed."""
    if not target.exists():
        staging.rename(target)
        return
    try:
        if _exchange(staging, target):
            return
        aside = staging.with_name(f"{staging.name}.old")
        target.rename(aside)
    except OSError as error:  # such as a folder of a container's image
        if error.errno not in _NOT_MOVABLE:
            raise
        inside = target / staging.name
        shutil.move(staging, inside)
        _move_up(inside)
        return
    staging.rename(target)
    aside.rename(staging)


def _exchange(staging: Path, target: Path) -> bool:
    """Exchange two folders in one step; tell whether the system can."""
    if sys.platform != "linux":
        return False
    exchange, at_cwd = 2, -100  # RENAME_EXCHANGE, AT_FDCWD of renameat2(2)
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        if libc.renameat2(at_cwd, os.fsencode(staging), at_cwd, os.fsencode(target), exchange) == 0:
            return True
        code = ctypes.get_errno()
        if code not in _NOT_SUPPORTED:
            raise OSError(code, os.strerror(code), str(target))
    _warn("a file system that cannot exchange two folders: for a moment neither is there")
    return False


def _move_up(staging: Path) -> None:
    """Put what a staging folder holds in the place of all else in the folder around it; the manifest comes last.

    In between the manifests of both are in the staging folder: they say which files the next writer may replace.
    """
    target = staging.parent
    before, after = target / MANIFEST_NAME, staging / MANIFEST_NAME
    saved = staging / f"{_PREVIOUS}.new"
    saved.write_bytes(before.read_bytes() if before.is_file() else b"")
    saved.replace(staging / _PREVIOUS)
    before.unlink(missing_ok=True)
    _sync(target)
    new = sorted(p.name for p in staging.iterdir() if p.name not in (MANIFEST_NAME, _PREVIOUS))
    for old in _entries(target):
        if old.name not in new or old.is_dir():
            _remove(old)
    for name in new:
        (staging / name).replace(target / name)
    _sync(target)
    if after.exists():
        after.replace(before)
        _sync(target)
    shutil.rmtree(staging)


@cache
def _warn(said: str) -> None:
    """Log a warning, once."""
    logger.warning("%s", said)
