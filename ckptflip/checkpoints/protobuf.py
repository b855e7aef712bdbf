"""The wire format of protocol buffers: the fields of a message and the bytes where their values lie.

A message is a run of fields, and nothing in it says what they mean: the number of each is looked up in the
``.proto`` file of its format. Reading one is a loop over `fields` with a `match` on the number; a field that
holds a message of its own is read by the same loop between its `offset` and its `end`:

    for field in fields(data, 0, len(data)):
        match field.number:
            case 1:                                     # int64 size = 1
                size = signed(expect(field, VARINT))
            case 2:                                     # string name = 2
                name = text(data, field)
            case 3:                                     # Shape shape = 3, a message
                expect(field, LENGTH)
                shape = read_shape(data, field.offset, field.end)
            case 4:                                     # repeated int64 dims = 4, packed or one by one
                dims += [signed(v.value) for v in repeated_varints(data, field)]

Offsets are positions in `data`, so with a whole file as `data` they are positions in the file. `FileBytes`
stands for the bytes of a file that may hold gigabytes of tensors: it reads the parts that are asked for.

Nothing is copied, allocated or recursed into here. Whoever reads messages inside messages bounds the depth,
and whoever collects fields bounds their number. Malformed input raises `ProtobufError`, and nothing else;
callers turn it into a `CheckpointError` that names the file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Protocol, overload

from msgspec import Struct

# Wire types: how a field's value is encoded.
VARINT = 0
FIXED64 = 1
LENGTH = 2
FIXED32 = 5
_KINDS = {VARINT: "varint", FIXED64: "8 bytes", LENGTH: "length-delimited", FIXED32: "4 bytes"}
_LARGEST_NUMBER = (1 << 29) - 1
_TOO_LARGE = 1 << 64
_WINDOW = 1 << 16


class ProtobufError(Exception):
    """Bytes that are no well-formed message, or not the one that was expected. Says where and why."""


class Bytes(Protocol):
    """What messages are read from: `bytes`, a `memoryview` of bytes, or `FileBytes`."""

    def __len__(self) -> int: ...

    @overload
    def __getitem__(self, at: int, /) -> int: ...

    @overload
    def __getitem__(self, at: slice, /) -> bytes | memoryview: ...


class Field(Struct, frozen=True, gc=False):
    """One field of a message.

    Attributes:
        number: which field it is.
        wire: how its value is encoded: `VARINT`, `FIXED64`, `LENGTH` or `FIXED32`.
        value: a number as stored, unsigned (see `signed`); for `LENGTH` how many bytes the value has.
        offset: where the value begins: for `LENGTH` its first byte, after the length itself.
        end: where the value ends, and the next field begins.
    """

    number: int
    wire: int
    value: int
    offset: int
    end: int


class Varint(Struct, frozen=True, gc=False):
    """A whole number of 1 to 10 bytes.

    Attributes:
        value: unsigned.
        offset: its first byte.
        end: the byte after its last.
    """

    value: int
    offset: int
    end: int


def fields(data: Bytes, start: int, end: int) -> Iterator[Field]:
    """The fields of the message that fills the bytes from `start` to `end`, in their order there.

    Args:
        data: what holds the message, and perhaps more before and after it.
        start: its first byte.
        end: the byte after its last.

    Raises:
        ProtobufError: a number that is too long, a value that goes on beyond `end`, a group (wire types 3 and
            4, which no format of ours uses), no such wire type, no such field number.

    Example:
        >>> list(fields(b"\\x08\\x96\\x01", 0, 3))
        [Field(number=1, wire=0, value=150, offset=1, end=3)]
    """
    _check_range(data, start, end)
    at = start
    while at < end:
        tag_at = at
        tag = data[at]
        at += 1
        if tag >= 0x80:
            tag, at = varint(data, tag_at, end)
        number, wire = tag >> 3, tag & 7
        if not 0 < number <= _LARGEST_NUMBER:
            raise ProtobufError(f"byte {tag_at} begins a field of number {number}, which cannot be")
        offset = at
        if wire == VARINT:
            value, at = varint(data, at, end)
        elif wire == LENGTH:
            value, offset = varint(data, at, end)
            at = offset + value
        elif wire in (FIXED32, FIXED64):
            at += 4 if wire == FIXED32 else 8
            value = int.from_bytes(data[offset : min(at, end)], "little")
        else:
            raise ProtobufError(f"byte {tag_at} begins a field of wire type {wire}, which is not supported")
        if at > end:
            raise ProtobufError(
                f"field {number} at byte {tag_at} claims {at - offset} bytes; {end - offset} are left"
            )
        yield Field(number, wire, value, offset, at)


def varints(data: Bytes, start: int, end: int) -> Iterator[Varint]:
    """The numbers of a packed field, which lie side by side from `start` to `end`.

    Raises:
        ProtobufError: a number that is too long or goes on beyond `end`.
    """
    _check_range(data, start, end)
    at = start
    while at < end:
        offset = at
        value, at = varint(data, at, end)
        yield Varint(value, offset, at)


def repeated_varints(data: Bytes, field: Field) -> Iterator[Varint]:
    """The numbers of a repeated field, be they packed in this field or one of them in it.

    Raises:
        ProtobufError: the field holds no such numbers.
    """
    if field.wire == VARINT:
        yield Varint(field.value, field.offset, field.end)
    else:
        expect(field, LENGTH)
        yield from varints(data, field.offset, field.end)


def expect(field: Field, wire: int) -> int:
    """The field's value, if it is encoded as it should be.

    Raises:
        ProtobufError: it is encoded otherwise.
    """
    if field.wire != wire:
        raise ProtobufError(
            f"field {field.number} at byte {field.offset} is {_KINDS[field.wire]}, not {_KINDS[wire]}"
        )
    return field.value


def text(data: Bytes, field: Field) -> str:
    """The value of a field of type ``string``; its length is `field.value` bytes, for callers to bound.

    Raises:
        ProtobufError: the field is no string, or not UTF-8.
    """
    expect(field, LENGTH)
    try:
        return str(data[field.offset : field.end], "utf-8")
    except UnicodeDecodeError as why:
        raise ProtobufError(
            f"field {field.number} at byte {field.offset} is not UTF-8 text ({why.reason})"
        ) from None


def signed(value: int) -> int:
    """The number that was stored in a field of type ``int32``, ``int64`` or ``enum``.

    Negative ones are stored as 64 bits, also those of 32.

    Example:
        >>> signed(0xFFFF_FFFF_FFFF_FFFF), signed(5)
        (-1, 5)
    """
    return value - _TOO_LARGE if value >> 63 else value


def varint(data: Bytes, at: int, end: int) -> tuple[int, int]:
    """The number that begins at a byte, and the byte after it.

    Args:
        data: what holds it.
        at: its first byte.
        end: the byte that it must not reach.

    Raises:
        ProtobufError: it has more than 64 bits, or goes on up to `end`.
    """
    first = at
    value = shift = 0
    while at < end:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >= _TOO_LARGE:
                break
            return value, at
        shift += 7
        if shift == 70:
            break
    else:
        raise ProtobufError(f"the number at byte {first} goes on beyond byte {end}, where the message ends")
    raise ProtobufError(f"the number at byte {first} has more than 64 bits")


def _check_range(data: Bytes, start: int, end: int) -> None:
    if not 0 <= start <= end <= len(data):
        raise ProtobufError(f"a message from byte {start} to {end} does not lie in {len(data)} bytes")


class FileBytes:
    """The bytes of an open file by position, read in windows: what `fields` takes in place of `bytes`.

    Slices read just what they name, so skipping over gigabytes costs nothing.

    Args:
        fd: the file, open for reading; it is not closed here.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._size = os.fstat(fd).st_size
        self._window = b""
        self._start = 0

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, at: int, /) -> int: ...

    @overload
    def __getitem__(self, at: slice, /) -> bytes: ...

    def __getitem__(self, at: int | slice, /) -> int | bytes:
        """One byte, or those of a slice without a step.

        Raises:
            ProtobufError: the file has become shorter.
        """
        if isinstance(at, slice):
            start, stop, _ = at.indices(self._size)
            return self._read(start, max(stop - start, 0))
        if not self._start <= at < self._start + len(self._window):
            self._window = self._read(at, max(min(_WINDOW, self._size - at), 1))
            self._start = at
        return self._window[at - self._start]

    def _read(self, at: int, length: int) -> bytes:
        held = at - self._start
        if held >= 0 and held + length <= len(self._window):
            return self._window[held : held + length]
        try:
            found = os.pread(self._fd, length, at)
        except (OSError, ValueError) as why:
            raise ProtobufError(f"byte {at} cannot be read ({why})") from None
        if len(found) != length:
            raise ProtobufError(f"the file ends before byte {at + length}: it was cut while it was read")
        return found
