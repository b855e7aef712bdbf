"""Exact quantiles of numbers that are read in blocks, any number of times, in bounded memory.

So many numbers are kept and sorted as fit; of more, the wanted ones are found by their bits: a float64 read
as an integer, with its bits inverted where it is negative, keeps its order. Four passes count the numbers by
16 of their bits each, from the top, and end at the number of the wanted rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import floor, isfinite, nan

import numpy as np
from numpy.typing import NDArray

# Numbers that are kept: 64 MiB of them.
MOST_KEPT = 1 << 23
_DIGIT = 16
_TOP = np.uint64(1 << 63)

Read = Callable[[], Iterator[NDArray[np.float64]]]


class Quantiles:
    """The quantiles of a stream of float64 numbers, none of them NaN.

    Args:
        read: gives all numbers in blocks, the same ones each time it is called.
        most_kept: numbers that are held in memory; more are read four times more for each set of quantiles.

    Attributes:
        count: how many numbers there are.

    Example:
        >>> numbers = Quantiles(lambda: iter([np.array([3.0, -1.0]), np.array([2.0])]))
        >>> numbers.count, numbers.with_zeros(2, [0.0, 0.5, 1.0]), numbers.magnitudes([0.5])
        (3, [-1.0, 0.0, 3.0], [2.0])
    """

    def __init__(self, read: Read, most_kept: int = MOST_KEPT) -> None:
        self._read = read
        kept: list[NDArray[np.float64]] | None = []
        self.count = 0
        self._sum = np.longdouble(0)
        for block in read():
            self.count += block.size
            self._sum += block.sum(dtype=np.longdouble)
            if kept is not None and self.count <= most_kept:
                kept.append(block)
            else:
                kept = None
        self._kept = None if kept is None else np.sort(np.concatenate([np.empty(0), *kept]))

    def mean_with_zeros(self, zeros: int) -> float:
        """The mean of the numbers and so many zeros; NaN of none."""
        total = self.count + zeros
        return float(self._sum / total) if total else nan

    def with_zeros(self, zeros: int, shares: Sequence[float]) -> list[float]:
        """Quantiles of the numbers and so many zeros, interpolated linearly; NaN of none.

        Args:
            zeros: how many zeros to add.
            shares: which quantiles, 0 the minimum, 1 the maximum.
        """
        if not self.count + zeros:
            return [nan] * len(shares)
        below = self._below_zero() if zeros else 0
        wanted = _ranks(self.count + zeros, shares)
        own = sorted({_without(rank, below, zeros) for rank in wanted} - {-1})
        values = dict(zip(own, self._at(own, magnitudes=False), strict=True)) | {-1: 0.0}
        ranked = {rank: values[_without(rank, below, zeros)] for rank in wanted}
        return [_between(ranked, self.count + zeros, share) for share in shares]

    def magnitudes(self, shares: Sequence[float]) -> list[float]:
        """Quantiles of the numbers' magnitudes, interpolated linearly; NaN of none."""
        if not self.count:
            return [nan] * len(shares)
        wanted = _ranks(self.count, shares)
        ranked = dict(zip(wanted, self._at(wanted, magnitudes=True), strict=True))
        return [_between(ranked, self.count, share) for share in shares]

    def _below_zero(self) -> int:
        if self._kept is not None:
            return int(np.searchsorted(self._kept, 0.0))
        return sum(int(np.count_nonzero(block < 0)) for block in self._read())

    def _at(self, ranks: Sequence[int], *, magnitudes: bool) -> list[float]:
        """The numbers of these ranks, in ascending order."""
        if self._kept is not None:
            ordered = np.sort(np.abs(self._kept)) if magnitudes else self._kept
            return [float(ordered[rank]) for rank in ranks]
        return self._by_digits(ranks, magnitudes=magnitudes)

    def _by_digits(self, ranks: Sequence[int], *, magnitudes: bool) -> list[float]:
        # For each wanted rank, the top bits that are known so far and its rank among numbers that begin so.
        known = [(0, rank) for rank in ranks]
        for shift in range(64 - _DIGIT, -1, -_DIGIT):
            counts = {prefix: np.zeros(1 << _DIGIT, np.int64) for prefix, _ in known}
            for block in self._read():
                keys = _keys(np.abs(block) if magnitudes else block)
                # A shift by 64 bits leaves a number as it is.
                begin = keys >> np.uint64(shift + _DIGIT) if shift < 64 - _DIGIT else np.zeros_like(keys)
                for prefix, count in counts.items():
                    digits = (keys[begin == prefix] >> np.uint64(shift)) & np.uint64((1 << _DIGIT) - 1)
                    count += np.bincount(digits.astype(np.int64), minlength=count.size)
            known = [_narrowed(prefix, rank, counts[prefix]) for prefix, rank in known]
        return [float(v) for v in _numbers(np.array([prefix for prefix, _ in known], np.uint64))]


def _narrowed(prefix: int, rank: int, counts: NDArray[np.int64]) -> tuple[int, int]:
    """The next digit of the number of a rank, and its rank among those that share it."""
    ends = np.cumsum(counts)
    digit = int(np.searchsorted(ends, rank, side="right"))
    return prefix << _DIGIT | digit, rank - int(ends[digit] - counts[digit])


def _keys(numbers: NDArray[np.float64]) -> NDArray[np.uint64]:
    """Integers in the order of the numbers."""
    words = np.ascontiguousarray(numbers).view(np.uint64)
    return np.where(words & _TOP, ~words, words | _TOP)


def _numbers(keys: NDArray[np.uint64]) -> NDArray[np.float64]:
    """The numbers again."""
    return np.where(keys & _TOP, keys ^ _TOP, ~keys).view(np.float64)


def _ranks(total: int, shares: Sequence[float]) -> list[int]:
    """The ranks that quantiles lie at or between, in ascending order."""
    places = [share * (total - 1) for share in shares]
    return sorted({min(floor(p) + step, total - 1) for p in places for step in (0, 1)})


def _without(rank: int, below: int, zeros: int) -> int:
    """A rank among numbers and zeros as one among the numbers alone; -1 for a zero."""
    if rank < below:
        return rank
    return -1 if rank < below + zeros else rank - zeros


def _between(ranked: dict[int, float], total: int, share: float) -> float:
    place = share * (total - 1)
    low = floor(place)
    a, b = ranked[low], ranked[min(low + 1, total - 1)]
    if a == b or place == low or not isfinite(a):
        return a
    return a + (b - a) * (place - low)
