"""olmo2-export fp16: does a model fit float16? What overflows, and the smallest float32 islands that hold it.

Exit code 0: it fits, or a package with the islands was written; 1: it does not fit. The last line is JSON.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from olmo2_export.catalog import exported
from olmo2_export.verbs.arguments import declare_lora

HELP = "does a model fit float16; exit 1 if not, with the float32 islands that make it fit"

_TEXT = "UTF-8 text to measure on; default: the text of this package, random ids for a model without a tokenizer"


def declare(verb: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    verb.add_argument("model", metavar="MODEL", help="Hub id, folder, or 'demo'")
    verb.add_argument("--revision", metavar="REV", help="branch, tag or commit of a Hub id")
    declare_lora(verb, "a LoRA adapter (folder or Hub id), merged; may be repeated, in order")
    verb.add_argument("--text", type=Path, metavar="FILE", help=_TEXT)
    verb.add_argument("--tokens", type=int, metavar="N", help="tokens to measure on; default 1024")
    verb.add_argument("--margin", type=float, metavar="X", help="the largest number that is called safe; default 30000")
    verb.add_argument("--apply", action="store_true", help="write a package with the islands to --out")
    verb.add_argument("--out", type=Path, metavar="DIR", help="the package folder to write")
    halves = exported(lambda row: row.dtype == "float16")
    verb.add_argument(
        "--variant", action="append", choices=halves, help=f"of --apply: default {halves[0]}; may be repeated"
    )
    verb.add_argument("--force", action="store_true", help="of --apply: replace the package that is there")


def run(args: argparse.Namespace) -> int:
    """Run it; return the exit code."""
    import json

    from olmo2_export.atomic import check_replaceable
    from olmo2_export.config import ModelConfig
    from olmo2_export.fp16.report import safety_lines
    from olmo2_export.fp16.safety import MARGIN, TOKENS, measure_safety
    from olmo2_export.package.export import check_weights, export
    from olmo2_export.package.weight_choice import Options
    from olmo2_export.weights.merged import open_merged
    from runtimes.errors import UsageError

    if args.apply != (args.out is not None):
        raise UsageError("--apply and --out DIR go together: the package is written there")
    if not args.apply and (args.variant or args.force):
        raise UsageError("--variant and --force are of --apply, which is not given")
    if args.apply:
        check_replaceable(args.out, args.force)  # before it is measured
    checkpoint = open_merged(args.model, args.revision, args.lora)
    config = ModelConfig.from_json(checkpoint.folder / "config.json")
    check_weights(checkpoint, config)
    found = measure_safety(
        checkpoint,
        config,
        text=args.text,
        tokens=TOKENS if args.tokens is None else args.tokens,
        margin=MARGIN if args.margin is None else args.margin,
        prove=True,
    )
    print("\n".join(safety_lines(checkpoint.model, found)))
    held = found.held is not None and found.held.finite and not found.blocked
    applied = args.apply and held
    if applied:
        options = Options(fp16_islands=True, fp16_safety=found)
        export(checkpoint, args.out, variants=args.variant or ["fp16"], options=options, force=args.force)
        lora = "".join(f" --lora {given}" for given in args.lora)
        print(f"written: {args.out}; check it with: olmo2-export verify {args.out} --reference {args.model}{lora}")
    elif args.apply:
        print("nothing was written: no islands make this model finite in float16; export it with --variant bf16")
    print(json.dumps({"model": checkpoint.model, "applied": applied, **found.to_document()}))
    return 0 if (found.safe and held) or applied else 1
