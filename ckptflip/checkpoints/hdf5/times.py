"""Times of modification in object headers: kept as they were, when the library has written into a copy.

A dataset or group may record when it was used and altered. The library stamps the time of day there, so that
the same faults gave other bytes a second later. Source: HDF5 file format specification 3.0, "Data object
headers", versions 1 and 2; their checksum is Bob Jenkins' lookup3 (hashlittle, initial value 0).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
from h5py import h5o
from msgspec import Struct

_MODIFIED, _CONTINUED = 0x12, 0x10  # types of messages in headers of version 1
_MOST_BLOCKS = 1000  # of one header; more are a damaged file's


class _Stamps(Struct, frozen=True):
    """Where one header keeps times: spans of (offset, bytes), and what a checksum behind it covers."""

    spans: tuple[tuple[int, int], ...]
    summed: tuple[int, int] | None = None


@contextmanager
def kept_times(path: Path, names: Iterable[bytes]) -> Iterator[None]:
    """Give the objects of these names, and what holds them, the times that they have now when this ends.

    Args:
        path: an HDF5 file that is closed before and after.
        names: paths in the file.
    """
    with h5py.File(path, "r", locking=False) as file:
        block, sizes = file.userblock_size, file.id.get_create_plist().get_sizes()
        found = {h5o.get_info(h5o.open(file.id, name)).addr for name in _with_parents(names)}
    if sizes != (8, 8):
        yield
        return
    at = sorted(block + address for address in found)
    with path.open("rb") as raw:
        at += _extension(raw.fileno(), block)
        before = {where: _read(raw.fileno(), _stamps(raw.fileno(), where, block)) for where in at}
    yield
    with path.open("r+b") as raw:
        for where, values in before.items():
            _restore(raw.fileno(), _stamps(raw.fileno(), where, block), values)


def _with_parents(names: Iterable[bytes]) -> set[bytes]:
    found = {b"/"}
    for name in names:
        parts = name.strip(b"/").split(b"/")
        found |= {b"/".join(parts[:i]) for i in range(1, len(parts) + 1)}
    return found


def _read(file: int, stamps: _Stamps) -> list[bytes]:
    return [os.pread(file, size, offset) for offset, size in stamps.spans]


def _restore(file: int, stamps: _Stamps, values: list[bytes]) -> None:
    if len(values) != len(stamps.spans) or _read(file, stamps) == values:
        return
    if stamps.summed is None:
        for (offset, _), value in zip(stamps.spans, values, strict=True):
            os.pwrite(file, value, offset)
        return
    start, end = stamps.summed
    header = bytearray(os.pread(file, end - start + 4, start))
    if lookup3(header[:-4]) != int.from_bytes(header[-4:], "little"):
        return  # it is not what it was taken for
    for (offset, size), value in zip(stamps.spans, values, strict=True):
        header[offset - start : offset - start + size] = value
    header[-4:] = lookup3(header[:-4]).to_bytes(4, "little")
    os.pwrite(file, header, start)


def _stamps(file: int, at: int, block: int) -> _Stamps:
    head = os.pread(file, 28, at)
    if head[:5] == b"OHDR\x02" and head[5] & 0x20:
        # Access, modification, change and birth; then the size of what follows, as wide as the flags say.
        where, width = 22 + (4 if head[5] & 0x10 else 0), 1 << (head[5] & 3)
        size = int.from_bytes(os.pread(file, width, at + where), "little")
        return _Stamps(((at + 6, 16),), (at, at + where + width + size))
    if head[:1] == b"\x01":
        return _Stamps(tuple(_messages(file, at, block)))
    return _Stamps(())


def _messages(file: int, at: int, block: int) -> Iterator[tuple[int, int]]:
    """Where a header of version 1 keeps times."""
    blocks = [(at + 16, int.from_bytes(os.pread(file, 4, at + 8), "little"))]
    for start, size in blocks:
        raw, here = os.pread(file, min(size, 1 << 20), start), 0
        while here + 8 <= len(raw):
            kind, length = struct.unpack_from("<HH", raw, here)
            if kind == _MODIFIED and length >= 8:
                yield start + here + 12, 4
            if kind == _CONTINUED and here + 24 <= len(raw) and len(blocks) < _MOST_BLOCKS:
                offset, more = struct.unpack_from("<QQ", raw, here + 8)
                if offset < 1 << 62:
                    blocks.append((block + offset, more))
            here += 8 + length


def _extension(file: int, block: int) -> list[int]:
    """Where the superblock's own header lies, if there is one."""
    head = os.pread(file, 28, block)
    if len(head) < 28 or head[8] not in (2, 3):
        return []
    (address,) = struct.unpack_from("<Q", head, 20)
    return [block + address] if address < 1 << 62 else []


def _rotated(value: int, by: int) -> int:
    value &= 0xFFFFFFFF
    return value << by & 0xFFFFFFFF | value >> 32 - by


def lookup3(data: bytes | bytearray) -> int:
    """The checksum of HDF5's metadata (Jenkins 2006, lookup3.c, hashlittle with initial value 0).

    Example:
        >>> hex(lookup3(b"Four score and seven years ago"))
        '0x17770551'
    """
    a = b = c = 0xDEADBEEF + len(data) & 0xFFFFFFFF
    if not data:
        return c
    padded = bytes(data) + b"\0" * (-len(data) % 12)
    words: tuple[int, ...] = struct.unpack(f"<{len(padded) // 4}I", padded)
    for i in range(0, len(words) - 3, 3):
        a, b, c = a + words[i], b + words[i + 1], c + words[i + 2]
        for by in (4, 6, 8, 16, 19, 4):
            # Each round is the same with the three names turned by one.
            a = (a - c & 0xFFFFFFFF) ^ _rotated(c, by)
            c = c + b
            a, b, c = b, c, a
    a, b, c = a + words[-3], b + words[-2], c + words[-1]
    for by in (14, 11, 25, 16, 4, 14, 24):
        c = (c ^ b & 0xFFFFFFFF) - _rotated(b, by) & 0xFFFFFFFF
        a, b, c = b, c, a
    # After seven turns the last result stands at b.
    return b & 0xFFFFFFFF
