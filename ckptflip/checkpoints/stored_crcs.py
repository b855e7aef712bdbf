"""Stored CRCs that cover tensor data: which ones an alteration touches, and what they become."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from ckptflip.checkpoints import crc
from ckptflip.checkpoints.patch import Patch
from ckptflip.errors import CheckpointError, RecordError
from ckptflip.faults.record import ChecksumEntry

_STORED = np.dtype("<u4")


class StoredCrc(Struct, frozen=True, gc=False):
    """A stored CRC over a range of a file.

    CRCs are listed innermost first: the stored bytes of one may lie in the range of a later one.

    Attributes:
        algorithm: ``crc32`` or ``crc32c``.
        file: position of the file that is covered.
        start: the first covered byte.
        length: covered bytes.
        places: (file, offset) wherever its four little-endian bytes are stored, all alike.
        masked: stored in TensorFlow's masked form.
        zero_is_none: a stored 0 means that no checksum was computed.
    """

    algorithm: str
    file: int
    start: int
    length: int
    places: tuple[tuple[int, int], ...]
    masked: bool = False
    zero_is_none: bool = False


class _Bytes:
    """Altered bytes of some files: where, and what is XORed into each."""

    def __init__(self, patches: Sequence[tuple[int, Patch]]) -> None:
        self._offsets: dict[int, NDArray[np.int64]] = {}
        self._masks: dict[int, NDArray[np.uint8]] = {}
        for file, each in patches:
            self.add(file, each.dtype, each.offsets, each.masks)

    def add(self, file: int, dtype: np.dtype[Any], offsets: NDArray[np.int64], masks: NDArray[Any]) -> None:
        """Take in words of one dtype, in any order."""
        at = (offsets[:, None] + np.arange(dtype.itemsize)).reshape(-1)
        xored = np.ascontiguousarray(masks.astype(dtype)).view(np.uint8).reshape(-1)
        changed = xored != 0
        at, xored = at[changed], xored[changed]
        if file in self._offsets:
            at, xored = (
                np.concatenate([self._offsets[file], at]),
                np.concatenate([self._masks[file], xored]),
            )
        order = np.argsort(at, kind="stable")
        self._offsets[file], self._masks[file] = at[order], xored[order]

    def in_ranges(self, file: int, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which ranges hold an altered byte."""
        offsets = self._offsets.get(file, np.empty(0, np.int64))
        return np.searchsorted(offsets, ends) > np.searchsorted(offsets, starts)

    def within(self, stored: StoredCrc) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """The altered bytes that a CRC covers: how many covered bytes follow each, and its mask."""
        offsets = self._offsets.get(stored.file, np.empty(0, np.int64))
        low, high = np.searchsorted(offsets, [stored.start, stored.start + stored.length])
        if low == high:
            return np.empty(0, np.int64), np.empty(0, np.uint8)
        return stored.start + stored.length - 1 - offsets[low:high], self._masks[stored.file][low:high]


def updated(
    crcs: Sequence[StoredCrc], patches: Sequence[tuple[int, Patch]], descriptors: Mapping[int, int]
) -> list[ChecksumEntry]:
    """What the stored CRCs become when words are altered: a CRC that was right stays right.

    One that was wrong stays wrong by the same difference, since a CRC is affine.

    Args:
        crcs: of the checkpoint, innermost first.
        patches: (position of the file, the patch).
        descriptors: of all files of the checkpoint, open for reading, by position.

    Raises:
        CheckpointError: a stored CRC lies beyond the end of its file.
    """
    altered = _Bytes(patches)
    found: list[ChecksumEntry] = []
    for stored in _touched(crcs, altered):
        behind, masks = altered.within(stored)
        change = crc.delta(stored.algorithm, behind, masks)
        for file, offset in stored.places:
            before = _stored(descriptors[file], offset)
            if not change or (stored.zero_is_none and not before):
                continue
            after = crc.mask(crc.unmask(before) ^ change) if stored.masked else before ^ change
            found.append(ChecksumEntry(file, offset, before, after))
            altered.add(file, _STORED, np.array([offset]), np.array([before ^ after], np.uint32))
    return found


def restored(
    crcs: Sequence[StoredCrc], recorded: Sequence[ChecksumEntry], descriptors: Mapping[int, int]
) -> list[ChecksumEntry]:
    """What gives recorded CRCs their value back, whether or not an interrupted run had reached them.

    Args:
        crcs: of the checkpoint.
        recorded: from the injection's record.
        descriptors: of the files, as for `updated`.

    Raises:
        RecordError: a place holds no checksum of this checkpoint, or one that is neither what it was before
            nor what it became.
    """
    known = {place for stored in crcs for place in stored.places}
    found = []
    for entry in recorded:
        where = f"the checksum at byte {entry.offset} of file {entry.file}"
        if (entry.file, entry.offset) not in known:
            raise RecordError(
                f"{where} is none of this checkpoint's: the record belongs to another. Nothing was altered"
            )
        now = _stored(descriptors[entry.file], entry.offset)
        each = zip(*map(_bytes, (now, entry.before, entry.after)), strict=True)
        if any(n not in (b, a) for n, b, a in each):
            raise RecordError(
                f"{where} is {now:#010x}, recorded {entry.before:#010x} → {entry.after:#010x}: the file was "
                "altered since. Nothing was altered"
            )
        if now != entry.before:
            found.append(ChecksumEntry(entry.file, entry.offset, now, entry.before))
    return found


def as_patches(entries: Sequence[ChecksumEntry], paths: Sequence[str]) -> list[Patch]:
    """Patches that write the CRCs' new values."""
    by_file: dict[int, list[ChecksumEntry]] = {}
    for entry in entries:
        by_file.setdefault(entry.file, []).append(entry)
    made = []
    for file, several in by_file.items():
        several.sort(key=lambda e: e.offset)
        offsets = np.array([e.offset for e in several], np.int64)
        masks = np.array([e.before ^ e.after for e in several], np.uint32)
        made.append(Patch(paths[file], _STORED, offsets, masks))
    return made


def _touched(crcs: Sequence[StoredCrc], altered: _Bytes) -> list[StoredCrc]:
    """The CRCs whose range is altered, by data or by the stored bytes of others, in their order."""
    if not crcs:
        return []
    files = np.array([s.file for s in crcs], np.int64)
    starts = np.array([s.start for s in crcs], np.int64)
    ends = starts + np.array([s.length for s in crcs], np.int64)
    chosen = np.zeros(len(crcs), bool)
    changes = altered
    while True:
        hit = np.zeros(len(crcs), bool)
        for file in np.unique(files).tolist():
            here = files == file
            hit[here] = changes.in_ranges(file, starts[here], ends[here])
        fresh = np.flatnonzero(hit & ~chosen)
        if not fresh.size:
            return [crcs[i] for i in np.flatnonzero(chosen).tolist()]
        chosen[fresh] = True
        changes = _Bytes([])
        by_file: dict[int, list[int]] = {}
        for i in fresh.tolist():
            for file, offset in crcs[i].places:
                by_file.setdefault(file, []).append(offset)
        for file, offsets in by_file.items():
            changes.add(file, np.dtype("u1"), np.array(offsets, np.int64), np.ones(len(offsets), np.uint8))


def _stored(descriptor: int, offset: int) -> int:
    data = os.pread(descriptor, 4, offset)
    if len(data) < 4:
        raise CheckpointError(f"a checksum is said to lie at byte {offset}, beyond the end of the file")
    return int.from_bytes(data, "little")


def _bytes(value: int) -> bytes:
    return (value & 0xFFFFFFFF).to_bytes(4, "little")
