"""olmo2-export inspect: what a package holds."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "what a package holds; checks every file"


def declare(verb: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    verb.add_argument("package", type=Path, metavar="PACKAGE")


def run(args: argparse.Namespace) -> int:
    """Run it; return the exit code."""
    from olmo2_export.summary import summarize

    print(summarize(args.package))
    return 0
