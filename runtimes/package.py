"""A package folder, opened once: what its manifests say, and which of its files were read and found to be right.

    package = open_package("packages/olmo2-1b")      or "hf:owner/name@revision", published on the Hub
    variant = package.variant("q4")
    package.check(variant.files)

Whoever needs a package takes a `Package`, or takes a path and opens it first; nobody opens it twice.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any, TypeAlias

from runtimes.errors import BackendError, UsageError, VariantNotFoundError
from runtimes.manifest import MANIFEST_NAME, PARITY_NAME, TRT_FOLDER, Manifest, ModelSpec, TrtManifest, Variant
from runtimes.manifest_file import read_manifest, read_reports, read_trt_manifest
from runtimes.sealed import FileEntry, check_files, hash_files

HUB = "hf:"
"""begins the name of a package on the Hub; a folder of such a name is given by its absolute path"""

_Identity: TypeAlias = tuple[int, int, int, int, int]
_EXPORT_AGAIN = "export the package again"


class Package:
    """What a package folder said when it was opened; made by `open_package`.

    The TensorRT manifest and parity.json are read when they are first asked for, so that damage there stops nobody who
    does not need them. A file is hashed when it is first checked, and again only where it is another one since.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        checksum: str,
        *,
        fetch: Callable[[Sequence[str]], None] | None = None,
        remedy: str = _EXPORT_AGAIN,
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.checksum = checksum
        """of manifest.json, which identifies the whole export"""
        self._fetch = fetch
        """brings files of a package on the Hub to its folder in the cache"""
        self._remedy = remedy
        """what to do where a file is another one"""
        self._hashed: dict[str, tuple[_Identity, FileEntry]] = {}

    def __repr__(self) -> str:
        return f"Package({str(self.folder)!r})"

    @property
    def on_hub(self) -> bool:
        """Whether it was published: nothing is written to it."""
        return self._fetch is not None

    @property
    def model(self) -> ModelSpec:
        """The shape of the model."""
        return self.manifest.model

    @cached_property
    def trt(self) -> TrtManifest | None:
        """The TensorRT graphs and engines; None if nothing was built.

        Raises:
            IntegrityError: the manifest was changed, or was built from another export than this one.
        """
        return read_trt_manifest(self.folder, self.checksum)

    @cached_property
    def reports(self) -> Mapping[str, Mapping[str, Any]]:
        """Variant -> what parity.json says of it, in this very export; {} where it says nothing.

        It is a report and no part of the contract.
        """
        return read_reports(self.folder, self.checksum)

    @property
    def verdicts(self) -> Mapping[str, bool]:
        """Variant -> whether it passed every gate, as `reports` has it."""
        return {name: report["passed"] is True for name, report in self.reports.items()}

    def variant(self, name: str | None = None) -> Variant:
        """Return a variant, of the export or of the TensorRT graphs.

        Args:
            name: None means the only or first one of the export.

        Raises:
            VariantNotFoundError: naming the variants there are.
            IntegrityError: it is none of the export's, and the TensorRT manifest was changed.
        """
        own = self.manifest.variants
        if name is None:
            name = next(iter(own), "")
        if name in own:
            return own[name]
        built = self.trt.variants if self.trt is not None else {}
        if name in built:
            return built[name]
        raise VariantNotFoundError(f"{self.folder}: no variant {name!r}; it has {', '.join([*own, *built]) or 'none'}")

    def check_logits(self, what: str) -> None:
        """Refuse a classifier where logits are needed.

        Args:
            what: needs them.

        Raises:
            UsageError: it is one.
        """
        if self.model.task == "sequence-classification":
            raise UsageError(
                f"{self.folder}: a classifier, which gives scores and no logits; {what} needs a language model, and "
                "olmo2-run score scores texts"
            )

    def files_of(self, variant: Variant) -> Mapping[str, FileEntry]:
        """Return the table that vouches for a variant's files: path in the package -> what it must be."""
        if variant.name in self.manifest.variants or self.trt is None:
            return self.manifest.files
        return self.trt.files

    def provide(self, names: Iterable[str]) -> None:
        """Download files of a package on the Hub that are not in the cache yet; a folder has what it has.

        Raises:
            PackageNotFoundError: the Hub does not give them.
        """
        if self._fetch is not None:
            self._fetch(list(names))

    def check(self, names: Iterable[str] | None = None, *, hashes: bool = True, remedy: str | None = None) -> None:
        """Compare files with what the manifests say of them, once they are here: presence and size, then sha256.

        Args:
            names: paths in the package, of either manifest; None means all of the export's, without trt/.
            hashes: False stops after presence and size, without reading the files.
            remedy: what the message tells the user to do; None: what fits where the package is from.

        Raises:
            IntegrityError: naming every file that differs.
            PackageNotFoundError: the Hub does not give them.
        """
        names = list(self.manifest.files if names is None else names)
        self.provide(names)
        files: Mapping[str, FileEntry] = self.manifest.files
        if any(name not in files for name in names) and self.trt is not None:
            files = {**self.trt.files, **files}
        check_files(self.folder, files, names, hashes=hashes, remedy=remedy or self._remedy, hashed=self._hash)

    def _hash(self, folder: Path, names: Iterable[str]) -> dict[str, FileEntry]:
        """Return the entries of files, read where they were not or are others since; two threads may both read one."""
        before = {name: _identity(folder / name) for name in names}
        known = {name: self._hashed[name] for name in before if name in self._hashed}
        found = {name: entry for name, (identity, entry) in known.items() if identity == before[name]}
        for name, entry in hash_files(folder, [name for name in before if name not in found]).items():
            found[name] = entry
            if _identity(folder / name) == before[name]:  # else it was written to meanwhile, and is not remembered
                self._hashed[name] = before[name], entry
        return found


AnyPackage: TypeAlias = str | os.PathLike[str] | Package
"""a package folder, `hf:OWNER/NAME[@REVISION]`, or one that is open"""


def is_on_hub(package: AnyPackage) -> bool:
    """Tell whether a package is, or by its name would be, one of the Hub."""
    if isinstance(package, Package):
        return package.on_hub
    return PurePath(package).as_posix().startswith(HUB)


def open_package(package: AnyPackage) -> Package:
    """Open a package: read and check its manifest; one that is open is returned as it is.

    Of a package on the Hub only the manifests and parity.json are downloaded here; the rest when it is checked.

    Raises:
        PackageNotFoundError: no such folder, or no manifest in it; no such repository, or the Hub cannot be reached.
        IntegrityError: the manifest was changed.
        PackageError: it is of a version that is not read, or damaged otherwise.
        UsageError: not the form of a name on the Hub.
        BackendError: a package on the Hub, and huggingface_hub is not installed.
    """
    if isinstance(package, Package):
        return package
    if is_on_hub(package):
        return _open_on_hub(PurePath(package).as_posix())
    folder = Path(package)
    return Package(folder, *read_manifest(folder))


def _open_on_hub(name: str) -> Package:
    place = name.removeprefix(HUB)
    try:
        from runtimes.hub import open_snapshot
    except ImportError as error:
        raise BackendError(
            f"{name}: huggingface_hub cannot be imported ({error}); run: pip install 'olmo2-export[hub]'"
        ) from error
    documents = (MANIFEST_NAME, PARITY_NAME, f"{TRT_FOLDER}/{MANIFEST_NAME}", "config.json")
    snapshot = open_snapshot(name, place, documents)
    manifest, checksum = read_manifest(snapshot.folder)
    return Package(snapshot.folder, manifest, checksum, fetch=snapshot.fetch, remedy=snapshot.remedy)


def _identity(path: Path) -> _Identity:
    """Return what differs once a file is another one or was written to; of a link, what it leads to."""
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
