"""Drawing positions: distinct ones, or each with a small probability. Same key, same draw, everywhere.

Only the raw 64-bit output of PCG64 is used. numpy promises that stream for ever; it does not promise the
streams of `Generator.choice` or `Generator.binomial`, which would tie a plan to numpy's version.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Positions = NDArray[np.int64]
_CHUNK = 1 << 20


class Stream:
    """A reproducible stream of random numbers, keyed on what is drawn.

    Args:
        key: whole numbers ≥ 0, such as (seed, position of the policy).

    Example:
        >>> Stream(7, 0).below(10, 5).tolist() == Stream(7, 0).below(10, 5).tolist()
        True
    """

    def __init__(self, *key: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(key[0], spawn_key=key[1:]))

    def raw(self, n: int) -> NDArray[np.uint64]:
        """`n` uniform 64-bit words."""
        return np.asarray(self._bits.random_raw(n), dtype=np.uint64)

    def below(self, end: int, n: int) -> Positions:
        """`n` uniform whole numbers in 0 … end-1, by rejection, so without modulo bias (0 < end < 2^63)."""
        shift = np.uint64(64 - max((end - 1).bit_length(), 1))
        kept: list[NDArray[np.uint64]] = []
        found = 0
        while found < n:
            drawn = self.raw(max(16, 2 * (n - found))) >> shift
            drawn = drawn[drawn < np.uint64(end)]
            kept.append(drawn)
            found += drawn.size
        return np.concatenate(kept)[:n].astype(np.int64) if kept else np.empty(0, np.int64)


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

    The gap before the next hit is geometric, so gaps are drawn instead of positions: their number is binomial,
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
    rate = -math.log1p(-p)
    hits: list[Positions] = []
    at = -1
    while at < end:
        expected = (end - at) * p
        # A gap that reaches `end` means "no more hits" and is capped there; n keeps their sum inside int64.
        n = min(_CHUNK, 2**62 // end, int(expected + 6 * math.sqrt(expected) + 16))
        uniform = (stream.raw(n).astype(np.float64) + 0.5) * 2.0**-64
        gaps = np.minimum(-np.log1p(-np.minimum(uniform, 1 - 2.0**-53)) / rate, float(end))
        positions = at + np.cumsum(gaps.astype(np.int64) + 1)
        hits.append(positions[positions < end])
        at = int(positions[-1])
    return np.concatenate(hits)


def _member(values: Positions, ascending: Positions) -> NDArray[np.bool_]:
    """Which of the values occur in an ascending array."""
    if not ascending.size:
        return np.zeros(values.shape, bool)
    at = np.minimum(np.searchsorted(ascending, values), ascending.size - 1)
    return ascending[at] == values
