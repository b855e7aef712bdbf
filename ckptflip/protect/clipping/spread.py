"""How the values of a stream lie: extremes, mean and percentiles, in the same memory however long it is."""

from __future__ import annotations

from functools import cached_property
from math import inf, nan

import numpy as np
from numpy.typing import NDArray

_TOP = np.uint32(1 << 31)
_KEYS = 1 << 16


class Spread:
    """Counts of float32 and float64 values by the upper half of their words in float32.

    A float32 read as an integer, with its bits inverted where it is negative, keeps its order; its upper 16
    bits tell values apart by a part in 128 or less. Percentiles are rounded outwards to that, and never
    beyond the extremes, which are exact.

    Attributes:
        count: values so far.
        low, high: the least and the greatest; inf and -inf of none.
        odd: values that are NaN or infinite; they are counted here alone.

    Example:
        >>> spread = Spread()
        >>> spread.add(np.arange(1000, dtype=np.float32))
        >>> spread.low, spread.high, spread.mean
        (0.0, 999.0, 499.5)
        >>> spread.between(0.8)
        (99.0, 899.9999389648438)
    """

    def __init__(self) -> None:
        self.count = self.odd = 0
        self.low, self.high = inf, -inf
        self._sum = 0.0
        self._counts = np.zeros(_KEYS, np.int64)

    @property
    def mean(self) -> float:
        """The mean of the values; NaN of none."""
        return self._sum / self.count if self.count else nan

    def add(self, values: NDArray[np.float32 | np.float64]) -> None:
        """Add values, float32 or float64 of any shape."""
        flat = values.ravel()
        finite = np.isfinite(flat)
        if not finite.all():
            flat = flat[finite]
            self.odd += values.size - flat.size
        if not flat.size:
            return
        self.count += flat.size
        self.low, self.high = min(self.low, float(flat.min())), max(self.high, float(flat.max()))
        self._sum += float(flat.sum(dtype=np.float64))
        self._counts += np.bincount(_keys(_narrow(flat)) >> np.uint32(16), minlength=_KEYS)
        self.__dict__.pop("_ends", None)

    def between(self, share: float) -> tuple[float, float]:
        """The two values between which this share of all lies, as much cut off below as above.

        Args:
            share: more than 0, at most 1.

        Returns:
            Lower and upper; NaN of no values.
        """
        if not self.count:
            return nan, nan
        cut = (1 - share) / 2 * self.count
        lower = int(np.searchsorted(self._ends, cut, side="right"))
        upper = int(np.searchsorted(self._ends, self.count - cut, side="left"))
        first, last = _number(lower << 16), _number(upper << 16 | 0xFFFF)
        return max(self.low, first), min(self.high, last)

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        return np.cumsum(self._counts)


def _narrow(values: NDArray[np.float32 | np.float64]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        return values.astype(np.float32, copy=False)


def _keys(values: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Integers in the order of the values."""
    words = values.view(np.uint32)
    return np.where(words & _TOP, ~words, words | _TOP)


def _number(key: int) -> float:
    word = key ^ 0x80000000 if key & 0x80000000 else key ^ 0xFFFFFFFF
    return float(np.array([word], np.uint32).view(np.float32)[0])
