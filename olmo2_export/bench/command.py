"""A comparison as a command line asks for it."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from olmo2_export.bench.arguments import CONTEXTS, PEERS
from olmo2_export.bench.compare import Setting, compare
from olmo2_export.weights.checkpoint import Checkpoint
from runtimes.errors import UsageError
from runtimes.package import Package, open_package
from runtimes.threads import default_threads


def run_comparison(
    args: argparse.Namespace,
    package: Path,
    reference: Checkpoint | None,
    work: Path,
    *,
    backend: str = "ort",
    device: str | None = None,
) -> tuple[dict[str, Any], str]:
    """Run `compare` with the arguments of `declare_setting`, and `variant`.

    Returns:
        What the last line of stdout says, and the report for people.
    """
    opened = open_package(package)
    setting = Setting(
        contexts=tuple(args.contexts or _fitting(opened, args.new_tokens)),
        batch_sizes=tuple(args.batch_sizes),
        new_tokens=args.new_tokens,
        repeats=args.repeats,
        threads=default_threads() if args.threads is None else args.threads,
        backend=backend,
        device=device,
        minutes=args.minutes,
    )
    return compare(
        opened,
        args.variant or [],
        setting,
        work=work,
        peers=PEERS if "all" in args.vs else args.vs,
        reference=reference,
        peers_folder=args.peers,
    )


def check_out(out: Path | None) -> None:
    """Refuse a file that cannot be written, before anything is measured for it.

    Raises:
        UsageError: it is a folder, its folder is missing, or one of them may not be written.
    """
    if out is None:
        return
    if out.is_dir() or not out.parent.is_dir() or not os.access(out if out.exists() else out.parent, os.W_OK):
        raise UsageError(f"--out {out}: expected a file that can be written, in a folder that is there")


def write_out(out: Path | None, document: dict[str, Any]) -> None:
    """Write what was measured, if a file was asked for."""
    if out is not None:
        out.write_text(json.dumps(document) + "\n")


def _fitting(package: Package, new_tokens: int) -> list[int]:
    """Return the usual context lengths that the model's context leaves room for; half of it, if none is."""
    package.check_logits("bench")
    room = package.model.max_position_embeddings - new_tokens
    return [length for length in CONTEXTS if length <= room] or [max(1, room // 2)]


@contextmanager
def work_folder(parent: Path | None, keep: Path | None) -> Iterator[Path]:
    """A temporary folder that is removed, or the one to keep."""
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep.resolve()
        return
    work = Path(tempfile.mkdtemp(prefix="olmo2-bench-", dir=parent))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
