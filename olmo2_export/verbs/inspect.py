"""olmo2-export inspect: what a package holds. Needs no GPU, and reads no weights but to check them."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "what a package holds; checks every file"


def declare(verb: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    verb.add_argument("package", type=Path, metavar="PACKAGE")
    verb.add_argument("--variant", metavar="V", help="only that one, and the engines compiled from it; default: all")
    verb.add_argument("--json", action="store_true", help="the same as a JSON document")


def run(args: argparse.Namespace) -> int:
    """Run it; return the exit code."""
    import json

    from rich.console import Console

    from olmo2_export.summary.package import describe
    from olmo2_export.summary.text import plain, render

    summary = describe(args.package, args.variant)
    if args.json:
        print(json.dumps(summary.to_document(), indent=2, allow_nan=False))
        return 0
    console = Console(highlight=False)
    if console.is_terminal:
        console.print(render(summary))
    else:
        print(plain(summary))
    return 0
