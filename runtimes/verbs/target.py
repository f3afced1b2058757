"""Where a package runs, and what it is opened with."""

from __future__ import annotations

import argparse
from typing import TypedDict

from runtimes import Backend, Device
from runtimes.targets import describe_backends, describe_devices

PACKAGE_HELP = "its folder, or hf:OWNER/NAME[@REV] on the Hub"


class Opening(TypedDict):
    """What `open_runner` takes of a command line, for the package and for a draft model's."""

    backend: Backend
    device: Device | None
    check_hashes: bool
    threads: int | None
    huge_pages: bool
    prepared: bool


def declare_target(verb: argparse.ArgumentParser, threads: str) -> None:
    """Declare --backend, --device, --threads and how weights lie; `threads`: how many there are, for the help."""
    verb.add_argument("--backend", default="ort", metavar="B", help=f"{describe_backends()} (default: ort)")
    verb.add_argument("--device", metavar="D", help=f"where onnxruntime runs: {describe_devices()} (default: cpu)")
    verb.add_argument("--threads", type=int, metavar="N", help=f"CPU threads (default: {threads})")
    verb.add_argument(
        "--no-huge-pages",
        action="store_true",
        help="on a CPU, leave weights in pages of the usual size (default: in huge ones after the first step)",
    )
    verb.add_argument(
        "--no-prepared",
        action="store_true",
        help="take the package's own graphs (default: what olmo2-run prepare has made for this machine, if it has)",
    )


def declare_kv_cache(verb: argparse.ArgumentParser) -> None:
    """Declare --kv-cache."""
    verb.add_argument(
        "--kv-cache",
        metavar="C",
        help="float32, int8, ...: what keys and values are stored in, of what the variant was exported with "
        "(default: what its manifest names first)",
    )


def declare_trust(verb: argparse.ArgumentParser) -> None:
    """Declare --skip-hash-check."""
    verb.add_argument("--skip-hash-check", action="store_true", help="trust the files; check only their sizes")


def declare_debug(verb: argparse.ArgumentParser) -> None:
    """Declare --debug, which `runtimes.cli` looks for."""
    verb.add_argument("--debug", action="store_true", help="show where an error came from")


def opening(args: argparse.Namespace) -> Opening:
    """Return what the command line says of opening a package."""
    return {
        "backend": args.backend,
        "device": args.device,
        "check_hashes": not args.skip_hash_check,
        "threads": args.threads,
        "huge_pages": not args.no_huge_pages,
        "prepared": not args.no_prepared,
    }
