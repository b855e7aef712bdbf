"""GGUF files: metadata, a table of tensors, and their data, plain or in quantised blocks.

Source: the format's page in the ggml repository, versions 2 and 3, and the `gguf` package at version 0.19.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

from msgspec import Struct

from ckptflip.bits.formats import lookup_name
from ckptflip.checkpoints.files import open_plain
from ckptflip.checkpoints.gguf.blocks import BLOCKS, PLAIN, UNUSED, Block, Part
from ckptflip.checkpoints.laid import LaidOut
from ckptflip.checkpoints.listing import (
    Array,
    DamagedError,
    bits_of,
    catalogue,
    check_apart,
    without_repeats,
)
from ckptflip.checkpoints.pieces import Layout, Piece, contiguous
from ckptflip.checkpoints.target import Skipped
from ckptflip.errors import CheckpointError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = "general.alignment"
_DEFAULT_ALIGNMENT = 32
# Bytes of a metadata value, by the number of its type.
_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_UINT32, _STRING, _ARRAY = 4, 8, 9
# Far above real models, and below what would take minutes: entries, texts and lists in all, depth of lists.
_MOST_ENTRIES = 1 << 18
_MOST_ITEMS = 1 << 24
_DEEPEST = 8
_LONGEST_NAME = 1 << 16
_WINDOW = 1 << 20


class _Info(Struct, frozen=True):
    """An entry of the table of tensors; `offset` counts from the start of the data."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


class _Cursor:
    """A place in the header, which moves on as it is read.

    Args:
        fd: the file, open for reading.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.size = os.fstat(fd).st_size
        self.order = "<"
        self._data = b""
        self._start = 0
        self._at = 0
        self.items = _MOST_ITEMS

    @property
    def place(self) -> int:
        """The byte to be read next."""
        return self._start + self._at

    def take(self, count: int) -> bytes:
        """The next bytes."""
        if self._at + count > len(self._data):
            self._refill(count)
        self._at += count
        return self._data[self._at - count : self._at]

    def number(self, size: int) -> int:
        """The next unsigned number."""
        return int.from_bytes(self.take(size), "little" if self.order == "<" else "big")

    def skip(self, count: int) -> None:
        """Move on without reading."""
        if count > self.size - self.place:
            raise DamagedError(
                f"something at byte {self.place} claims {count} bytes, and the file ends before"
            )
        self._at += count

    def text(self) -> str:
        """The next text."""
        at, length = self.place, self.number(8)
        if length > _LONGEST_NAME:
            raise DamagedError(f"the name at byte {at} claims {length} bytes")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise DamagedError(f"the name at byte {at} is not UTF-8") from None

    def count_items(self, count: int) -> None:
        """Bound the number of values that are walked one by one."""
        self.items -= count
        if self.items < 0:
            raise DamagedError(f"its metadata claim more than {_MOST_ITEMS} texts and lists")

    def skip_texts(self, count: int) -> None:
        """Move on over texts. A vocabulary has hundreds of thousands of them."""
        self.count_items(count)
        length = struct.Struct(f"{self.order}Q")
        for _ in range(count):
            if self._at + 8 > len(self._data):
                self._refill(8)
            (size,) = length.unpack_from(self._data, self._at)
            self._at += 8 + size
            if self._at > len(self._data) and self.place > self.size:
                raise DamagedError(f"a text before byte {self.place} goes on beyond the end of the file")

    def _refill(self, count: int) -> None:
        """Have at least so many bytes ahead."""
        place = self.place
        if count > self.size - place:
            raise DamagedError(f"it ends at byte {self.size}, within its header")
        self._data = os.pread(self._fd, max(count, _WINDOW), place)
        self._start, self._at = place, 0
        if len(self._data) < count:
            raise DamagedError("it was cut while it was read")


def open_checkpoint(path: Path) -> LaidOut:
    """Open a GGUF file.

    Raises:
        CheckpointError: it cannot be read, is truncated, of an unknown version, or its header is damaged.
    """
    try:
        with open_plain(path) as file:
            cursor = _Cursor(file.fileno())
            infos, start = _header(cursor)
        arrays, skipped = _arrays(infos, start, cursor.size, cursor.order)
    except OSError as why:
        raise CheckpointError(f"{path} cannot be read: {why.strerror or why}") from None
    except DamagedError as why:
        raise CheckpointError(f"{path} is a damaged GGUF file: {why}. Copy or download it again") from None
    layouts = [a.layout for a in arrays]
    return LaidOut(path, "gguf", [path], catalogue(arrays), layouts, skipped=skipped)


def _header(cursor: _Cursor) -> tuple[list[_Info], int]:
    """The table of tensors, and where the data begins."""
    if cursor.take(len(MAGIC)) != MAGIC:
        raise DamagedError("its magic bytes are missing")
    version = cursor.number(4)
    if version & 0xFFFF == 0:
        cursor.order = ">"
        version = int.from_bytes(version.to_bytes(4, "big"), "little")
    if version not in _VERSIONS:
        raise DamagedError(f"its version is {version}, and those known are 2 and 3")
    tensors, entries = cursor.number(8), cursor.number(8)
    if max(tensors, entries) > _MOST_ENTRIES:
        raise DamagedError(
            f"it claims {tensors} tensors and {entries} metadata; {_MOST_ENTRIES} are possible"
        )
    alignment = _metadata(cursor, entries)
    infos = [_info(cursor) for _ in range(tensors)]
    return infos, -(-cursor.place // alignment) * alignment


def _metadata(cursor: _Cursor, entries: int) -> int:
    """Skip the metadata; the alignment of the data, which is among them."""
    alignment = _DEFAULT_ALIGNMENT
    keys: set[str] = set()
    for _ in range(entries):
        key, kind = cursor.text(), cursor.number(4)
        if key in keys:
            raise DamagedError(f"its metadata have {key!r} twice")
        keys.add(key)
        if key != _ALIGNMENT:
            _skip_value(cursor, kind, _DEEPEST)
            continue
        alignment = cursor.number(4) if kind == _UINT32 else 0
        if not alignment or alignment & (alignment - 1):
            raise DamagedError(f"its {_ALIGNMENT} is no power of two of 32 bits")
    return alignment


def _skip_value(cursor: _Cursor, kind: int, depth: int) -> None:
    if kind in _SCALARS:
        cursor.skip(_SCALARS[kind])
    elif kind == _STRING:
        cursor.skip_texts(1)
    elif kind != _ARRAY:
        raise DamagedError(f"the type {kind} of a value before byte {cursor.place} is not known")
    elif not depth:
        raise DamagedError(f"its metadata have lists in lists, more than {_DEEPEST} deep")
    else:
        inner, count = cursor.number(4), cursor.number(8)
        if inner in _SCALARS:
            cursor.skip(count * _SCALARS[inner])
        elif inner == _STRING:
            cursor.skip_texts(count)
        else:
            cursor.count_items(count)
            for _ in range(count):
                _skip_value(cursor, inner, depth - 1)


def _info(cursor: _Cursor) -> _Info:
    name = cursor.text()
    axes = cursor.number(4)
    if axes > 63:
        raise DamagedError(f"{name!r} has {axes} axes")
    # The file has the innermost axis first.
    shape = tuple(cursor.number(8) for _ in range(axes))[::-1]
    return _Info(name, shape, cursor.number(4), cursor.number(8))


def _arrays(infos: list[_Info], start: int, size: int, order: str) -> tuple[list[Array], list[Skipped]]:
    arrays: list[Array] = []
    skipped: list[Skipped] = []
    ranges: list[tuple[int, int, str]] = []
    names: set[str] = set()
    for info in infos:
        if info.name in names:
            raise DamagedError(f"it holds two tensors named {info.name!r}")
        names.add(info.name)
        try:
            count = _bytes_of(info)
        except DamagedError as why:
            raise DamagedError(f"{info.name!r}: {why}") from None
        if count is None:
            reason = UNUSED.get(info.kind, f"of the type {info.kind}, which is not known")
            skipped.append(Skipped(info.name, reason))
            continue
        if start + info.offset + count > size:
            raise DamagedError(
                f"{info.name!r} would lie at bytes {start + info.offset} to {start + info.offset + count} of "
                f"a file of {size} bytes"
            )
        ranges.append((start + info.offset, start + info.offset + count, info.name))
    check_apart(ranges)
    for info in infos:
        if info.kind in PLAIN:
            number = lookup_name(PLAIN[info.kind])
            layout = contiguous(0, start + info.offset, number, info.shape, order)
            arrays.append(Array(info.name, info.shape, layout))
        elif info.kind in BLOCKS:
            arrays += _parts(info, BLOCKS[info.kind], start, order)
    # A field of a block may have a name that another tensor has too.
    arrays, repeated = without_repeats(arrays)
    return arrays, [*skipped, *repeated]


def _bytes_of(info: _Info) -> int | None:
    """Bytes of a tensor's data; None for types that are not known."""
    if info.kind in PLAIN:
        return bits_of(info.shape, lookup_name(PLAIN[info.kind]).width) // 8
    block = BLOCKS.get(info.kind)
    if block is None:
        return None
    elements = bits_of(info.shape, block.size) // block.size
    if not info.shape or info.shape[-1] % block.elements:
        raise DamagedError(f"its rows are not made of {block.name} blocks of {block.elements} elements")
    return elements // block.elements * block.size


def _parts(info: _Info, block: Block, start: int, order: str) -> list[Array]:
    """The fields of a quantised tensor's blocks, each an array of its own."""
    rows = (*info.shape[:-1], info.shape[-1] // block.elements)
    return [
        Array(
            f"{info.name}.{part.suffix}",
            info.shape if part.words == block.elements else (*rows, *((part.words,) if part.dims else ())),
            _layout(part, start + info.offset, bits_of(rows, 1), block.size * 8, order),
            f"{block.name} blocks",
            part_of=info.name,
        )
        for part in block.parts
    ]


def _layout(part: Part, at: int, blocks: int, stride: int, order: str) -> Layout:
    dims = (blocks, *part.dims)
    piece = Piece(0, at + part.offset, dims, (stride, *part.strides))
    return Layout(dims, (piece,), lookup_name(part.dtype), order, part.bits)
