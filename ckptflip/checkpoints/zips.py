"""The directory of a zip archive: where each member's bytes and each copy of its CRC-32 lie in the file.

Nothing is unpacked to find out, and nothing that an archive says is believed before it is checked. Source of
the layout: APPNOTE.TXT, "ZIP File Format Specification", sections 4.3 to 4.5.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from msgspec import Struct

from ckptflip.checkpoints.zip_directory import (
    DEFLATED,
    DESCRIPTOR,
    ENCRYPTED,
    FULL32,
    LOCAL,
    STORED,
    Directory,
    Entry,
    Window,
    directory,
    zip64_values,
)
from ckptflip.errors import CheckpointError

__all__ = ["DEFLATED", "STORED", "Member", "Members", "members"]

# Where the CRC-32 stands in a local header.
_LOCAL_CRC = 14
_STEP = 1 << 20


class Member(Struct, frozen=True):
    """One member of an archive.

    Attributes:
        name: its name, parts joined by ``/``.
        offset: where its data begins in the file.
        size: bytes of its contents.
        packed: bytes of its data in the file; as many as `size` when it is stored without compression.
        method: 0 stored, 8 deflated, others by the specification.
        crc: the CRC-32 of its contents that the directory gives.
        crc_places: where the file stores that CRC-32: in the local header, in the data descriptor behind the
            data, and in the directory; the first two only where there is one.
    """

    name: str
    offset: int
    size: int
    packed: int
    method: int
    crc: int
    crc_places: tuple[int, ...]


class Members:
    """The members of an archive, in the directory's order, by name. Local headers are read when asked for.

    Holds the descriptor it was made from, which the caller keeps open.
    """

    def __init__(self, window: Window, directory: Directory) -> None:
        self._window = window
        self._entries = directory.entries
        self._ends = directory.ends

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __getitem__(self, name: str) -> Member:
        """A member, with its local header checked against the directory.

        Raises:
            CheckpointError: there is none of this name, or header and directory disagree.
        """
        entry = self._entries.get(name)
        if entry is None:
            raise CheckpointError(f"{self._window.where} holds no member {name!r}")
        return _located(self._window, name, entry, self._ends[entry.header])

    def size(self, name: str) -> int:
        """Bytes of a member's contents, as the directory says."""
        return self._entries[name].size

    def read(self, name: str, limit: int) -> bytes:
        """The contents of a member, unpacked if need be. Its CRC-32 is not checked.

        Raises:
            CheckpointError: more than `limit` bytes, or another number of them than the directory says; an
                unknown compression.
        """
        member = self[name]
        if member.size > limit:
            raise CheckpointError(
                f"{self._window.where}: {name!r} claims {member.size} bytes, more than the {limit} expected"
            )
        if member.method == STORED:
            raw = self._window.read(member.offset - self._window.start, member.size)
        elif member.method == DEFLATED:
            raw = _inflated(self._window, member)
        else:
            raise CheckpointError(
                f"{self._window.where}: {name!r} is compressed by method {member.method}, which is not "
                "supported; write the archive again, stored or deflated"
            )
        if len(raw) != member.size:
            raise self._window.damaged(f"{name!r} ends after {len(raw)} of its {member.size} bytes")
        return raw


def members(fd: int, where: Path | str, *, start: int = 0, length: int | None = None) -> Members:
    """Read the directory of a zip archive.

    Args:
        fd: the file, open for reading; it must stay open as long as members are asked for.
        where: the file's name, for messages.
        start: where the archive begins in the file.
        length: its bytes; None: up to the end of the file. Offsets given back count from the file's start.

    Raises:
        CheckpointError: no zip archive, a damaged one, or one that is encrypted, split, or made to mislead:
            names given twice, absolute or with ``..``, members that overlap.
    """
    size = os.fstat(fd).st_size
    length = size - start if length is None else length
    if start < 0 or length < 0 or start + length > size:
        raise CheckpointError(f"{where} ends at byte {size}, before the end of an archive said to lie in it")
    window = Window(fd, str(where), start, length)
    return Members(window, directory(window))


def _located(window: Window, name: str, entry: Entry, last: int) -> Member:
    """An entry with what its local header adds: the place of the data, and of further copies of the CRC."""
    raw = window.read(entry.header, LOCAL.size + len(entry.raw_name) + 64)
    if len(raw) < LOCAL.size:
        raise window.damaged(f"the local header of {name!r} lies beyond the end of the file")
    sign, _, flags, method, _, _, crc, packed, size, n, extra = LOCAL.unpack_from(raw)
    data = entry.header + LOCAL.size + n + extra
    if (
        sign != b"PK\3\4"
        or raw[LOCAL.size : LOCAL.size + n] != entry.raw_name
        or method != entry.method
        or (flags ^ entry.flags) & (ENCRYPTED | DESCRIPTOR)
    ):
        raise window.damaged(f"the local header of {name!r} disagrees with the directory")
    if data + entry.packed > last:
        raise window.damaged(f"the data of {name!r} overlaps what follows")
    if size == FULL32 or packed == FULL32:
        extras = window.read(entry.header + LOCAL.size + n, extra)
        wide = zip64_values(window, extras, 2)
        size, packed = (wide[0] if size == FULL32 else size), (wide[1] if packed == FULL32 else packed)
    deferred = bool(flags & DESCRIPTOR)
    if (size, packed) != (entry.size, entry.packed) and not (deferred and size == packed == 0):
        raise window.damaged(f"the local header of {name!r} gives other sizes than the directory")
    places = [] if deferred and not crc else [window.start + entry.header + _LOCAL_CRC]
    if deferred:
        behind = _descriptor_crc(window.read(data + entry.packed, min(24, last - data - entry.packed)), entry)
        places += [] if behind is None else [window.start + data + entry.packed + behind]
    return Member(
        name,
        window.start + data,
        entry.size,
        entry.packed,
        entry.method,
        entry.crc,
        (*places, entry.crc_place),
    )


def _descriptor_crc(raw: bytes, entry: Entry) -> int | None:
    """Where a data descriptor keeps the CRC: behind its signature, which may be missing.

    It is known by its sizes, of 32 or 64 bits, and not by the CRC: an interrupted repair may have left that
    one unlike the others.
    """
    for at in (4, 0) if raw.startswith(b"PK\7\x08") else (0,):
        for kind in ("<2Q", "<2L"):
            if at + 4 + struct.calcsize(kind) <= len(raw):
                packed, size = struct.unpack_from(kind, raw, at + 4)
                if (packed, size) == (entry.packed, entry.size):
                    return at
    return None


def _inflated(window: Window, member: Member) -> bytes:
    """The contents of a deflated member: never more bytes than it claims, and one to show that it lied."""
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    parts: list[bytes] = []
    room, at, last = member.size + 1, member.offset, member.offset + member.packed
    try:
        while room and not stream.eof:
            raw = stream.unconsumed_tail
            if not raw:
                raw = window.read(at - window.start, min(_STEP, last - at))
                at += len(raw)
            parts.append(stream.decompress(raw, min(room, _STEP)))
            room -= len(parts[-1])
            if not raw and not parts[-1]:
                break
    except zlib.error as why:
        raise window.damaged(f"{member.name!r} cannot be inflated ({why})") from None
    if not room:
        raise window.damaged(f"{member.name!r} holds more than the {member.size} bytes it claims")
    return b"".join(parts)
