"""Which calls of a model are hit, and the seed of each draw in them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import inf
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from ckptflip.errors import UsageError
from ckptflip.faults.stream import philox, philox_one

# The last word of the counter. A `Stream` has 0 there, a schedule another number: no draw shares theirs.
_DOMAIN = 0x11FEFA17


class Due:
    """Which calls, counted from 0, are hit.

    Args:
        calls: these alone: a number, a range, or any collection of numbers; None: all.
        every: the N-th, 2N-th, … call, counted from 1; None: all.
        once: only the first of those.

    Raises:
        UsageError: numbers that make no sense, or no call at all.

    Example:
        >>> due = Due(range(10), every=4)
        >>> [call for call in range(20) if due(call)]
        [3, 7]
    """

    def __init__(
        self, calls: int | Iterable[int] | None = None, every: int | None = None, once: bool = False
    ) -> None:
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise UsageError(f"every must be a whole number of calls, 1 or more, not {every!r}")
        self._calls = None if calls is None else _collection(calls)
        self._every = every
        self.once = bool(once)
        if self.next(0) == inf:
            raise UsageError(f"no call is ever hit with calls={calls!r} and every={every!r}: counted from 0")

    def __call__(self, call: int) -> bool:
        if self._calls is not None and call not in self._calls:
            return False
        return self._every is None or (call + 1) % self._every == 0

    def next(self, call: int) -> float:
        """The first call from this one on that is hit; infinity where there is none.

        Example:
            >>> Due(every=4).next(4), Due([1, 2]).next(3)
            (7, inf)
        """
        every, asked = self._every or 1, self._calls
        if asked is None:
            return call + (-call - 1) % every
        if isinstance(asked, range):
            # A range may be long: from the call on, what holds of it comes round after `every`.
            start = max(0, -((asked.start - call) // asked.step))
            return next((n for n in asked[start : start + every] if (n + 1) % every == 0), inf)
        return min((n for n in asked if n >= call and (n + 1) % every == 0), default=inf)


def _collection(calls: int | Iterable[int]) -> range | frozenset[int]:
    if isinstance(calls, range):
        found: range | frozenset[int] = calls if calls.step > 0 else calls[::-1]
        looked_at: Iterable[int] = [*calls[:1], *calls[-1:]]
    else:
        try:
            looked_at = found = frozenset([calls] if isinstance(calls, int) else calls)
        except TypeError:
            raise UsageError(f"calls are numbers, counted from 0, not {calls!r}") from None
    if not found or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in looked_at):
        raise UsageError(f"calls are numbers from 0 on, and at least one, not {calls!r}")
    return found


def seed_of(seed: int, call: int, name: str, times: int = 0) -> int:
    """The seed of what is drawn at one place in one call: 0 … 2^64-1.

    It depends on nothing else, so that hitting further places, or another order of theirs, changes no draw.

    Args:
        seed: of all that is drawn.
        call: of the model, from 0.
        name: of the place, such as ``activations/conv1``.
        times: how often the place was passed in this call before.

    Example:
        >>> seed_of(7, 0, "activations/conv1") != seed_of(7, 1, "activations/conv1")
        True
    """
    counter = (call & 0xFFFFFFFF, times & 0xFFFFFFFF, crc32(name.encode()), _DOMAIN)
    low, high, _, _ = philox_one(counter, (seed & 0xFFFFFFFF, seed >> 32))
    return low | high << 32


def keys_of(names: Sequence[str]) -> NDArray[np.uint64]:
    """What `seeds_of` knows places by."""
    return np.array([crc32(name.encode()) for name in names], np.uint64)


def seeds_of(seed: int, call: int, keys: NDArray[np.uint64]) -> list[int]:
    """`seed_of` the first draw at many places, in one go.

    Args:
        seed, call: as for `seed_of`.
        keys: of the places.

    Example:
        >>> seeds_of(7, 3, keys_of(["inputs"])) == [seed_of(7, 3, "inputs")]
        True
    """
    zero = np.zeros_like(keys)
    counter = (zero + np.uint64(call & 0xFFFFFFFF), zero, keys, zero + np.uint64(_DOMAIN))
    low, high, _, _ = philox(counter, (seed & 0xFFFFFFFF, seed >> 32))
    seeds: list[int] = (low | high << np.uint64(32)).tolist()
    return seeds
