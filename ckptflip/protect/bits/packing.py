"""Chosen bits of words, stored without the others between them."""

from __future__ import annotations

from typing import Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Words = NDArray[Any]


class Slice(Struct, frozen=True):
    """Bits side by side in a word: 8 of them, stored as a byte, or one, stored as an eighth of a byte."""

    shift: int
    width: int


class Packing:
    """How the bits under a mask are stored: bytes for every eight neighbours, packed bits for the rest.

    Args:
        mask: the bits; others of a word are neither stored nor compared.
        dtype: of the words, unsigned, in native byte order.

    Attributes:
        mask: as given.
        dtype: as given.

    Example:
        >>> packing = Packing(0x1FF << 23, np.dtype(np.uint32))  # sign and exponent of a float32
        >>> packed = packing.pack(np.array([1.5, -2.0], np.float32).view(np.uint32))
        >>> packed, packing.size(1000)
        (array([127, 128,   2], dtype=uint8), 1125)
    """

    def __init__(self, mask: int, dtype: np.dtype[Any]) -> None:
        self.mask, self.dtype = mask, dtype
        self._slices = tuple(_slices(mask))

    def size(self, count: int) -> int:
        """Bytes that so many words take."""
        return sum(_size(one, count) for one in self._slices)

    def pack(self, words: Words) -> Bytes:
        """The chosen bits of words, in either byte order."""
        parts = []
        for one in self._slices:
            moved = words >> self.dtype.type(one.shift)
            if one.width == 8:
                parts.append(moved.astype(np.uint8))
            else:
                parts.append(np.packbits((moved & self.dtype.type(1)).astype(bool), bitorder="little"))
        return np.concatenate([np.empty(0, np.uint8), *parts])

    def differences(self, left: Bytes, right: Bytes, count: int) -> tuple[NDArray[np.int64], Words]:
        """Where packed words differ.

        Args:
            left, right: both packed from so many words.
            count: how many.

        Returns:
            Positions of words, ascending, and for each the bits that differ.
        """
        places, masks, start = [], [], 0
        for one in self._slices:
            end = start + _size(one, count)
            apart = left[start:end] ^ right[start:end]
            at = np.flatnonzero(apart)
            if one.width == 8:
                places.append(at)
                masks.append(apart[at].astype(self.dtype) << self.dtype.type(one.shift))
            elif at.size:
                row, bit = np.nonzero(np.unpackbits(apart[at, None], axis=1, bitorder="little"))
                places.append(at[row] * 8 + bit)
                masks.append(np.full(row.size, 1 << one.shift, self.dtype))
            start = end
        return joined(places, masks, self.dtype)

    def clear_unused(self, packed: Bytes, count: int) -> int:
        """Set the bits behind the last word's to 0, as they were packed; how many were not.

        One bit of so many words fills its last byte in part. What is left of it belongs to no word.

        Args:
            packed: from so many words; altered in place.
            count: how many.
        """
        used, end, found = count % 8, 0, 0
        for one in self._slices:
            end += _size(one, count)
            if used and one.width == 1:
                found += (int(packed[end - 1]) >> used).bit_count()
                packed[end - 1] &= (1 << used) - 1
        return found

    def flip(self, packed: Bytes, places: NDArray[np.int64], masks: Words, count: int) -> None:
        """XOR masks into packed words, in place. Positions are distinct."""
        start = 0
        for one in self._slices:
            end, part = start + _size(one, count), masks >> self.dtype.type(one.shift)
            if one.width == 8:
                packed[start + places] ^= part.astype(np.uint8)
            else:
                bits = (part & self.dtype.type(1)).astype(np.uint8) << (places % 8).astype(np.uint8)
                np.bitwise_xor.at(packed, start + places // 8, bits)
            start = end


def joined(
    places: list[NDArray[np.int64]], masks: list[Words], dtype: np.dtype[Any]
) -> tuple[NDArray[np.int64], Words]:
    """Positions and masks, those of one position put together; ascending."""
    if not any(at.size for at in places):
        return np.empty(0, np.int64), np.empty(0, dtype)
    distinct, which = np.unique(np.concatenate(places), return_inverse=True)
    together = np.zeros(distinct.size, dtype)
    np.bitwise_or.at(together, which, np.concatenate(masks))
    return distinct.astype(np.int64), together


def _slices(mask: int) -> list[Slice]:
    found, shift = [], 0
    while mask >> shift:
        if mask >> shift & 0xFF == 0xFF:
            found.append(Slice(shift, 8))
            shift += 8
        else:
            if mask >> shift & 1:
                found.append(Slice(shift, 1))
            shift += 1
    return found


def _size(one: Slice, count: int) -> int:
    return count if one.width == 8 else -(-count // 8)
