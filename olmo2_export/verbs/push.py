"""olmo2-export push: a verified package onto the Hugging Face Hub, with a model card that says what was measured.

Sent are the files that the manifests vouch for, in one commit; an upload that was cut off goes on when it is run again.
Whoever has olmo2-run opens it as hf:OWNER/NAME.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from olmo2_export.verbs.arguments import package_folder

if TYPE_CHECKING:
    from olmo2_export.publish.contents import Contents

HELP = "package -> the Hub, with a model card"


def declare(verb: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    verb.add_argument("package", type=package_folder, metavar="PACKAGE")
    verb.add_argument("repository", metavar="OWNER/NAME", help="on the Hub; log in before: hf auth login")
    verb.add_argument("--create", action="store_true", help="make the repository if it is not there")
    verb.add_argument("--private", action="store_true", help="make it so that its owner alone sees it")
    verb.add_argument("--message", metavar="TEXT", help="of the commit; default: which variants of which model")
    verb.add_argument(
        "--license",
        metavar="ID",
        help="of the weights, as apache-2.0; default: what the card of the checkpoint on the Hub says",
    )
    verb.add_argument(
        "--engines", action="store_true", help="also graphs and engines for TensorRT, which are for the GPUs they name"
    )
    verb.add_argument(
        "--unverified", action="store_true", help="also variants that failed or were not verified; the card says so"
    )
    verb.add_argument(
        "--force", action="store_true", help="write over a repository that holds something else than a package"
    )
    verb.add_argument("--dry-run", action="store_true", help="show what would be sent, and the card; send nothing")


def run(args: argparse.Namespace) -> int:
    """Run it; return the exit code."""
    from olmo2_export.publish.card import CARD, make_card
    from olmo2_export.publish.contents import gather
    from olmo2_export.publish.push import check_repository, push
    from olmo2_export.summary.text import size
    from runtimes.command import printable
    from runtimes.errors import first_names

    check_repository(args.repository, create=args.create, private=args.private)
    contents = gather(args.package, engines=args.engines, unverified=args.unverified)
    card = make_card(contents, args.repository, licence(contents, args.license))
    files = {CARD: len(card.encode()), **contents.files}
    whole = f"{len(files)} files, {size(sum(files.values()))}"
    if contents.left_out:
        print(f"left out, as no manifest vouches for it: {printable(first_names(contents.left_out))}")
    if contents.trt_left_out:
        print("left out: trt/, its graphs and engines; --engines sends them")
    if args.dry_run:
        print("\n".join(f"{size(nbytes):>10}  {printable(name)}" for name, nbytes in files.items()))
        print(f"would send {whole} to {args.repository}, and this card:\n\n{card}", end="")
        return 0
    source = contents.package.manifest.source.model
    message = args.message or f"{', '.join(contents.variants)} of {source}, by olmo2-export"
    done = push(
        contents,
        args.repository,
        card,
        message=message,
        create=args.create,
        private=args.private,
        force=args.force,
    )
    for name in done.deleted:
        print(f"deleted there: {printable(name)}, of the package before")
    print(f"published {whole}: {done.url}" if done.changed else f"nothing has changed: {done.url}")
    print(f"run it with: hf:{args.repository}, or for good: hf:{args.repository}@{done.commit}")
    return 0


def licence(contents: Contents, given: str | None) -> dict[str, str]:
    """Return the licence of the weights, as a card has it: what was given, else what the checkpoint's own card says."""
    import logging

    from olmo2_export.weights.hub import licence_of
    from runtimes.errors import CheckpointNotFoundError

    source, said = contents.package.manifest.source, ""
    if given is not None:
        return {"license": given}
    if source.kind == "demo":
        return {"license": "apache-2.0"}  # as all of this distribution
    if source.kind == "hub":
        try:
            if found := licence_of(source.model, source.revision):
                return found
        except CheckpointNotFoundError as error:
            said = f" ({error})"
    logging.getLogger(__name__).warning("the licence of %s is not known%s; give it with --license", source.model, said)
    return {}
