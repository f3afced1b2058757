"""olmo2-export build: package -> TensorRT engine; `engine.options` decides what the options may be together."""

from __future__ import annotations

import argparse
from pathlib import Path

from olmo2_export.catalog import precisions
from olmo2_export.verbs.arguments import declare_backend, package_folder
from olmo2_export.verbs.words import megabytes

HELP = "package -> TensorRT engine, also without a GPU"


def declare(verb: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    verb.add_argument("package", type=package_folder, metavar="PACKAGE")
    verb.add_argument("--precision", choices=precisions(), default="bf16")
    declare_backend(verb, "TensorRT for RTX (default), or full TensorRT", default="trt_rtx", engines=True)
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
    verb.add_argument(
        "--recipe", metavar="R", help="of int4: rtn, search, gptq; default: search, or a checkpoint's codes"
    )
    verb.add_argument("--calibration", type=Path, metavar="FILE", help="UTF-8 text for int8, fp8 and gptq")
    verb.add_argument("--weight-streaming", action="store_true", help="weights may stay in host memory")
    full = verb.add_argument_group("full TensorRT")
    full.add_argument("--portable", action="store_true", help="runs on later versions, the lean runtime and other GPUs")
    full.add_argument("--refit", action="store_true", help="its weights can be replaced")
    full.add_argument(
        "--refit-from",
        type=package_folder,
        metavar="PACKAGE",
        help="do not build: take that package's engine, replace its weights",
    )
    full.add_argument("--timing-cache", type=Path, metavar="FILE", help="keeps measurements from build to build")


def run(args: argparse.Namespace) -> int:
    """Run it; return the exit code."""
    from olmo2_export.engine.build import build, refit
    from olmo2_export.engine.options import EngineOptions
    from olmo2_export.summary.text import engine_lines

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
        f"{engine.backend} {engine.backend_version}: {megabytes(report.plan_bytes)} in {report.seconds:.1f} s "
        f"({report.compile_seconds:.1f} s in TensorRT), peak memory {megabytes(report.peak_rss)}"
    )
    return 0
