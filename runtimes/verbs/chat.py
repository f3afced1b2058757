"""Talk to a model that has a chat template."""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from runtimes import UsageError, open_package
from runtimes.chat.conversation import Conversation
from runtimes.chat.template import ChatTemplate
from runtimes.chat.terminal import Screen, Session, Terminal, streams_are_terminals
from runtimes.text.tokenizer import Tokenizer
from runtimes.verbs.generation import declare_generation, grammar_of, open_models, rules_of, sampler_of, stops_of
from runtimes.verbs.target import PACKAGE_HELP

HELP = "talk to a model that has a chat template"
DESCRIPTION = "Talk to a model that has a chat template. In a pipe each line of stdin is a turn."


def declare(verb: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    verb.add_argument("package", type=Path, metavar="PACKAGE", help=PACKAGE_HELP)
    verb.add_argument("--system", metavar="TEXT", help="the system prompt (default: the template's own, if any)")
    verb.add_argument("--template", metavar="NAME", help="which chat template, where the package has several")
    verb.add_argument("--json", action="store_true", help="write messages, a line of JSON each, instead of answers")
    verb.add_argument("--history", type=Path, metavar="FILE", help="keep what is typed there (default: nowhere)")
    declare_generation(verb, "of an answer (default: as many as fit)")


def run(args: argparse.Namespace) -> None:
    """Chat, in a terminal or through a pipe.

    Raises:
        Olmo2ExportError: whatever is wrong.
    """
    sampler = sampler_of(args)
    check_hashes = not args.skip_hash_check
    package = open_package(args.package)
    package.check_logits("chat")
    terminal = streams_are_terminals()
    if args.history is not None and not terminal:
        raise UsageError(f"--history {args.history}: stdin and stdout are no terminal, where something is typed")
    with ExitStack() as stack:
        template = stack.enter_context(ChatTemplate.from_package(package, check_hashes=check_hashes))
        tokenizer = Tokenizer.from_package(package, check_hashes=check_hashes)
        rules = rules_of(args, package.model.vocab_size, grammar_of(args, tokenizer, package.model.vocab_size))
        template.begins_thinking(name=args.template)  # one that does not work is refused before the model is opened
        runner, drafter = open_models(args, package, stack)
        chat = Conversation(runner, tokenizer, template, system=args.system, name=args.template)
        ask = partial(
            chat.ask,
            sampler=sampler,
            max_new_tokens=args.max_new_tokens,
            stop=stops_of(args),
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
        session.run_terminal(keyboard.read_line, keyboard.typed)
