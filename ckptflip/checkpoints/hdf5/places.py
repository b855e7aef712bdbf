"""From word positions to places in a file: records, external segments, chunks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from ckptflip.checkpoints import patch
from ckptflip.checkpoints.hdf5.chunks import ChunkCodec
from ckptflip.checkpoints.hdf5.types import Field
from ckptflip.checkpoints.hdf5.walker import Dataset
from ckptflip.errors import CheckpointError

Positions = NDArray[np.int64]
# Looking up one chunk costs a tree search; above this many, one pass over the whole index is cheaper.
_FEW_CHUNKS = 32


def split(words: Positions, field: Field) -> tuple[Positions, Positions]:
    """Word positions in a tensor as (record, word within the record's field)."""
    if field.words == 1:
        return words, np.zeros_like(words)
    record, inner = np.divmod(words, field.words)
    return record, inner


def word_bytes(inner: Positions, field: Field) -> NDArray[np.int64]:
    """Positions of the bytes of words within their records, shape (words, bytes of a word)."""
    size = field.number.word_size
    return (field.offset + inner * size)[:, None] + np.arange(size)


def intra_record(
    records: NDArray[np.uint8], inner: Positions, field: Field, stored: np.dtype[Any]
) -> NDArray[Any]:
    """Take one word out of each record: `records` has shape (words, bytes of a record)."""
    taken = np.take_along_axis(records, word_bytes(inner, field), axis=1)
    return np.ascontiguousarray(taken).view(stored)[:, 0].astype(stored.newbyteorder("="))


def element_space(dataset: Any, place: Dataset, records: Positions) -> Any:
    """The file space of a dataset with some of its records selected, in the order given."""
    space = dataset.get_space()
    space.select_elements(np.stack(np.unravel_index(records, place.shape), axis=1).astype(np.uint64))
    return space


class Place(Struct, frozen=True, eq=False):
    """Words that lie at byte offsets of one file.

    Attributes:
        path: the file.
        offsets: ascending.
        rows: which of the asked words these are.
        descriptor: of the open file, or -1 when it is another file than the checkpoint.
    """

    path: str
    offsets: Positions
    rows: Positions
    descriptor: int = -1

    def read(self, stored: np.dtype[Any]) -> NDArray[Any]:
        """The words, in native byte order."""
        if self.descriptor >= 0:
            return patch.read_words(self.descriptor, stored, self.offsets)
        try:
            fd = os.open(self.path, os.O_RDONLY)
        except OSError as why:
            raise CheckpointError(
                f"the external data file {self.path} cannot be read: {why.strerror}"
            ) from None
        try:
            return patch.read_words(fd, stored, self.offsets)
        finally:
            os.close(fd)


def segments_of(place: Dataset, logical: Positions, size: int, checkpoint: Path, name: str) -> list[Place]:
    """Where words of an externally stored dataset lie.

    Args:
        place: the dataset.
        logical: where each word starts in the dataset, in bytes, ascending.
        size: bytes of a word.
        checkpoint: the file that names the external ones.
        name: the tensor's, for messages.

    Raises:
        CheckpointError: a segment lies outside the checkpoint's own folder: a file from a stranger must not
            name what is read or altered elsewhere.
    """
    found: list[Place] = []
    start = 0
    home = checkpoint.resolve().parent
    for file, offset, length in place.segments:
        path = (home / file).resolve()
        if not path.is_relative_to(home):
            raise CheckpointError(
                f"{name} keeps its data in {file!r}, outside the checkpoint's folder: it is left alone"
            )
        end = min(start + length, 1 << 62)  # an unlimited segment has the largest length there is
        rows = np.flatnonzero((logical >= start) & (logical < end))
        if rows.size and logical[rows[-1]] + size > end:
            raise CheckpointError(f"{name} has an element that lies in two external files: it is left alone")
        if rows.size:
            found.append(Place(str(path), offset + logical[rows] - start, rows))
        start = end
    if logical.size and logical[-1] >= start:
        raise CheckpointError(f"{name} has more elements than its external files have room for")
    return found


class Part(Struct, frozen=True, eq=False):
    """The asked records that lie in one chunk.

    Attributes:
        coordinates: the chunk's first record along each axis.
        offset: the chunk's first byte in the file; None when it was never written (it holds fill values).
        size: its stored bytes.
        filter_mask: the filters that were skipped for it, as bits.
        within: positions of the records in the chunk.
        rows: which of the asked records these are.
    """

    coordinates: tuple[int, ...]
    offset: int | None
    size: int
    filter_mask: int
    within: Positions
    rows: Positions


class Chunks:
    """The chunks of one dataset.

    Args:
        dataset: the low-level dataset.
        place: what the walk found of it.
        size: bytes in the file, to check chunks against.
        descriptor: of the open file; needed to read chunks, not to locate them.
        user_block: bytes before HDF5's own first byte.
        start: where the HDF5 file begins in the open one.
    """

    def __init__(
        self,
        dataset: Any,
        place: Dataset,
        size: int = 1 << 62,
        descriptor: int = -1,
        user_block: int = 0,
        start: int = 0,
    ) -> None:
        self.record = place.record
        self._dataset = dataset
        self._place = place
        self._size = size
        self._descriptor = descriptor
        self._user_block = user_block
        self._start = start
        self._shift: int | None = None if user_block else 0
        self._codec: ChunkCodec | None = None
        self._index: dict[tuple[int, ...], tuple[int, int, int]] | None = None
        self._grid = tuple(-(-n // c) for n, c in zip(place.shape, place.chunk, strict=True))

    def locate(self, records: Positions) -> list[Part]:
        """Group records by the chunk that holds them, in the order of the chunks."""
        axes = np.unravel_index(records, self._place.shape)
        whole = [np.divmod(a, c) for a, c in zip(axes, self._place.chunk, strict=True)]
        number = np.ravel_multi_index([w[0] for w in whole], self._grid)
        within = np.ravel_multi_index([w[1] for w in whole], self._place.chunk)
        order = np.argsort(number, kind="stable")
        firsts = np.flatnonzero(np.diff(number[order], prepend=-1))
        parts = []
        for rows in np.split(order, firsts[1:]) if order.size else ():
            at = np.unravel_index(int(number[rows[0]]), self._grid)
            coordinates = tuple(int(i) * c for i, c in zip(at, self._place.chunk, strict=True))
            offset, size, mask = self._stored(coordinates, many=firsts.size > _FEW_CHUNKS)
            parts.append(Part(coordinates, offset, size, mask, within[rows].astype(np.int64), rows))
        return parts

    def origins(self, first: int, last: int) -> Iterator[tuple[int, ...]]:
        """The chunks that hold rows first … last-1."""
        steps = self._place.chunk
        start = first // steps[0] * steps[0]
        rest = (range(0, n, c) for n, c in zip(self._place.shape[1:], steps[1:], strict=True))
        return product(range(start, last, steps[0]), *rest)

    def stored(self) -> Iterator[tuple[tuple[int, ...], int, int, int]]:
        """Every chunk that was written: first record along each axis, first byte, bytes, skipped filters."""
        if self._index is None:
            self._index = {}
            self._dataset.chunk_iter(self._note)
        for coordinates, found in self._index.items():
            yield (coordinates, *self._checked(coordinates, *found))

    def decoded(self, coordinates: tuple[int, ...]) -> NDArray[np.uint8]:
        """The records of one chunk, shape (records of a chunk, bytes of a record); not to be altered."""
        offset, size, mask = self._stored(coordinates, many=False)
        if offset is None:
            return np.broadcast_to(self._filters().fill(), (prod(self._place.chunk), self._place.record))
        raw = os.pread(self._descriptor, size, offset)
        if not self._place.filters or (not self._place.coded and not mask):
            return np.frombuffer(raw, np.uint8, self._payload).reshape(-1, self._place.record)
        return self._filters().decode(raw, mask)

    def _filters(self) -> ChunkCodec:
        """The dataset's filter pipeline, made when it is first needed."""
        if self._codec is None:
            self._codec = ChunkCodec(self._dataset, self._place.key.decode("utf-8", "backslashreplace"))
        return self._codec

    @property
    def _payload(self) -> int:
        return prod(self._place.chunk) * self._place.record

    def _stored(self, coordinates: tuple[int, ...], *, many: bool) -> tuple[int | None, int, int]:
        if many and self._index is None:
            self._index = {}
            self._dataset.chunk_iter(self._note)
        if self._index is not None:
            found = self._index.get(coordinates)
        else:
            info = self._dataset.get_chunk_info_by_coord(coordinates)
            found = None if info.byte_offset is None else (info.byte_offset, info.size, info.filter_mask)
        if found is None:
            return None, 0, 0
        return self._checked(coordinates, *found)

    def _note(self, info: Any) -> None:
        assert self._index is not None
        self._index[tuple(info.chunk_offset)] = (info.byte_offset, info.size, info.filter_mask)

    def _checked(
        self, coordinates: tuple[int, ...], offset: int, size: int, mask: int
    ) -> tuple[int, int, int]:
        if self._shift is None:
            # Some HDF5 versions count a chunk's place from the end of the user block: ask the bytes.
            _, data = self._dataset.read_direct_chunk(coordinates)
            there = os.pread(self._descriptor, size, self._start + offset)
            self._shift = 0 if there == bytes(data) else self._user_block
        offset += self._shift
        raw = not self._place.coded and not mask
        least = self._payload + (4 if self._place.filters else 0) if raw else 0
        if offset < 0 or offset + size > self._size or size < least:
            name = self._place.key.decode("utf-8", "backslashreplace")
            raise CheckpointError(
                f"{name}: the chunk at {coordinates} is said to lie outside the file: its index is damaged"
            )
        return self._start + offset, size, mask
