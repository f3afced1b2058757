"""Text from editors of any system, and one line for what is none."""

from __future__ import annotations

import pytest

from runtimes.errors import InputError
from runtimes.plain_text import plain_text


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
