"""Which words of an HDF5 file lie where: contiguous data, and chunks that are stored byte for byte."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod

import numpy as np

from ckptflip.checkpoints.extents import Extent, Held, Locate, Positions, bits_of
from ckptflip.checkpoints.hdf5.places import Chunks
from ckptflip.checkpoints.hdf5.types import Field
from ckptflip.checkpoints.hdf5.walker import Dataset

# Records by their positions in a stored part: positions in the dataset, -1 for padding.
_Number = Callable[[Positions], Positions]


def of_dataset(tensor: int, place: Dataset, field: Field, chunks: Callable[[], Chunks]) -> Iterator[Extent]:
    """The ranges of the file in which words of one tensor lie.

    Args:
        tensor: its position in the catalogue.
        place: its dataset.
        field: its numbers in a record.
        chunks: gives the dataset's chunks, for one that is chunked.
    """
    if not place.records:
        return
    if place.kind == "flat":
        size = place.records * place.record
        locate = _locate(place, field, place.offset, place.records, lambda record: record)
        yield Extent(tensor, 0, place.offset, place.offset + size, locate)
    elif place.kind == "chunked":
        for origin, offset, size, mask in chunks().stored():
            name = f"chunk {','.join(str(o // c) for o, c in zip(origin, place.chunk, strict=True))}"
            if place.coded or mask:
                yield Extent(tensor, 0, offset, offset + size, part=name)
            else:
                locate = _locate(place, field, offset, prod(place.chunk), _in_chunk(place, origin))
                yield Extent(tensor, 0, offset, offset + size, locate)


def _locate(place: Dataset, field: Field, start: int, records: int, number: _Number) -> Locate:
    """Finds words among records that lie one after the other."""
    size = field.number.word_size

    def locate(at: Positions) -> Held:
        byte = (at >> 3) - start
        record, inside = np.divmod(byte, place.record)
        word, within = np.divmod(inside - field.offset, size)
        fits = (byte >= 0) & (record < records) & (word >= 0) & (word < field.words)
        rows = np.flatnonzero(fits)
        numbers = number(record[rows])
        rows, numbers = rows[numbers >= 0], numbers[numbers >= 0]
        bits = bits_of(within[rows] * 8 + (at[rows] & 7), field.stored)
        return Held(rows, numbers * field.words + word[rows], bits)

    return locate


def _in_chunk(place: Dataset, origin: tuple[int, ...]) -> _Number:
    """Records of a chunk as records of the dataset; those beyond its edges are padding."""

    def number(records: Positions) -> Positions:
        index = [i + o for i, o in zip(np.unravel_index(records, place.chunk), origin, strict=True)]
        inside = np.ones(records.shape, bool)
        for along, length in zip(index, place.shape, strict=True):
            inside &= along < length
        found = np.full(records.shape, -1, np.int64)
        found[inside] = np.ravel_multi_index([i[inside] for i in index], place.shape)
        return found

    return number
