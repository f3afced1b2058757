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
from runtimes.nvidia import TensorRTBackend
from runtimes.signals import Interrupted, interruptible

_VARIANTS = "fp32 (the default); q4, q8 for CPUs; bf16, fp16, q4f16 for --device cuda; may be repeated"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def _add_build(verb: argparse.ArgumentParser) -> None:
    """Declare the options of build; what they may be, and together, is decided by `engine_options.settle`."""
    verb.add_argument("package", type=Path, metavar="PACKAGE")
    verb.add_argument("--precision", choices=["bf16", "fp16", "fp32", "int4", "int8", "fp8"], default="bf16")
    verb.add_argument(
        "--backend", choices=["trt_rtx", "trt"], default="trt_rtx", help="TensorRT for RTX (default), or full TensorRT"
    )
    verb.add_argument(
        "--compute-capability",
        action="append",
        metavar="X.Y",
        help="a GPU generation to compile for, as 8.9, or 'current'; may be repeated; default: 8.0, 8.6, 8.9 and 12.0",
    )
    verb.add_argument(
        "--profile", choices=["latency", "compact"], help="latency: batch 1, weights twice; compact (default): once"
    )
    verb.add_argument("--max-batch-size", type=int, metavar="N", help="rows per call; default 4, or 1 for latency")
    verb.add_argument("--max-cache-length", type=int, metavar="N", help="tokens; default: the context, at most 4096")
    verb.add_argument("--prefill-chunk", type=int, metavar="N", help="tokens per row and prefill call; default 512")
    verb.add_argument("--top-k", type=int, default=1, metavar="N", help="candidates the engine picks; default 1")
    verb.add_argument("--recipe", metavar="R", help="of int4: rtn, search (the default), gptq")
    verb.add_argument("--calibration", type=Path, metavar="FILE", help="UTF-8 text for int8, fp8 and gptq")
    verb.add_argument("--weight-streaming", action="store_true", help="weights may stay in host memory")
    full = verb.add_argument_group("full TensorRT")
    full.add_argument("--portable", action="store_true", help="runs on later versions, the lean runtime and other GPUs")
    full.add_argument("--refit", action="store_true", help="its weights can be replaced")
    full.add_argument(
        "--refit-from",
        type=Path,
        metavar="PACKAGE",
        help="do not build: take that package's engine, replace its weights",
    )
    full.add_argument("--timing-cache", type=Path, metavar="FILE", help="keeps measurements from build to build")
    verb.set_defaults(handler=_build)


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
    verb.add_argument("--variant", action="append", metavar="V", help=_VARIANTS)
    verb.add_argument("--recipe", metavar="R", help="of q4, q8, q4f16: rtn, search (the default), gptq, ...")
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
    verb.set_defaults(handler=_verify)

    _add_build(verbs.add_parser("build", parents=[debug], help="package -> TensorRT engine, also without a GPU"))

    verb = verbs.add_parser("debug", parents=[debug], help="where a graph for TensorRT goes wrong, with Polygraphy")
    verb.add_argument(
        "question",
        choices=["capability", "compare", "reduce"],
        help="which nodes TensorRT does not take; which tensor differs first; which few nodes still fail",
    )
    verb.add_argument("package", type=Path, metavar="PACKAGE", help="with TensorRT graphs, from build")
    verb.add_argument("--variant", default="trt_bf16", metavar="V", help="default trt_bf16")
    verb.add_argument(
        "--backend",
        choices=["ort", "trt_rtx", "trt"],
        help="which TensorRT; for compare also ort, its default: the graph's precision against float32, on the CPU",
    )
    verb.add_argument("--tolerance", type=float, metavar="X", help="of compare: relative RMS error of a tensor")
    verb.add_argument("--out", type=Path, metavar="FILE", help="of reduce: the ONNX file to write")
    verb.add_argument("--check", metavar="COMMAND", help="of reduce: exits with 0 if the ONNX file it is given is fine")
    verb.set_defaults(handler=_debug)

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
    reports = verify(args.package, checkpoint, variants=args.variant or [], backend=args.backend, device=args.device)
    print(format_reports(reports))
    passed = all(report.passed for report in reports)
    print(f"{'verified' if passed else 'NOT verified'}: {args.package} against {checkpoint.model}")
    return 0 if passed else 1


def _build(args: argparse.Namespace) -> int:
    from olmo2_export.engine import build, refit
    from olmo2_export.engine_options import EngineOptions
    from olmo2_export.summary import engine_lines

    options = EngineOptions(
        precision=args.precision,
        backend=args.backend,
        compute_capabilities=args.compute_capability,
        profile=args.profile,
        max_batch_size=args.max_batch_size,
        max_cache_length=args.max_cache_length,
        prefill_chunk=args.prefill_chunk,
        top_k=args.top_k,
        recipe=args.recipe,
        calibration=args.calibration,
        portable=args.portable,
        weight_streaming=args.weight_streaming,
        refit=args.refit,
        timing_cache=args.timing_cache,
    )
    report = refit(args.package, args.refit_from, options) if args.refit_from else build(args.package, options)
    engine = report.engine
    print("\n".join(engine_lines(engine, report.plan_bytes)))
    print(
        f"{'refitted' if args.refit_from else 'built'} for {', '.join(engine.compute_capabilities)} with "
        f"{engine.backend} {engine.backend_version}: {_megabytes(report.plan_bytes)} in {report.seconds:.1f} s "
        f"({report.compile_seconds:.1f} s in TensorRT), peak memory {_megabytes(report.peak_rss)}"
    )
    return 0


def _debug(args: argparse.Namespace) -> int:
    import shlex

    from olmo2_export.debug import capability, compare_variant, format_differences, reduce

    unused = {"compare": ("out", "check"), "capability": ("out", "check", "tolerance"), "reduce": ("tolerance",)}
    if given := [f"--{name}" for name in unused[args.question] if getattr(args, name) is not None]:
        raise UsageError(f"{', '.join(given)}: debug {args.question} has no use for it")
    if args.question == "compare":
        differences, first = compare_variant(args.package, args.variant, args.backend or "ort", args.tolerance)
        print(format_differences(differences, first))
        return 0 if first is None else 1
    if args.backend == "ort":
        raise UsageError(f"backend ort: debug {args.question} asks a TensorRT: trt_rtx or trt")
    backend: TensorRTBackend = args.backend or "trt_rtx"
    if args.question == "capability":
        supported, said = capability(args.package, args.variant, backend)
        print(said.rstrip())
        return 0 if supported else 1
    if args.out is None:
        raise UsageError("debug reduce: --out says which ONNX file to write")
    reduce(args.package, args.variant, args.out, backend, shlex.split(args.check or ""))
    print(f"wrote {args.out}: look at its last node")
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
