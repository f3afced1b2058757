"""olmo2-export verify: a package against PyTorch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from olmo2_export.verbs.arguments import declare_lora, declare_lora_inputs, declare_target

if TYPE_CHECKING:
    from olmo2_export.measure.parity import ParityReport

HELP = "package against PyTorch: exit 1 if any gate fails"


def declare(verb: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    verb.add_argument("package", type=Path, metavar="PACKAGE")
    verb.add_argument("--reference", required=True, metavar="MODEL", help="the checkpoint it was exported from")
    verb.add_argument("--revision", metavar="REV", help="of the reference, if it is a Hub id")
    declare_lora(verb, "the LoRA adapters that the package has merged, in the same order")
    declare_lora_inputs(verb, "the LoRA adapters that the package takes at run time")
    declare_target(verb, variant="default: all that the backend runs; may be repeated", many=True, what="the graphs")
    verb.add_argument(
        "--longest",
        type=int,
        metavar="N",
        help="tokens of the longest rows; default: what the cache holds, at most 4096. Fewer are quicker",
    )
    verb.add_argument(
        "--low-memory",
        action="store_true",
        help="layers one at a time, on rows of at most 256 tokens; default: only where the model is beyond free memory",
    )
    verb.add_argument(
        "--out", type=Path, metavar="FILE", help="where the report goes; default: parity.json in the package"
    )
    verb.add_argument(
        "--locate",
        action="store_true",
        help="find the first layer and tensor that departs, and the operation; nothing else; exit 1 if there is one",
    )


def run(args: argparse.Namespace) -> int:
    """Run it; return the exit code."""
    from olmo2_export.verify.measure import LONGEST
    from olmo2_export.verify.verify import REFERENCE, format_reports, verify
    from olmo2_export.weights.merged import open_merged
    from runtimes.errors import UsageError

    checkpoint = open_merged(args.reference, args.revision, args.lora, switchable=args.lora_inputs)
    if args.locate and args.out is not None:
        raise UsageError("--out: --locate writes no report")
    if args.locate:
        from olmo2_export.locate.locate import format_location, locate_all

        locations = locate_all(args.package, checkpoint, args.variant or [], backend=args.backend, device=args.device)
        print("\n\n".join(format_location(location) for location in locations))
        return 1 if any(location.first is not None for location in locations) else 0

    def verdict(reports: Sequence[ParityReport]) -> str:
        word = "verified" if all(report.passed for report in reports) else "NOT verified"
        return f"{format_reports(reports)}\n{word}: {args.package} against {checkpoint.model} in {REFERENCE}"

    reports = verify(
        args.package,
        checkpoint,
        variants=args.variant or [],
        backend=args.backend,
        device=args.device,
        low_memory=args.low_memory,
        longest=LONGEST if args.longest is None else args.longest,
        out=args.out,
        show=lambda reports: print(verdict(reports), flush=True),
    )
    return 0 if all(report.passed for report in reports) else 1
