"""What a TensorBundle's index says: a header, and for each key a dtype, a shape and the bytes of its values.

Source: tensorflow/core/protobuf/tensor_bundle.proto, tensor_shape.proto and tensor_slice.proto.
"""

from __future__ import annotations

from msgspec import Struct

from ckptflip.checkpoints.listing import DamagedError
from ckptflip.checkpoints.protobuf import (
    FIXED32,
    LENGTH,
    VARINT,
    Field,
    ProtobufError,
    expect,
    fields,
    signed,
)
from ckptflip.checkpoints.tensorbundle.table import Block, Entry, read_table

# The version of the format that is read here; a bundle may ask for readers of a later one.
VERSION = 1
# More than any TensorFlow tensor can have; it bounds what one entry allocates.
_MOST_AXES = 254
_MOST_SHARDS = 1 << 20
# Of a tensor in tens of thousands of slices.
_LONGEST_ENTRY = 1 << 20
# A slice's length where it takes all of an axis.
WHOLE = -1

Extents = tuple[tuple[int, int], ...]


class Saved(Struct, frozen=True, gc=False):
    """One entry of the index: a tensor, a slice of one, or a tensor that was saved in slices.

    Attributes:
        key: its key.
        dtype: number of its dtype in TensorFlow's `DataType`.
        shape: elements along each axis.
        shard: the data file that holds it.
        offset: its first byte there.
        size: its bytes there.
        checksum: where the masked CRC-32C of these bytes is stored in the index; None: nowhere.
        slices: for a tensor in slices, where each begins and how long it is (`WHOLE`: all there is), by axis.
    """

    key: bytes
    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    checksum: int | None
    slices: tuple[Extents, ...]


class Index(Struct, frozen=True):
    """All that an index says.

    Attributes:
        shards: how many data files there are.
        order: byte order of all values, ``<`` or ``>``.
        blocks: the blocks that hold the entries.
        saved: the entries, keys ascending.
    """

    shards: int
    order: str
    blocks: list[Block]
    saved: list[Saved]


def read_index(data: bytes) -> Index:
    """The index that fills the bytes of a file.

    Raises:
        DamagedError: it is damaged or truncated, no index of a bundle, or of a later version.
    """
    table = read_table(data)
    if not table.entries or table.entries[0].key:
        raise DamagedError("it is a table, but has no header of a TensorBundle")
    header = table.entries[0]
    try:
        shards, order = _header(data, header)
        return Index(shards, order, table.blocks, [_saved(data, e) for e in table.entries[1:]])
    except ProtobufError as why:
        raise DamagedError(str(why)) from None


def _header(data: bytes, entry: Entry) -> tuple[int, str]:
    shards, order = 0, "<"
    for field in fields(data, entry.start, entry.end):
        if field.number == 1:
            shards = signed(expect(field, VARINT))
        elif field.number == 2:
            endianness = expect(field, VARINT)
            if endianness > 1:
                raise DamagedError(f"its byte order is number {endianness}, which is neither little nor big")
            order = "<>"[endianness]
        elif field.number == 3:
            _check_version(data, field)
    if not 0 <= shards <= _MOST_SHARDS:
        raise DamagedError(f"it claims {shards} data files")
    return shards, order


def _check_version(data: bytes, version: Field) -> None:
    expect(version, LENGTH)
    for field in fields(data, version.offset, version.end):
        if field.number == 2 and signed(expect(field, VARINT)) > VERSION:
            raise DamagedError(f"it is of version {field.value}, which only a later TensorFlow reads")


def _saved(data: bytes, entry: Entry) -> Saved:
    dtype = shard = offset = size = 0
    shape: tuple[int, ...] = ()
    checksum: int | None = None
    slices: list[Extents] = []
    if entry.end - entry.start > _LONGEST_ENTRY:
        raise DamagedError(f"the entry at byte {entry.start} has {entry.end - entry.start} bytes")
    for field in fields(data, entry.start, entry.end):
        number = field.number
        if number == 1:
            dtype = expect(field, VARINT)
        elif number == 2:
            shape += _shape(data, field)
        elif number == 3:
            shard = signed(expect(field, VARINT))
        elif number == 4:
            offset = signed(expect(field, VARINT))
        elif number == 5:
            size = signed(expect(field, VARINT))
        elif number == 6:
            expect(field, FIXED32)
            checksum = field.offset
        elif number == 7:
            slices.append(_extents(data, field))
        if len(shape) > _MOST_AXES:
            raise DamagedError(f"the entry at byte {entry.start} has more than {_MOST_AXES} axes")
    if offset < 0 or size < 0:
        raise DamagedError(f"the entry at byte {entry.start} claims {size} bytes at byte {offset}")
    return Saved(entry.key, dtype, shape, shard, offset, size, checksum, tuple(slices))


def _shape(data: bytes, shape: Field) -> tuple[int, ...]:
    """The axes of a TensorShapeProto."""
    expect(shape, LENGTH)
    axes: list[int] = []
    for field in fields(data, shape.offset, shape.end):
        if field.number == 2:
            expect(field, LENGTH)
            length = 0
            for part in fields(data, field.offset, field.end):
                if part.number == 1:
                    length = signed(expect(part, VARINT))
            axes.append(length)
        elif field.number == 3 and field.value:
            raise DamagedError(f"the shape at byte {shape.offset} has no known number of axes")
        if len(axes) > _MOST_AXES:
            break
    return tuple(axes)


def _extents(data: bytes, piece: Field) -> Extents:
    """Start and length along each axis of a TensorSliceProto."""
    expect(piece, LENGTH)
    found: list[tuple[int, int]] = []
    for field in fields(data, piece.offset, piece.end):
        if field.number != 1:
            continue
        expect(field, LENGTH)
        start, length = 0, WHOLE
        for part in fields(data, field.offset, field.end):
            if part.number == 1:
                start = signed(expect(part, VARINT))
            elif part.number == 2:
                length = signed(expect(part, VARINT))
        found.append((start, length))
        if len(found) > _MOST_AXES:
            raise DamagedError(f"the slice at byte {piece.offset} has more than {_MOST_AXES} axes")
    return tuple(found)
