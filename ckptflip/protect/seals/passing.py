"""One pass over the stream: digests of cells, shares of groups. Memory does not grow with the checkpoint."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterator
from hashlib import blake2b

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from ckptflip.checkpoints.files import Progress
from ckptflip.protect.seals import code, work
from ckptflip.protect.seals.cuts import Cuts
from ckptflip.protect.seals.stream import Stream

DIGEST = 16
CRC = 4
_PIECE = 1 << 20
# Bytes whose planes are XORed together: numpy's calls cost as much as some tens of KiB do.
_TOGETHER = 1 << 17


class Groups(Struct, frozen=True):
    """How blocks are grouped for the erasure code: block `b` is row ``b // count`` of group ``b % count``.

    So neighbouring blocks lie in different groups, and a run of lost blocks is spread over all of them.

    Attributes:
        count: of groups.
        rows: blocks of a group; some groups have one less.
        shares: of a group.
    """

    count: int
    rows: int
    shares: int


def digest_of(data: NDArray[np.uint8]) -> bytes:
    """BLAKE2b of some bytes, 16 bytes of it."""
    return blake2b(data.data, digest_size=DIGEST).digest()


def table_of(
    cuts: Cuts,
    stream: Stream,
    groups: Groups | None,
    keep: Callable[[int, NDArray[np.uint8]], None],
    workers: int,
    progress: Progress | None,
) -> NDArray[np.uint8]:
    """Digest and CRC-32 of every cell, and the shares of every group, in one pass.

    Args:
        cuts: of the stream.
        stream: what is read.
        groups: the groups; None: no shares.
        keep: takes shares: (number of the first, their bytes, shape (shares, bytes of a block)). Those of one
            group follow each other.
        workers: threads.
        progress: told the bytes read.

    Returns:
        Shape (cells, 20).
    """
    table = np.empty((cuts.cells, DIGEST + CRC), np.uint8)

    def note(cell: int, data: NDArray[np.uint8]) -> None:
        table[cell, :DIGEST] = np.frombuffer(digest_of(data), np.uint8)
        table[cell, DIGEST:] = np.frombuffer(zlib.crc32(data.data).to_bytes(CRC, "little"), np.uint8)

    if groups is None:
        each_cell(cuts, stream, note, workers, progress)
        return table
    matrix = code.coefficients(groups.rows, groups.shares)
    told = _together(progress)

    def share(bounds: tuple[int, int]) -> None:
        low, high = bounds
        made = np.zeros((groups.shares, high - low, 8, cuts.block // 64), np.uint64)
        for row in range(groups.rows):
            first = row * groups.count + low
            last = min(row * groups.count + high, cuts.blocks)
            if first >= last:
                continue
            data = _cells_of(cuts, stream, first, last, note)
            told(data.size)
            add_blocks(made[:, : last - first], matrix[:, row], padded(data, cuts.block))
        keep(low * groups.shares, made.swapaxes(0, 1).reshape(-1, cuts.block // 8).view(np.uint8))

    work.over(_ranges(groups.count, max(1, _PIECE // 2 // cuts.block)), share, workers)
    return table


def each_cell(
    cuts: Cuts,
    stream: Stream,
    note: Callable[[int, NDArray[np.uint8]], None],
    workers: int,
    progress: Progress | None,
) -> None:
    """Read the whole stream and hand out its cells, on several threads, in any order."""
    told = _together(progress)

    def read(bounds: tuple[int, int]) -> None:
        told(_cells_of(cuts, stream, *bounds, note).size)

    work.over(_ranges(cuts.blocks, max(1, _PIECE // cuts.block)), read, workers)


def padded(data: NDArray[np.uint8], block: int) -> NDArray[np.uint64]:
    """Whole blocks as planes, the last one filled up with zeros: shape (blocks, 8, words of a plane)."""
    short = -data.size % block
    if short:
        data = np.concatenate([data, np.zeros(short, np.uint8)])
    return data.view(np.uint64).reshape(-1, 8, block // 64)


def add_blocks(shares: NDArray[np.uint64], factors: NDArray[np.uint8], planes: NDArray[np.uint64]) -> None:
    """Add one block of each group, times its coefficient, to each share.

    Args:
        shares: shape (shares, groups, 8, words of a plane); altered.
        factors: one for each share.
        planes: shape (groups, 8, words of a plane).
    """
    step = max(1, _TOGETHER // (planes[0].size * 8))
    for low in range(0, len(planes), step):
        high = low + step
        for share, factor in zip(shares, factors.tolist(), strict=True):
            code.accumulate(share[low:high], planes[low:high], factor)


def _cells_of(
    cuts: Cuts, stream: Stream, first: int, last: int, note: Callable[[int, NDArray[np.uint8]], None]
) -> NDArray[np.uint8]:
    """Read blocks first … last-1 and hand out their cells."""
    cells = range(int(cuts.first[first]), int(cuts.first[last]))
    base = int(cuts.edges[cells.start])
    data = stream.read(base, int(cuts.edges[cells.stop]))
    for cell in cells:
        start, end = cuts.cell(cell)
        note(cell, data[start - base : end - base])
    return data


def _ranges(count: int, step: int) -> Iterator[tuple[int, int]]:
    return ((low, min(count, low + step)) for low in range(0, count, step))


def _together(progress: Progress | None) -> Callable[[int], None]:
    """Progress as told by several threads, one at a time."""
    if progress is None:
        return lambda _: None
    lock = threading.Lock()

    def told(count: int) -> None:
        with lock:
            progress(count)

    return told
