"""Continue a prompt; the new text goes to stdout as it is made."""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from contextlib import ExitStack
from pathlib import Path

from runtimes import UsageError, open_package
from runtimes.generation.generate import Generation, encode_prompt, generate
from runtimes.generation.samples import generate_samples
from runtimes.text.logprobs import TokenLogprobs
from runtimes.text.plain_text import plain_lines
from runtimes.text.tokenizer import Tokenizer
from runtimes.verbs.generation import declare_generation, grammar_of, open_models, rules_of, sampler_of, stops_of
from runtimes.verbs.streams import read_stdin, write
from runtimes.verbs.target import PACKAGE_HELP

logger = logging.getLogger(__name__)

HELP = "continue a prompt"
DESCRIPTION = "Continue a prompt; the new text goes to stdout as it is made."

_DEFAULT_NEW_TOKENS = 128


def declare(verb: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    verb.add_argument("package", type=Path, metavar="PACKAGE", help=PACKAGE_HELP)
    verb.add_argument("--prompt", required=True, metavar="TEXT", help="- reads stdin, less one newline at its end")
    verb.add_argument(
        "--special-tokens",
        action="store_true",
        help="names of special tokens in the prompt, as <|endoftext|>, are these tokens: for a prompt that a chat "
        "template has rendered (default: they are text)",
    )
    verb.add_argument(
        "--samples",
        type=int,
        default=1,
        metavar="N",
        help="so many texts of one prompt, with the seeds S, S+1, ...; needs --json (default: 1)",
    )
    verb.add_argument(
        "--json", action="store_true", help="write a line of JSON for each text, with its tokens, where it has ended"
    )
    verb.add_argument(
        "--logprobs", type=int, metavar="N", help="with --json: log probabilities, and those of the N likeliest tokens"
    )
    verb.add_argument("--prompt-logprobs", type=int, metavar="N", help="with --json: the same of the prompt's tokens")
    declare_generation(verb, f"must fit in the context (default: {_DEFAULT_NEW_TOKENS}, or as many as fit)")


def _read_prompt(text: str) -> str:
    if text == "-":
        return read_stdin().removesuffix("\n")
    return plain_lines(text.removesuffix("\r"))  # $(cat) ate the LF


def _check(args: argparse.Namespace) -> None:
    """Refuse options that mean nothing together.

    Raises:
        UsageError: the message names them.
    """
    if args.samples < 1:
        raise UsageError(f"--samples {args.samples}: expected at least 1")
    for name, given in (
        ("--samples", args.samples > 1),
        ("--logprobs", args.logprobs is not None),
        ("--prompt-logprobs", args.prompt_logprobs is not None),
    ):
        if given and not args.json:
            raise UsageError(f"{name}: has no place in a text that streams; add --json")
    if args.samples > 1:
        for name, given in (
            ("--speculate", args.speculate != "none"),
            ("--draft", args.draft is not None),
            ("--prompt-logprobs", args.prompt_logprobs is not None),
        ):
            if given:
                raise UsageError(f"{name}: not with --samples {args.samples}; ask for one text")


def _as_json(result: Generation) -> dict[str, object]:
    found: dict[str, object] = {
        "text": result.text,
        "token_ids": result.token_ids,
        "finish_reason": result.finish_reason,
        "prompt_tokens": len(result.prompt_token_ids),
    }
    if result.logprobs:
        found["logprobs"] = [_logprobs_as_json(token) for token in result.logprobs]
    if result.prompt_logprobs:
        found["prompt_logprobs"] = [None, *(_logprobs_as_json(token) for token in result.prompt_logprobs)]
    return found


def _logprobs_as_json(token: TokenLogprobs) -> dict[str, object]:
    def finite(logprob: float) -> float | None:  # JSON has no -inf
        return logprob if math.isfinite(logprob) else None

    top = [{"token_id": token_id, "logprob": finite(logprob)} for token_id, logprob in token.top]
    return {"token_id": token.token_id, "logprob": finite(token.logprob), "rank": token.rank, "top": top}


def _stats(result: Generation) -> str:
    first, rate = result.time_to_first_token, result.decode_tokens_per_second
    return ", ".join(
        [
            f"{len(result.prompt_token_ids)} prompt tokens ({result.reused_tokens} reused)",
            f"{len(result.token_ids)} new tokens ({result.drafted} drafted, {result.accepted} accepted)",
            f"time to first token {'-' if first is None else f'{first * 1000:.1f}'} ms",
            f"{'-' if rate is None else f'{rate:.1f}'} tokens/s",
            f"finish reason {result.finish_reason}",
        ]
    )


def run(args: argparse.Namespace) -> None:
    """Generate a text, or several, and write them.

    Raises:
        Olmo2ExportError: whatever is wrong.
    """
    _check(args)
    sampler = sampler_of(args)
    check_hashes = not args.skip_hash_check
    package = open_package(args.package)
    package.check_logits("generate")
    tokenizer = Tokenizer.from_package(package, check_hashes=check_hashes)
    prompt = _read_prompt(args.prompt)
    prompt_ids = encode_prompt(tokenizer, prompt, parse_special=args.special_tokens)
    if not args.special_tokens and (found := tokenizer.special_in(prompt)):
        logger.warning(
            "the prompt holds %s, taken as text; with --special-tokens it is the special token", ", ".join(found[:5])
        )
    grammar = grammar_of(args, tokenizer, package.model.vocab_size)
    rules = rules_of(args, package.model.vocab_size, grammar)
    with ExitStack() as stack:
        runner, drafter = open_models(args, package, stack)
        room = max(0, runner.max_cache_length - len(prompt_ids))
        new = min(_DEFAULT_NEW_TOKENS, room) if args.max_new_tokens is None else args.max_new_tokens
        if args.samples > 1:
            results = generate_samples(
                runner,
                tokenizer,
                prompt_ids,
                args.samples,
                drawer=lambda i: (sampler_of(args, i), rules_of(args, package.model.vocab_size, grammar)),
                max_new_tokens=new,
                stop=stops_of(args),
                logprobs=args.logprobs,
                adapter=args.adapter,
            )
        else:
            result = generate(
                runner,
                tokenizer,
                prompt_ids,
                sampler=sampler,
                max_new_tokens=new,
                stop=stops_of(args),
                on_text=None if args.json else write,
                speculate=drafter,
                rules=rules,
                logprobs=args.logprobs,
                prompt_logprobs=args.prompt_logprobs,
                adapter=args.adapter,
            )
            results = [result]
        memory_note = runner.memory_note
    write("".join(f"{json.dumps(_as_json(r))}\n" for r in results) if args.json else "\n")
    cut = [result for result in results if grammar is not None and result.finish_reason != "eos"]
    if cut:
        logger.warning("cut off before it was what it has to look like: raise --max-new-tokens, or take --stop away")
    if args.stats:
        for result in results:
            entry = runner.variant
            words = [_stats(result), memory_note, f"variant {entry.name}", f"KV cache {entry.kv_cache.name}"]
            sys.stderr.write(f"{', '.join(filter(None, words))}\n")
