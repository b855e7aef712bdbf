"""Drawing positions: distinct ones, or each with a small probability. Same key, same draw, everywhere."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ckptflip.faults.stream import Positions, Stream

_CHUNK = 1 << 20
_LN2 = 0.6931471805599453


def distinct(stream: Stream, end: int, n: int, taken: Positions | None = None) -> Positions:
    """`n` distinct positions in 0 … end-1, every set of them equally likely, ascending.

    Args:
        stream: where randomness comes from.
        end: how many positions there are; any size below 2^63.
        n: how many to draw.
        taken: ascending positions that must not be drawn.

    Raises:
        ValueError: fewer than `n` positions are left.

    Example:
        >>> distinct(Stream(1), 5, 5)
        array([0, 1, 2, 3, 4])
    """
    barred = np.empty(0, np.int64) if taken is None else taken
    left = end - barred.size
    if n > left:
        raise ValueError(f"{n} positions wanted, {left} left")
    if n > left // 2:
        # So many that rejection would crawl: draw those to leave out instead.
        free = np.setdiff1d(np.arange(end, dtype=np.int64), barred, assume_unique=True)
        return np.delete(free, distinct(stream, left, left - n))
    if n == 1 and not barred.size:
        return stream.below(end, 1)
    chosen = np.empty(0, np.int64)
    while chosen.size < n:
        drawn = stream.below(end, n - chosen.size)
        chosen = union(chosen, drawn[~_member(drawn, barred)])
    return chosen


def union(first: Positions, second: Positions) -> Positions:
    """The positions in either array, ascending, each once.

    Example:
        >>> union(np.array([4, 1]), np.array([1, 2]))
        array([1, 2, 4])
    """
    both = np.sort(np.concatenate([first, second]))
    return both[np.diff(both, prepend=-1) > 0]


def bernoulli(stream: Stream, end: int, p: float) -> Positions:
    """Each position in 0 … end-1 independently with probability `p`, ascending.

    The gap before the next hit is geometric, so gaps are drawn instead of positions: their count is binomial,
    the positions follow without replacement, and time and memory grow with the hits alone. A gap is
    floor(E / -log(1-p)) with E exponential, exact for every p down to 1e-12 and below (Devroye, Non-Uniform
    Random Variate Generation, 1986, X.2).

    Example:
        >>> bernoulli(Stream(3), 4, 1.0)
        array([0, 1, 2, 3])
    """
    if p >= 1:
        return np.arange(end, dtype=np.int64)
    if p <= 0 or end == 0:
        return np.empty(0, np.int64)
    rate = float(_exponential(np.array(p)))
    hits: list[Positions] = []
    at = -1
    while at < end:
        expected = (end - at) * p
        # A gap that reaches `end` means "no more hits" and is capped there; n keeps their sum inside int64.
        n = min(_CHUNK, 2**62 // end, int(expected + 6 * math.sqrt(expected) + 16))
        uniform = (stream.raw(n).astype(np.float64) + 0.5) * 2.0**-64
        with np.errstate(over="ignore", divide="ignore"):  # below p = 1e-307 a gap can exceed every float
            gaps = np.minimum(_exponential(np.minimum(uniform, 1 - 2.0**-53)) / rate, float(end))
        positions = at + np.cumsum(gaps.astype(np.int64) + 1)
        hits.append(positions[positions < end])
        at = int(positions[-1])
    return np.concatenate(hits)


def _exponential(uniform: NDArray[np.float64]) -> NDArray[np.float64]:
    """-log(1 - u) for 0 < u < 1, the same to the last bit on every machine.

    The logarithms of numpy and of C libraries differ in their last bits from one processor to the next, which
    moves a hit by a position now and then. This one is made of what IEEE 754 fixes: with s = u / (2 - u),
    -log(1 - u) = 2 atanh s = 2 (s + s³/3 + s⁵/5 + …); above 1/2, powers of two are taken out of 1 - u first.
    """
    upper = uniform > 0.5
    fraction, exponent = np.frexp(np.where(upper, 1 - uniform, 1.0))
    s = np.where(upper, (1 - fraction) / (1 + fraction), uniform / (2 - uniform))
    square, series = s * s, np.zeros_like(s)
    for odd in range(35, 0, -2):  # s ≤ 1/3, so the next term is below the last bit
        series = series * square + 1 / odd
    logarithm: NDArray[np.float64] = 2 * s * series - np.where(upper, exponent, 0) * _LN2
    return logarithm


def _member(values: Positions, ascending: Positions) -> NDArray[np.bool_]:
    """Which of the values occur in an ascending array."""
    if not ascending.size:
        return np.zeros(values.shape, bool)
    at = np.minimum(np.searchsorted(ascending, values), ascending.size - 1)
    found: NDArray[np.bool_] = ascending[at] == values
    return found
