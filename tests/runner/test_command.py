"""The end of every command line: one line, and the exit code that fits what went wrong."""

from __future__ import annotations

import errno
import signal
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from runtimes.command import Parser, expanded, printable, run_command
from runtimes.errors import FailedError, UsageError


def raising(error: BaseException) -> Callable[[], NoReturn]:
    def body() -> NoReturn:
        raise error

    return body


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UsageError("this\n  and that"), 2, "this and that"),
        (FailedError("two  blanks stay"), 1, "two  blanks stay"),
        (PermissionError(errno.EACCES, "Permission denied", "/a/file"), 2, "[Errno 13] Permission denied: '/a/file'"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "[Errno 28] No space left on device"),
        (MemoryError(), 1, "out of memory; use less"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 2,
         "torch is not installed; run: pip install 'olmo2-export[export]'"),
        (KeyError("x"), 1, "internal error: KeyError: 'x'; run with --debug and report it"),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_one_line(
    error: Exception, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("tool", raising(error), more_memory="use less", extra="export") == code
    assert capsys.readouterr().err == f"tool: error: {said}\n"
    assert run_command("tool", raising(error), more_memory="use less", extra="export", debug=True) == code
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback")
    assert printed.endswith(f"tool: error: {said}\n")


def test_a_module_that_no_extra_brings_is_our_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    missing = ModuleNotFoundError("No module named 'x'", name="x")
    assert run_command("tool", raising(missing), debug_option="-v") == 1
    assert "internal error: ModuleNotFoundError: No module named 'x'; run with -v and" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_is_said_where_there_is_something_to_say(
    number: signal.Signals, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    assert run_command("tool", lambda: signal.raise_signal(number), debug=True) == code
    assert capsys.readouterr().err == ""
    assert run_command("tool", lambda: signal.raise_signal(number), interrupted="nothing was written") == code
    assert capsys.readouterr().err == "tool: interrupted; nothing was written\n"
    assert signal.getsignal(number) is before


def test_a_reader_that_went_away_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("tool", raising(BrokenPipeError())) == 141
    assert capsys.readouterr().err == ""


def test_the_exit_code_is_what_the_body_returns() -> None:
    assert [run_command("tool", lambda code=code: code) for code in (None, 0, 1)] == [0, 0, 1]


def test_the_home_of_a_path_is_expanded_and_that_of_nobody_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/of/a")
    parser = Parser(prog="tool")
    verb = parser.add_subparsers().add_parser("verb")
    verb.add_argument_group("files").add_argument("--out", type=Path, default=Path("~/out"))
    verb.add_argument("--text")
    given = parser.parse_args(["verb", "--out", "~/x/~y", "--text", "~/z"])
    assert (given.out, given.text) == (Path("/home/of/a/x/~y"), "~/z")
    assert parser.parse_args(["verb", "--out", "./~/x"]).out == Path("~/x")
    with pytest.raises(UsageError, match=r"--out: ~of-nobody/x: there is no home of ~of-nobody; write \./~of-nobody/x"):
        parser.parse_args(["verb", "--out", "~of-nobody/x"])
    assert expanded("~of-nobody/x") == Path("~of-nobody/x")


def test_what_steers_a_terminal_is_printed_as_its_code() -> None:
    assert printable("a\nb\x1b[31m ü") == r"a\nb\x1b[31m ü"


def test_a_command_line_that_makes_no_sense_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser(prog="tool")
    assert run_command("tool", lambda: parser.parse_args(["--fast"]) and None) == 2
    assert capsys.readouterr().err == "tool: error: unrecognized arguments: --fast; see tool --help\n"
