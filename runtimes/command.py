"""What every command line ends with: one line for whatever goes wrong, and the exit code that fits. Standard library.

Exit codes: 0 done; 1 it ran but failed; 2 bad usage or input; 130 interrupted; 141 the reader of stdout went away;
143 terminated.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from runtimes.errors import DISK_FULL, FailedError, Olmo2ExportError, UsageError
from runtimes.signals import BROKEN_PIPE_EXIT, Interrupted, interruptible


def expanded(text: str) -> Path:
    """Return a path, `~` and `~user` replaced where there is such a user."""
    try:
        return Path(text).expanduser() if text.startswith("~") else Path(text)
    except RuntimeError:  # no such user, or no home
        return Path(text)


def printable(text: object) -> str:
    """Return a name as it may go to a terminal: what steers one is shown as its code instead."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def path_argument(text: str) -> Path:
    """Return a path of a command line, its home expanded.

    Raises:
        ArgumentTypeError: there is no such home.
    """
    path = expanded(text)
    if text.startswith("~") and path == Path(text):
        raise argparse.ArgumentTypeError(f"{text}: there is no home of {path.parts[0]}; write ./{text} for a folder")
    return path


class Parser(argparse.ArgumentParser):
    """A parser that raises what is wrong with a command line; arguments of type `Path` have their home expanded."""

    def __init__(self, **options: Any) -> None:
        """Take argparse's own options."""
        super().__init__(**options)
        self.register("type", Path, path_argument)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong.

        Raises:
            UsageError: always.
        """
        raise UsageError(f"{message}; see {self.prog} --help")


def run_command(
    program: str,
    body: Callable[[], int | None],
    *,
    debug: bool = False,
    debug_option: str = "--debug",
    interrupted: str | None = None,
    more_memory: str = "",
    extra: str | None = None,
) -> int:
    """Run what a command line asks for; on stderr there is one line if it fails, and nothing of a traceback.

    Args:
        program: its name, at the head of that line.
        body: returns the exit code; None is 0. What it prints is flushed here.
        debug: show the traceback before the line.
        debug_option: what on the command line sets `debug`.
        interrupted: what to say if it is interrupted; None: nothing.
        more_memory: what to do where memory runs out.
        extra: of this distribution, which brings the modules that may be missing; None: all must be there.

    Returns:
        The exit code.
    """

    def failed(message: str, exit_code: int) -> int:
        if debug:
            traceback.print_exc()
        lines = " ".join(line.strip() for line in message.splitlines())
        sys.stderr.write(f"{program}: error: {lines}\n")
        return exit_code

    def internal(error: Exception) -> str:
        return f"internal error: {type(error).__name__}: {error}; run with {debug_option} and report it"

    try:
        with interruptible():
            code = body()
            sys.stdout.flush()
            return code or 0
    except Interrupted as interruption:
        if interrupted is not None:
            sys.stderr.write(f"{program}: interrupted; {interrupted}\n")
        return interruption.exit_code
    except BrokenPipeError:  # a reader like head has seen enough
        _drop_stdout()
        return BROKEN_PIPE_EXIT
    except Olmo2ExportError as error:
        return failed(str(error), error.exit_code)
    except ModuleNotFoundError as error:
        if extra is None:
            return failed(internal(error), FailedError.exit_code)
        way_out = f"pip install 'olmo2-export[{extra}]'"
        return failed(f"{error.name} is not installed; run: {way_out}", Olmo2ExportError.exit_code)
    except OSError as error:  # a file that cannot be read or written
        code = FailedError.exit_code if error.errno in DISK_FULL else Olmo2ExportError.exit_code
        return failed(str(error), code)
    except MemoryError:
        return failed(f"out of memory{more_memory and '; '}{more_memory}", FailedError.exit_code)
    except Exception as error:  # the last resort: a user gets one line, and --debug the rest
        return failed(internal(error), FailedError.exit_code)


def _drop_stdout() -> None:
    """Let nothing more be written to stdout, which the interpreter would try once more at its end."""
    with suppress(OSError):  # it is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
