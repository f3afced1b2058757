"""Embed texts: a vector for each, of the hidden states of its tokens."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from runtimes import Package, Slots, UsageError
from runtimes.runners.embeddings import POOLINGS, embed
from runtimes.verbs.documents import declare_documents, each_document

HELP = "embed texts, a vector for each: a line of JSON"
DESCRIPTION = f"{HELP}."


def hidden_state(word: str) -> int | None:
    """Return the number of a hidden state; None: the last. The parser names this function where it is neither."""
    return None if word == "last" else int(word)


def declare(verb: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    declare_documents(verb)
    verb.add_argument("--pooling", choices=POOLINGS, default="mean", help="of a text's tokens (default: mean)")
    verb.add_argument(
        "--hidden-state",
        type=hidden_state,
        metavar="N",
        help="of those that the package gives (default: its last)",
    )
    verb.add_argument("--normalize", action="store_true", help="divide each vector by its length")


def _check_gives_hidden(package: Package, name: str) -> None:
    if not package.model.hidden_states:
        raise UsageError(f"{name}: its graphs give no hidden states; export it with --hidden-states last")


def run(args: argparse.Namespace) -> None:
    """Write a vector of each text.

    Raises:
        Olmo2ExportError: whatever is wrong.
    """

    def vectors(runner: Slots, sequences: list[Sequence[int]]) -> list[object]:
        found = embed(
            runner,
            sequences,
            pooling=args.pooling,
            hidden_state=args.hidden_state,
            normalize=args.normalize,
            batch_size=runner.max_slots,
        )
        return [[float(str(x)) for x in row] for row in found]  # the shortest that is the same float32

    each_document(args, "embedding", vectors, lambda package: _check_gives_hidden(package, args.package))
