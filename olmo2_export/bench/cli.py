"""python -m olmo2_export.bench: what this project costs and how fast it is, beside what a user would take instead.

    compare   olmo2-export bench on made-up weights: ours and all peers, over context lengths and batch sizes
    stages    seconds and peak memory of export and build
    quality   KL, top-1 and perplexity of quantised variants on the demo model, and llama.cpp's
    cpu       the table of targets: ours, llama.cpp and onnxruntime-genai in turns
    serve     clients of a server: throughput, what a token costs more, waits, a soak; llama-server beside it
    gpu       the table of targets on a GPU: ours, transformers' compiled static cache, and the hardware's limits
    profile   where the time of our prefill and decode goes, by operator, beside what memory allows
    lora      what a LoRA adapter that is chosen at run time costs a decode step

Tables go to stdout, progress to stderr; the last line of stdout is JSON whose keys carry the units.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from olmo2_export.bench import cpu, gpu, lora, profile, quality, serve, stages
from olmo2_export.bench.arguments import declare_setting
from olmo2_export.bench.checkpoint import SIZES
from olmo2_export.bench.command import check_out, run_comparison, work_folder, write_out
from olmo2_export.bench.compare import ours_failed
from olmo2_export.bench.contenders import Workshop
from olmo2_export.bench.processes import ROOT, check_system
from olmo2_export.weights.checkpoint import open_checkpoint
from runtimes.command import Parser, run_command
from runtimes.errors import UsageError
from runtimes.package import Package
from runtimes.targets import find_target


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; without any it is that of `cpu`."""
    parser = Parser(prog="python -m olmo2_export.bench", description=__doc__.partition("\n")[0])
    work = Parser(add_help=False)
    work.add_argument("--work", type=Path, help="where to put a temporary folder, for cpu and 1B of some 25 GB")
    work.add_argument("--debug", action="store_true", help="show where an error came from")
    sized = Parser(add_help=False)
    sized.add_argument("--size", choices=list(SIZES), default="1B")
    kept = Parser(add_help=False)
    kept.add_argument("--keep", type=Path, metavar="DIR", help="make the models here, and use those already here")
    kept.add_argument("--threads", type=int, default=2)
    kept.add_argument("--steps", type=int, default=32, help="decode steps that are timed; default 32")
    kept.add_argument("--variant", action="append", metavar="V", help="of ours; the first is judged; default: q4")
    beside = Parser(add_help=False)
    beside.add_argument("--peers", type=Path, default=ROOT, metavar="DIR", help="where make peers put its venvs")
    beside.add_argument("--llama-type", action="append", metavar="T", help="of GGUF; the first is judged")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    verb = verbs.add_parser("compare", parents=[work, sized], help="ours and all peers, by context and batch size")
    verb.add_argument("--variant", action="append", metavar="V", help="of ours; default: q4 q8 fp32")
    declare_setting(verb)
    verb.set_defaults(vs=["all"])
    verb = verbs.add_parser("stages", parents=[work, sized], help="time and memory of export and build")
    verb.add_argument("--precision", action="append", metavar="P", help="of an engine; may be repeated; default: bf16")
    verb.add_argument("--no-build", action="store_true", help="leave the TensorRT engines out")
    verb.add_argument("--variant", action="append", metavar="V", help="of the export; may be repeated; default: fp32")
    verb.add_argument("--layers", type=int, metavar="N", help="measure so many, at least 2, and half of them; no build")
    verb.add_argument("--no-prefill-graph", action="store_true", help="leave the int8 prefill graph out")
    verb = verbs.add_parser("quality", parents=[work, beside], help="variants against llama.cpp on the demo model")
    verb.add_argument(
        "--variant", action="append", choices=list(quality.OURS), metavar="V", help="default: all of ours"
    )
    verb.add_argument(
        "--model", type=Path, metavar="DIR", help="a checkpoint with heldout.txt and calibration.txt; default: the demo"
    )
    verb.add_argument("--windows", type=int, metavar="N", help="of 512 tokens; default: the whole held-out text")
    verb = verbs.add_parser("cpu", parents=[work, sized, kept, beside], help="the table of targets")
    verb.add_argument("--rounds", type=int, default=3)
    verb.add_argument("--only", action="append", choices=cpu.TASKS, metavar="TASK", help=f"of {', '.join(cpu.TASKS)}")
    verb = verbs.add_parser("serve", parents=[work, sized], help="a server and its clients")
    load = serve.Load()
    verb.add_argument("--keep", type=Path, metavar="DIR", help="make the models here, and use those already here")
    verb.add_argument("--peers", type=Path, default=ROOT, metavar="DIR", help="where make peers put its venvs")
    verb.add_argument("--variant", default="q4", metavar="V", help="of ours; default q4")
    verb.add_argument(
        "--package", type=Path, metavar="DIR", help="measure a package that is there, without llama-server"
    )
    verb.add_argument(
        "--clients", type=int, nargs="+", default=list(load.clients), metavar="N", help="at once; default 1 2 4 8"
    )
    for name, words in (
        ("rounds", "of everything, in turns"),
        ("threads", "of each server"),
        ("slots", "answers that a server makes at once"),
        ("prompt-tokens", "of a prompt"),
        ("new-tokens", "of an answer"),
        ("long-tokens", "of the prompts that arrive while others are answered"),
        ("requests", "of the soak; 0: none"),
    ):
        default = getattr(load, name.replace("-", "_"))
        verb.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{words}; default {default}")
    verb = verbs.add_parser("gpu", parents=[work, sized], help="the table of targets on a GPU")
    verb.add_argument("--keep", type=Path, metavar="DIR", help="make the models here, and use those already here")
    verb.add_argument(
        "--with",
        dest="wanted",
        action="append",
        metavar="B:V",
        help="ort:VARIANT, trt_rtx:PRECISION or trt:PRECISION; the first is judged; default: ort:bf16",
    )
    verb.add_argument("--device", default="cuda", help="of ort and transformers; default cuda")
    verb.add_argument("--rounds", type=int, default=3)
    verb.add_argument("--steps", type=int, default=128, help="decode steps that are timed; default 128")
    verb.add_argument("--only", action="append", choices=gpu.TASKS, metavar="TASK", help=f"of {', '.join(gpu.TASKS)}")
    verb.add_argument("--no-baseline", action="store_true", help="leave transformers out")
    verb.add_argument(
        "--package",
        type=Path,
        action="append",
        metavar="DIR",
        help="measure the variants of a package that is there; may be repeated; default: packages are made",
    )
    verb.add_argument("--reference", type=Path, metavar="DIR", help="the checkpoint for transformers; default: made")
    verb.add_argument(
        "--minutes", type=float, metavar="M", help="end after that, with what was measured till then; default: all is"
    )
    verb.add_argument("--out", type=Path, metavar="FILE", help="write the JSON of the last line there too")
    verb = verbs.add_parser("profile", parents=[work, sized, kept], help="time by operator")
    verb.add_argument("--context", type=int, default=512, help="tokens of the prefill; default 512")
    verb.add_argument(
        "--rows", type=int, nargs="+", default=[1, 2, 4], metavar="N", help="of decode steps; default 1 2 4"
    )
    verb.add_argument("--package", type=Path, metavar="DIR", help="profile a package that is there")
    verb = verbs.add_parser("lora", parents=[work, sized, kept], help="what an adapter costs a decode step")
    verb.add_argument("--rank", type=int, default=16, help="of the adapter; default 16")
    verb.add_argument("--rounds", type=int, default=3)
    given = sys.argv[1:] if argv is None else argv
    return parser.parse_args(given or ["cpu"])


def run(args: argparse.Namespace) -> int:
    """Run one verb; return 0, or 1 if a contender failed."""
    check_system()
    failed, out, packages = False, getattr(args, "out", None), list[Package]()
    check_out(out)
    if args.verb == "gpu":
        packages = gpu.check(
            args.size,
            wanted=args.wanted or ["ort:bf16"],
            rounds=args.rounds,
            steps=args.steps,
            baseline=not args.no_baseline,
            packages=args.package or (),
            reference=args.reference,
            keep=args.keep,
            minutes=args.minutes,
        )
    with work_folder(args.work, getattr(args, "keep", None)) as work:
        match args.verb:
            case "compare":
                workshop = Workshop(work, args.size)
                args.variant = args.variant or list(find_target().variants)
                reference = open_checkpoint(str(workshop.checkpoint("olmo2")))
                result, report = run_comparison(args, workshop.bundle(args.variant), reference, work)
                failed = ours_failed(result)
            case "stages":
                if args.layers is not None and args.layers < 2:
                    raise UsageError(f"--layers {args.layers}: expected 2 or more, to tell what one of them takes")
                result = stages.run(
                    args.size,
                    work,
                    [] if args.no_build else args.precision or ["bf16"],
                    variants=args.variant or ["fp32"],
                    layers=args.layers,
                    prefill_graph=not args.no_prefill_graph,
                )
                report = stages.table(result)
            case "quality":
                result = quality.run(
                    work,
                    args.peers,
                    variants=args.variant or list(quality.OURS),
                    llama_types=args.llama_type or ["Q4_K_M", "Q4_0", "Q8_0"],
                    most_windows=args.windows,
                    model=args.model,
                )
                report = quality.table(result)
            case "cpu":
                result, report = cpu.run(
                    args.size,
                    work,
                    args.peers,
                    variants=args.variant or ["q4"],
                    llama_types=args.llama_type or ["Q4_K_M"],
                    tasks=args.only or cpu.TASKS,
                    rounds=args.rounds,
                    threads=args.threads,
                    steps=args.steps,
                )
            case "serve":
                load = serve.Load(
                    clients=tuple(args.clients),
                    prompt_tokens=args.prompt_tokens,
                    new_tokens=args.new_tokens,
                    long_tokens=args.long_tokens,
                    rounds=args.rounds,
                    threads=args.threads,
                    slots=args.slots,
                    requests=args.requests,
                )
                result, report = serve.run(
                    args.size, work, args.peers, load=load, variant=args.variant, package=args.package
                )
            case "gpu":
                result, report = gpu.run(
                    args.size,
                    work,
                    wanted=args.wanted or ["ort:bf16"],
                    device=args.device,
                    rounds=args.rounds,
                    steps=args.steps,
                    only=args.only or gpu.TASKS,
                    baseline=not args.no_baseline,
                    packages=packages,
                    reference=args.reference,
                    minutes=args.minutes,
                )
            case "lora":
                result, report = lora.run(
                    args.size,
                    work,
                    (args.variant or ["q4"])[0],
                    rank=args.rank,
                    rounds=args.rounds,
                    threads=args.threads,
                    steps=args.steps,
                )
            case _:
                result = profile.run(
                    args.size,
                    work,
                    args.variant or ["q4"],
                    args.threads,
                    args.context,
                    args.steps,
                    args.rows,
                    [args.package] if args.package else [],
                )
                report = profile.table(result)
    print(report)
    print(json.dumps(result), flush=True)
    write_out(out, result)
    return 1 if failed or (args.verb != "compare" and result.get("failures")) else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m olmo2_export.bench`."""
    return run_command(
        "bench",
        lambda: run(parse_args(argv)),
        debug="--debug" in (sys.argv[1:] if argv is None else argv),
        interrupted="nothing is left behind but what --keep keeps",
        extra="export",
    )
