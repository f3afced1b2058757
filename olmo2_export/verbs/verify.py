"""olmo2-export verify: a package against PyTorch."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "package against PyTorch: exit 1 if any gate fails"


def declare(verb: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    verb.add_argument("package", type=Path, metavar="PACKAGE")
    verb.add_argument("--reference", required=True, metavar="MODEL", help="the checkpoint it was exported from")
    verb.add_argument("--revision", metavar="REV", help="of the reference, if it is a Hub id")
    verb.add_argument(
        "--variant", action="append", metavar="V", help="default: all that the backend runs; may be repeated"
    )
    verb.add_argument(
        "--backend",
        choices=["ort", "trt_rtx", "trt"],
        default="ort",
        help="what runs the graphs: onnxruntime (default), or the engines of a TensorRT",
    )
    verb.add_argument(
        "--device", choices=["cpu", "cuda", "nv-rtx"], default="cpu", help="where ort runs them; default cpu"
    )
    verb.add_argument(
        "--longest",
        type=int,
        metavar="N",
        help="tokens of the longest rows; default: what the cache holds, at most 4096. Fewer are quicker",
    )
    verb.add_argument(
        "--locate",
        action="store_true",
        help="find the first layer and tensor that departs, and the operation; nothing else; exit 1 if there is one",
    )


def run(args: argparse.Namespace) -> int:
    """Run it; return the exit code."""
    from olmo2_export.checkpoint import open_checkpoint
    from olmo2_export.verify.measure import LONGEST
    from olmo2_export.verify.verify import format_reports, verify

    checkpoint = open_checkpoint(args.reference, args.revision)
    if args.locate:
        from olmo2_export.locate.locate import format_location, locate_all

        locations = locate_all(args.package, checkpoint, args.variant or [], backend=args.backend, device=args.device)
        print("\n\n".join(format_location(location) for location in locations))
        return 1 if any(location.first is not None for location in locations) else 0
    reports = verify(
        args.package,
        checkpoint,
        variants=args.variant or [],
        backend=args.backend,
        device=args.device,
        longest=LONGEST if args.longest is None else args.longest,
    )
    print(format_reports(reports))
    passed = all(report.passed for report in reports)
    print(f"{'verified' if passed else 'NOT verified'}: {args.package} against {checkpoint.model}")
    return 0 if passed else 1
