"""How the bytes of a sealed set are cut: into blocks of one size, and cells that end where a file ends too.

All files count as one stream, end to end. The erasure code works on blocks of the stream, so that many small
files cost no more than a large one; digests are of cells, so that damage to one file casts no doubt on the
next.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

LEAST_BLOCK = 1 << 12
_USUAL_BLOCK = 1 << 16
_USUAL_BLOCKS = 1 << 12
# Bounds the tables of a seal, which are held in memory, whatever the size of the checkpoint.
MOST_BLOCKS = 1 << 20


class Cuts(Struct, frozen=True, eq=False):
    """Where files, blocks and cells begin in the stream, in bytes.

    Attributes:
        block: bytes of a block; the last one may be shorter.
        files: the first byte of each file, and the end, int64, shape (files + 1,).
        edges: the first byte of each cell, and the end, int64, shape (cells + 1,).
        first: the first cell of each block, and the number of cells, int64, shape (blocks + 1,).
        owner: the file of each cell, int64.
    """

    block: int
    files: NDArray[np.int64]
    edges: NDArray[np.int64]
    first: NDArray[np.int64]
    owner: NDArray[np.int64]

    @property
    def total(self) -> int:
        """Bytes of all files."""
        return int(self.files[-1])

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return self.first.size - 1

    @property
    def cells(self) -> int:
        """How many cells there are."""
        return self.edges.size - 1

    def cell(self, number: int) -> tuple[int, int]:
        """The first byte of a cell and the byte after its last, in the stream."""
        return int(self.edges[number]), int(self.edges[number + 1])

    def in_file(self, number: int) -> tuple[int, int, int]:
        """The file of a cell, and its first and end byte in that file."""
        start, end = self.cell(number)
        file = int(self.owner[number])
        base = int(self.files[file])
        return file, start - base, end - base

    def block_of(self, cell: int) -> int:
        """The block that a cell lies in."""
        return int(self.edges[cell]) // self.block


def cut(sizes: Sequence[int], block: int) -> Cuts:
    """Cut files of some sizes.

    Args:
        sizes: bytes of each file, in their order.
        block: bytes of a block.

    Example:
        >>> cuts = cut([5, 0, 6], 4)
        >>> cuts.edges.tolist(), cuts.owner.tolist(), cuts.first.tolist()
        ([0, 4, 5, 8, 11], [0, 0, 2, 2], [0, 1, 3, 4])
    """
    files = np.concatenate([[0], np.cumsum(np.asarray(sizes, np.int64), dtype=np.int64)]).astype(np.int64)
    total = int(files[-1])
    at_blocks = np.arange(0, total, block, dtype=np.int64)
    edges = np.unique(np.concatenate([at_blocks, files]))
    cells = edges[:-1]
    owner = np.searchsorted(files, cells, side="right") - 1
    first = np.append(np.searchsorted(cells, at_blocks), cells.size)
    return Cuts(block, files, edges, first.astype(np.int64), owner.astype(np.int64))


def block_for(total: int) -> int:
    """Bytes of a block for so many bytes in all: small in small checkpoints, 64 KiB from 256 MiB on.

    Example:
        >>> block_for(300_000), block_for(2 << 30), block_for(1 << 40)
        (4096, 65536, 1048576)
    """
    wished = min(max(LEAST_BLOCK, total // _USUAL_BLOCKS), _USUAL_BLOCK)
    needed = -(-total // MOST_BLOCKS)
    return 1 << (max(wished, needed) - 1).bit_length()
