"""Graphs prepared for this machine: weights packed as onnxruntime's kernels read them, in a file that is mapped.

Without, each process packs the weights into memory of its own while it loads. Mapped, they take none: processes share
the file's pages, and the system may drop them. A folder for each graph, in `.prepared` in the package, or where that
cannot be written in the user's cache:

| file                     | what it holds                                                                         |
|--------------------------|---------------------------------------------------------------------------------------|
| the graph's name         | the graph as onnxruntime optimised it                                                 |
| its data's name          | the weights as they came, then packed, each of these from a whole huge page on        |
| prepared.json            | what it was made of, and for which machine; size and sha256 of the two                |

onnxruntime packs each weight once more while it loads, one at a time, and takes what is mapped if that is the same to
the byte: so it wants the weights as they came, too, and a file of another processor costs memory and breaks nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import platform
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import onnxruntime as ort  # type: ignore[import-untyped]

from runtimes.errors import DISK_FULL, BackendError, PackageError, ResourceError
from runtimes.linked_data import change_external_data, external_data
from runtimes.manifest import Variant
from runtimes.ort.session import open_session
from runtimes.ort.versions import without_too_new
from runtimes.package import Package
from runtimes.sealed import FORMAT_VERSION, FileEntry, check_files, read_sealed, seal
from runtimes.targets import find_target, runs

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

FOLDER = ".prepared"
"""in a package"""

logger = logging.getLogger(__name__)

_DOCUMENT, _STAGING = "prepared.json", ".staging-"
_HUGE_PAGE, _LINE = 1 << 21, 64
_FORM = 1
"""of the files; another is not looked at"""
_COPIES = 5
"""what is written takes at most so many times the package's data on the disk, while it is written"""
_CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class PreparedGraph:
    """A graph that was prepared for this machine."""

    folder: Path
    graph: Path
    data: Path
    files: Mapping[str, FileEntry]
    hashes: bool

    def check(self) -> None:
        """Compare the files with what was written; without `hashes` their sizes alone.

        Raises:
            IntegrityError: one is another since.
        """
        remedy = "delete the folder, and run olmo2-run prepare again"
        check_files(self.folder, self.files, hashes=self.hashes, remedy=remedy, hashed=_hash_mapped)


def find_prepared(package: Package, graph: str, data: Sequence[str], *, hashes: bool = True) -> PreparedGraph | None:
    """Return a graph of a package as it was prepared for this machine and this onnxruntime; None if it was not.

    Args:
        package: its manifest says which graph and weights.
        graph: a path in it.
        data: likewise, of its weights.
        hashes: its `check` reads the files.
    """
    if graph not in package.manifest.files:  # one for TensorRT, which nobody prepares
        return None
    made_of = _made_of(package, graph, data)
    for home in _homes(package):
        folder = home / _name(graph, made_of)
        try:
            document = read_sealed(folder / _DOCUMENT)
            files = {name: FileEntry(**entry) for name, entry in document["files"].items()}
            if document["made_of"] == made_of:
                check_files(folder, files, hashes=False)
                return PreparedGraph(folder, folder / Path(graph).name, folder / Path(data[0]).name, files, hashes)
        except FileNotFoundError:
            continue
        except (PackageError, KeyError, TypeError, AttributeError, OSError) as error:
            logger.warning("%s: not used (%s); delete it, and run olmo2-run prepare again", folder, error)
    return None


def prepare(package: Package, variant: Variant, threads: int) -> Iterator[tuple[PreparedGraph, bool]]:
    """Prepare the graphs of a variant for this machine and this onnxruntime, those that are not yet.

    What was prepared for the same machine from other graphs of that name, or by another onnxruntime, is deleted.

    Args:
        package: its files have been checked.
        variant: whose.
        threads: of an operator.

    Yields:
        Each graph, and whether it was made now.

    Raises:
        BackendError: it does not run on a CPU, or not with this onnxruntime.
        ResourceError: the disk is full, or no folder can be written.
        PackageError: onnxruntime cannot load the graph.
    """
    cpu = find_target("ort", "cpu")
    if not runs(variant, cpu):
        raise BackendError(f"variant {variant.name}: does not run on {cpu.place}; prepare {', '.join(cpu.variants)}")
    variant = without_too_new(variant, ort.__version__, cpu.device)
    graphs = [(variant.graph, variant.data)]
    if variant.prefill is not None:
        graphs.append((variant.prefill.graph, variant.prefill.data))
    for graph, data in graphs:
        if found := find_prepared(package, graph, data):
            yield found, False
            continue
        home = _writable_home(package)
        with _locked(home):
            if found := find_prepared(package, graph, data):  # another process has made it meanwhile
                yield found, False
                continue
            yield _made(package, variant, graph, data, home, threads), True


def _made(
    package: Package, variant: Variant, graph: str, data: Sequence[str], home: Path, threads: int
) -> PreparedGraph:
    made_of = _made_of(package, graph, data)
    target = home / _name(graph, made_of)
    size = sum(package.files_of(variant)[name].size for name in data)
    free = shutil.disk_usage(home).free
    if free < _COPIES * size:
        raise ResourceError(f"{home}: {free:,} bytes are free, preparing {graph} takes {_COPIES * size:,}; free some")
    for leftover in home.glob(f"{_STAGING}*"):  # of a writer that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    staging = home / f"{_STAGING}{os.getpid()}"
    try:
        staging.mkdir()
        packed = staging / Path(graph).name
        open_session(package.folder / graph, variant, threads, save_as=packed)
        _lay_out(packed, staging / Path(data[0]).name)
        names = sorted(path.name for path in staging.iterdir())
        files = _hash_mapped(staging, names)
        entries = {name: {"sha256": entry.sha256, "size": entry.size} for name, entry in files.items()}
        document = {"format_version": FORMAT_VERSION, "made_of": made_of, "files": entries}
        with (staging / _DOCUMENT).open("wb") as file:
            file.write(seal(document))
            _force(file)
        _drop_stale(home, graph, made_of)
        staging.rename(target)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise ResourceError(f"{home}: the disk is full; free {_COPIES * size:,} bytes") from error
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return PreparedGraph(target, target / Path(graph).name, target / Path(data[0]).name, files, hashes=True)


def _lay_out(graph: Path, data: Path) -> None:
    """Write the weights of a graph that onnxruntime saved so that what is packed can lie in huge pages.

    Args:
        graph: its weights lie beside it, in a file of its name with `_data`; it is written anew.
        data: what is written.
    """
    saved = graph.with_name(f"{graph.name}_data")
    model = graph.read_bytes()
    plain: dict[int, int] = {}  # where a weight begins -> its bytes
    packed: dict[int, int] = {}
    offset = 0
    for key, value in external_data(model):
        if key == "offset":
            offset = int(value)
        elif key == "length":
            plain[offset] = int(value)
        elif key.startswith("prepacked"):
            packed |= dict(_blobs(value))
    moved, end = {}, 0
    for blobs in (plain, packed):
        for start, size in sorted(blobs.items()):
            end = _up(end, _HUGE_PAGE if blobs is packed and size >= _HUGE_PAGE else _LINE)
            moved[start] = end
            end += size
        end = _up(end, _HUGE_PAGE if packed else _LINE)
    laid_out = data.with_name("laid_out")
    with saved.open("rb") as source, laid_out.open("wb") as target:
        for start, size in (*sorted(plain.items()), *sorted(packed.items())):
            source.seek(start)
            target.seek(moved[start])
            while size:
                target.write(piece := source.read(min(size, _HUGE_PAGE)))
                size -= len(piece)
        _force(target)
    saved.unlink()
    laid_out.rename(data)

    def change(key: str, value: str) -> str:
        if key == "location":
            return data.name
        if key == "offset":
            return str(moved[int(value)])
        if key.startswith("prepacked"):
            name, *blobs = value.split("|")
            parts = [blob.split(";") for blob in blobs]
            return "|".join([name, *(";".join([str(moved[int(start)]), *rest]) for start, *rest in parts)])
        return value

    with graph.open("wb") as file:
        file.write(change_external_data(model, change))
        _force(file)


def _blobs(entry: str) -> Iterator[tuple[int, int]]:
    """Yield where packed weights begin, and their bytes, of an entry as `KEY|START;SIZE;CHECKSUM|...`."""
    for blob in entry.split("|")[1:]:
        start, size, *_ = blob.split(";")
        yield int(start), int(size)


def _up(number: int, step: int) -> int:
    return -(-number // step) * step


def _force(file: IO[bytes]) -> None:
    """Have a file written to the disk, and forgotten by the memory, so that who reads it first decides on its pages."""
    file.flush()
    os.fsync(file.fileno())
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _drop_stale(home: Path, graph: str, made_of: Mapping[str, Any]) -> None:
    """Delete what was prepared from a graph of that name for the same machine, as nothing reads it any more."""
    for folder in home.glob(f"{Path(graph).name}-*"):
        try:
            stale: bool = read_sealed(folder / _DOCUMENT)["made_of"]["machine"] == made_of["machine"]
        except (OSError, PackageError, KeyError, TypeError):
            stale = True
        if stale:
            logger.info("%s: of another graph or onnxruntime, deleted", folder)
            shutil.rmtree(folder, ignore_errors=True)


def _made_of(package: Package, graph: str, data: Sequence[str]) -> dict[str, Any]:
    """Return all that decides what is prepared."""
    files = package.manifest.files
    return {
        "form": _FORM,
        "onnxruntime": ort.__version__,
        "machine": _machine(),
        "graph": {name: files[name].sha256 for name in (graph, *data)},
    }


def _machine(cpuinfo: Path = _CPUINFO) -> dict[str, str]:
    """Return what decides how kernels want their weights: the system, and what the processor can do."""
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:  # Linux alone has it
        lines = []
    flags = next((line.partition(":")[2] for line in lines if line.startswith(("flags", "Features"))), "")
    words = " ".join(sorted(flags.split())) or platform.processor()
    return {
        "system": sys.platform,
        "architecture": platform.machine(),
        "instructions": hashlib.sha256(words.encode()).hexdigest()[:16],
    }


def _name(graph: str, made_of: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    return f"{Path(graph).name}-{digest[:16]}"


def _homes(package: Package) -> list[Path]:
    """Return where prepared graphs of a package may be, the first that can be written first."""
    cache = {"darwin": "Library/Caches", "win32": "AppData/Local"}.get(sys.platform, ".cache")
    own = Path.home() / cache / "olmo2-export" / "prepared" / package.checksum[:16]
    return [own] if package.on_hub else [package.folder / FOLDER, own]


def _writable_home(package: Package) -> Path:
    """Return the first home that can be written, which is there then.

    Raises:
        ResourceError: none can.
    """
    for home in _homes(package):
        try:
            home.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            logger.info("%s: cannot be written (%s)", home, error.strerror)
            continue
        if os.access(home, os.W_OK):
            return home
    raise ResourceError(f"{' and '.join(map(str, _homes(package)))}: neither can be written; make one writable")


def _hash_mapped(folder: Path, names: Iterable[str]) -> dict[str, FileEntry]:
    """Return the entries of files, read in huge pages where the system can: they stay in memory as they were read."""
    found = {}
    for name in names:
        with (folder / name).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with suppress(OSError):  # of a kernel that has none
                    memory.madvise(mmap.MADV_HUGEPAGE)
            found[name] = FileEntry(hashlib.sha256(memory).hexdigest(), len(memory))
    return found


@contextmanager
def _locked(home: Path) -> Iterator[None]:
    """Wait for other writers of a home, and keep them out; the kernel frees it when the process ends."""
    with (home / ".lock").open("ab") as file:
        if fcntl is not None:
            with suppress(OSError):  # of a file system without locks; two writers then both make it, and one keeps it
                fcntl.flock(file, fcntl.LOCK_EX)
        yield
