"""Sums without carry (XOR) over groups of words: what parity and Hamming codes keep of them.

The words of a group lie as far apart as there are groups, so that neighbours are in different groups, and
every sum is one of whole rows. All bits of a word are summed side by side: each of them is a code of its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

# Words of a row that are summed at a time: so that the sums stay in the cache.
_AT_A_TIME = 1 << 13
# Up to so many words, few calls on copies are faster than many on rows.
_SMALL = 1 << 16


def groups_of(count: int, group: int) -> int:
    """How many groups so many words make."""
    return -(-count // group)


def sums(words: NDArray[Any], group: int, members: NDArray[np.bool_]) -> NDArray[Any]:
    """The sums of chosen words of every group.

    Args:
        words: n words, unsigned, either byte order; word i·G + g belongs to group g of G.
        group: words in a group; those that are missing in the last ones count as 0.
        members: bool[sums, group]: which of a group's words each sum is of.

    Returns:
        Native words [sums, G].

    Example:
        >>> sums(np.array([1, 2, 4, 8, 16], np.uint8), 3, np.array([[True, True, True], [True, False, True]]))
        array([[21, 10],
               [17,  2]], dtype=uint8)
    """
    native = words.dtype.newbyteorder("=")
    count = groups_of(words.size, group)
    if words.size <= _SMALL:
        rows = np.zeros(group * count, native)
        rows[: words.size] = words
        rows = rows.reshape(group, count)
        return np.stack([np.bitwise_xor.reduce(rows[which], axis=0) for which in members])
    found = np.zeros((len(members), count), native)
    places = [np.flatnonzero(column).tolist() for column in members.T]
    for begin in range(0, count, _AT_A_TIME):
        end = min(begin + _AT_A_TIME, count)
        for row, wanted in enumerate(places):
            part = words[row * count + begin : row * count + end]
            for which in wanted:
                into = found[which, begin : begin + part.size]
                np.bitwise_xor(into, part, out=into)
    return found
