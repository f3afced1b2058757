"""Text from editors of any system, and one line for what is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtimes.errors import InputError
from runtimes.text.plain_text import plain_lines, plain_text, read_text


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"abc\n", "abc\n"),
        (b"abc\r\n", "abc\n"),
        (b"a\r\nb\rc\n", "a\nb\nc\n"),
        (b"\xef\xbb\xbfabc", "abc"),
        (b"a\xef\xbb\xbfbc", "a\ufeffbc"),
        (b"", ""),
        ("naïve \0 text".encode(), "naïve \0 text"),
    ],
)
def test_line_ends_and_byte_order_marks_are_no_text(data: bytes, expected: str) -> None:
    assert plain_text(data, "stdin") == expected


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "latin-1"])
def test_other_encodings_are_one_line(encoding: str) -> None:
    mark = "" if encoding.endswith("6") or encoding.endswith("32") or encoding == "latin-1" else "\ufeff"
    with pytest.raises(InputError, match=r"prompt\.txt: .*save it as UTF-8"):
        plain_text((mark + "naïve").encode(encoding), "prompt.txt")


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
def test_wide_characters_without_a_mark_are_valid_utf8_and_refused(encoding: str) -> None:
    with pytest.raises(InputError, match=r"prompt\.txt: byte [01] and many others are NUL, as in UTF-16"):
        plain_text("plain English".encode(encoding), "prompt.txt")


def test_a_file_is_read_piece_by_piece_with_its_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbf" + ("\u00e9\r\n" * 40_000).encode())
    pieces = list(read_text(path))
    assert len(pieces) > 2
    assert "".join(pieces) == "\u00e9\r\n" * 40_000
    path.write_bytes("x".encode("utf-16"))
    with pytest.raises(InputError, match="begins as UTF-16 does"):
        list(read_text(path))


def test_lines_of_arguments() -> None:
    assert plain_lines("\ufeffa\r\nb\rc") == "a\nb\nc"


def test_what_is_no_file_is_said_to_be_what_it_is(tmp_path: Path) -> None:
    for path, found in ((tmp_path, "a folder"), (tmp_path / "away", "no such file"), (Path("/dev/null"), "no file")):
        with pytest.raises(InputError, match=f"{path}: {found}; expected a file of UTF-8 text"):
            list(read_text(path))
