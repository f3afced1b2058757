"""olmo2-export VERB: the command line of the exporter. Each verb imports only what it needs."""

from __future__ import annotations

import argparse
import logging
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from runtimes.errors import DISK_FULL, Olmo2ExportError, UsageError
from runtimes.signals import Interrupted, interruptible


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        UsageError: bad usage, before anything is imported or written.
    """
    parser = _Parser(prog="olmo2-export", description="OLMo 2 from checkpoint to verified inference.")
    debug = _Parser(add_help=False)
    debug.add_argument("--debug", action="store_true", help="show tracebacks and debug logging")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    verb = verbs.add_parser("export", parents=[debug], help="checkpoint -> package folder")
    verb.add_argument("model", metavar="MODEL", help="Hub id (allenai/OLMo-2-0425-1B), folder, or 'demo'")
    verb.add_argument("--out", type=Path, required=True, metavar="DIR", help="the package folder to write")
    verb.add_argument("--variant", action="append", metavar="V", help="fp32 (the default), q4 or q8; may be repeated")
    verb.add_argument("--recipe", metavar="R", help="of q4 and q8: rtn, search (the default), gptq, mixed, gptq-mixed")
    verb.add_argument(
        "--calibration", type=Path, metavar="FILE", help="UTF-8 text for gptq, mixed and a quantised KV cache"
    )
    verb.add_argument("--size-budget", type=float, metavar="BITS", help="bits per weight, for mixed and gptq-mixed")
    verb.add_argument("--block-size", type=int, choices=[32, 64, 128], help="weights that share a scale; default 128")
    verb.add_argument("--kv-cache", choices=["fp32", "int8", "int4"], default="fp32", help="of q4 and q8; default fp32")
    verb.add_argument("--no-prefill-graph", action="store_true", help="q4 and q8: leave the int8 prefill graph out")
    verb.add_argument("--revision", metavar="REV", help="branch, tag or commit of a Hub id")
    verb.add_argument("--force", action="store_true", help="replace the package that is there")
    verb.set_defaults(handler=_export)

    verb = verbs.add_parser("verify", parents=[debug], help="package against PyTorch: exit 1 if any gate fails")
    verb.add_argument("package", type=Path, metavar="PACKAGE")
    verb.add_argument("--reference", required=True, metavar="MODEL", help="the checkpoint it was exported from")
    verb.add_argument("--revision", metavar="REV", help="of the reference, if it is a Hub id")
    verb.add_argument(
        "--variant", action="append", metavar="V", help="default: all of the export; trt_fp32 after build"
    )
    verb.add_argument("--backend", choices=["ort"], default="ort", help="what runs the graphs")
    verb.set_defaults(handler=_verify)

    verb = verbs.add_parser("build", parents=[debug], help="package -> TensorRT engine, also without a GPU")
    verb.add_argument("package", type=Path, metavar="PACKAGE")
    verb.add_argument("--precision", choices=["bf16", "fp16", "fp32"], default="bf16")
    verb.add_argument(
        "--compute-capability",
        action="append",
        metavar="X.Y",
        help="a GPU generation to compile for, as 8.9; may be repeated; default: 8.0, 8.6, 8.9 and 12.0",
    )
    verb.add_argument("--max-batch-size", type=int, default=4, metavar="N", help="rows per call; default 4")
    verb.add_argument("--max-cache-length", type=int, metavar="N", help="tokens; default: the context, at most 4096")
    verb.set_defaults(handler=_build)

    verb = verbs.add_parser("inspect", parents=[debug], help="what a package holds; checks every file")
    verb.add_argument("package", type=Path, metavar="PACKAGE")
    verb.set_defaults(handler=_inspect)
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
    try:
        with interruptible():
            return run(parse_args(argv))
    except Interrupted as interruption:
        return _report("interrupted; what was there before is untouched", interruption.exit_code, debug=False)
    except Olmo2ExportError as error:
        return _report(str(error), error.exit_code, debug)
    except ModuleNotFoundError as error:
        return _report(f"{error.name} is not installed; run: pip install 'olmo2-export[export]'", 2, debug)
    except OSError as error:  # a file that cannot be read or written
        return _report(str(error), 1 if error.errno in DISK_FULL else 2, debug)
    except MemoryError:
        return _report("out of memory", 1, debug)
    except Exception as error:  # the last resort: a user gets one line, and --debug the rest
        return _report(f"internal error: {type(error).__name__}: {error}; run with --debug and report it", 1, debug)


def _report(message: str, exit_code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"olmo2-export: error: {' '.join(message.split())}", file=sys.stderr)
    return exit_code


def _export(args: argparse.Namespace) -> int:
    from olmo2_export.checkpoint import open_checkpoint
    from olmo2_export.package import export
    from olmo2_export.summary import quantization_lines
    from olmo2_export.variants import Options

    options = Options(
        recipe=args.recipe,
        calibration=args.calibration,
        size_budget=args.size_budget,
        block_size=args.block_size,
        kv_cache=args.kv_cache,
        prefill_graph=not args.no_prefill_graph,
    )
    started = time.monotonic()
    manifest = export(
        open_checkpoint(args.model, args.revision),
        args.out,
        variants=args.variant or ["fp32"],
        options=options,
        force=args.force,
    )
    seconds = time.monotonic() - started
    size = sum(entry.size for entry in manifest.files.values())
    at = f"@{manifest.source.revision[:12]}" if manifest.source.revision else ""
    for variant in manifest.variants.values():
        counts = ", ".join(f"{n} {op}" for op, n in variant.op_counts.items() if n)
        print(f"{variant.name}: opset {variant.opset}, {counts}")
        for line in quantization_lines(variant):
            print(f"  {line}")
    print(
        f"exported {manifest.source.model}{at} to {args.out}: {_megabytes(size)} in {seconds:.1f} s, "
        f"peak memory {_peak_megabytes()}"
    )
    return 0


def _verify(args: argparse.Namespace) -> int:
    from olmo2_export.checkpoint import open_checkpoint
    from olmo2_export.verify import format_reports, verify

    checkpoint = open_checkpoint(args.reference, args.revision)
    reports = verify(args.package, checkpoint, variants=args.variant or [], backend=args.backend)
    print(format_reports(reports))
    passed = all(report.passed for report in reports)
    print(f"{'verified' if passed else 'NOT verified'}: {args.package} against {checkpoint.model}")
    return 0 if passed else 1


def _build(args: argparse.Namespace) -> int:
    from olmo2_export.engine import CAPABILITIES, build

    report = build(
        args.package,
        precision=args.precision,
        compute_capabilities=args.compute_capability or CAPABILITIES,
        max_batch_size=args.max_batch_size,
        max_cache_length=args.max_cache_length,
    )
    engine = report.engine
    print(f"{engine.plan}: {', '.join(f'{n} {kind}' for kind, n in engine.layer_counts.items())}")
    print(
        f"built for {', '.join(engine.compute_capabilities)} with {engine.backend} {engine.backend_version}: "
        f"{_megabytes(report.plan_bytes)} in {report.seconds:.1f} s, peak memory {_megabytes(report.peak_rss)}"
    )
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from olmo2_export.summary import summarize

    print(summarize(args.package))
    return 0


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _peak_megabytes() -> str:
    import resource

    return _megabytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
