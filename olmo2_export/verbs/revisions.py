"""olmo2-export revisions: the branches and tags of a Hub repository, in the order of training.

Stage, ingredient, step and billions of tokens are read from names such as stage2-ingredient1-step11931-tokens50B. What
says neither stage nor step, as main, comes last. MODEL may also be a folder with a checkpoint folder per revision.
Nothing is downloaded but the list.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from olmo2_export.weights.revisions import Revision

HELP = "the branches and tags of a Hub repository, by stage and step"


def declare(verb: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    verb.add_argument("model", metavar="MODEL", help="Hub id, or a folder with a folder per revision")
    verb.add_argument(
        "--match",
        action="append",
        metavar="PATTERN",
        help="only names such as 'stage1-*', in quotes; may be repeated; default: all",
    )
    verb.add_argument("--every", type=int, default=1, metavar="N", help="of those the first, every Nth, and the last")
    verb.add_argument("--json", action="store_true", help="the same as a JSON document")


def run(args: argparse.Namespace) -> int:
    """Run it; return the exit code."""
    from olmo2_export.weights.revisions import check_every, list_revisions, matching, thinned

    every = check_every(args.every)
    listed = list_revisions(args.model)
    matched = [matching(listed, pattern, args.model) for pattern in args.match or ["*"]]
    kept = {revision for found in matched for revision in thinned(found, every)}
    revisions = [revision for revision in listed if revision in kept]
    if args.json:
        print(json.dumps({"model": args.model, "revisions": [document(revision) for revision in revisions]}, indent=2))
        return 0
    print(table(revisions))
    print(f"{args.model}: {len(revisions)} of {len(listed)} revisions")
    return 0


def document(revision: Revision) -> dict[str, object]:
    """Return a revision for machines; null where the name does not say."""
    head = {"name": revision.name, "kind": revision.kind, "commit": revision.commit}
    return head | asdict(revision.training)


def table(revisions: Sequence[Revision]) -> str:
    """Return revisions for people, a line each."""
    rows = [["revision", "stage", "ingredient", "step", "tokens", "kind", "commit"]]
    for revision in revisions:
        at = revision.training
        tokens = "-" if at.tokens_b is None else f"{at.tokens_b}B"
        numbers = ["-" if n is None else str(n) for n in (at.stage, at.ingredient, at.step)]
        rows.append([revision.name, *numbers, tokens, revision.kind, (revision.commit or "-")[:12]])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    words = {0, 5, 6}
    return "\n".join(
        "  ".join(
            c.ljust(w) if i in words else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
