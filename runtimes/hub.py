"""Packages on the Hugging Face Hub: into the Hub's own cache, the documents first, any other file when it is needed.

    snapshot = open_snapshot("hf:owner/name@v1", "owner/name@v1", ("manifest.json",))
    snapshot.fetch(["onnx/model.onnx", "onnx/model.onnx_data"])

A name leads to one commit, and all files are of that one. What is in the cache is not asked for again; without a
network, or with HF_HUB_OFFLINE, the cache alone answers. Only what reaches the Hub imports this file.
"""

from __future__ import annotations

import glob
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants, errors, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import tqdm

from runtimes.errors import PackageNotFoundError, UsageError

logger = logging.getLogger(__name__)

REQUEST_FAILED: tuple[type[Exception], ...] = (
    HfHubHTTPError.__bases__[0],
    HFValidationError,
    OSError,
    getattr(errors, "XetDownloadError", OSError),
)
"""what is raised of a request: HfHubHTTPError is both an error of the library below, which has others for a network
that is down, and an OSError, as OfflineModeIsEnabled is. XetDownloadError is newer than the oldest version"""

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_UNREACHABLE = "the Hub cannot be reached and the cache has no copy; check the network or HF_HUB_OFFLINE"
_MEANT = {
    401: "the Hub refuses the token; log in with another: hf auth login",
    403: "the token does not allow it; log in with another, or ask the owner for access: hf auth login",
    412: "somebody else has changed the repository meanwhile",
    429: "the Hub takes no more requests for now; wait some minutes",
}
"""HTTP status -> what it means, and what to do; the Hub's own words go behind it"""


@dataclass(frozen=True)
class Snapshot:
    """One commit of a repository, in the cache as far as it was asked for."""

    name: str
    """as a user writes it, for messages"""
    repository: str
    commit: str
    folder: Path

    @property
    def remedy(self) -> str:
        """What to do where a file is another than it must be."""
        home = self.folder.parents[1]
        return f"it was published so, or the cache was changed: delete {home} to download it again"

    def fetch(self, files: Sequence[str]) -> None:
        """Download what is not here yet; what the repository does not have stays away.

        Raises:
            PackageNotFoundError: the Hub cannot be reached, or does not give it.
        """
        lacking = [glob.escape(name) for name in files if not (self.folder / name).is_file()]
        if lacking:
            _download(self.name, self.repository, self.commit, lacking)


class _NoBar(tqdm):
    """For documents of some kilobytes, which every run asks for."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **(options | {"disable": True}))  # type: ignore[no-untyped-call]


def is_hub_id(name: str) -> bool:
    """Tell whether a name can be a repository's on the Hub."""
    return _ID.fullmatch(name) is not None


def open_snapshot(name: str, place: str, documents: Sequence[str]) -> Snapshot:
    """Find the commit that a name leads to, and download its documents.

    Args:
        name: as a user writes it, for messages.
        place: OWNER/NAME, or OWNER/NAME@REVISION with a branch, a tag or a commit; without one the branch main.
        documents: files that every run needs; the first is what makes a repository a package.

    Raises:
        UsageError: no such form of a name.
        PackageNotFoundError: no such repository or revision, not a package, or the Hub cannot be reached.
    """
    repository, at, revision = place.partition("@")
    if not is_hub_id(repository) or (at and not revision):
        raise UsageError(f"{name}: expected hf:OWNER/NAME, or hf:OWNER/NAME@REVISION")
    folder = _download(name, repository, revision or None, list(map(glob.escape, documents)), tqdm_class=_NoBar)
    if not (folder / documents[0]).is_file():
        raise PackageNotFoundError(
            f"{name}: not a package (no {documents[0]}); of a checkpoint one is made with: "
            f"olmo2-export export {repository} --out DIR"
        )
    logger.info("%s: commit %s", name, folder.name)
    return Snapshot(name, repository, folder.name, folder)


def _download(name: str, repository: str, revision: str | None, patterns: list[str], **options: Any) -> Path:
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns, **options))
    except REQUEST_FAILED as error:
        raise PackageNotFoundError(f"{name}: {why(repository, error)}") from error


def why(repository: str, error: BaseException) -> str:
    """Say why the Hub did not give what was asked for, and what to do, as the end of a line.

    Args:
        repository: that was asked for.
        error: out of `REQUEST_FAILED`.
    """
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    match error:
        case GatedRepoError():
            return (
                f"access is granted on request: ask for it at {constants.ENDPOINT}/{repository}, then log in: "
                "hf auth login"
            )
        case RepositoryNotFoundError():
            return f"{status}, no such repository, or a private one; check the name, or log in: hf auth login"
        case RevisionNotFoundError():
            return f"{status}, no such revision; expected a branch, a tag or a commit"
        case LocalEntryNotFoundError(__cause__=HfHubHTTPError() as refusal):
            return why(repository, refusal)
        case LocalEntryNotFoundError() | OfflineModeIsEnabled():
            return _UNREACHABLE
        case HfHubHTTPError():
            said = " ".join((error.server_message or "").split())[:200].rstrip(".")
            meant = _MEANT.get(status or 0, f"the Hub answers {status} {error.response.reason_phrase}")
            return f"{meant} (the Hub: {said})" if said else meant
    if isinstance(error, REQUEST_FAILED[0]):
        return f"the Hub cannot be reached ({reason(error)}); check the network"
    return reason(error)


def reason(error: BaseException) -> str:
    """Return what an error says of itself, in one line."""
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
