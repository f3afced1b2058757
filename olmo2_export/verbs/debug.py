"""olmo2-export debug: where a graph for TensorRT goes wrong."""

from __future__ import annotations

import argparse
from pathlib import Path

from olmo2_export.verbs.arguments import declare_backend, declare_variant, package_folder
from runtimes.errors import UsageError
from runtimes.targets import backends, find_target
from runtimes.trt.nvidia import tensorrt_backend

HELP = "where a graph for TensorRT goes wrong, with Polygraphy"


def declare(verb: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    verb.add_argument(
        "question",
        choices=["capability", "compare", "reduce"],
        help="which nodes TensorRT does not take; which tensor differs first; which few nodes still fail",
    )
    verb.add_argument("package", type=package_folder, metavar="PACKAGE", help="with TensorRT graphs, from build")
    declare_variant(verb, "default trt_bf16", default="trt_bf16")
    declare_backend(
        verb,
        "which TensorRT; for compare also ort, its default: the graph's precision against float32, on the CPU",
        default=None,
    )
    verb.add_argument("--tolerance", type=float, metavar="X", help="of compare: relative RMS error of a tensor")
    verb.add_argument("--out", type=Path, metavar="FILE", help="of reduce: the ONNX file to write")
    verb.add_argument("--check", metavar="COMMAND", help="of reduce: exits with 0 if the ONNX file it is given is fine")


def run(args: argparse.Namespace) -> int:
    """Run it; return the exit code."""
    import shlex

    from olmo2_export.debug.debug import capability, compare_variant, format_differences, reduce

    unused = {"compare": ("out", "check"), "capability": ("out", "check", "tolerance"), "reduce": ("tolerance",)}
    if given := [f"--{name}" for name in unused[args.question] if getattr(args, name) is not None]:
        raise UsageError(f"{', '.join(given)}: debug {args.question} has no use for it")
    if args.question == "compare":
        differences, first = compare_variant(args.package, args.variant, args.backend or "ort", args.tolerance)
        print(format_differences(differences, first))
        return 0 if first is None else 1
    engines = backends(engines=True)
    backend = args.backend or engines[0]
    if not find_target(backend).needs_engine:
        raise UsageError(f"backend {backend}: debug {args.question} asks a TensorRT: {' or '.join(engines)}")
    tensorrt = tensorrt_backend(backend)
    if args.question == "capability":
        supported, said = capability(args.package, args.variant, tensorrt)
        print(said.rstrip())
        return 0 if supported else 1
    if args.out is None:
        raise UsageError("debug reduce: --out says which ONNX file to write")
    reduce(args.package, args.variant, args.out, tensorrt, shlex.split(args.check or ""))
    print(f"wrote {args.out}: look at its last node")
    return 0
