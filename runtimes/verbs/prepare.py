"""Write a variant's weights as this machine's kernels read them."""

from __future__ import annotations

import argparse

from runtimes import prepare_variant
from runtimes.verbs.streams import write
from runtimes.verbs.target import PACKAGE_HELP, declare_debug, declare_kv_cache, declare_trust

HELP = "write weights as this machine reads them"
DESCRIPTION = (
    "Write a variant's weights as this machine's kernels read them, into a file that every process maps: they load "
    "faster and share its memory. It goes into the package, or where that cannot be written into the user's cache."
)


def declare(verb: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    verb.add_argument("package", metavar="PACKAGE", help=PACKAGE_HELP)
    verb.add_argument("--variant", metavar="V", help="which variant of the package (default: as generate)")
    declare_kv_cache(verb)
    declare_trust(verb)
    declare_debug(verb)


def run(args: argparse.Namespace) -> None:
    """Write what is not there yet, and say where it lies.

    Raises:
        Olmo2ExportError: whatever is wrong.
    """
    check = not args.skip_hash_check
    for graph, made in prepare_variant(args.package, variant=args.variant, kv_cache=args.kv_cache, check_hashes=check):
        size = sum(entry.size for entry in graph.files.values())
        write(f"{graph.folder}: {'written' if made else 'there already'}, {size / 1e6:.0f} MB\n")
