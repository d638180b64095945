"""Reading of protobuf's wire format, which ONNX files are in, without a protobuf library.

The format is specified at protobuf.dev, "Encoding". Values that need a description of the message
to be understood are not interpreted.
"""

from __future__ import annotations

from collections.abc import Iterator

_VARINT, _FIXED64, BYTES, _FIXED32 = 0, 1, 2, 5  # wire types
_FIXED_SIZE = {_FIXED64: 8, _FIXED32: 4}
_LONGEST_VARINT = 10  # bytes


def _read_varint(data: memoryview, at: int) -> tuple[int, int]:
    """The integer at an offset, and the offset after it."""
    value = 0
    for index, byte in enumerate(data[at : at + _LONGEST_VARINT]):
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, at + index + 1
    raise ValueError("an integer is cut or too long")


def read_fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value of each field of a message, except numbers of fixed size.

    The value is an integer, or the content of a string, a packed list or a message.

    Raises:
        ValueError: The message is cut or damaged.
    """
    at = 0
    while at < len(data):
        key, at = _read_varint(data, at)
        kind = key & 7
        if kind == _VARINT:
            value, at = _read_varint(data, at)
            yield key >> 3, value
            continue
        if kind == BYTES:
            size, at = _read_varint(data, at)
        elif kind in _FIXED_SIZE:
            size = _FIXED_SIZE[kind]
        else:
            raise ValueError(f"a field has the wire type {kind}")
        if size > len(data) - at:
            raise ValueError("a field is cut")
        if kind == BYTES:
            yield key >> 3, data[at : at + size]
        at += size


def read_messages(data: memoryview, *numbers: int) -> Iterator[memoryview]:
    """Content of the fields at a path of field numbers; of `data` itself without a path.

    Raises:
        ValueError: A message is cut or damaged.
    """
    if not numbers:
        yield data
        return
    first, *rest = numbers
    for number, value in read_fields(data):
        if number == first and isinstance(value, memoryview):
            yield from read_messages(value, *rest)
