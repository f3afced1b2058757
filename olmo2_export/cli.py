"""olmo2-export VERB: the command line of the exporter. The verbs are in `verbs/`, a file each."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence

from olmo2_export.verbs import (
    bench,
    build,
    debug,
    evaluate,
    export,
    fp16,
    inspect,
    push,
    report,
    revisions,
    sweep,
    verify,
)
from runtimes.command import Parser, run_command

# In the order of a package's life.
VERBS = {
    "revisions": revisions,
    "export": export,
    "fp16": fp16,
    "verify": verify,
    "evaluate": evaluate,
    "sweep": sweep,
    "build": build,
    "debug": debug,
    "bench": bench,
    "report": report,
    "inspect": inspect,
    "push": push,
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        UsageError: bad usage, before anything is imported or written.
    """
    parser = Parser(prog="olmo2-export", description="OLMo from checkpoint to verified inference.")
    common = Parser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show tracebacks and debug logging")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    for name, module in VERBS.items():
        verb = verbs.add_parser(name, parents=[common], help=module.HELP, description=module.__doc__)
        module.declare(verb)
        verb.set_defaults(handler=module.run)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """Run one verb; return 0, or 1 if a check failed. Errors are raised."""
    handler: Callable[[argparse.Namespace], int] = args.handler
    return handler(args)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `olmo2-export`: 0 done, 1 ran but failed a check or a resource, 2 bad usage or input."""
    debug = "--debug" in (sys.argv[1:] if argv is None else argv)
    level = logging.DEBUG if debug else logging.WARNING
    logging.basicConfig(level=level, format="olmo2-export: %(levelname)s: %(message)s")
    logging.getLogger("runtimes.hub").setLevel(min(level, logging.INFO))  # which commit a package on the Hub is
    return run_command(
        "olmo2-export",
        lambda: run(parse_args(argv)),
        debug=debug,
        interrupted="what was there before is untouched",
        extra="export",
    )
