"""Protected rows: where values, check bytes, scale and bias of a row lie, and what the check bytes hold.

A protected row is a stored row with check bytes between its values and its scale: of codes, the digits of
their sum and a tag of 16 bits; of floats, a sum of 32 bits. To ATen it is a row of the same kind with
some columns more. What the checks find: docs/design/abft-embeddings.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ckptflip.errors import UsageError

LAYOUTS = ("int8", "int4", "int2", "fp32", "bf16")
_BITS = {"int8": 8, "int4": 4, "int2": 2, "fp32": 32, "bf16": 16}
# The multipliers of the tag, as in embedding_bag.h.
MIX_NUMBERS, MIX_ROW = 0x9E3779B97F4A7C15, 0xD1B54A32D192ED03
_MOST_DIGITS = 8


def digit_weights(dim: int, bits: int) -> tuple[int, ...]:
    """What the digits of a sum of codes count for; the first counts 1, and all together `dim`.

    Every sum from 0 to dim · (2^bits − 1) can be written with digits that are codes themselves. As the
    weights add up to `dim`, a bias that is added to every column cancels in Σ columns −
    Σ weight · digit column.

    Args:
        dim: columns.
        bits: of a code.

    Example:
        >>> digit_weights(64, 8), digit_weights(64, 4), digit_weights(512, 8)
        ((1, 63), (1, 16, 47), (1, 256, 255))
    """
    weights, place = [], 1
    while dim:
        weights.append(min(place, dim))
        dim -= weights[-1]
        place <<= bits
    return tuple(weights)


def position_weights(dim: int) -> NDArray[np.int64]:
    """What each column counts for in the weighted sum, int64[dim]: distinct for any 256 columns in a row."""
    weights: NDArray[np.int64] = (np.arange(dim) & 255) - 128
    return weights


@dataclass(frozen=True)
class Row:
    """The layout of the rows of one protected table.

    Attributes:
        layout: of `LAYOUTS`.
        dim: columns.

    Raises:
        UsageError: another layout; no columns, or more than check bytes can stand for.

    Example:
        >>> row = Row("int8", 64)
        >>> row.stored_width, row.width, row.tag, row.aten_columns
        (72, 76, 66, 68)
    """

    layout: str
    dim: int

    def __post_init__(self) -> None:
        if self.layout not in _BITS:
            raise UsageError(f"layout {self.layout!r} cannot be protected: use {', '.join(LAYOUTS)}")
        if self.dim < 1 or (self.coded and self.bits * len(self.weights) > 32):
            raise UsageError(f"a protected {self.layout} table cannot have {self.dim} columns")

    @property
    def bits(self) -> int:
        """Of a value."""
        return _BITS[self.layout]

    @property
    def coded(self) -> bool:
        """Whether values are codes, with a scale and a bias for each row."""
        return self.bits <= 8

    @cached_property
    def weights(self) -> tuple[int, ...]:
        """Of the digits; () for floats."""
        return digit_weights(self.dim, self.bits) if self.coded else ()

    @property
    def check(self) -> int:
        """The first check byte: so many bytes the values take."""
        return -(-self.dim * self.bits // 8)

    @property
    def check_size(self) -> int:
        """Check bytes of a row."""
        return 8 if self.coded and self.bits * len(self.weights) > 16 else 4

    @property
    def tag(self) -> int:
        """The first byte of the tag of 16 bits; of floats, of the sum."""
        return self.check + self.check_size - (2 if self.coded else 4)

    @property
    def numbers(self) -> int:
        """Bytes of scale and bias together."""
        return {8: 8, 4: 4, 2: 4}.get(self.bits, 0)

    @property
    def stored_width(self) -> int:
        """Bytes of a row before it is protected."""
        return self.check + self.numbers

    @property
    def width(self) -> int:
        """Bytes of a protected row."""
        return self.stored_width + self.check_size

    @property
    def aten_columns(self) -> int:
        """The columns that an unmodified operator sees."""
        return (self.check + self.check_size) * 8 // self.bits

    @property
    def first_digit(self) -> int:
        """The column of the digit that counts 1, as an unmodified operator sees it."""
        return self.check * 8 // self.bits

    def plan(self, rows: int) -> bytes:
        """The table as the kernel wants it described: see `Table` in embedding_bag.h."""
        digits = [*self.weights, *[0] * (_MOST_DIGITS - len(self.weights))]
        head = [self.bits, rows, self.width, self.dim, self.check, self.tag, len(self.weights)]
        return np.array([*head, *digits], np.int64).tobytes()
