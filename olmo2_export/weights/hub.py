"""Where a checkpoint is: a Hub id, a local folder, or the bundled demo; and which revisions a repository has."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeAlias

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, SafetensorsParsingError
from tqdm.auto import tqdm

from olmo2_export.config import LFS_POINTER, read_json_object, refuse_other_forms
from olmo2_export.weights.other_formats import (
    ADAPTER,
    ADAPTER_WEIGHTS,
    INDEX,
    SINGLE,
    is_whole,
    listed_place,
    refuse_file,
    refuse_other_formats,
)
from runtimes.command import expanded
from runtimes.errors import CheckpointError, CheckpointNotFoundError, broken_link, first_names
from runtimes.hub import REQUEST_FAILED, is_hub_id, reason, why
from runtimes.manifest import SourceKind

DEMO = "demo"
TEXT_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
"""files that a package takes over as they are, where the checkpoint has them"""
TEMPLATES = "additional_chat_templates"
"""a folder of chat templates beside the default one, NAME.jinja each"""

Ref: TypeAlias = tuple[str, Literal["branch", "tag"], str]
"""a branch's or tag's name, which of them it is, and the commit that it leads to"""

_TEXTS = ["config.json", *TEXT_FILES, f"{TEMPLATES}/*.jinja", INDEX, ADAPTER]
_COMMIT = re.compile(r"[0-9a-f]{40}")
_NO_LIST: tuple[type[Exception], ...] = (*REQUEST_FAILED, ValueError, KeyError, TypeError)
"""what is raised of an answer that is no list of revisions, besides"""


def locate(model: str, revision: str | None, *, weights: bool = True) -> tuple[Path, str, SourceKind]:
    """Find a checkpoint and download what is on the Hub: its texts, then the weight files that its index names.

    What config.json says to be another model is refused before any weights are downloaded.

    Args:
        model: `demo`, a local folder, or a Hub id.
        revision: branch, tag or commit; Hub ids only.
        weights: False leaves the weight files where they are.

    Returns:
        The folder; the Hub id, `demo`, or the folder's name; and which of these it is.

    Raises:
        CheckpointNotFoundError: no such folder, repository or revision; or a repository that holds something else.
        ConfigError: config.json on the Hub is of another model.
    """
    if model == DEMO:
        return Path(__file__).parents[1] / "demo", DEMO, "demo"
    path = expanded(model)
    if path.is_dir():
        return path, path.resolve().name, "folder"
    if path.exists():
        refuse_file(path)
    if lost := broken_link(path):
        raise CheckpointNotFoundError(f"{path}: {lost}")
    if not is_hub_id(model):
        raise CheckpointNotFoundError(f"{model}: no such folder, and not a Hub id (owner/name) or '{DEMO}'")
    folder = _download(model, revision, _TEXTS, quiet=True)
    at = folder.name if _COMMIT.fullmatch(folder.name) else revision  # all files of one commit
    if (folder / "config.json").is_file():
        refuse_other_forms(read_json_object(folder / "config.json"), f"{model}: config.json")
    shards = sorted(set(read_index(folder / INDEX).values())) if (folder / INDEX).exists() else []
    if not weights:
        return folder, model, "hub"
    if not shards and not (folder / SINGLE).is_file():
        names = _file_names(model, at)
        if names and SINGLE not in names:
            refuse_other_formats(listed_place(model, names, folder))
    _download(model, at, [SINGLE, *map(glob.escape, shards)])
    if not is_whole(folder) and (names := _file_names(model, at)):
        refuse_other_formats(listed_place(model, names, folder))
    return folder, model, "hub"


def locate_adapter(model: str) -> tuple[Path, str, SourceKind]:
    """Find a LoRA adapter, and download one that is on the Hub.

    Args:
        model: a local folder, or a Hub id, with or without @REVISION.

    Returns:
        As `locate`.

    Raises:
        CheckpointNotFoundError: no such folder, repository or revision; or something else is there.
    """
    path = expanded(model)
    name, _, revision = model.partition("@")
    kind: SourceKind = "folder"
    if path.is_dir():
        folder, name = path, path.resolve().name
    elif path.exists() or not is_hub_id(name):
        raise CheckpointNotFoundError(f"{model}: expected the folder of a LoRA adapter, or a Hub id (owner/name)")
    else:
        folder, kind = _download(name, revision or None, [ADAPTER, ADAPTER_WEIGHTS]), "hub"
    for file in (ADAPTER, ADAPTER_WEIGHTS):
        if not (folder / file).is_file():
            pickled = file == ADAPTER_WEIGHTS and (folder / "adapter_model.bin").exists()
            hint = "; adapter_model.bin is never read: convert it to safetensors" if pickled else ""
            raise CheckpointNotFoundError(f"{model}: no {file}{hint}; expected a LoRA adapter as PEFT saves it")
    return folder, name, kind


def _file_names(model: str, revision: str | None) -> list[str]:
    """Return the names of all files of a repository; none where the Hub cannot be asked, as what is here tells too."""
    try:
        return HfApi().list_repo_files(model, revision=revision)
    except REQUEST_FAILED:
        return []


def list_refs(model: str) -> list[Ref]:
    """Return the branches and tags of a repository on the Hub, in no order.

    Raises:
        CheckpointNotFoundError: no such repository, or the Hub cannot be reached; the cache does not know them all.
    """
    try:
        refs = HfApi().list_repo_refs(model)
    except OfflineModeIsEnabled as error:
        raise CheckpointNotFoundError(
            f"{model}: its revisions are listed by the Hub, and HF_HUB_OFFLINE is set; unset it, or name the revisions"
        ) from error
    except HfHubHTTPError as error:
        raise CheckpointNotFoundError(f"{model}: {why(model, error)}") from error
    except _NO_LIST as error:
        raise CheckpointNotFoundError(
            f"{model}: its revisions are listed by the Hub, which does not answer as expected ({reason(error)}); "
            "check the network, or name the revisions"
        ) from error
    branches: list[Ref] = [(ref.name, "branch", ref.target_commit) for ref in refs.branches]
    tags: list[Ref] = [(ref.name, "tag", ref.target_commit) for ref in refs.tags]
    return branches + tags


def licence_of(model: str, revision: str | None) -> dict[str, str]:
    """Return what the card of a repository says of its licence: `license`, and of another `license_name` and `_link`.

    Raises:
        CheckpointNotFoundError: the Hub cannot be reached, or has no such revision.
    """
    try:
        card = HfApi().model_info(model, revision=revision).card_data
    except REQUEST_FAILED as error:
        raise CheckpointNotFoundError(f"{model}: its licence is not known: {why(model, error)}") from error
    said = {name: getattr(card, name, None) for name in ("license", "license_name", "license_link")}
    return {name: value for name, value in said.items() if isinstance(value, str)}


def remote_headers(model: str, revision: str, files: Sequence[str]) -> dict[str, dict[str, tuple[str, list[int]]]]:
    """Read the headers of weight files that stay on the Hub: some 100 KB of each.

    Args:
        model: a Hub id.
        revision: a commit.
        files: safetensors of the repository.

    Returns:
        Per file, tensor -> its dtype as safetensors names it, and its shape.

    Raises:
        CheckpointNotFoundError: the Hub cannot be reached, or has no such file.
        CheckpointError: a header is damaged.
    """
    found: dict[str, dict[str, tuple[str, list[int]]]] = {}
    for file in files:
        try:
            header = HfApi().parse_safetensors_file_metadata(model, file, revision=revision)
        except SafetensorsParsingError as error:
            raise CheckpointError(f"{model}: {file}: a damaged header; expected safetensors: {error}") from error
        except REQUEST_FAILED as error:
            said = f"{file}: its header cannot be read: {why(model, error)}"
            raise CheckpointNotFoundError(f"{model}@{revision}: {said}") from error
        found[file] = {name: (str(info.dtype), list(info.shape)) for name, info in header.tensors.items()}
    return found


class _NoBar(tqdm):  # type: ignore[type-arg]  # of whatever
    """Shows nothing: a few texts come at once, and what they say may be that nothing else will."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options | {"disable": True})


def _download(model: str, revision: str | None, patterns: Sequence[str], *, quiet: bool = False) -> Path:
    bar = _NoBar if quiet else None
    try:
        # Resumes what is partly there; without a network, or with HF_HUB_OFFLINE=1, it answers from the cache.
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(patterns), tqdm_class=bar))
    except REQUEST_FAILED as error:
        raise CheckpointNotFoundError(f"{model}@{revision or 'main'}: {why(model, error)}") from error


def read_index(path: Path) -> dict[str, str]:
    """Read the index of a checkpoint in several files: tensor -> its file.

    Raises:
        CheckpointError: not an index, or a file that lies elsewhere.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if text.startswith(LFS_POINTER):
            raise CheckpointError(f"{path}: a Git LFS pointer: run 'git lfs pull', or download the file itself")
        weight_map: dict[str, str] = json.loads(text)["weight_map"]
        names = set(weight_map.values())
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: {broken_link(path) or error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: no valid weight_map ({type(error).__name__}); download it again") from error
    bad = sorted(str(n) for n in names if not isinstance(n, str) or not _is_shard(n))
    if bad:
        raise CheckpointError(f"{path}: {first_names(bad)}: a shard is a .safetensors file in the same folder")
    return {tensor: PurePosixPath(name).as_posix() for tensor, name in weight_map.items()}


def _is_shard(name: str) -> bool:
    path = PurePosixPath(name)  # ./x.safetensors is x.safetensors
    return path.as_posix() == Path(name).name and path.suffix == ".safetensors"
