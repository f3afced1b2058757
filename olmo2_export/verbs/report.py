"""olmo2-export report: one page that says how far a package is from PyTorch, and how fast and large it is."""

from __future__ import annotations

import argparse
from pathlib import Path

from olmo2_export.verbs.arguments import declare_lora

HELP = "package -> one HTML page, and markdown, with pictures"


def declare(verb: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    verb.add_argument("package", type=Path, metavar="PACKAGE")
    verb.add_argument("--reference", required=True, metavar="MODEL", help="the checkpoint it was exported from")
    verb.add_argument("--revision", metavar="REV", help="of the reference, if it is a Hub id")
    declare_lora(verb, "the LoRA adapters that the package has merged, in the same order")
    verb.add_argument("--variant", action="append", metavar="V", help="default: all; may be repeated")
    verb.add_argument("--bench", type=Path, metavar="FILE", help="what olmo2-export bench printed: throughput, memory")
    verb.add_argument("--parity", type=Path, metavar="FILE", help="what verify --out wrote; default: the package's own")
    verb.add_argument("--tokens", type=int, metavar="N", help="at which logits are compared; default: at most 4096")
    verb.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="the folder to write; an old report is replaced"
    )


def run(args: argparse.Namespace) -> int:
    """Run it; return the exit code."""
    from olmo2_export.report.data import gather
    from olmo2_export.report.page import HTML, check_out, write_report
    from olmo2_export.weights.merged import open_merged

    check_out(args.out)
    checkpoint = open_merged(args.reference, args.revision, args.lora)
    data = gather(
        args.package,
        checkpoint,
        variants=args.variant or [],
        bench=args.bench,
        parity=args.parity,
        tokens=args.tokens,
    )
    written = write_report(data, args.out)
    print(
        f"{written.passed} variants passed, {written.failed} failed, {written.unverified} not verified yet; "
        f"{written.pictures} figures"
    )
    print(f"report: {args.out / HTML}, {written.html_bytes / 1e6:.1f} MB")
    return 0
