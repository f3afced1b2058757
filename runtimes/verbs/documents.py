"""Texts one by one, a line of JSON for each: what score and embed share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import cache

from runtimes import Package, Slots, UsageError, open_package, open_runner
from runtimes.documents import in_groups, read_documents, written
from runtimes.text.tokenizer import Tokenizer
from runtimes.verbs.streams import read_file, read_stdin, write
from runtimes.verbs.target import PACKAGE_HELP, declare_debug, declare_kv_cache, declare_target, declare_trust, opening


def declare_documents(verb: argparse.ArgumentParser) -> None:
    """Declare the arguments of a verb that reads texts and writes JSON."""
    verb.add_argument("package", metavar="PACKAGE", help=PACKAGE_HELP)
    verb.add_argument("input", nargs="?", default="-", metavar="FILE", help="UTF-8, a text a line (default: -, stdin)")
    verb.add_argument(
        "--jsonl",
        action="store_true",
        help='each line is JSON: "a text", {"text": ...} or {"token_ids": [...]}; other fields are written again '
        "(default: where FILE ends in .jsonl)",
    )
    verb.add_argument("--special-tokens", action="store_true", help="names of special tokens are these tokens")
    verb.add_argument("--variant", metavar="V", help="which variant of the package (default: as generate)")
    declare_kv_cache(verb)
    declare_target(verb, "one per physical core")
    verb.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="texts that are read, computed and answered together (default: 8, or what an engine was built for)",
    )
    declare_trust(verb)
    declare_debug(verb)


def each_document(
    args: argparse.Namespace,
    name: str,
    answer: Callable[[Slots, list[Sequence[int]]], list[object]],
    check: Callable[[Package], None],
) -> None:
    """Read texts, and write a line of JSON for each.

    Args:
        args: the command line.
        name: of the field with what is found.
        answer: finds it, of the ids of some texts, in their order.
        check: refuses a package that has no such answer, before it is opened.

    Raises:
        Olmo2ExportError: whatever is wrong.
    """
    if args.batch_size is not None and args.batch_size < 1:
        raise UsageError(f"--batch-size {args.batch_size}: expected at least 1")
    package = open_package(args.package)
    check(package)
    options = opening(args)
    tokenizer = cache(lambda: Tokenizer.from_package(package, check_hashes=options["check_hashes"]))  # ids need none
    text = read_stdin() if args.input == "-" else read_file(args.input)
    with open_runner(
        package, variant=args.variant, kv_cache=args.kv_cache, max_slots=args.batch_size, **options
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
                write(written(document, name, value))
