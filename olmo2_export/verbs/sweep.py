"""olmo2-export sweep: several revisions of a model, exported, evaluated and drawn over their training steps.

The first revision is exported; of the others only the weights are written anew. For each: perplexity with its standard
error, KL divergence to PyTorch on the same weights, and KL divergence to the revision before it. DIR gets sweep.json,
sweep.csv, sweep.png, sweep.svg and the package of the last revision; a sweep that was interrupted goes on when it is
run again. The last line of stdout is JSON.

A pattern such as 'stage1-*' (in quotes) stands for all revisions that it matches, in the order of the verb revisions;
with --every N for the first of them, every Nth after it, and the last. With --backend trt the engine of the first
revision is built, and refitted with the weights of the others; TensorRT for RTX builds each.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from olmo2_export.verbs.arguments import declare_backend, declare_device, declare_outputs, declare_variant
from runtimes.command import expanded, printable

if TYPE_CHECKING:
    from olmo2_export.evaluate.revisions import RevisionResult

HELP = "several revisions of a model: perplexity and KL divergence over training steps"


def declare(verb: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    verb.add_argument("model", metavar="MODEL", help="Hub id, or a folder with a folder per revision")
    verb.add_argument(
        "--revisions", nargs="+", required=True, metavar="REV", help="branches, tags, commits; folders; patterns"
    )
    verb.add_argument("--every", type=int, metavar="N", help="of a pattern's revisions the first, every Nth, the last")
    verb.add_argument("--out", type=Path, default=Path("sweep"), metavar="DIR", help="results; default: ./sweep")
    declare_variant(verb, "what to evaluate of each; default fp32, or with engines trt_bf16")
    verb.add_argument("--recipe", metavar="R", help="of q4, q8: as in export; of int4 engines: as in build")
    verb.add_argument("--no-prefill-graph", action="store_true", help="q4 and q8: leave the int8 prefill graph out")
    declare_outputs(verb)
    declare_backend(verb, "onnxruntime (ort, the default), or engines of a TensorRT, made on this machine's GPU")
    declare_device(verb, "where onnxruntime runs it; default cpu", backend="ort")
    verb.add_argument("--text", type=Path, metavar="FILE", help="as in evaluate; default: the demo's held-out text")
    verb.add_argument("--context", type=int, metavar="N", help="as in evaluate")
    verb.add_argument("--stride", type=int, metavar="N", help="as in evaluate")
    verb.add_argument("--max-tokens", type=int, metavar="N", help="stop after so many; default: the whole text")
    verb.add_argument("--low-memory", action="store_true", help="PyTorch with one layer in memory at a time")


def run(args: argparse.Namespace) -> int:
    """Run it; return the exit code."""
    from olmo2_export.evaluate.revisions import RESULTS, sweep
    from olmo2_export.evaluate.revisions_plot import draw
    from olmo2_export.evaluate.text import HELDOUT
    from olmo2_export.package.weight_choice import Options
    from olmo2_export.weights.revisions import choose, is_pattern
    from runtimes.errors import UsageError
    from runtimes.targets import find_target

    if args.max_tokens is not None and args.max_tokens < 1:
        raise UsageError(f"--max-tokens {args.max_tokens}: expected at least 1")
    variant = args.variant or ("trt_bf16" if find_target(args.backend, args.device).needs_engine else "fp32")
    text = args.text or HELDOUT
    chosen = choose(args.model, args.revisions, args.every)
    for one in chosen:
        if is_pattern(one.asked):
            print(f"{printable(one.asked)}: {len(one.names)} of {one.matched} revisions that match", flush=True)
    results = sweep(
        args.model,
        [name for one in chosen for name in one.names],
        args.out,
        variant=variant,
        options=Options(
            recipe=args.recipe,
            prefill_graph=not args.no_prefill_graph,
            hidden_states=args.hidden_states,
            inputs_embeds=args.inputs_embeds,
        ),
        backend=args.backend,
        device=args.device,
        text=text,
        context=args.context,
        stride=args.stride,
        max_tokens=args.max_tokens,
        low_memory=args.low_memory,
    )
    folder = expanded(args.model)
    name = folder.resolve().name if folder.is_dir() else args.model
    title = f"{name}, {variant} on {text.name} ({results[0].evaluated_tokens:,} tokens)"
    files = draw(results, title, variant, args.out / "sweep")
    print(table(results))
    print(f"drawn: {', '.join(map(str, files))}")
    document = json.loads((args.out / RESULTS).read_text(encoding="utf-8"))
    print(json.dumps(document | {"files": [str(file) for file in files]}))
    return 0


def table(results: Sequence[RevisionResult]) -> str:
    """Return the sweep for people, a line per revision."""
    head = ["revision", "perplexity", "±", "PyTorch", "KL to PyTorch", "±", "top-1", "KL to before", "±", "export s"]
    engines = any(r.engine for r in results)
    head += ["engine"] * engines
    rows = [head]
    for r in results:
        numbers = [f"{r.perplexity:.3f}", _short(r.perplexity_se, ".3f"), f"{r.pytorch_perplexity:.3f}"]
        numbers += [f"{r.kl_mean_nats:.2e}", _short(r.kl_mean_se_nats, ".0e"), f"{r.top1_share:.2%}"]
        numbers += [_short(r.change_kl_mean_nats, ".4f"), _short(r.change_kl_mean_se_nats, ".4f"), f"{r.export_s:.1f}"]
        rows.append([printable(r.revision), *numbers, *[r.engine or "kept"] * engines])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join(
        "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )


def _short(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"
