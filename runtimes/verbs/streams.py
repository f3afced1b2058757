"""Text that a verb reads and writes: stdin, files, stdout."""

from __future__ import annotations

import sys
from pathlib import Path

from runtimes.text.plain_text import plain_lines, plain_text, read_text


def read_stdin() -> str:
    """Return all of stdin.

    Raises:
        InputError: it is not UTF-8.
    """
    return plain_text(sys.stdin.buffer.read(), "stdin")


def read_file(path: str) -> str:
    """Return a file's text.

    Raises:
        InputError: no file, or it is not UTF-8.
    """
    return plain_lines("".join(read_text(Path(path))))


def write(text: str) -> None:
    """Write to stdout, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()
