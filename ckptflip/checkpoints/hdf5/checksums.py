"""Keeping the Fletcher-32 of altered chunks right, where the chunk's bytes are patched in the file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from ckptflip.checkpoints.fletcher import fletcher32
from ckptflip.checkpoints.hdf5.places import Chunks, split, word_bytes
from ckptflip.checkpoints.hdf5.types import Field
from ckptflip.checkpoints.patch import Patch


class TouchedWords(Struct, frozen=True, eq=False):
    """Altered words of one field of a dataset.

    Attributes:
        field: where the words lie in a record.
        words: their positions in the tensor.
        mask: what is XORed into each now, uint64.
        fault: the whole mask of the recorded fault, uint64.
    """

    field: Field
    words: NDArray[np.int64]
    mask: NDArray[np.uint64]
    fault: NDArray[np.uint64]


def checksum_patches(chunks: Chunks, touched: Sequence[TouchedWords], fd: int, target: Path) -> list[Patch]:
    """What makes the checksum of every touched chunk of a dataset right again.

    A stored checksum is taken for right when it belongs to the chunk as it is now, as it will be, or as the
    recorded fault left it: an interrupted run leaves any of the three. A checksum that was wrong stays wrong.

    Args:
        chunks: the dataset's chunks.
        touched: its altered words, by field.
        fd: the open file.
        target: the file the patches are for.
    """
    payloads: dict[tuple[int, ...], _Versions] = {}
    for each in touched:
        records, inner = split(each.words, each.field)
        for part in chunks.locate(records):
            assert part.offset is not None
            if part.coordinates not in payloads:
                raw = os.pread(fd, part.size, part.offset)
                payloads[part.coordinates] = _Versions(raw, part.offset + part.size - 4)
            size = chunks.record
            at = (part.within * size)[:, None] + word_bytes(inner[part.rows], each.field)
            for payload, masks in (
                (payloads[part.coordinates].after, each.mask),
                (payloads[part.coordinates].faulty, each.mask ^ each.fault),
            ):
                payload[at] ^= masks[part.rows].astype(each.field.stored).view(np.uint8).reshape(at.shape)
    found = [(v.offset, mask) for v in payloads.values() if (mask := v.mask())]
    found.sort()
    offsets = np.array([offset for offset, _ in found], np.int64)
    return [Patch(str(target), np.dtype("<u4"), offsets, np.array([mask for _, mask in found], np.uint32))]


# A write that is killed stops where a page of the file ends, and after a power failure where a sector does.
_SECTOR = 512


class _Versions:
    """One chunk's bytes now, after the change, and as the recorded fault left them."""

    def __init__(self, raw: bytes, offset: int) -> None:
        self.offset = offset
        self._stored = int.from_bytes(raw[-4:], "little")
        self._now = fletcher32(raw[:-4])
        self.after = np.frombuffer(raw[:-4], np.uint8).copy()
        self.faulty = self.after.copy()

    def mask(self) -> int:
        """What to XOR into the stored checksum; 0 to leave it."""
        right = fletcher32(self.after.tobytes())
        known = (self._now, right, fletcher32(self.faulty.tobytes()))
        return self._stored ^ right if self._stored in known or self._is_torn(known) else 0

    def _is_torn(self, known: tuple[int, ...]) -> bool:
        """Whether the stored checksum is the start of one known value and the end of another."""
        cut = -self.offset % _SECTOR
        if not 0 < cut < 4:
            return False
        stored, *values = (c.to_bytes(4, "little") for c in (self._stored, *known))
        return any(stored[:cut] == v[:cut] for v in values) and any(stored[cut:] == v[cut:] for v in values)
