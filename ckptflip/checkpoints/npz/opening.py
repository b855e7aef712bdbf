"""numpy's files: .npy, one array, and .npz, a zip archive of such."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ckptflip.checkpoints import zip_rewrite
from ckptflip.checkpoints.files import open_plain
from ckptflip.checkpoints.laid import LaidOut
from ckptflip.checkpoints.listing import Array, DamagedError, catalogue, without_repeats
from ckptflip.checkpoints.npz import npy
from ckptflip.checkpoints.stored_crcs import StoredCrc
from ckptflip.checkpoints.target import Skipped
from ckptflip.checkpoints.zips import DEFLATED, STORED, Member, Members, members
from ckptflip.errors import CheckpointError

# What the array of a .npy file is called: the file's own name would make that of a copy another one.
NAME = "array"
_SUFFIX = ".npy"
# More than this is not unpacked, since all of it must be held at once.
_MOST_UNPACKED = 1 << 32
# Deflate cannot do better than one byte for 1032.
_BEST_RATIO = 1032


class Unpacked:
    """Members of an archive as decoded bytes. See `ckptflip.checkpoints.laid.Blobs`.

    Args:
        path: the archive.
        used: the members, in the order of the blobs.
    """

    def __init__(self, path: Path, used: Sequence[Member]) -> None:
        self._path = path
        self._members = used
        self._names = [m.name for m in used]

    def decode(self, blob: int) -> NDArray[np.uint8]:
        """The contents of a member.

        Raises:
            CheckpointError: they are damaged.
        """
        try:
            with open_plain(self._path) as file:
                contents = members(file.fileno(), self._path).read(self._names[blob], _MOST_UNPACKED)
        except OSError as why:
            raise CheckpointError(f"{self._path} cannot be read: {why.strerror or why}") from None
        return np.frombuffer(contents, np.uint8)

    def extent(self, blob: int) -> tuple[int, int, int, str]:
        """Where a member's data is stored: file, first and end byte, and its name."""
        member = self._members[blob]
        return 0, member.offset, member.offset + member.packed, f"member {member.name}"

    def encode(self, changed: Mapping[int, NDArray[np.uint8]], paths: Sequence[Path], checksum: str) -> None:
        """Write new contents of some members into a copy of the archive.

        Raises:
            CheckpointError: the copy cannot be written.
        """
        contents = {self._names[blob]: data for blob, data in changed.items()}
        zip_rewrite.rewrite(paths[0], contents, checksum)


def open_checkpoint(path: Path) -> LaidOut:
    """Open a .npy or a .npz file.

    Raises:
        CheckpointError: it cannot be read, is truncated or damaged.
    """
    try:
        with open_plain(path) as file:
            if file.read(len(npy.MAGIC)) == npy.MAGIC:
                return _open_npy(path, file.fileno())
            return _open_npz(path, members(file.fileno(), path), file.fileno())
    except OSError as why:
        raise CheckpointError(f"{path} cannot be read: {why.strerror or why}") from None
    except DamagedError as why:
        raise CheckpointError(f"{path} is a damaged numpy file: {why}. Copy or download it again") from None


def _open_npy(path: Path, fd: int) -> LaidOut:
    header = npy.read_header(lambda count: os.pread(fd, count, 0))
    _check_size(header, os.fstat(fd).st_size)
    arrays, skipped = npy.arrays(header, NAME, 0, 0, "contiguous")
    layouts = [a.layout for a in arrays]
    return LaidOut(path, "npy", [path], catalogue(arrays), layouts, skipped=skipped)


def _open_npz(path: Path, archive: Members, fd: int) -> LaidOut:
    arrays: list[Array] = []
    skipped: list[Skipped] = []
    used: list[Member] = []
    every = [archive[name] for name in archive]
    # Once deflated members are altered, all places behind them move, those of the others' checksums too.
    coded = any(m.method == DEFLATED for m in every)
    for member in every:
        reason = _why_not(member)
        if reason:
            skipped.append(Skipped(member.name, reason))
            continue
        packed = member.method == DEFLATED
        try:
            header = npy.read_header(partial(_inflated if packed else _plain, fd, member))
            _check_size(header, member.size)
            found, left = npy.arrays(
                header,
                member.name.removesuffix(_SUFFIX),
                1 + len(used) if coded else 0,
                0 if coded else member.offset,
                "deflated" if packed else "contiguous",
            )
        except DamagedError as why:
            raise DamagedError(f"its member {member.name!r}: {why}") from None
        arrays += found
        skipped += left
        used += [member] if found else []
    arrays, repeated = without_repeats(arrays)
    return LaidOut(
        path,
        "npz",
        [path],
        catalogue(arrays),
        [a.layout for a in arrays],
        skipped=[*skipped, *repeated],
        crcs=() if coded else [_crc(m) for m in used],
        blobs=Unpacked(path, used) if coded else None,
    )


def _why_not(member: Member) -> str:
    """Why a member holds no array that can be altered; "" where it does."""
    if not member.name.endswith(_SUFFIX):
        return "no .npy file"
    if member.method not in (STORED, DEFLATED):
        return f"compressed by method {member.method}, which numpy never uses"
    if member.size > _MOST_UNPACKED and member.method == DEFLATED:
        return f"deflated, and more than {_MOST_UNPACKED >> 30} GiB when unpacked; save it uncompressed"
    return ""


def _check_size(header: npy.Header, size: int) -> None:
    if not header.pickled and header.start + header.nbytes > size:
        raise DamagedError(f"its array needs {header.nbytes} bytes; {size - header.start} follow its header")


def _crc(member: Member) -> StoredCrc:
    return StoredCrc("crc32", 0, member.offset, member.size, tuple((0, at) for at in member.crc_places))


def _plain(fd: int, member: Member, count: int) -> bytes:
    """The first bytes of a stored member."""
    return os.pread(fd, min(count, member.size), member.offset)


def _inflated(fd: int, member: Member, count: int) -> bytes:
    """The first bytes of a deflated member."""
    if member.size > (member.packed + 1) * _BEST_RATIO:
        raise DamagedError(f"{member.packed} bytes cannot unpack to the {member.size} that it claims")
    # Before the first byte may come tables of some three hundred.
    raw = os.pread(fd, min(member.packed, 2 * count + 1024), member.offset)
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(raw, count)
    except zlib.error as why:
        raise DamagedError(f"it cannot be inflated ({why})") from None
