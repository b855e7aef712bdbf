"""The end records and the directory of a zip archive, checked for what they claim.

Source of the layout: APPNOTE.TXT, "ZIP File Format Specification", sections 4.3 to 4.5.
"""

from __future__ import annotations

import os
import struct

import numpy as np
from msgspec import Struct

from ckptflip.errors import CheckpointError

STORED, DEFLATED = 0, 8
ENCRYPTED = 1 << 0 | 1 << 6 | 1 << 13
DESCRIPTOR = 1 << 3
_UTF8 = 1 << 11
FULL32 = 0xFFFFFFFF
_FULL16 = 0xFFFF

LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s4B4H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = struct.Struct("<4sLQL")
# Where the CRC-32 stands in a directory entry.
_CRC = 16
# Far above any real checkpoint; below what a hostile file could make us hold.
_MOST_MEMBERS = 1 << 20
_LARGEST_DIRECTORY = 1 << 28


class Entry(Struct, frozen=True):
    """What the directory says of a member; `header` is where its local header lies in the window."""

    raw_name: bytes
    header: int
    size: int
    packed: int
    method: int
    flags: int
    crc: int
    crc_place: int


class _End(Struct, frozen=True):
    """The end records: where the directory lies in the window, and what all its offsets are relative to."""

    entries: int
    start: int
    size: int
    shift: int


class Window(Struct, frozen=True):
    """The part of an open file in which the archive lies."""

    fd: int
    where: str
    start: int
    length: int

    def read(self, at: int, count: int) -> bytes:
        """Up to `count` bytes; fewer at the end of the window."""
        count = min(count, self.length - at)
        if at < 0 or count <= 0:
            return b""
        try:
            return os.pread(self.fd, count, self.start + at)
        except OSError as why:
            raise CheckpointError(f"{self.where} cannot be read: {why.strerror}") from None

    def damaged(self, why: str) -> CheckpointError:
        """The error that says so."""
        return CheckpointError(f"{self.where} is a damaged zip archive: {why}. Copy or download it again")


class Directory(Struct, frozen=True):
    """What the directory of an archive says, checked as far as it goes without the local headers.

    Attributes:
        entries: by name, in the directory's order.
        ends: for each local header, where the next one (or the directory) begins: no member reaches beyond.
    """

    entries: dict[str, Entry]
    ends: dict[int, int]


def directory(window: Window) -> Directory:
    """Read the directory of an archive.

    Raises:
        CheckpointError: no zip archive, a damaged one, or one that is encrypted, split, or made to mislead.
    """
    end = _end(window)
    entries = _entries(window, end)
    return Directory(entries, _ends(window, entries, end))


def _end(window: Window) -> _End:
    """The end of central directory record, in its 64-bit form where there is one."""
    tail_at = max(0, window.length - _END.size)
    tail = window.read(tail_at, _END.size)
    if not (len(tail) == _END.size and tail.startswith(b"PK\5\6")):
        # A comment may follow, of at most 65,535 bytes.
        tail_at = max(0, tail_at - _FULL16)
        tail = window.read(tail_at, _END.size + _FULL16)
    found = tail.rfind(b"PK\5\6", 0, max(0, len(tail) - _END.size + 4))
    if found < 0:
        raise CheckpointError(
            f"{window.where} is no zip archive, or its end is missing. Copy or download it again"
        )
    at = tail_at + found
    _, disk, first_disk, here, entries, size, offset, _ = _END.unpack_from(tail, found)
    locator = window.read(at - _LOCATOR64.size, _LOCATOR64.size)
    if at >= _LOCATOR64.size and locator.startswith(b"PK\6\7"):
        at -= _LOCATOR64.size
        at, disk, first_disk, here, entries, size, offset = _end64(window, at, _LOCATOR64.unpack(locator))
    if disk or first_disk or here != entries:
        raise CheckpointError(f"{window.where} is one part of a split zip archive; join its parts first")
    if size > at or offset > at - size:
        raise window.damaged(f"its directory is said to lie at byte {offset} and to have {size} bytes")
    if entries > _MOST_MEMBERS or size > _LARGEST_DIRECTORY:
        raise CheckpointError(
            f"{window.where} claims {entries} members in a directory of {size} bytes; "
            f"at most {_MOST_MEMBERS} are read"
        )
    # What precedes the archive (a script that unpacks it, say) shifts all its offsets.
    return _End(entries, at - size, size, at - size - offset)


def _end64(
    window: Window, before: int, locator: tuple[bytes, int, int, int]
) -> tuple[int, int, int, int, int, int, int]:
    """The zip64 end record: its position, and what replaces the fields of the short one."""
    _, disk, offset, disks = locator
    if disk or disks > 1:
        raise CheckpointError(f"{window.where} is one part of a split zip archive; join its parts first")
    for at in (before - _END64.size, offset):
        raw = window.read(at, _END64.size) if at <= before - _END64.size else b""
        if len(raw) == _END64.size and raw.startswith(b"PK\6\6"):
            _, size, _, _, disk, first_disk, here, entries, directory, start = _END64.unpack(raw)
            if at + 12 + size == before:
                return at, disk, first_disk, here, entries, directory, start
    raise window.damaged("its zip64 end record is not where it is said to be")


def _entries(window: Window, end: _End) -> dict[str, Entry]:
    """The directory's entries by name."""
    raw = window.read(end.start, end.size)
    if len(raw) != end.size or end.size < end.entries * _CENTRAL.size:
        raise window.damaged(f"its directory of {end.size} bytes cannot hold {end.entries} entries")
    found: dict[str, Entry] = {}
    at = 0
    for _ in range(end.entries):
        if at + _CENTRAL.size > end.size:
            raise window.damaged("its directory ends within an entry")
        fields = _CENTRAL.unpack_from(raw, at)
        n, extra, comment = fields[12:15]
        after = at + _CENTRAL.size + n + extra + comment
        if fields[0] != b"PK\1\2" or after > end.size:
            raise window.damaged(f"its directory is wrong at byte {window.start + end.start + at}")
        raw_name = raw[at + _CENTRAL.size : at + _CENTRAL.size + n]
        name = _name(window, raw_name, fields[5])
        if name in found:
            raise window.damaged(f"it holds two members named {name!r}")
        extras = raw[at + _CENTRAL.size + n : after - comment]
        found[name] = _entry(window, end, raw_name, fields, extras, at)
        at = after
    if at != end.size:
        raise window.damaged(f"its directory holds {end.size - at} bytes more than its entries")
    return found


def _entry(
    window: Window, end: _End, raw_name: bytes, fields: tuple[int, ...], extras: bytes, at: int
) -> Entry:
    flags, method, crc, packed, size = fields[5], fields[6], fields[9], fields[10], fields[11]
    disk, header = fields[15], fields[18]
    if flags & ENCRYPTED:
        raise CheckpointError(f"{window.where} is encrypted ({raw_name!r}); decrypt it first")
    if size == FULL32 or packed == FULL32 or header == FULL32 or disk == _FULL16:
        wide = (size == FULL32, packed == FULL32, header == FULL32)
        values = zip64_values(window, extras, sum(wide))
        size, packed, header = (
            values.pop(0) if is_wide else narrow
            for is_wide, narrow in zip(wide, (size, packed, header), strict=True)
        )
    elif disk:
        raise CheckpointError(f"{window.where} is one part of a split zip archive; join its parts first")
    if method == STORED and size != packed:
        raise window.damaged(f"{raw_name!r} is stored as it is, but claims two sizes")
    return Entry(
        raw_name,
        header + end.shift,
        size,
        packed,
        method,
        flags,
        crc,
        window.start + end.start + at + _CRC,
    )


def zip64_values(window: Window, extras: bytes, count: int) -> list[int]:
    """The 64-bit values in place of the fields that are full: size, packed size, offset, in this order."""
    at = 0
    while at + 4 <= len(extras):
        kind, size = struct.unpack_from("<2H", extras, at)
        if kind == 1 and size >= 8 * count and at + 4 + size <= len(extras):
            return list(struct.unpack_from(f"<{count}Q", extras, at + 4))
        at += 4 + size
    raise window.damaged("a size or an offset is said to be in a zip64 field that is not there")


def _name(window: Window, raw: bytes, flags: int) -> str:
    try:
        name = raw.decode("utf-8" if flags & _UTF8 else "cp437")
    except UnicodeDecodeError:
        raise window.damaged(f"the name {raw!r} is not UTF-8") from None
    plain = name.replace("\\", "/") if "\\" in name else name
    if plain[:1] in ("/", "") or plain[1:2] == ":" or "\0" in plain:
        raise window.damaged(f"the name {name!r} is not relative")
    if ".." in plain and ".." in plain.split("/"):
        raise window.damaged(f"the name {name!r} leads out of the archive")
    return name


def _ends(window: Window, entries: dict[str, Entry], end: _End) -> dict[int, int]:
    """For each local header, where the next one (or the directory) begins: no member may reach beyond.

    Local headers may hold more than is known here; `_located` sees the rest.
    """
    least = [(e.header, e.header + LOCAL.size + len(e.raw_name) + e.packed) for e in entries.values()]
    if any(last > end.start for _, last in least):
        raise window.damaged("a member is said to lie beyond the directory")
    extents = np.array(least, np.int64).reshape(-1, 2)
    extents = extents[np.argsort(extents[:, 0], kind="stable")]
    if (extents[1:, 0] < extents[:-1, 1]).any():
        raise window.damaged("members overlap")
    starts: list[int] = extents[:, 0].tolist()
    return dict(zip(starts, [*starts[1:], end.start], strict=True)) if starts else {}
