"""Score texts with a classifier or reward model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from runtimes import Package, Slots, UsageError
from runtimes.verbs.documents import declare_documents, each_document

HELP = "score texts with a classifier or reward model: a line of JSON for each"
DESCRIPTION = f"{HELP}."


def declare(verb: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    declare_documents(verb)


def _check_classifier(package: Package, name: str) -> None:
    if package.model.task != "sequence-classification":
        raise UsageError(f"{name}: a language model, which gives no scores; use olmo2-run generate, or a classifier")


def run(args: argparse.Namespace) -> None:
    """Write the scores of texts.

    Raises:
        Olmo2ExportError: whatever is wrong.
    """

    def score(runner: Slots, sequences: list[Sequence[int]]) -> list[object]:
        labels = runner.model.labels
        return [dict(zip(labels, row, strict=True)) for row in runner.score(sequences).tolist()]

    each_document(args, "scores", score, lambda package: _check_classifier(package, args.package))
