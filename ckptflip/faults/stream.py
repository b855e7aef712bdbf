"""Random numbers from a key: the same on every machine, for ever, whatever was drawn before elsewhere.

Philox4x32-10 (Salmon, Moraes, Dror and Shaw, Parallel random numbers: as easy as 1, 2, 3, SC 2011) encrypts
a counter under a key, so a stream is named by its key alone. It is written out here, in whole-number
arithmetic on arrays, because numpy does not promise the streams of its `Generator`, and importing
`numpy.random` or `hashlib` is a tenth of the time that flipping one bit takes. The tests hold it to the
authors' known answers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ckptflip.errors import UsageError

Positions = NDArray[np.int64]
Words = NDArray[np.uint64]
Four = tuple[Words, Words, Words, Words]

MOST_SEED = 2**64 - 1
_FACTORS = (0xD2511F53, 0xCD9E8D57)
_MULTIPLIERS = (np.uint64(_FACTORS[0]), np.uint64(_FACTORS[1]))
_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_CHUNK = 1 << 18
# Words taken from a stream at a time, at the least.
_FEWEST = 16


def check_seed(seed: int) -> None:
    """Raise UsageError unless the seed is one that a stream can have."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MOST_SEED:
        raise UsageError(f"seed must be a whole number from 0 to 2^64-1, not {seed!r}")


class Stream:
    """A reproducible stream of random numbers, keyed on what is drawn.

    Args:
        seed: 0 … 2^64-1.
        place: which of 2^32 independent streams of this seed.

    Example:
        >>> Stream(7, 0).below(10, 5).tolist() == Stream(7, 0).below(10, 5).tolist()
        True
    """

    def __init__(self, seed: int, place: int = 0) -> None:
        self._key = (seed & 0xFFFFFFFF, seed >> 32)
        self._place = np.uint64(place)
        self._counter = 0

    def raw(self, n: int) -> Words:
        """`n` uniform 64-bit words. Each call goes on at a fresh counter; one counter gives two words."""
        found = np.empty((n + 1) // 2 * 2, np.uint64)
        for start in range(0, found.size // 2, _CHUNK):
            end = min(start + _CHUNK, found.size // 2)
            at = np.arange(self._counter, self._counter + end - start, dtype=np.uint64)
            zero = np.zeros_like(at)
            a, b, c, d = philox((at & _LOW, at >> _HALF, zero + self._place, zero), self._key)
            found[2 * start : 2 * end : 2] = a | b << _HALF
            found[2 * start + 1 : 2 * end : 2] = c | d << _HALF
            self._counter += end - start
        return found[:n]

    def below(self, end: int, n: int) -> Positions:
        """`n` uniform whole numbers in 0 … end-1, by rejection, so without modulo bias (0 < end < 2^63)."""
        if n == 1:
            return np.array([self.one_below(end)], np.int64)
        shift = np.uint64(64 - max((end - 1).bit_length(), 1))
        kept: list[Words] = []
        found = 0
        while found < n:
            drawn = self.raw(max(_FEWEST, 2 * (n - found))) >> shift
            drawn = drawn[drawn < np.uint64(end)]
            kept.append(drawn)
            found += drawn.size
        return np.concatenate(kept)[:n].astype(np.int64) if kept else np.empty(0, np.int64)

    def one_below(self, end: int) -> int:
        """What `below` gives for one number, as a plain integer: a draw of one fault costs little else."""
        shift = 64 - max((end - 1).bit_length(), 1)
        while True:
            first = self._counter
            self._counter += _FEWEST // 2
            for at in range(first, self._counter):
                a, b, c, d = philox_one((at & 0xFFFFFFFF, at >> 32, int(self._place), 0), self._key)
                for word in (a | b << 32, c | d << 32):
                    if word >> shift < end:
                        return word >> shift


def philox(counter: Four, key: tuple[int, int]) -> Four:
    """Philox4x32-10 of many counters under one key.

    Args:
        counter: the four 32-bit words of each counter, kept in uint64 arrays.
        key: two 32-bit words.

    Returns:
        Four 32-bit words for each counter, likewise.

    Example:
        >>> zero = np.zeros(1, np.uint64)
        >>> [hex(word[0]) for word in philox((zero, zero, zero, zero), (0, 0))]
        ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        left, right = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = (right >> _HALF) ^ c1 ^ np.uint64(k0), right & _LOW
        c2, c3 = (left >> _HALF) ^ c3 ^ np.uint64(k1), left & _LOW
        k0, k1 = (k0 + _STEPS[0]) & 0xFFFFFFFF, (k1 + _STEPS[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3


def philox_one(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """What `philox` gives for one counter, in plain integers: several times sooner than in arrays of one.

    Args:
        counter: four 32-bit words.
        key: two 32-bit words.

    Example:
        >>> [hex(word) for word in philox_one((0, 0, 0, 0), (0, 0))]
        ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        left, right = c0 * _FACTORS[0], c2 * _FACTORS[1]
        c0, c1 = right >> 32 ^ c1 ^ k0, right & 0xFFFFFFFF
        c2, c3 = left >> 32 ^ c3 ^ k1, left & 0xFFFFFFFF
        k0, k1 = k0 + _STEPS[0] & 0xFFFFFFFF, k1 + _STEPS[1] & 0xFFFFFFFF
    return c0, c1, c2, c3
