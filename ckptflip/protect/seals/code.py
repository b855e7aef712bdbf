"""The erasure code: shares from which lost blocks of a group follow, by XOR of bit planes alone.

A Cauchy Reed-Solomon code over GF(2^8) (Blömer et al., "An XOR-based erasure-resilient coding scheme", ICSI
TR-95-048): any `s` lost blocks of a group are restored from any `s` of its shares. A block is read as eight
planes; bit i of the symbols lies in plane i, so that multiplying by a constant is XOR of whole planes, which
numpy does at memory speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

# x^8 + x^4 + x^3 + x^2 + 1, as in most Reed-Solomon codes.
_POLYNOMIAL = 0x11D
MOST = 256

Planes = NDArray[np.uint64]


@cache
def coefficients(rows: int, shares: int) -> NDArray[np.uint8]:
    """What each block of a group is multiplied by in each share, shape (shares, rows).

    The first share is the plain XOR of all blocks. Every square part of the matrix can be inverted.

    Args:
        rows: blocks of a group.
        shares: of a group; with the rows at most 256.

    Example:
        >>> coefficients(3, 2)[0].tolist()
        [1, 1, 1]
    """
    points = range(shares, MOST)
    columns = list(points)  # the first row becomes ones
    scaled = [
        [_times(_inverse(i ^ p), c) for p, c in zip(points, columns, strict=True)] for i in range(shares)
    ]
    scaled = [_sparsest(row, rows) if i else row for i, row in enumerate(scaled)]
    # Of all columns that there could be, those that cost the fewest XORs.
    cost = [sum(len(_schedule(row[j])) for row in scaled) for j in range(len(points))]
    chosen = sorted(sorted(range(len(points)), key=lambda j: (cost[j], j))[:rows])
    return np.array([[row[j] for j in chosen] for row in scaled], np.uint8).reshape(shares, rows)


def accumulate(into: Planes, planes: Planes, coefficient: int) -> None:
    """Add a multiple of some blocks to others.

    Args:
        into: shape (blocks, 8, words of a plane); altered.
        planes: the same.
        coefficient: what they are multiplied by, 0 to 255.
    """
    if coefficient == 1:
        np.bitwise_xor(into, planes, out=into)
        return
    for to, source in _schedule(coefficient):
        np.bitwise_xor(into[:, to], planes[:, source], out=into[:, to])


def solved(
    matrix: NDArray[np.uint8], lost: Sequence[int], shares: Sequence[int], left: Sequence[Planes]
) -> list[Planes]:
    """The lost blocks of a group.

    Args:
        matrix: the code's coefficients.
        lost: the rows of the lost blocks.
        shares: the shares that are used, as many.
        left: of each share, what is left of it when the blocks that are there are taken out.

    Returns:
        The lost blocks, in their order.
    """
    inverse = _inverted([[int(matrix[s, r]) for r in lost] for s in shares])
    found = []
    for row in inverse:
        block = np.zeros_like(left[0])
        for coefficient, planes in zip(row, left, strict=True):
            if coefficient:
                accumulate(block, planes, coefficient)
        found.append(block)
    return found


@cache
def _tables() -> tuple[list[int], list[int]]:
    """Powers of the generator, twice over, and logarithms."""
    power, log = [0] * 510, [0] * 256
    value = 1
    for i in range(255):
        power[i] = power[i + 255] = value
        log[value] = i
        value <<= 1
        if value & 0x100:
            value ^= _POLYNOMIAL
    return power, log


def _times(a: int, b: int) -> int:
    if not a or not b:
        return 0
    power, log = _tables()
    return power[log[a] + log[b]]


def _inverse(a: int) -> int:
    power, log = _tables()
    return power[255 - log[a]]


@cache
def _schedule(coefficient: int) -> tuple[tuple[int, int], ...]:
    """The planes to be XORed for a multiplication, as (to, from)."""
    products = [_times(coefficient, 1 << i) for i in range(8)]
    return tuple((o, i) for o in range(8) for i in range(8) if products[i] >> o & 1)


def _sparsest(row: Sequence[int], count: int) -> list[int]:
    """A multiple of a row whose `count` cheapest entries cost the fewest XORs; the code stays as good."""

    def cost(scale: int) -> int:
        return sum(sorted(len(_schedule(_times(v, scale))) for v in row)[:count])

    best = min(range(1, MOST), key=cost)
    return [_times(v, best) for v in row]


def _inverted(matrix: list[list[int]]) -> list[list[int]]:
    """The inverse of a square matrix, by elimination."""
    size = len(matrix)
    rows = [[*row, *(int(i == j) for j in range(size))] for i, row in enumerate(matrix)]
    for column in range(size):
        pivot = next(r for r in range(column, size) if rows[r][column])
        rows[column], rows[pivot] = rows[pivot], rows[column]
        scale = _inverse(rows[column][column])
        rows[column] = [_times(v, scale) for v in rows[column]]
        for other in range(size):
            factor = rows[other][column]
            if other != column and factor:
                rows[other] = [v ^ _times(factor, p) for v, p in zip(rows[other], rows[column], strict=True)]
    return [row[size:] for row in rows]
