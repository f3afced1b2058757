"""`olmo2-run`: run a package from the command line; exit codes as in `command.py`."""

from __future__ import annotations

import argparse
import io
import json
import logging
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from typing import TypedDict

from runtimes import Backend, Device, Package, Slots, UsageError, open_package, open_runner
from runtimes.chat.conversation import Conversation
from runtimes.chat.template import ChatTemplate
from runtimes.chat.terminal import Screen, Session, Terminal, streams_are_terminals
from runtimes.command import Parser, run_command
from runtimes.documents import in_groups, read_documents, written
from runtimes.generation.generate import Generation, encode_prompt, generate
from runtimes.generation.samples import generate_samples
from runtimes.runners.embeddings import POOLINGS, embed
from runtimes.serve import verb as serve_verb
from runtimes.speculate.drafters import Drafter, DraftModel, PromptLookup
from runtimes.targets import describe_backends, describe_devices
from runtimes.text.logit_rules import LogitBias, LogitRule, Penalties
from runtimes.text.logprobs import TokenLogprobs
from runtimes.text.plain_text import plain_lines, plain_text, read_text
from runtimes.text.sampling import Sampler
from runtimes.text.structured import GrammarRule, StructuredOutput
from runtimes.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_DEFAULT_NEW_TOKENS = 128


class _Options(TypedDict):
    """What the model and the draft model are opened with."""

    backend: Backend
    device: Device | None
    check_hashes: bool
    threads: int | None


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        UsageError: it makes no sense.
    """
    parser = Parser(prog="olmo2-run", description="Run a package written by olmo2-export.", allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    verb = verbs.add_parser(
        "generate",
        help="continue a prompt",
        description="Continue a prompt; the new text goes to stdout as it is made.",
        allow_abbrev=False,
    )
    verb.add_argument("package", type=Path, metavar="PACKAGE", help="its folder, or hf:OWNER/NAME[@REV] on the Hub")
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
    _declare_generation(verb, f"must fit in the context (default: {_DEFAULT_NEW_TOKENS}, or as many as fit)")
    verb.set_defaults(run=_generate)
    verb = verbs.add_parser(
        "chat",
        help="talk to a model that has a chat template",
        description="Talk to a model that has a chat template. In a pipe each line of stdin is a turn.",
        allow_abbrev=False,
    )
    verb.add_argument("package", type=Path, metavar="PACKAGE", help="its folder, or hf:OWNER/NAME[@REV] on the Hub")
    verb.add_argument("--system", metavar="TEXT", help="the system prompt (default: the template's own, if any)")
    verb.add_argument("--template", metavar="NAME", help="which chat template, where the package has several")
    verb.add_argument("--json", action="store_true", help="write messages, a line of JSON each, instead of answers")
    verb.add_argument("--history", type=Path, metavar="FILE", help="keep what is typed there (default: nowhere)")
    _declare_generation(verb, "of an answer (default: as many as fit)")
    verb.set_defaults(run=_chat)
    for name, (words, function) in _OF_DOCUMENTS.items():
        of_documents = verbs.add_parser(name, help=words, description=f"{words}.", allow_abbrev=False)
        _declare_documents(of_documents, function)
        if function is _embed:
            _declare_pooling(of_documents)
    verb = verbs.add_parser("serve", help=serve_verb.HELP, description=serve_verb.DESCRIPTION, allow_abbrev=False)
    serve_verb.declare(verb)
    verb.set_defaults(run=serve_verb.run)
    return parser.parse_args(argv)


def _declare_generation(verb: argparse.ArgumentParser, new_tokens: str) -> None:
    """Declare how text is generated, and on what."""
    verb.add_argument(
        "--variant", metavar="V", help="which variant of the package (default: the fastest verified one that runs here)"
    )
    verb.add_argument("--adapter", metavar="NAME", help="a LoRA adapter of the package (default: none)")
    verb.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help=new_tokens,
    )
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
    verb.add_argument(
        "--backend",
        default="ort",
        metavar="B",
        help=f"{describe_backends()} (default: ort)",
    )
    verb.add_argument("--device", metavar="D", help=f"where onnxruntime runs: {describe_devices()} (default: cpu)")
    verb.add_argument(
        "--threads", type=int, metavar="N", help="CPU threads (default: one per physical core it may use)"
    )
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
    verb.add_argument("--skip-hash-check", action="store_true", help="trust the files; check only their sizes")
    verb.add_argument("--stats", action="store_true", help="end with a line of tokens and times on stderr")
    verb.add_argument("--debug", action="store_true", help="show where an error came from")


def _declare_structured(verb: argparse.ArgumentParser) -> None:
    """Declare what a text may have to look like."""
    of = verb.add_mutually_exclusive_group()
    of.add_argument("--json-schema", metavar="FILE", help="write JSON of this schema; {} is any JSON")
    of.add_argument("--regex", metavar="R", help="write what this regular expression matches from end to end")
    of.add_argument("--choice", action="append", metavar="TEXT", help="write one of these; to be repeated")
    of.add_argument("--grammar", metavar="FILE", help="write a text of this grammar, in llguidance's dialect of Lark")


def _bias(word: str) -> tuple[int, float]:
    token_id, sign, value = word.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError(f"{word!r}: expected ID=B, as 42=-5 or 42=-inf")
    return int(token_id), float(value)


def _declare_documents(verb: argparse.ArgumentParser, function: Callable[[argparse.Namespace], None]) -> None:
    """Declare the arguments of a verb that reads texts and writes JSON."""
    verb.add_argument("package", metavar="PACKAGE", help="its folder, or hf:OWNER/NAME[@REV] on the Hub")
    verb.add_argument("input", nargs="?", default="-", metavar="FILE", help="UTF-8, a text a line (default: -, stdin)")
    verb.add_argument(
        "--jsonl",
        action="store_true",
        help='each line is JSON: "a text", {"text": ...} or {"token_ids": [...]}; other fields are written again '
        "(default: where FILE ends in .jsonl)",
    )
    verb.add_argument("--special-tokens", action="store_true", help="names of special tokens are these tokens")
    verb.add_argument("--variant", metavar="V", help="which variant of the package (default: as generate)")
    verb.add_argument("--backend", default="ort", metavar="B", help=f"{describe_backends()} (default: ort)")
    verb.add_argument("--device", metavar="D", help=f"where onnxruntime runs: {describe_devices()} (default: cpu)")
    verb.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: one per physical core)")
    verb.add_argument("--skip-hash-check", action="store_true", help="trust the files; check only their sizes")
    verb.add_argument("--debug", action="store_true", help="show where an error came from")
    verb.set_defaults(run=function)


def _declare_pooling(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--pooling", choices=POOLINGS, default="mean", help="of a text's tokens (default: mean)")
    verb.add_argument(
        "--hidden-state",
        type=hidden_state,
        metavar="N",
        help="of those that the package gives (default: its last)",
    )
    verb.add_argument("--normalize", action="store_true", help="divide each vector by its length")


def run(args: argparse.Namespace) -> None:
    """Do what the command line asks.

    Args:
        args: from `parse_args`.

    Raises:
        Olmo2ExportError: whatever is wrong.
    """
    args.run(args)


def _score(args: argparse.Namespace) -> None:
    def score(runner: Slots, sequences: list[Sequence[int]]) -> list[object]:
        labels = runner.model.labels
        return [dict(zip(labels, row, strict=True)) for row in runner.score(sequences).tolist()]

    _each_document(args, "scores", score, lambda package: _check_classifier(package, args.package))


def _check_classifier(package: Package, name: str) -> None:
    if package.model.task != "sequence-classification":
        raise UsageError(f"{name}: a language model, which gives no scores; use olmo2-run generate, or a classifier")


def _each_document(
    args: argparse.Namespace,
    name: str,
    answer: Callable[[Slots, list[Sequence[int]]], list[object]],
    check: Callable[[Package], None],
) -> None:
    """Read texts, and write a line of JSON for each, with what `answer` finds of some of them as the field `name`."""
    package = open_package(args.package)
    check(package)
    check_hashes = not args.skip_hash_check
    tokenizer = cache(lambda: Tokenizer.from_package(package, check_hashes=check_hashes))  # ids need none
    text = plain_text(sys.stdin.buffer.read(), "stdin") if args.input == "-" else _read_file(Path(args.input))
    with open_runner(
        package,
        variant=args.variant,
        backend=args.backend,
        device=args.device,
        check_hashes=check_hashes,
        threads=args.threads,
    ) as runner:
        documents = read_documents(
            text,
            tokenizer,
            jsonl=args.jsonl or args.input.endswith(".jsonl"),
            vocab_size=runner.model.vocab_size,
            longest=runner.max_cache_length,
            found=name,
            parse_special=args.special_tokens,
        )
        alone = runner.model.task == "sequence-classification" and runner.model.pad_token_id is None
        for group in in_groups(documents, 1 if alone else runner.max_slots):
            found = answer(runner, [document.token_ids for document in group])
            for document, value in zip(group, found, strict=True):
                _write(written(document, name, value))


def _embed(args: argparse.Namespace) -> None:
    def vectors(runner: Slots, sequences: list[Sequence[int]]) -> list[object]:
        found = embed(runner, sequences, pooling=args.pooling, hidden_state=args.hidden_state, normalize=args.normalize)
        return [[float(str(x)) for x in row] for row in found]  # the shortest that is the same float32

    _each_document(args, "embedding", vectors, lambda package: _check_gives_hidden(package, args.package))


def hidden_state(word: str) -> int | None:
    return None if word == "last" else int(word)


def _check_gives_hidden(package: Package, name: str) -> None:
    if not package.model.hidden_states:
        raise UsageError(f"{name}: its graphs give no hidden states; export it with --hidden-states last")


_OF_DOCUMENTS: dict[str, tuple[str, Callable[[argparse.Namespace], None]]] = {
    "score": ("score texts with a classifier or reward model: a line of JSON for each", _score),
    "embed": ("embed texts, a vector for each: a line of JSON", _embed),
}
"""verbs that read texts and write JSON"""


def _read_file(path: Path) -> str:
    return plain_lines("".join(read_text(path)))


def _opened(args: argparse.Namespace, package: Package, stack: ExitStack) -> tuple[Slots, Drafter | None]:
    """Open the package, and what guesses for it; the stack closes both."""
    options: _Options = {
        "backend": args.backend,
        "device": args.device,
        "check_hashes": not args.skip_hash_check,
        "threads": args.threads,
    }
    runner = stack.enter_context(open_runner(package, variant=args.variant, **options))
    if args.draft is not None:
        return runner, DraftModel(stack.enter_context(open_runner(args.draft, **options)))
    return runner, PromptLookup() if args.speculate == "lookup" else None


def _stops(args: argparse.Namespace) -> list[str]:
    return [form for stop in args.stop for form in dict.fromkeys((stop, plain_lines(stop)))]  # as CR LF, too


def _generate(args: argparse.Namespace) -> None:
    _check_generate(args)
    sampler = _sampler(args, 0)
    check_hashes = not args.skip_hash_check
    package = open_package(args.package)
    package.check_logits("generate")
    tokenizer = Tokenizer.from_package(package, check_hashes=check_hashes)
    prompt = _read_stdin() if args.prompt == "-" else plain_lines(args.prompt.removesuffix("\r"))  # $(cat) ate the LF
    prompt_ids = encode_prompt(tokenizer, prompt, parse_special=args.special_tokens)
    if not args.special_tokens and (found := tokenizer.special_in(prompt)):
        logger.warning(
            "the prompt holds %s, taken as text; with --special-tokens it is the special token", ", ".join(found[:5])
        )
    grammar = _grammar(args, tokenizer, package.model.vocab_size)
    rules = _rules(args, package.model.vocab_size, grammar)
    with ExitStack() as stack:
        runner, drafter = _opened(args, package, stack)
        room = max(0, runner.max_cache_length - len(prompt_ids))
        new = min(_DEFAULT_NEW_TOKENS, room) if args.max_new_tokens is None else args.max_new_tokens
        if args.samples > 1:
            results = generate_samples(
                runner,
                tokenizer,
                prompt_ids,
                args.samples,
                drawer=lambda i: (_sampler(args, i), _rules(args, package.model.vocab_size, grammar)),
                max_new_tokens=new,
                stop=_stops(args),
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
                stop=_stops(args),
                on_text=None if args.json else _write,
                speculate=drafter,
                rules=rules,
                logprobs=args.logprobs,
                prompt_logprobs=args.prompt_logprobs,
                adapter=args.adapter,
            )
            results = [result]
    _write("".join(f"{json.dumps(_as_json(r))}\n" for r in results) if args.json else "\n")
    cut = [result for result in results if grammar is not None and result.finish_reason != "eos"]
    if cut:
        logger.warning("cut off before it was what it has to look like: raise --max-new-tokens, or take --stop away")
    if args.stats:
        for result in results:
            sys.stderr.write(f"{_stats(result)}, variant {runner.variant.name}\n")


def _check_generate(args: argparse.Namespace) -> None:
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


def _sampler(args: argparse.Namespace, number: int) -> Sampler:
    """Return what draws one of the samples; the first is what a single text is drawn by."""
    seed = None if args.seed is None else args.seed + number
    return Sampler(args.temperature, args.top_k, args.top_p, seed, args.min_p)


def _grammar(args: argparse.Namespace, tokenizer: Tokenizer, vocab_size: int) -> GrammarRule | None:
    """Return what the text has to look like."""
    if args.json_schema is not None:
        return StructuredOutput(tokenizer, vocab_size).json_schema(_read_file(Path(args.json_schema)))
    if args.regex is not None:
        return StructuredOutput(tokenizer, vocab_size).regex(args.regex)
    if args.choice is not None:
        return StructuredOutput(tokenizer, vocab_size).choice(args.choice)
    if args.grammar is not None:
        return StructuredOutput(tokenizer, vocab_size).grammar(_read_file(Path(args.grammar)))
    return None


def _rules(args: argparse.Namespace, vocab_size: int, grammar: GrammarRule | None) -> list[LogitRule]:
    """Return the rules of one text: what only excludes comes last."""
    penalties = Penalties(args.repetition_penalty, args.presence_penalty, args.frequency_penalty)
    rules: list[LogitRule] = [] if penalties == Penalties() else [penalties]
    if args.logit_bias:
        rules.append(LogitBias(dict(args.logit_bias), vocab_size))
    return rules if grammar is None else [*rules, grammar.fork()]


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


def _chat(args: argparse.Namespace) -> None:
    sampler = _sampler(args, 0)
    check_hashes = not args.skip_hash_check
    package = open_package(args.package)
    package.check_logits("chat")
    terminal = streams_are_terminals()
    if args.history is not None and not terminal:
        raise UsageError(f"--history {args.history}: stdin and stdout are no terminal, where something is typed")
    with ExitStack() as stack:
        template = stack.enter_context(ChatTemplate.from_package(package, check_hashes=check_hashes))
        tokenizer = Tokenizer.from_package(package, check_hashes=check_hashes)
        rules = _rules(args, package.model.vocab_size, _grammar(args, tokenizer, package.model.vocab_size))
        template.begins_thinking(name=args.template)  # one that does not work is refused before the model is opened
        runner, drafter = _opened(args, package, stack)
        chat = Conversation(runner, tokenizer, template, system=args.system, name=args.template)
        ask = partial(
            chat.ask,
            sampler=sampler,
            max_new_tokens=args.max_new_tokens,
            stop=_stops(args),
            speculate=drafter,
            rules=rules,
            adapter=args.adapter,
        )
        notes = sys.stdout if terminal else sys.stderr
        screen = Screen(sys.stdout, notes, terminal=terminal, messages=args.json)
        session = Session(chat, ask, screen, stats=args.stats)
        if not terminal:
            session.run_pipe(sys.stdin.buffer)
            return
        screen.note(
            f"{package.folder.resolve().name}, variant {runner.variant.name}, a context of {runner.max_cache_length} "
            "tokens; /help lists commands, Ctrl-D ends"
        )
        keyboard = Terminal(args.history)
        stack.callback(keyboard.close)
        session.run_terminal(keyboard.read_line)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character must not end the text
    logging.basicConfig(format="%(message)s")
    logging.getLogger("runtimes").setLevel(logging.INFO)  # on stderr: which commit, what a GPU's memory is used for
    return run_command(
        "olmo2-run",
        lambda: run(parse_args(argv)),
        debug="--debug" in (sys.argv[1:] if argv is None else argv),
        more_memory="use a smaller model or a shorter prompt",
    )


def _read_stdin() -> str:
    return plain_text(sys.stdin.buffer.read(), "stdin").removesuffix("\n")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


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
