"""Giving damaged cells their bytes back: from shares where there are some, else from their CRC-32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from ckptflip.protect.seals import code, locating
from ckptflip.protect.seals.checking import Checked
from ckptflip.protect.seals.passing import Groups, add_blocks, digest_of, padded


class Cell(Struct, frozen=True, eq=False):
    """A damaged cell.

    Attributes:
        number: of the cell.
        now: its bytes; zeros where there are none.
        good: what they were, proven by the digest; None where that cannot be told.
    """

    number: int
    now: NDArray[np.uint8]
    good: NDArray[np.uint8] | None


def mended(found: Checked) -> Iterator[Cell]:
    """Every damaged cell, mended if the seal allows it. One group of blocks is held at a time."""
    effort = locating.Effort()
    groups = found.seal.header.groups
    if groups is None:
        yield from (_by_crc(found, cell, effort) for cell in found.bad)
        return
    by_group: dict[int, list[int]] = {}
    for cell in found.bad:
        by_group.setdefault(found.seal.cuts.block_of(cell) % groups.count, []).append(cell)
    for group, cells in sorted(by_group.items()):
        yield from _in_group(found, groups, group, cells, effort)


def _by_crc(found: Checked, cell: int, effort: locating.Effort) -> Cell:
    seal = found.seal
    now = found.stream.read(*seal.cuts.cell(cell))
    _, offset, _ = seal.cuts.in_file(cell)
    return Cell(cell, now, locating.mended(now, seal.digest(cell), seal.crc(cell), offset, effort))


def _in_group(
    found: Checked, groups: Groups, group: int, cells: Sequence[int], effort: locating.Effort
) -> Iterator[Cell]:
    """The damaged cells of one group: by its shares if they suffice, else first those that need none."""
    cuts = found.seal.cuts
    numbers = (group * groups.shares + s for s in range(groups.shares))
    good = [n for n in numbers if n not in found.bad_shares]
    lost = sorted({cuts.block_of(c) for c in cells})
    if len(lost) > len(good):
        by_crc = [_by_crc(found, cell, effort) for cell in cells]
        known = {c.number: c.good for c in by_crc if c.good is not None}
        lost = sorted({cuts.block_of(c.number) for c in by_crc if c.good is None})
    else:
        by_crc, known = [], {}
    blocks = _restored(found, groups, group, lost, good, known) if len(lost) <= len(good) else {}
    if by_crc and not blocks:
        yield from by_crc
        return
    for cell in cells:
        start, end = cuts.cell(cell)
        now = found.stream.read(start, end)
        block = cuts.block_of(cell)
        as_was = known.get(cell)
        if as_was is None and block in blocks:
            base = block * cuts.block
            as_was = blocks[block][start - base : end - base]
        proven = as_was is not None and digest_of(as_was) == found.seal.digest(cell)
        yield Cell(cell, now, as_was if proven else None)


def _restored(
    found: Checked,
    groups: Groups,
    group: int,
    lost: Sequence[int],
    good: Sequence[int],
    known: dict[int, NDArray[np.uint8]],
) -> dict[int, NDArray[np.uint8]]:
    """Lost blocks of a group, by number.

    Args:
        found: the damage.
        groups: how blocks are grouped.
        group: which one.
        lost: blocks, no more than there are good shares.
        good: numbers of the shares that may be used.
        known: cells that were mended already.
    """
    cuts, count = found.seal.cuts, groups.count
    used = list(good)[: len(lost)]
    read = [found.seal.share(n) for n in used]
    if not lost or any(share is None for share in read):
        return {}
    left = np.stack([padded(share, cuts.block)[0] for share in read if share is not None])[:, None]
    matrix = code.coefficients(groups.rows, groups.shares)
    rows = [n % groups.shares for n in used]
    for block in range(group, cuts.blocks, count):
        if block not in lost:
            data = _block(found, block, known)
            add_blocks(left, matrix[rows, block // count], padded(data, cuts.block))
    solved = code.solved(matrix, [b // count for b in lost], rows, list(left))
    return {b: planes.reshape(-1).view(np.uint8) for b, planes in zip(lost, solved, strict=True)}


def _block(found: Checked, block: int, known: dict[int, NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """A block as it was, of which some cells may have been mended."""
    cuts = found.seal.cuts
    cells = range(int(cuts.first[block]), int(cuts.first[block + 1]))
    base = int(cuts.edges[cells.start])
    data = found.stream.read(base, int(cuts.edges[cells.stop]))
    for cell in cells:
        if cell in known:
            start, end = cuts.cell(cell)
            data[start - base : end - base] = known[cell]
    return data
