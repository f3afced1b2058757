"""Arguments that several verbs have: variants of a package, what graphs give, where they run (`runtimes.targets`)."""

from __future__ import annotations

import argparse
from pathlib import Path

from runtimes.command import path_argument
from runtimes.package import HUB, is_on_hub
from runtimes.targets import backends, devices


def package_folder(text: str) -> Path:
    """Return the folder of a package that is written to, or whose files other programs read; not one on the Hub."""
    path = path_argument(text)
    if is_on_hub(path):
        repository, _, revision = text.removeprefix(HUB).partition("@")
        at = f" --revision {revision}" if revision else ""
        raise argparse.ArgumentTypeError(
            f"{text}: expected a folder; run: hf download {repository}{at} --local-dir DIR, and give DIR"
        )
    return path


def declare_target(verb: argparse.ArgumentParser, *, variant: str, many: bool, what: str = "it") -> None:
    """Declare --variant, --backend and --device.

    Args:
        verb: the command line.
        variant: help of --variant.
        many: --variant may be repeated, and is a list.
        what: runs there, in the help.
    """
    declare_variant(verb, variant, many=many)
    declare_backend(verb, f"what runs {what}: onnxruntime (ort, the default), or the engines of a TensorRT")
    declare_device(verb, f"where ort runs {what}; default {devices('ort')[0]}")


def declare_lora(verb: argparse.ArgumentParser, help_text: str) -> None:
    """Declare --lora, a LoRA adapter that is merged; it may be repeated."""
    verb.add_argument("--lora", action="append", default=[], metavar="DIR[=NAME]", help=help_text)


def declare_lora_inputs(verb: argparse.ArgumentParser, help_text: str) -> None:
    """Declare --lora-inputs, a LoRA adapter that runners may use or not; it may be repeated."""
    verb.add_argument("--lora-inputs", action="append", default=[], metavar="DIR[=NAME]", help=help_text)


def declare_outputs(verb: argparse.ArgumentParser) -> None:
    """Declare --hidden-states and --inputs-embeds: what graphs give beside logits, and take beside tokens."""
    verb.add_argument(
        "--hidden-states",
        metavar="N,...",
        type=_numbers,
        default=(),
        help="give these too: 0 the embedding, N what layer N gives, or last, as transformers numbers them",
    )
    verb.add_argument("--inputs-embeds", action="store_true", help="take vectors too, in the place of tokens")


def _numbers(text: str) -> tuple[int, ...]:
    """Read numbers of hidden states, `last` among them."""
    words = [word.strip() for word in text.split(",")]
    if not all(word == "last" or word.isdecimal() for word in words):
        raise argparse.ArgumentTypeError(f"{text!r}: expected numbers with commas between, or last, as in 8,last")
    return tuple(-1 if word == "last" else int(word) for word in words)


def declare_variant(
    verb: argparse.ArgumentParser, help_text: str, *, many: bool = False, default: str | None = None
) -> None:
    """Declare --variant, the name of a package's graph; a list where it may be repeated."""
    verb.add_argument("--variant", action="append" if many else "store", default=default, metavar="V", help=help_text)


def declare_backend(
    verb: argparse.ArgumentParser, help_text: str, *, default: str | None = "ort", engines: bool | None = None
) -> None:
    """Declare --backend; `engines`: only backends that need an engine, or only those that need none."""
    verb.add_argument("--backend", choices=backends(engines=engines), default=default, help=help_text)


def declare_device(verb: argparse.ArgumentParser, help_text: str, *, backend: str | None = None) -> None:
    """Declare --device; None where it is not given, which is the backend's first. `backend`: only its devices."""
    verb.add_argument("--device", choices=devices(backend), help=help_text)
