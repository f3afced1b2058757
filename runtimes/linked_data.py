"""Open a graph whose weights lie elsewhere: in a Hub cache, every file of a package is a link into a folder of blobs.

onnxruntime takes weights out of the graph's own folder only; which links it still follows changed with its versions.
What the links of a package lead to is checked against the manifest, so that they are followed here: the graph is given
to onnxruntime with the weights' true name in it, and their true folder.

A graph is a protobuf message: fields of a tag, for text and messages followed by a length and as many bytes. Of
ModelProto.graph (7), GraphProto.initializer (5), TensorProto.external_data (13), each a pair of key (1) and value (2),
the values of `location` are replaced; all other bytes stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from runtimes.errors import PackageError

_EXTERNAL_DATA = (7, 5, 13)
_KEY, _VALUE = 1, 2
_LENGTH_DELIMITED = 2
_FIXED_SIZES = {1: 8, 5: 4}


def follow_link(graph: Path, serialised: bytes | None = None, data: str | None = None) -> tuple[bytes | None, Path]:
    """Return what to open for a graph, and the folder of its weights.

    Args:
        graph: the ONNX file.
        serialised: open this in its place; None: the file.
        data: the name of the file of its weights, beside it; None: the same name with `_data`.

    Returns:
        The serialised graph, None where the file will do; and the folder its weights are in.

    Raises:
        PackageError: it is no ONNX graph.
    """
    name = data or f"{graph.name}_data"
    real = graph.with_name(name).resolve()
    if real == graph.parent.resolve() / name:
        return serialised, graph.parent
    if serialised is None:
        serialised = graph.read_bytes()
    try:
        return _renamed(serialised, name, real.name), real.parent
    except (IndexError, KeyError, UnicodeDecodeError) as error:  # it ends in a number, or has a tag that there is not
        raise PackageError(f"{graph}: not an ONNX graph; export the package again") from error


def external_data(model: bytes) -> list[tuple[str, str]]:
    """Return key and value of all that a serialised model says of data that lie elsewhere, weight by weight."""
    found: list[tuple[str, str]] = []

    def seen(key: str, value: str) -> str:
        found.append((key, value))
        return value

    change_external_data(model, seen)
    return found


def change_external_data(model: bytes, change: Callable[[str, str], str]) -> bytes:
    """Return a serialised model with other values in what it says of data that lie elsewhere.

    Args:
        model: protobuf.
        change: gets key and value, such as `offset` and `4096`, and returns the value to be.
    """

    def changed(pair: bytes) -> bytes:
        fields = {number: pair[begin:end].decode() for number, _, begin, end in _fields(pair)}
        value = change(fields[_KEY], fields.get(_VALUE, ""))
        return pair if value == fields.get(_VALUE, "") else _pair(fields[_KEY], value)

    return _within(model, _EXTERNAL_DATA, changed)


def _renamed(model: bytes, old: str, new: str) -> bytes:
    """Return a serialised model whose external data of one name has another."""
    return change_external_data(model, lambda key, value: new if (key, value) == ("location", old) else value)


def _within(message: bytes, path: tuple[int, ...], change: Callable[[bytes], bytes]) -> bytes:
    """Change the messages at the end of a path of field numbers."""
    if not path:
        return change(message)
    parts: list[bytes] = []
    copied = 0
    for number, start, begin, end in _fields(message):
        if number == path[0] and begin < end:
            parts += [message[copied:start], _field(number, _within(message[begin:end], path[1:], change))]
            copied = end
    return b"".join([*parts, message[copied:]])


def _fields(message: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Yield each field's number, and where it starts, its content begins and ends; numbers have an empty content."""
    position = 0
    while position < len(message):
        start = position
        tag, position = _varint(message, position)
        if tag & 7 == _LENGTH_DELIMITED:
            size, position = _varint(message, position)
            yield tag >> 3, start, position, position + size
            position += size
        elif tag & 7 == 0:
            _, position = _varint(message, position)
        else:
            position += _FIXED_SIZES[tag & 7]


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """Read a number of 7 bits a byte, the last byte below 128; return it and what follows its position."""
    value = shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, position


def _pair(key: str, value: str) -> bytes:
    return _field(_KEY, key.encode()) + _field(_VALUE, value.encode())


def _field(number: int, content: bytes) -> bytes:
    return _number(number << 3 | _LENGTH_DELIMITED) + _number(len(content)) + content


def _number(value: int) -> bytes:
    digits = bytearray()
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    return bytes([*digits, value])
