"""Giving members of a zip archive new contents, every other byte of the archive kept.

Compressed data may grow or shrink: the sizes and offsets that follow from that are all that changes besides.
Source of the layout: APPNOTE.TXT, "ZIP File Format Specification", sections 4.3 to 4.5.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from ckptflip.checkpoints.splice import Edit, splice
from ckptflip.checkpoints.zips import DEFLATED, STORED, Member, Members, members
from ckptflip.errors import CheckpointError

_FULL32 = 0xFFFFFFFF
_ZIP64 = 1


class _Swap(Struct, frozen=True, eq=False):
    """New data of a member, and what its stored checksums are XORed with."""

    member: Member
    data: bytes
    size: int
    crc: int

    @property
    def growth(self) -> int:
        """How many bytes more than before the data has in the file."""
        return len(self.data) - self.member.packed

    @property
    def swelling(self) -> int:
        """How many bytes more than before the contents have."""
        return self.size - self.member.size


class _Place(Struct, frozen=True):
    """A number in the file: where, and in how many bytes."""

    at: int
    size: int


class _Reader:
    """An open archive, for numbers at places in it."""

    def __init__(self, fd: int, path: Path) -> None:
        self._fd = fd
        self._path = path

    def read(self, at: int, size: int) -> int:
        """The number there."""
        raw = os.pread(self._fd, size, at)
        if len(raw) != size:
            raise CheckpointError(f"{self._path} was truncated while it was read")
        return int.from_bytes(raw, "little")

    def moved(self, place: _Place, by: int) -> Edit:
        """An edit that adds to the number at a place."""
        value = self.read(place.at, place.size) + by
        if value >= 1 << 8 * place.size or (place.size == 4 and value == _FULL32):
            raise CheckpointError(
                f"{self._path} would outgrow its offsets, which count up to 4 GiB; write it with wider ones"
            )
        return Edit(place.at, place.size, value.to_bytes(place.size, "little"))


def rewrite(path: Path, contents: Mapping[str, NDArray[np.uint8]], checksum: str) -> None:
    """Give members new contents.

    Args:
        path: the archive; one that nobody else has open.
        contents: new contents by name, of members that are stored or deflated.
        checksum: ``repair``: a CRC-32 that was right is right again, one that was wrong stays wrong;
            ``leave``: all stay as they are.

    Raises:
        CheckpointError: the archive is damaged or cannot be written; it is as it was before.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        archive = members(fd, path)
        edits = list(_edits(_Reader(fd, path), archive, contents, checksum))
    finally:
        os.close(fd)
    splice(path, edits)


def _edits(
    reader: _Reader, archive: Members, contents: Mapping[str, NDArray[np.uint8]], checksum: str
) -> Iterator[Edit]:
    swaps = [_swap(archive, name, data, checksum) for name, data in contents.items()]
    total = sum(s.growth for s in swaps)
    every = sorted((archive[name] for name in archive), key=lambda m: m.offset)
    entries = {m.name: m.crc_places[-1] - 16 for m in every}
    last = max(entries.values())
    end = last + 46 + sum(reader.read(last + at, 2) for at in (28, 30, 32))
    start, moves = _end_places(reader, end)
    yield from (reader.moved(place, total) for place in moves)
    shift = min(entries.values()) - reader.read(start.at, start.size)
    by_name = {s.member.name: s for s in swaps}
    grown = 0
    for member in every:
        size, packed, header = _entry_places(reader, entries[member.name])
        local = reader.read(header.at, header.size) + shift
        if grown:
            yield reader.moved(header, grown)
        swap = by_name.get(member.name)
        if swap is None:
            continue
        yield Edit(member.offset, member.packed, swap.data)
        for of_contents, of_data in ((size, packed), *_size_places(reader, member, local)):
            yield reader.moved(of_contents, swap.swelling)
            yield reader.moved(of_data, swap.growth)
        for at in member.crc_places:
            yield Edit(at, 4, (reader.read(at, 4) ^ swap.crc).to_bytes(4, "little"))
        grown += swap.growth


def _swap(archive: Members, name: str, contents: NDArray[np.uint8], checksum: str) -> _Swap:
    member = archive[name]
    assert member.method in (STORED, DEFLATED)
    change = 0
    if checksum == "repair":
        change = zlib.crc32(archive.read(name, member.size)) ^ zlib.crc32(contents.data)
    if member.method == STORED:
        return _Swap(member, contents.tobytes(), contents.size, change)
    stream = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return _Swap(member, stream.compress(contents.data) + stream.flush(), contents.size, change)


def _entry_places(reader: _Reader, at: int) -> tuple[_Place, _Place, _Place]:
    """Where a directory entry has the sizes of the contents and of the data, and the local header's place."""
    wide = [at + field for field in (24, 20, 42) if reader.read(at + field, 4) == _FULL32]
    long = _zip64(reader, at + 46 + reader.read(at + 28, 2), reader.read(at + 30, 2)) if wide else 0
    size, packed, header = (
        _Place(long + 8 * wide.index(narrow), 8) if narrow in wide else _Place(narrow, 4)
        for narrow in (at + 24, at + 20, at + 42)
    )
    return size, packed, header


def _size_places(reader: _Reader, member: Member, local: int) -> Iterator[tuple[_Place, _Place]]:
    """Where the local header and the data descriptor have the sizes of the contents and of the data."""
    size, packed = _Place(local + 22, 4), _Place(local + 18, 4)
    if _FULL32 in (reader.read(size.at, 4), reader.read(packed.at, 4)):
        extras = local + 30 + reader.read(local + 26, 2)
        long = _zip64(reader, extras, reader.read(local + 28, 2))
        size, packed = _Place(long, 8), _Place(long + 8, 8)
    # Where a descriptor follows the data, the header may have 0.
    if reader.read(packed.at, packed.size) == member.packed:
        yield size, packed
    for at in member.crc_places[:-1]:
        if at >= member.offset + member.packed:
            wide = (reader.read(at + 4, 8), reader.read(at + 12, 8)) == (member.packed, member.size)
            each = 8 if wide else 4
            yield _Place(at + 4 + each, each), _Place(at + 4, each)


def _zip64(reader: _Reader, at: int, length: int) -> int:
    """Where the first value of the 64-bit field lies among the extra fields, which were checked before."""
    end = at + length
    while at + 4 <= end:
        if reader.read(at, 2) == _ZIP64:
            return at + 4
        at += 4 + reader.read(at + 2, 2)
    raise CheckpointError("an archive lost a field while it was read")


def _end_places(reader: _Reader, end: int) -> tuple[_Place, list[_Place]]:
    """Where the end records have the directory's offset, and all the offsets that grow with the archive."""
    if reader.read(end, 4) != int.from_bytes(b"PK\6\6", "little"):
        return _Place(end + 16, 4), [_Place(end + 16, 4)]
    start = _Place(end + 48, 8)
    locator = end + 12 + reader.read(end + 4, 8)
    moves = [start, _Place(locator + 8, 8)]
    if reader.read(locator + 20 + 16, 4) != _FULL32:
        moves.append(_Place(locator + 20 + 16, 4))
    return start, moves
