"""Text from elsewhere, a file, a pipe or a shell, as Python reads text files: UTF-8 without a byte order mark; CRLF and
CR end a line as LF does.

A text that is measured byte for byte keeps its line ends: `read_text`. Text that a program passes to the library is
taken as it is.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from pathlib import Path

from runtimes.errors import InputError

_READ = 1 << 16  # bytes
_MARK = "\ufeff"
_OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
"""the longer ones first, since one begins with another"""


def plain_text(data: bytes, where: str) -> str:
    """Decode a text that an editor of any system has written.

    Args:
        data: the bytes of a file, or of stdin.
        where: names it in the message.

    Raises:
        InputError: it is not UTF-8.
    """
    return plain_lines("".join(_decoded([data], where)))


def plain_lines(text: str) -> str:
    """Return a text without a byte order mark, its lines ended by LF."""
    return text.removeprefix(_MARK).replace("\r\n", "\n").replace("\r", "\n")


def read_text(path: Path) -> Iterator[str]:
    """Read a file of any length in pieces, without a byte order mark; its line ends stay as they are.

    Raises:
        InputError: no file, or it is not UTF-8; says at which byte.
    """
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no file" if path.exists() else "no such file"
        raise InputError(f"{path}: {found}; expected a file of UTF-8 text")
    with path.open("rb") as file:
        yield from _decoded(iter(lambda: file.read(_READ), b""), str(path))


def _decoded(pieces: Iterable[bytes], where: str) -> Iterator[str]:
    """Decode the bytes of a text, piece by piece."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    position = 0
    for data in pieces:
        if position == 0:
            _refuse_wide(data[:_READ], where)
        yield from _piece(decoder, data, where, position)
        position += len(data)
    yield from _piece(decoder, b"", where, position, final=True)


def _refuse_wide(data: bytes, where: str) -> None:
    """Refuse what begins as no UTF-8 does: with the mark of another encoding, or with NUL in most characters.

    English in UTF-16 is valid UTF-8: each letter and a NUL.
    """
    mark = next((name for mark, name in _OTHER_MARKS.items() if data.startswith(mark)), None)
    if mark is not None:
        raise InputError(f"{where}: begins as {mark} does, expected UTF-8; save it as UTF-8")
    if 3 * data.count(0) > len(data):
        raise InputError(f"{where}: byte {data.find(0)} and many others are NUL, as in UTF-16; save it as UTF-8")


def _piece(
    decoder: codecs.IncrementalDecoder, data: bytes, where: str, position: int, *, final: bool = False
) -> Iterator[str]:
    waiting = len(decoder.getstate()[0])  # bytes of a character that is not whole yet
    try:
        text = decoder.decode(data, final=final)
    except UnicodeDecodeError as error:
        at = position - waiting + error.start
        raise InputError(f"{where}: byte {at} is not UTF-8 ({error.reason}); save it as UTF-8") from error
    if text:
        yield text
