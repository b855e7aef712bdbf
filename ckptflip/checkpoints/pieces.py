"""Where the words of a tensor lie: boxes of it, each at regular distances in one file."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from math import prod
from operator import mul
from typing import Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from ckptflip.bits import NumberFormat

Positions = NDArray[np.int64]
# Up to so many pieces, each is asked in turn which words it holds.
_FEW_PIECES = 16


class Piece(Struct, frozen=True, gc=False):
    """A box of a tensor whose words lie at regular distances in one file.

    Attributes:
        file: position in the checkpoint's list of files; positions beyond the list are coded blobs, whose
            decoded bytes count as a file of their own (see `ckptflip.checkpoints.laid.Blobs`).
        offset: the byte of the box's first word.
        shape: words along each axis of the box.
        strides: bits from one word to the next along each axis.
        start: where the box begins along each axis of the layout; () at the origin.
    """

    file: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: tuple[int, ...] = ()

    def span(self, width: int) -> tuple[int, int]:
        """The first byte of all words of `width` bits, and the byte after the last one."""
        reach = [(n - 1) * s for n, s in zip(self.shape, self.strides, strict=True)]
        low, high = sum(r for r in reach if r < 0), sum(r for r in reach if r > 0)
        return self.offset + (low >> 3), self.offset - (-(high + width) >> 3)


class Layout(Struct, frozen=True, gc=False):
    """Where the words of one tensor lie.

    Attributes:
        dims: the axes over which words are numbered in C order. Their product is the number of words; they
            may be another factorisation than the tensor's shape, as (blocks, 2, 16) for packed blocks.
        pieces: disjoint boxes that cover all of it.
        number: the format of an element.
        order: byte order of the words in the file, ``<`` or ``>``.
        bits: the width of a word in the file where words are packed tighter than bytes, else 0.
    """

    dims: tuple[int, ...]
    pieces: tuple[Piece, ...]
    number: NumberFormat
    order: str = "<"
    bits: int = 0

    @property
    def stored(self) -> np.dtype[Any]:
        """The dtype of a word as it lies in the file; bytes where words are packed."""
        return np.dtype("u1") if self.bits else self.number.word_dtype.newbyteorder(self.order)  # type: ignore[arg-type]

    @property
    def width(self) -> int:
        """Bits of a word in the file."""
        return self.bits or self.number.word_size * 8


def strides_of(shape: tuple[int, ...], width: int) -> tuple[int, ...]:
    """Distances in bits between neighbours along each axis, for words of `width` bits in C order.

    Example:
        >>> strides_of((2, 3), 32)
        (96, 32)
    """
    return tuple(accumulate(reversed(shape[1:]), mul, initial=width))[::-1] if shape else ()


def contiguous(
    file: int, offset: int, number: NumberFormat, shape: tuple[int, ...], order: str = "<", bits: int = 0
) -> Layout:
    """The layout of a tensor whose words lie one after the other.

    Args:
        file: position in the checkpoint's list of files.
        offset: the first byte.
        number: the format of an element.
        shape: the tensor's shape, in elements.
        order: ``<`` or ``>``.
        bits: for words packed tighter than bytes, their width.

    Example:
        >>> from ckptflip.bits import lookup
        >>> contiguous(0, 64, lookup("complex64"), (2, 2)).dims
        (2, 2, 2)
    """
    dims = shape if number.parts == 1 else (*shape, number.parts)
    piece = Piece(file, offset, dims, strides_of(dims, bits or number.word_size * 8))
    return Layout(dims, (piece,), number, order, bits)


def located(layout: Layout, words: Positions) -> Iterator[tuple[Piece, NDArray[np.intp] | slice, Positions]]:
    """Words by the piece that holds them.

    Args:
        layout: of the tensor.
        words: ascending flat positions.

    Yields:
        The piece; which of the words it holds; the place of each in bits, counted from the file's first byte.
    """
    if len(layout.pieces) == 1 and layout.pieces[0].shape == layout.dims:
        piece = layout.pieces[0]
        if piece.strides == strides_of(layout.dims, layout.width):
            yield piece, slice(None), piece.offset * 8 + words * layout.width
        else:
            yield piece, slice(None), _addresses(piece, np.unravel_index(words, layout.dims))
        return
    axes = np.unravel_index(words, layout.dims)
    for piece, rows in _assigned(layout, axes):
        inside = [a[rows] - s for a, s in zip(axes, piece.start or (0,) * len(axes), strict=True)]
        yield piece, rows, _addresses(piece, inside)


def is_plain(layout: Layout) -> bool:
    """Whether all words lie one after the other, each in bytes of its own."""
    if len(layout.pieces) != 1 or layout.bits:
        return False
    piece = layout.pieces[0]
    return piece.shape == layout.dims and piece.strides == strides_of(layout.dims, layout.width)


def _addresses(piece: Piece, inside: Any) -> Positions:
    address: Positions = np.full(len(inside[0]) if piece.shape else 1, piece.offset * 8, np.int64)
    for along, stride in zip(inside, piece.strides, strict=True):
        address = address + along * stride
    return address


def _assigned(layout: Layout, axes: Any) -> Iterator[tuple[Piece, NDArray[np.intp]]]:
    """Which words each piece holds, pieces without any left out."""
    if len(layout.pieces) > _FEW_PIECES:
        cells = _cells(layout)
        if cells is not None:
            yield from _by_cell(layout, axes, *cells)
            return
    for piece in layout.pieces:
        held = np.ones(axes[0].shape, bool)
        for along, start, length in zip(axes, piece.start or (0,) * len(axes), piece.shape, strict=True):
            held &= (along >= start) & (along < start + length)
        rows = np.flatnonzero(held)
        if rows.size:
            yield piece, rows


def _cells(layout: Layout) -> tuple[tuple[int, ...], Positions] | None:
    """The grid on which all pieces begin, and the number of each piece's cell; None when there is none."""
    starts = np.array([p.start or (0,) * len(layout.dims) for p in layout.pieces], np.int64)
    grid = np.array([p.shape for p in layout.pieces], np.int64).max(axis=0)
    if not (grid > 0).all() or (starts % grid).any():
        return None
    counts = tuple(-(-n // int(g)) for n, g in zip(layout.dims, grid, strict=True))
    if prod(counts) >= 1 << 62:
        return None
    return tuple(grid.tolist()), np.ravel_multi_index(tuple((starts // grid).T), counts).astype(np.int64)


def _by_cell(
    layout: Layout, axes: Any, grid: tuple[int, ...], numbers: Positions
) -> Iterator[tuple[Piece, NDArray[np.intp]]]:
    counts = tuple(-(-n // g) for n, g in zip(layout.dims, grid, strict=True))
    cell = np.ravel_multi_index([a // g for a, g in zip(axes, grid, strict=True)], counts)
    order = np.argsort(numbers, kind="stable")
    rows = np.argsort(cell, kind="stable")
    firsts = np.flatnonzero(np.diff(cell[rows], prepend=-1))
    ascending = numbers[order]
    for part in np.split(rows, firsts[1:]) if rows.size else ():
        at = int(np.searchsorted(ascending, cell[part[0]]))
        if at < ascending.size and ascending[at] == cell[part[0]]:
            yield layout.pieces[order[at]], part
