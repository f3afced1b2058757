"""olmo2-export evaluate: perplexity of a text, with error bars, and the distance to PyTorch on the same tokens.

Each window reads --context tokens and scores what no other has scored; the first begins with the model's bos (or eos)
token. Standard errors are over blocks of 256 tokens, as tokens beside each other are not independent. A MODEL that is
no package is evaluated in PyTorch, on the same windows. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from olmo2_export.verbs.arguments import declare_lora, declare_target

if TYPE_CHECKING:
    from olmo2_export.evaluate.evaluate import Comparison, Evaluation

HELP = "perplexity ± standard error, and KL divergence to PyTorch, on a text"


def declare(verb: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    verb.add_argument("model", metavar="PACKAGE|MODEL", help="a package; or a checkpoint, which PyTorch runs")
    declare_target(verb, variant="of the package; default: the fastest verified one", many=False)
    verb.add_argument("--kv-cache", metavar="C", help="of the variant's, as in olmo2-run; default: the variant's own")
    verb.add_argument(
        "--decode-graph", action="store_true", help="score with the graph that generates text, not that for prompts"
    )
    verb.add_argument("--reference", metavar="MODEL", help="compare with this checkpoint in PyTorch, in float32")
    verb.add_argument("--revision", metavar="REV", help="of the checkpoint, if it is a Hub id")
    declare_lora(verb, "LoRA adapters that are merged into the checkpoint, in order")
    verb.add_argument(
        "--text", type=Path, metavar="FILE", help="UTF-8, or token ids as .npy; default: the demo's held-out text"
    )
    verb.add_argument("--context", type=int, metavar="N", help="tokens a window reads; default 1024, or what fits")
    verb.add_argument("--stride", type=int, metavar="N", help="tokens a window scores; default: --context")
    verb.add_argument("--max-tokens", type=int, metavar="N", help="stop after so many; default: the whole text")
    verb.add_argument("--pytorch", action="store_true", help="MODEL is a checkpoint: evaluate it in PyTorch")
    verb.add_argument(
        "--low-memory", action="store_true", help="PyTorch with one layer in memory at a time, instead of all"
    )


def run(args: argparse.Namespace) -> int:
    """Run it; return the exit code."""
    from olmo2_export.evaluate.evaluate import evaluate, token_text
    from olmo2_export.evaluate.models import Evaluated, open_package_model, open_torch_model
    from olmo2_export.evaluate.text import HELDOUT
    from olmo2_export.peak_memory import peak_bytes
    from olmo2_export.weights.merged import open_merged
    from runtimes.command import expanded
    from runtimes.errors import UsageError
    from runtimes.manifest import MANIFEST_NAME
    from runtimes.package import is_on_hub, open_package

    path = expanded(args.model)
    package = open_package(path) if is_on_hub(path) or (path / MANIFEST_NAME).is_file() else None
    of_package = {"--variant": args.variant, "--device": args.device, "--reference": args.reference}
    of_package["--kv-cache"] = args.kv_cache
    given = [name for name, value in of_package.items() if value is not None]
    given += ["--backend"] * (args.backend != "ort") + ["--decode-graph"] * args.decode_graph
    if args.max_tokens is not None and args.max_tokens < 1:
        raise UsageError(f"--max-tokens {args.max_tokens}: expected at least 1")
    if args.pytorch and package is not None:
        source = package.manifest.source.model
        raise UsageError(f"--pytorch: {path} is a package; give the checkpoint it was exported from ({source})")
    if package is None and given:
        why = "PyTorch runs a checkpoint by itself" if args.pytorch else f"{path} is no package"
        raise UsageError(f"{', '.join(given)}: {why}")
    if package is not None and args.reference is None and (args.revision is not None or args.low_memory or args.lora):
        raise UsageError("--revision, --lora and --low-memory: of the checkpoint, so give one with --reference")

    checkpoint = (
        open_merged(args.model if package is None else args.reference, args.revision, args.lora)
        if (args.reference or package is None)
        else None
    )
    tokenized = package or (path if checkpoint is None else checkpoint.folder)
    tokens = token_text(tokenized, args.text or HELDOUT, most=args.max_tokens, is_package=package is not None)
    with ExitStack() as stack:
        models: list[Evaluated] = []
        if package is not None:
            opened = open_package_model(
                package,
                variant=args.variant,
                backend=args.backend,
                device=args.device,
                decode_graph=args.decode_graph,
                kv_cache=args.kv_cache,
            )
            models.append(stack.enter_context(opened))
        if checkpoint is not None:
            models.append(stack.enter_context(open_torch_model(checkpoint, low_memory=args.low_memory)))
        result = evaluate(models[0], tokens, references=models[1:], context=args.context, stride=args.stride)
    print("\n".join(evaluation_lines(result)))
    print(json.dumps(result.to_document() | {"peak_memory_bytes": peak_bytes()}))
    return 0


def evaluation_lines(result: Evaluation) -> list[str]:
    """Return an evaluation for people."""
    begun = f"begun with token {result.prefix}" if result.prefix is not None else "begun with its own first token"
    lines = [
        f"{result.name} on {result.text}: {result.tokens:,} tokens, {begun}, in {result.windows:,} windows of "
        f"{result.context:,} tokens, each scoring {result.stride:,}",
        f"perplexity {_with_error(result.perplexity.value, result.perplexity.se)} "
        f"({result.tokens / max(result.seconds, 1e-9):,.0f} tokens/s)",
    ]
    for comparison in result.comparisons:
        lines += _comparison_lines(comparison)
    return lines


def _comparison_lines(found: Comparison) -> list[str]:
    change = found.change
    interval = "" if change.low is None else f", 95 % within {change.low:+.3%} to {change.high:+.3%}"
    return [
        f"against {found.name}: its perplexity {_with_error(found.perplexity.value, found.perplexity.se)}, "
        f"the change {change.value:+.3%}{interval}",
        f"KL {_with_error(found.kl.value, found.kl.se, '.3g')} nats/token, p99 {found.kl_p99:.3g}, "
        f"max {found.kl_max:.3g}; the same likeliest token at {found.top1:.2%}",
    ]


def _with_error(value: float, se: float | None, form: str = ".3f") -> str:
    return f"{value:{form}} ± {se:{'.2g' if form != '.3f' else form}}" if se is not None else f"{value:{form}}"
