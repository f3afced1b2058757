"""Text from elsewhere, as Python reads text files: UTF-8 without a byte order mark; CRLF ends a line as LF does."""

from __future__ import annotations

import codecs

from runtimes.errors import InputError

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
    for mark, name in _OTHER_MARKS.items():
        if data.startswith(mark):
            raise InputError(f"{where}: begins as {name} does, expected UTF-8; save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: byte {error.start} is not UTF-8; save it as UTF-8") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")
