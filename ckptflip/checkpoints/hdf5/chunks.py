"""One stored chunk at a time through HDF5's own filters, in a scratch file in memory."""

from __future__ import annotations

import zlib
from itertools import count
from math import prod
from typing import Any

import numpy as np
from h5py import h5d, h5f, h5p, h5s, h5z
from numpy.typing import NDArray

from ckptflip.checkpoints.fletcher import fletcher32
from ckptflip.checkpoints.hdf5.walker import FLETCHER32
from ckptflip.errors import CheckpointError

# HDF5 refuses two open files of one name, in memory too.
_NAMES = count()
_GZIP, _SHUFFLE = 1, 2


class ChunkCodec:
    """Decodes and encodes chunks as one dataset's filter pipeline does.

    A checksum that does not match is no obstacle to reading: a checkpoint altered with its checksum left
    as it was must stay readable for `diff` and `undo`.

    Args:
        dataset: the low-level dataset whose pipeline is used.
        name: its name, for messages.
    """

    def __init__(self, dataset: Any, name: str) -> None:
        self._name = name
        self._kind = dataset.get_type()
        creation = dataset.get_create_plist()
        self._shape = creation.get_chunk()
        self._filters = [creation.get_filter(i)[0] for i in range(creation.get_nfilters())]
        access = h5p.create(h5p.FILE_ACCESS)
        access.set_fapl_core(backing_store=False)
        self._file = h5f.create(f"ckptflip-scratch-{next(_NAMES)}".encode(), h5f.ACC_TRUNC, fapl=access)
        space = h5s.create_simple(self._shape)
        self._scratch = h5d.create(self._file, b"chunk", self._kind, space, dcpl=creation.copy())
        self._fill_only = creation.copy()
        self._fill_only.remove_filter(h5z.FILTER_ALL)
        self._fill_only.set_chunk((1,))
        self._origin = (0,) * len(self._shape)

    @property
    def ends_in_checksum(self) -> bool:
        """Whether a stored chunk ends in a Fletcher-32 checksum of the bytes before it."""
        return self._filters[-1:] == [FLETCHER32]

    def decode(self, stored: bytes, filter_mask: int) -> NDArray[np.uint8]:
        """The records of a stored chunk, shape (records, bytes of a record).

        Raises:
            CheckpointError: the filters refuse the chunk.
        """
        if not self._filters:
            return np.frombuffer(stored, np.uint8).reshape(-1, self._kind.get_size())
        self._check_size(stored, filter_mask)
        if self._has_checksum(filter_mask):
            stored = with_checksum(stored[:-4])
        try:
            write_chunk(self._scratch, self._origin, stored, filter_mask)
            if filter_mask:
                # HDF5 2.0 forgets which filters were skipped until the dataset is opened anew.
                self._scratch.close()
                self._scratch = h5d.open(self._file, b"chunk")
            records = self._records()
            self._scratch.read(h5s.ALL, h5s.ALL, records, self._kind)
        except (OSError, ValueError) as why:
            raise CheckpointError(f"{self._name}: a chunk cannot be decoded: {why}") from None
        return records.view(np.uint8).reshape(records.size, -1)

    def _check_size(self, stored: bytes, filter_mask: int) -> None:
        """Refuse a chunk that does not decode to its size: HDF5 would read beyond it, or fill the memory."""
        size = prod(self._shape) * self._kind.get_size()
        for i in reversed(range(len(self._filters))):
            if filter_mask >> i & 1 or self._filters[i] == _SHUFFLE:
                continue
            if self._filters[i] == FLETCHER32:
                stored = stored[:-4]
                continue
            before = [f for k, f in enumerate(self._filters[:i]) if not filter_mask >> k & 1]
            if self._filters[i] != _GZIP or any(f != _SHUFFLE for f in before):
                return  # only the library knows how much its other filters give
            try:
                stored = zlib.decompressobj().decompress(stored, size + 1)
            except zlib.error as why:
                raise CheckpointError(f"{self._name}: a chunk cannot be decoded: {why}") from None
        if len(stored) != size:
            more = "more than " if len(stored) > size else ""
            raise CheckpointError(
                f"{self._name}: a chunk of {size} bytes decodes to {more}{min(len(stored), size)}: damaged"
            )

    def encode(self, records: NDArray[np.uint8]) -> tuple[bytes, int]:
        """The stored form of a chunk and the filters that were skipped.

        Raises:
            CheckpointError: the filters do not give back what was put in.
        """
        if not self._filters:
            return records.tobytes(), 0
        data = np.ascontiguousarray(records).view(f"V{self._kind.get_size()}").reshape(self._shape)
        self._scratch.write(h5s.ALL, h5s.ALL, data, self._kind)
        # Until then a chunk may live in the cache alone, and its stored size reads as 0.
        h5f.flush(self._file)
        _, stored = self._scratch.read_direct_chunk(self._origin)
        filter_mask = self._scratch.get_chunk_info(0).filter_mask
        if not self._keeps(bytes(stored), filter_mask, records):
            raise CheckpointError(
                f"{self._name}: its filters cannot store the altered words exactly; leave this tensor out"
            )
        return bytes(stored), filter_mask

    def _keeps(self, stored: bytes, filter_mask: int, records: NDArray[np.uint8]) -> bool:
        try:
            return np.array_equal(self.decode(stored, filter_mask), records)
        except CheckpointError:
            return False  # HDF5 1.14 encodes some integers so wide that it refuses to decode them

    def fill(self) -> NDArray[np.uint8]:
        """The record that elements have which were never written, shape (1, bytes of a record)."""
        blank = h5d.create(self._file, None, self._kind, h5s.create_simple((1,)), dcpl=self._fill_only)
        value = np.empty((1,), f"V{self._kind.get_size()}")
        blank.read(h5s.ALL, h5s.ALL, value, self._kind)
        return value.view(np.uint8).reshape(1, -1)

    def settle_checksum(self, old: bytes, new: bytes, old_mask: int, new_mask: int, mode: str) -> bytes:
        """The new stored chunk with the checksum that `mode` asks for.

        ``repair`` leaves the right checksum in place, unless the old one was wrong already.
        """
        if not (self._has_checksum(new_mask) and self._has_checksum(old_mask) and len(old) >= 4):
            return new
        was_right = old[-4:] == with_checksum(old[:-4])[-4:]
        return new if mode == "repair" and was_right else new[:-4] + old[-4:]

    def _has_checksum(self, filter_mask: int) -> bool:
        return self.ends_in_checksum and not filter_mask >> (len(self._filters) - 1) & 1

    def _records(self) -> NDArray[Any]:
        return np.empty(self._shape, f"V{self._kind.get_size()}")


def write_chunk(dataset: Any, coordinates: tuple[int, ...], stored: bytes, filter_mask: int) -> None:
    """Write a stored chunk with the filters that were skipped for it.

    HDF5 (up to 2.0 at least) keeps the old mask where a chunk's size stays the same: then by way of another.
    """
    dataset.write_direct_chunk(coordinates, stored, filter_mask)
    if dataset.get_chunk_info_by_coord(coordinates).filter_mask != filter_mask:
        dataset.write_direct_chunk(coordinates, stored + b"\0", filter_mask)
        dataset.write_direct_chunk(coordinates, stored, filter_mask)


def with_checksum(payload: bytes) -> bytes:
    """A payload with its Fletcher-32 behind it, as HDF5 stores it."""
    return payload + fletcher32(payload).to_bytes(4, "little")
