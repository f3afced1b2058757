"""olmo2-export export: checkpoint -> package folder."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import olmo2_export.catalog as catalog
from olmo2_export.catalog import BLOCK_SIZES, DISTILL_STEPS, exported, listed, names
from olmo2_export.verbs.arguments import declare_lora, declare_lora_inputs, declare_outputs, declare_variant
from olmo2_export.verbs.words import megabytes
from runtimes.errors import UsageError

if TYPE_CHECKING:
    from olmo2_export.package.weight_choice import Options

HELP = "checkpoint -> package folder"


def declare(verb: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    verb.add_argument("model", metavar="MODEL", help="Hub id (allenai/OLMo-2-0425-1B), folder, or 'demo'")
    verb.add_argument("--out", type=Path, metavar="DIR", help="the package folder to write")
    quantized = exported(lambda row: row.defaults)
    for_cpus, for_gpus = ", ".join(names("blocks")), ", ".join(names("device"))
    words = f"fp32 (the default); {for_cpus} for CPUs; {for_gpus} for --device cuda; may be repeated"
    declare_variant(verb, words, many=True)
    verb.add_argument("--recipe", metavar="R", help=f"of {', '.join(quantized)}: rtn, search (the default), gptq, ...")
    verb.add_argument(
        "--calibration", type=Path, metavar="FILE", help="UTF-8 text for gptq, mixed and a quantised KV cache"
    )
    verb.add_argument("--size-budget", type=float, metavar="BITS", help="bits per weight, for mixed and gptq-mixed")
    verb.add_argument(
        "--distill-steps", type=int, metavar="N", help=f"of training, for distill; default {DISTILL_STEPS}"
    )
    verb.add_argument("--block-size", type=int, choices=BLOCK_SIZES, help="weights that share a scale")
    cached, prefilled = listed(exported(lambda row: row.quantized_cache)), listed(exported(lambda r: r.prefill_graph))
    halves = listed(exported(lambda row: row.dtype == "float16"))
    caches = [cache.name for cache in catalog.KV_CACHES]
    written = listed([cache.name for cache in catalog.kv_caches(())])
    verb.add_argument(
        "--kv-cache",
        choices=caches,
        action="append",
        default=[],
        help=f"of {cached}: to be chosen from at run time; may be repeated; default {written}",
    )
    verb.add_argument("--no-prefill-graph", action="store_true", help=f"{prefilled}: leave the int8 prefill graph out")
    verb.add_argument(
        "--requantize", action="store_true", help="of a quantised checkpoint: make q4 or q8 of its dequantised weights"
    )
    verb.add_argument(
        "--fp16-islands",
        action="store_true",
        help=f"{halves}: keep what overflows in float32, as the verb fp16 proposes, instead of refusing",
    )
    declare_outputs(verb)
    verb.add_argument(
        "--default-variant",
        metavar="NAME",
        help="what onnxruntime-genai and transformers.js open where none is named; fp32, or the first",
    )
    declare_lora(verb, "a LoRA adapter (folder, or Hub id with or without @REV), merged; may be repeated, in order")
    declare_lora_inputs(verb, "the same, not merged: runners choose for each sequence")
    verb.add_argument("--revision", metavar="REV", help="branch, tag or commit of a Hub id")
    verb.add_argument("--force", action="store_true", help="replace the package that is there")
    verb.add_argument(
        "--dry-run", action="store_true", help="say what it would write, need and take; write nothing, read no weights"
    )
    verb.add_argument("--json", action="store_true", help="with --dry-run: as a JSON object, bytes and seconds")


def run(args: argparse.Namespace) -> int:
    """Run it; return the exit code."""
    from olmo2_export.package.export import export
    from olmo2_export.package.weight_choice import Options
    from olmo2_export.peak_memory import peak_bytes
    from olmo2_export.summary.text import quantization_lines
    from olmo2_export.weights.merged import open_merged

    if args.out is None and not args.dry_run:
        raise UsageError("--out: missing; expected the package folder to write, or --dry-run")
    if args.json and not args.dry_run:
        raise UsageError("--json: only with --dry-run; inspect --json says what a package holds")
    options = Options(
        recipe=args.recipe,
        calibration=args.calibration,
        size_budget=args.size_budget,
        distill_steps=args.distill_steps,
        block_size=args.block_size,
        kv_caches=tuple(args.kv_cache),
        prefill_graph=not args.no_prefill_graph,
        requantize=args.requantize,
        fp16_islands=args.fp16_islands,
        hidden_states=args.hidden_states,
        inputs_embeds=args.inputs_embeds,
    )
    if args.dry_run:
        return _plan(args, options)
    started = time.monotonic()
    manifest = export(
        open_merged(args.model, args.revision, args.lora, switchable=args.lora_inputs),
        args.out,
        variants=args.variant or ["fp32"],
        options=options,
        force=args.force,
        default_variant=args.default_variant,
    )
    seconds = time.monotonic() - started
    size = sum(entry.size for entry in manifest.files.values())
    at = f"@{manifest.source.revision[:12]}" if manifest.source.revision else ""
    quantised = f" ({manifest.source.quantized})" if manifest.source.quantized else ""
    for variant in manifest.variants.values():
        counts = ", ".join(f"{n} {op}" for op, n in variant.op_counts.items() if n)
        print(f"{variant.name}: opset {variant.opset}, {counts}")
        for line in quantization_lines(variant):
            print(f"  {line}")
        for island, reason in variant.float32_islands.items():
            print(f"  float32 {island}: {reason}")
    print(
        f"exported {manifest.source.model}{at}{quantised} to {args.out}: {megabytes(size)} in {seconds:.1f} s, "
        f"peak memory {megabytes(peak_bytes())}"
    )
    return 0


def _plan(args: argparse.Namespace, options: Options) -> int:
    """Say what the export would do; exit code 1 where the disk has no room for it."""
    from olmo2_export.package.plan import plan_export
    from olmo2_export.summary.plan_text import plan_lines
    from olmo2_export.weights.merged import open_merged

    plan = plan_export(
        open_merged(args.model, args.revision, args.lora, switchable=args.lora_inputs, headers=True),
        variants=args.variant or ["fp32"],
        options=options,
        out=Path.cwd() if args.out is None else args.out,
        default_variant=args.default_variant,
    )
    print(json.dumps(plan.to_document(), indent=2) if args.json else "\n".join(plan_lines(plan)))
    return 1 if plan.free_disk is not None and plan.disk > plan.free_disk else 0
