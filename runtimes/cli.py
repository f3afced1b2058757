"""`olmo2-run VERB`: run a package from the command line; exit codes as in `command.py`. The verbs are in `verbs/`."""

from __future__ import annotations

import argparse
import io
import logging
import sys
from collections.abc import Sequence

from runtimes.command import Parser, run_command
from runtimes.serve import verb as serve
from runtimes.verbs import chat, embed, generate, prepare, score

VERBS = {"generate": generate, "chat": chat, "score": score, "embed": embed, "prepare": prepare, "serve": serve}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        UsageError: it makes no sense.
    """
    parser = Parser(prog="olmo2-run", description="Run a package written by olmo2-export.", allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, module in VERBS.items():
        verb = verbs.add_parser(name, help=module.HELP, description=module.DESCRIPTION, allow_abbrev=False)
        module.declare(verb)
        verb.set_defaults(run=module.run)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Do what the command line asks.

    Args:
        args: from `parse_args`.

    Raises:
        Olmo2ExportError: whatever is wrong.
    """
    args.run(args)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character must not end the text
    logging.basicConfig(format="%(message)s")
    logging.getLogger("runtimes").setLevel(logging.INFO)  # on stderr: which commit, what a GPU's memory is used for
    return run_command(
        "olmo2-run",
        lambda: run(parse_args(argv)),
        debug="--debug" in (sys.argv[1:] if argv is None else argv),
        more_memory="use a smaller model or a shorter prompt",
    )
