"""Upload a package to a repository on the Hub, in one commit.

`create_commit` and not `upload_folder`: what is sent is a list of files and no folder, and the commit is one, so that
nobody downloads half of an old package and half of a new one. Large files are sent first, into the Hub's storage by
their content; what is there already, from an upload that was cut off or from an earlier package, is not sent again.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.hf_api import ModelInfo

from olmo2_export.publish.card import CARD
from olmo2_export.publish.contents import Contents
from runtimes.errors import FailedError, PackageError, PackageNotFoundError, UsageError, first_names
from runtimes.hub import REQUEST_FAILED, is_hub_id, why
from runtimes.manifest import MANIFEST_NAME, PARITY_NAME, TRT_FOLDER
from runtimes.package import HUB, open_package

logger = logging.getLogger(__name__)

_OF_NOBODY = {".gitattributes", ".gitignore", "LICENSE", "LICENSE.txt", "LICENSE.md", CARD}
"""files that stand in a repository which holds nothing yet; of them the card alone is written over"""
_UPLOAD_FAILED: tuple[type[Exception], ...] = (*REQUEST_FAILED, ValueError, RuntimeError)
"""what is raised of an upload, besides: RuntimeError around what a large file ran into"""


@dataclass(frozen=True)
class Pushed:
    """What was published."""

    url: str
    commit: str
    changed: bool
    """False: the repository had it all"""
    deleted: tuple[str, ...]
    """files of the package that was there before"""


def check_repository(repository: str, *, create: bool, private: bool) -> None:
    """Check what needs no network.

    Raises:
        UsageError: no name of a repository, or private where nothing is created.
    """
    if not is_hub_id(repository):
        raise UsageError(f"{repository}: expected OWNER/NAME, a repository on the Hub")
    if private and not create:
        raise UsageError("--private: of a repository that --create makes; one that is there stays as it is")


def push(
    contents: Contents,
    repository: str,
    card: str,
    *,
    message: str,
    create: bool = False,
    private: bool = False,
    force: bool = False,
) -> Pushed:
    """Publish a package.

    Args:
        contents: what is sent.
        repository: OWNER/NAME.
        card: the README.md that goes with it.
        message: of the commit.
        create: make the repository if it is not there.
        private: make it so that its owner alone sees it.
        force: write over the files of a repository that holds something else than a package.

    Raises:
        UsageError: no token, no such repository, one that holds something else, or HF_HUB_OFFLINE is set.
        FailedError: what is there cannot be read, or the upload failed; nothing is published, and the next one goes
            on where this ended.
    """
    check_repository(repository, create=create, private=private)
    if constants.HF_HUB_OFFLINE:
        raise UsageError(f"{repository}: HF_HUB_OFFLINE is set, and publishing needs the Hub; unset it")
    token = get_token()
    if token is None:
        raise UsageError(f"{repository}: nobody is logged in; run: hf auth login, or set HF_TOKEN")
    api = HfApi(token=token)
    try:
        info = _find(api, repository, create=create, private=private)
    except REQUEST_FAILED as error:
        raise UsageError(f"{repository}: {why(repository, error)}") from error
    there = {file.rfilename for file in info.siblings or ()}
    foreign = sorted(there - _OF_NOBODY)
    if foreign and MANIFEST_NAME not in there and not force:
        raise UsageError(
            f"{repository}: holds something else than a package ({first_names(foreign)}); name a repository of its "
            "own, or write over it with --force"
        )
    gone = sorted((_published(repository, str(info.sha), there) & there) - contents.files.keys())
    additions = [CommitOperationAdd(CARD, card.encode())]
    additions += [CommitOperationAdd(name, contents.package.folder / name) for name in contents.files]
    try:
        done = api.create_commit(
            repository,
            [*additions, *(CommitOperationDelete(name) for name in gone)],
            commit_message=message,
            parent_commit=info.sha,
        )
    except _UPLOAD_FAILED as error:
        cause = error.__cause__ or error if isinstance(error, RuntimeError) else error
        raise FailedError(
            f"{repository}: {why(repository, cause)}; nothing was published; run it again, and it goes on from here"
        ) from error
    return Pushed(str(done.commit_url), str(done.oid), done.oid != info.sha, tuple(gone))


def _find(api: HfApi, repository: str, *, create: bool, private: bool) -> ModelInfo:
    """Return what the Hub knows of a repository, which is made if it shall be.

    Raises:
        UsageError: it is not there, or is public and shall be private.
    """
    try:
        info = api.model_info(repository)
    except RepositoryNotFoundError as error:
        if not create:
            raise UsageError(
                f"{repository}: no such repository, or one that this token does not see; --create makes it"
            ) from error
        api.create_repo(repository, private=private or None, exist_ok=True)  # else as the owner has set
        info = api.model_info(repository)
    if private and not info.private:
        raise UsageError(f"{repository}: is there, and public; leave out --private, or name another")
    return info


def _published(repository: str, commit: str, there: set[str]) -> set[str]:
    """Return the files of the package that a repository holds; of one that is damaged those in trt/ alone.

    These are of one export, and of no use beside another: all of the folder goes, whatever its manifest says.

    Raises:
        FailedError: the Hub does not give it.
    """
    if MANIFEST_NAME not in there:
        return set()
    built = {name for name in there if name.startswith(f"{TRT_FOLDER}/")}
    try:
        package = open_package(f"{HUB}{repository}@{commit}")
    except PackageNotFoundError as error:
        raise FailedError(f"{error}; nothing was published; run it again") from error
    except PackageError as error:
        logger.warning("%s: the package that is there is not read, and stays beside the new one: %s", repository, error)
        return built
    return {*package.manifest.files, PARITY_NAME, *built}
