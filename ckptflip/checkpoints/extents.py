"""From places in files back to words: which tensor holds a bit, as which bit of which element."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol, runtime_checkable

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from ckptflip.checkpoints.pieces import Layout, Piece

Positions = NDArray[np.int64]


class Held(Struct, frozen=True, eq=False):
    """Bits of a file that belong to words of a tensor.

    Attributes:
        rows: which of the asked bits these are.
        words: flat word positions in the tensor.
        bits: of each word, counted from its least significant one.
    """

    rows: Positions
    words: Positions
    bits: Positions


# Bits of a file, ascending, as 8 · byte + bit → those that belong to words.
Locate = Callable[[Positions], Held]


class Extent(Struct, frozen=True, eq=False):
    """A range of a file in which words of one tensor lie.

    Attributes:
        tensor: position in the catalogue.
        file: position among the checkpoint's files.
        start: its first byte.
        end: the byte after its last.
        locate: tells the words; None where they lie coded.
        part: what lies there, where it is coded: ``chunk 0,1``.
    """

    tensor: int
    file: int
    start: int
    end: int
    locate: Locate | None = None
    part: str = ""


@runtime_checkable
class Mapped(Protocol):
    """A checkpoint that knows which words lie where."""

    def extents(self) -> Iterable[Extent]:
        """Every range of a file in which words lie."""
        ...


def in_piece(layout: Layout, piece: Piece) -> Locate:
    """Finds the words of a box.

    Args:
        layout: of the tensor.
        piece: one of its boxes.
    """
    axes = sorted(range(len(piece.shape)), key=lambda a: -abs(piece.strides[a]))
    low = sum(min(0, (n - 1) * s) for n, s in zip(piece.shape, piece.strides, strict=True))

    def locate(at: Positions) -> Held:
        left = at - piece.offset * 8 - low
        index: list[Positions] = [np.zeros_like(at) for _ in axes]
        inside = left >= 0
        for axis in axes:
            length, stride = piece.shape[axis], abs(piece.strides[axis])
            step = np.minimum(left // stride, length - 1) if stride else np.zeros_like(left)
            left = left - step * stride
            index[axis] = step if piece.strides[axis] >= 0 else length - 1 - step
        rows = np.flatnonzero(inside & (left < layout.width))
        starts = piece.start or (0,) * len(index)
        whole = [i[rows] + s for i, s in zip(index, starts, strict=True)]
        words = np.ravel_multi_index(whole, layout.dims) if whole else np.zeros(rows.size, np.int64)
        return Held(rows, np.asarray(words, np.int64), bits_of(left[rows], layout.stored, layout.bits))

    return locate


def bits_of(inside: Positions, stored: np.dtype[np.generic], packed: int = 0) -> Positions:
    """Bits of words by their places in them: big-endian words begin with their most significant byte.

    Args:
        inside: 8 · byte + bit, from the word's first byte.
        stored: the words' dtype as stored.
        packed: their bits, where they are packed tighter than bytes.

    Example:
        >>> bits_of(np.array([0, 9]), np.dtype(">u2")).tolist()
        [8, 1]
    """
    if packed or stored.byteorder != ">":
        return inside
    byte, bit = np.divmod(inside, 8)
    return (stored.itemsize - 1 - byte) * 8 + bit
