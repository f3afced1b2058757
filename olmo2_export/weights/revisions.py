"""The revisions that a model has: branches and tags on the Hub, or folders; and which of them patterns choose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, TypeAlias, TypeVar

from olmo2_export.weights.hub import DEMO, list_refs
from olmo2_export.weights.revision_names import TrainingPoint, read_name, training_order
from runtimes.command import expanded
from runtimes.errors import CheckpointNotFoundError, UsageError, first_names
from runtimes.hub import is_hub_id

T = TypeVar("T")
RevisionKind: TypeAlias = Literal["branch", "tag", "folder"]

_SIGNS = "*?["
"""of a pattern; git takes them in no name of a branch or tag"""


@dataclass(frozen=True)
class Revision:
    """One revision of a model."""

    name: str
    kind: RevisionKind
    commit: str | None
    """what it leads to; None for a folder"""
    training: TrainingPoint
    """what its name says"""


@dataclass(frozen=True)
class Chosen:
    """What was asked for by one name or pattern."""

    asked: str
    matched: int
    """revisions that the pattern matches; 1 for a name"""
    names: tuple[str, ...]
    """those that are left of them, in the order of training"""


def list_revisions(model: str) -> list[Revision]:
    """Return the revisions of a model in the order of training: by stage, ingredient and step, the others last.

    Args:
        model: a Hub id, or a folder with a checkpoint folder per revision.

    Raises:
        CheckpointNotFoundError: no such folder or repository, the Hub cannot be reached, or there are no revisions.
        UsageError: a model that has none, as the demo and a checkpoint's own folder.
    """
    folder = expanded(model)
    if model == DEMO or (folder / "config.json").is_file():
        raise UsageError(f"{model}: one checkpoint; revisions have a Hub id, or a folder with a folder per revision")
    if folder.is_dir():
        found = [_revision(path.parent.name, "folder", None) for path in folder.glob("*/config.json")]
    elif is_hub_id(model):
        found = [_revision(*ref) for ref in list_refs(model)]
    else:
        raise CheckpointNotFoundError(f"{model}: no such folder, and not a Hub id (owner/name)")
    if not found:
        raise CheckpointNotFoundError(f"{model}: no revisions; expected branches on the Hub, or folders of checkpoints")
    return sorted(found, key=lambda revision: (training_order(revision.name), revision.kind))


def _revision(name: str, kind: RevisionKind, commit: str | None) -> Revision:
    return Revision(name, kind, commit, read_name(name))


def matching(revisions: Sequence[Revision], pattern: str, model: str) -> list[Revision]:
    """Return the revisions whose names a pattern matches.

    Args:
        revisions: of the model, in order.
        pattern: as a shell's: `*`, `?`, `[...]`; upper and lower case differ.
        model: its name, for the message.

    Raises:
        CheckpointNotFoundError: there is none.
    """
    found = [revision for revision in revisions if fnmatchcase(revision.name, pattern)]
    if not found:
        names = first_names(revision.name for revision in revisions)
        raise CheckpointNotFoundError(f"{model}: no revision matches '{pattern}'; it has {names}")
    return found


def check_every(every: int) -> int:
    """Return it.

    Raises:
        UsageError: it is below 1.
    """
    if every < 1:
        raise UsageError(f"--every {every}: expected at least 1")
    return every


def thinned(items: Sequence[T], every: int) -> list[T]:
    """Return the first item, every so many-th after it, and the last."""
    kept = list(items[::every])
    return kept if (len(items) - 1) % every == 0 else [*kept, items[-1]]


def is_pattern(name: str) -> bool:
    """Tell a pattern from the name of a revision."""
    return any(sign in name for sign in _SIGNS)


def choose(model: str, asked: Sequence[str], every: int | None = None) -> list[Chosen]:
    """Return which revisions names and patterns mean. The Hub is asked only where there is a pattern.

    Args:
        model: as `list_revisions`.
        asked: names of branches, tags, commits or folders, taken as they are; and patterns.
        every: of what each pattern matches the first, every so many-th after it, and the last; None: all of it.

    Returns:
        What each means, in the order in which they were given. What a name or an earlier pattern has is not among what
        a pattern has.

    Raises:
        UsageError: `every` without a pattern, or below 1; or as `list_revisions`.
        CheckpointNotFoundError: as `list_revisions`; or a pattern that matches nothing.
    """
    patterns = any(map(is_pattern, asked))
    if every is not None and not patterns:
        raise UsageError(f"--every {every}: thins out what a pattern such as 'stage1-*' matches; give one, in quotes")
    step = check_every(1 if every is None else every)
    listed = list_revisions(model) if patterns else []
    taken = {name for name in asked if not is_pattern(name)}
    chosen = []
    for name in asked:
        if not is_pattern(name):
            chosen.append(Chosen(name, 1, (name,)))
            continue
        names = list(dict.fromkeys(revision.name for revision in matching(listed, name, model)))
        left = tuple(kept for kept in thinned(names, step) if kept not in taken)
        chosen.append(Chosen(name, len(names), left))
        taken.update(left)
    return chosen
