"""How text is generated: the flags that generate and chat share, and what the library takes of them."""

from __future__ import annotations

import argparse
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from runtimes import Package, Slots, UsageError, open_runner
from runtimes.speculate.drafters import Drafter, DraftModel, PromptLookup
from runtimes.text.logit_rules import LogitBias, LogitRule, Penalties
from runtimes.text.plain_text import plain_lines
from runtimes.text.sampling import Sampler
from runtimes.text.structured import GrammarRule, StructuredOutput
from runtimes.text.tokenizer import Tokenizer
from runtimes.verbs.streams import read_file
from runtimes.verbs.target import declare_debug, declare_kv_cache, declare_target, declare_trust, opening


def _bias(word: str) -> tuple[int, float]:
    token_id, _, value = word.partition("=")
    try:
        return int(token_id), float(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{word!r}: expected ID=B, as 42=-5 or 42=-inf") from error


def _declare_structured(verb: argparse.ArgumentParser) -> None:
    """Declare what a text may have to look like."""
    of = verb.add_mutually_exclusive_group()
    of.add_argument("--json-schema", metavar="FILE", help="write JSON of this schema; {} is any JSON")
    of.add_argument("--regex", metavar="R", help="write what this regular expression matches from end to end")
    of.add_argument("--choice", action="append", metavar="TEXT", help="write one of these; to be repeated")
    of.add_argument("--grammar", metavar="FILE", help="write a text of this grammar, in llguidance's dialect of Lark")


def declare_generation(verb: argparse.ArgumentParser, new_tokens: str) -> None:
    """Declare how text is generated, and on what.

    Args:
        verb: the command line.
        new_tokens: help of --max-new-tokens.
    """
    verb.add_argument(
        "--variant", metavar="V", help="which variant of the package (default: the fastest verified one that runs here)"
    )
    declare_kv_cache(verb)
    verb.add_argument("--adapter", metavar="NAME", help="a LoRA adapter of the package (default: none)")
    verb.add_argument("--max-new-tokens", type=int, metavar="N", help=new_tokens)
    verb.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default: 0)")
    verb.add_argument("--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest (default: 0, off)")
    verb.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest that sum to P (default: 1, off)"
    )
    verb.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        metavar="P",
        help="leave out what is less likely than P times the likeliest (default: 0, off)",
    )
    verb.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="R",
        help="divide the logits of the prompt's and the text's tokens by R, multiply negative ones (default: 1, off)",
    )
    verb.add_argument(
        "--presence-penalty",
        type=float,
        default=0.0,
        metavar="R",
        help="take R off the logits of tokens that the text has (default: 0, off)",
    )
    verb.add_argument(
        "--frequency-penalty", type=float, default=0.0, metavar="R", help="the same, each time (default: 0, off)"
    )
    verb.add_argument(
        "--logit-bias",
        action="append",
        default=[],
        type=_bias,
        metavar="ID=B",
        help="add B to the logit of a token, -inf excludes it; may be repeated",
    )
    verb.add_argument("--seed", type=int, metavar="S", help="draw the same tokens every time")
    _declare_structured(verb)
    verb.add_argument("--stop", action="append", default=[], metavar="S", help="end before this text; may be repeated")
    declare_target(verb, "one per physical core it may use")
    guess = verb.add_mutually_exclusive_group()
    guess.add_argument(
        "--speculate",
        choices=("lookup", "none"),
        default="none",
        help="lookup: check several tokens at once where the text repeats itself (default: none)",
    )
    guess.add_argument(
        "--draft",
        type=Path,
        metavar="PACKAGE",
        help="check several tokens at once that this smaller model guesses",
    )
    declare_trust(verb)
    verb.add_argument("--stats", action="store_true", help="end with a line of tokens and times on stderr")
    declare_debug(verb)


def sampler_of(args: argparse.Namespace, number: int = 0) -> Sampler:
    """Return what draws one of the samples; the first is what a single text is drawn by."""
    seed = None if args.seed is None else args.seed + number
    return Sampler(args.temperature, args.top_k, args.top_p, seed, args.min_p)


def stops_of(args: argparse.Namespace) -> list[str]:
    """Return the stop strings, in each form that a text may have their line ends."""
    return [form for stop in args.stop for form in dict.fromkeys((stop, plain_lines(stop)))]  # as CR LF, too


def grammar_of(args: argparse.Namespace, tokenizer: Tokenizer, vocab_size: int) -> GrammarRule | None:
    """Return what the text has to look like."""
    if args.json_schema is not None:
        return StructuredOutput(tokenizer, vocab_size).json_schema(read_file(args.json_schema))
    if args.regex is not None:
        return StructuredOutput(tokenizer, vocab_size).regex(args.regex)
    if args.choice is not None:
        return StructuredOutput(tokenizer, vocab_size).choice(args.choice)
    if args.grammar is not None:
        return StructuredOutput(tokenizer, vocab_size).grammar(read_file(args.grammar))
    return None


def rules_of(args: argparse.Namespace, vocab_size: int, grammar: GrammarRule | None) -> list[LogitRule]:
    """Return the rules of one text: what only excludes comes last."""
    penalties = Penalties(args.repetition_penalty, args.presence_penalty, args.frequency_penalty)
    rules: list[LogitRule] = [] if penalties == Penalties() else [penalties]
    if args.logit_bias:
        twice = [token_id for token_id, count in Counter(i for i, _ in args.logit_bias).items() if count > 1]
        if twice:
            raise UsageError(f"--logit-bias: token {twice[0]} is given more than once; give it one")
        rules.append(LogitBias(dict(args.logit_bias), vocab_size))
    return rules if grammar is None else [*rules, grammar.fork()]


def open_models(args: argparse.Namespace, package: Package, stack: ExitStack) -> tuple[Slots, Drafter | None]:
    """Open the package, and what guesses for it; the stack closes both."""
    options = opening(args)
    runner = stack.enter_context(open_runner(package, variant=args.variant, kv_cache=args.kv_cache, **options))
    if args.draft is not None:
        return runner, DraftModel(stack.enter_context(open_runner(args.draft, **options)))
    return runner, PromptLookup() if args.speculate == "lookup" else None
