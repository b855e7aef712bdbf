"""Finding what was flipped in a cell from its CRC-32, proven by its digest, where there are no shares.

A CRC is affine over GF(2): the CRC of the damaged cell XOR that of the good one depends on the flipped bits
alone. One flip follows from it at once (the CRC's period, 2^32-1 bits, is beyond any cell). Two flips have a
few candidates, any damage within four aligned bytes one for each place. The digest says which one is right.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ckptflip.checkpoints import crc
from ckptflip.protect.seals.passing import digest_of

_ALGORITHM = "crc32"
_WORD = 4
# Beyond, tables and sorting would take more memory than a pass is allowed to.
_LARGEST = 1 << 20
# Of random masks one in 280 has so few.
_FEW_BITS = 8
# The searches cost as much as digesting the cell so many times.
_SEARCH = 2000

# Damaged bytes of a cell, and what was XORed into each.
_Candidate = tuple[NDArray[np.int64], NDArray[np.uint8]]


class Effort:
    """How many bytes may still be digested to try candidates: much damage must not cost hours.

    A search costs as much as digesting some bytes does. Single flips are looked for whatever is left.
    """

    def __init__(self, left: int = 1 << 31) -> None:
        self._left = left

    def spend(self, cost: int) -> bool:
        """Take so much; whether it was there."""
        self._left -= cost
        return self._left >= 0


def mended(
    data: NDArray[np.uint8], digest: bytes, good: int, offset: int, effort: Effort
) -> NDArray[np.uint8] | None:
    """A damaged cell as it was, if one flip, two, or changes in four aligned bytes explain it.

    Args:
        data: the bytes of the cell now.
        digest: of what they were.
        good: the CRC-32 of what they were.
        offset: where the cell begins in its file, by which words are aligned.
        effort: what may be spent; it is less afterwards.

    Returns:
        What they were, proven by the digest; None where nothing of the kind explains it.
    """
    change = zlib.crc32(data.data) ^ good
    if data.size > _LARGEST or not change:
        return None  # the CRC is damaged too, or the damage is one that it cannot see
    for at, masks in _candidates(data.size, change, offset, effort):
        tried = data.copy()
        np.bitwise_xor.at(tried, at, masks)
        if digest_of(tried) == digest:
            return tried
    return None


def _candidates(size: int, change: int, offset: int, effort: Effort) -> Iterator[_Candidate]:
    """Damage that would change the CRC so, likeliest and cheapest first."""
    order, ascending = _sorted_flips(size)
    low, high = (
        np.searchsorted(ascending, np.uint32(change)),
        np.searchsorted(ascending, np.uint32(change), side="right"),
    )
    yield from (_as_bytes(size, [one]) for one in order[low:high].tolist())
    if not effort.spend(_SEARCH * size):
        return
    words = _words(size, change, offset)
    later: list[_Candidate] = []
    for bits, candidate in words:
        if bits <= _FEW_BITS and effort.spend(size):
            yield candidate
        else:
            later.append(candidate)
    yield from (_as_bytes(size, pair) for pair in _pairs(size, change) if effort.spend(size))
    yield from (each for each in later if effort.spend(size))


def _as_bytes(size: int, flips: list[int]) -> _Candidate:
    """Bits, numbered from the last byte's, as bytes and masks."""
    bits = np.array(flips)
    return size - 1 - bits // 8, (1 << bits % 8).astype(np.uint8)


def _pairs(size: int, change: int) -> Iterator[list[int]]:
    order, ascending = _sorted_flips(size)
    wanted = _flips(size) ^ np.uint32(change)
    at = np.minimum(np.searchsorted(ascending, wanted), ascending.size - 1)
    hits = np.flatnonzero(ascending[at] == wanted)
    for one, other in zip(hits.tolist(), order[at[hits]].tolist(), strict=True):
        if one < other:
            yield [one, other]


def _words(size: int, change: int, offset: int) -> Iterator[tuple[int, _Candidate]]:
    """Changes of one aligned word, fewest bits first, with the number of their bits."""
    starts = np.arange(-offset % _WORD, size - _WORD + 1, _WORD)
    if not starts.size:
        return
    masks = crc.rewound(_ALGORITHM, change, size + 1)[size - starts]
    bits = np.bitwise_count(masks)
    for i in np.argsort(bits, kind="stable").tolist():
        word = np.frombuffer(int(masks[i]).to_bytes(_WORD, "little"), np.uint8)
        yield int(bits[i]), (starts[i] + np.arange(_WORD), word)


@lru_cache(maxsize=4)
def _flips(size: int) -> NDArray[np.uint32]:
    """The CRC's change by a flip of each bit, the last byte's first."""
    return crc.of_flips(_ALGORITHM, size).reshape(-1)


@lru_cache(maxsize=4)
def _sorted_flips(size: int) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
    order = np.argsort(_flips(size))
    return order, _flips(size)[order]
