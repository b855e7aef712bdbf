"""What was found, gathered cell by cell, and then listed with names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from ckptflip.bits import popcount
from ckptflip.protect.seals.checking import Checked
from ckptflip.protect.seals.mending import Cell
from ckptflip.protect.seals.naming import Names

# More flips than these are listed as a range with their number.
_MOST_IN_CELL = 512
_MOST_FLIPS = 10_000
# Flips in no tensor that are this near, in bits, are listed together.
_NEAR = 64

# File, first byte, end, bits that differ where that is known, mendable.
_Range = tuple[int, int, int, "int | None", bool]


class Damage(Struct, frozen=True, kw_only=True):
    """One thing that is not as it was sealed.

    Attributes:
        what: ``flip`` (one known bit), ``changed`` (a range); of whole files ``missing``, ``cut``, ``longer``
            or ``extra``; ``seal`` (the sidecar itself).
        file: its name.
        start: the first byte.
        end: the byte after the last.
        tensor: that lies there; "" where none does, or that is not known.
        element: flat index, for a flip.
        index: the same along each axis.
        bit: of the element, 0 the least significant; None where no element is named.
        bits: how many bits differ; None where that is not known.
        part: of the file, where the tensor lies coded, or what else there is to say; for a flip that is in no
            element, which bit of the byte it is.
        mendable: whether the seal can give the bytes back.
    """

    what: str
    file: str
    start: int
    end: int
    tensor: str = ""
    element: int | None = None
    index: tuple[int, ...] = ()
    bit: int | None = None
    bits: int | None = None
    part: str = ""
    mendable: bool = False


class Findings:
    """Damage of a checkpoint, before it has names.

    Args:
        found: by the pass.

    Attributes:
        unmended: cells whose bytes cannot be told.
    """

    def __init__(self, found: Checked) -> None:
        self._found = found
        self._flips: dict[int, list[NDArray[np.int64]]] = {}
        self._ranges: list[_Range] = []
        self._count = 0
        self.unmended: list[int] = []

    def add(self, cell: Cell) -> None:
        """Take in a cell."""
        file, start, end = self._found.seal.cuts.in_file(cell.number)
        if cell.good is None:
            self.unmended.append(cell.number)
        there = self._found.sizes[file] or 0
        if start >= there:
            return  # told of the file as a whole
        if cell.good is None:
            self._ranges.append((file, start, min(end, there), None, False))
            return
        differs = (cell.now ^ cell.good)[: there - start]
        flipped = popcount(differs)
        at = np.flatnonzero(differs)
        if not flipped:
            return
        if flipped > _MOST_IN_CELL or self._count + flipped > _MOST_FLIPS:
            self._ranges.append((file, start + int(at[0]), start + int(at[-1]) + 1, flipped, True))
            return
        self._count += flipped
        bits = np.flatnonzero(np.unpackbits(differs[at], bitorder="little"))
        self._flips.setdefault(file, []).append((start + at[bits >> 3]) * 8 + (bits & 7))

    def listed(self, names: Names | None, extra: Iterable[str]) -> list[Damage]:
        """Everything that was found, in the order of the files.

        Args:
            names: of what lies where; None where no byte in a file is damaged.
            extra: files that were not sealed.
        """
        rows = [*self._whole_files(extra), *self._of_seal(), *(self._inside(names) if names else ())]
        order = {self._name(i): i for i in range(len(self._found.paths))}
        return sorted(rows, key=lambda r: (order.get(r.file, len(order)), r.file, r.start, r.bit or 0))

    def _inside(self, names: Names) -> list[Damage]:
        """Damage inside of files."""
        rows: list[Damage] = []
        for file, several in self._flips.items():
            for at in several:
                rows += self._flips_of(file, names, at)
        for file, start, end, bits, mendable in _joined(self._ranges):
            parts = names.ranges(file, start, end)
            for low, high, tensor, part in parts:
                rows.append(
                    Damage(
                        what="changed", file=self._name(file), start=low, end=high, tensor=tensor, part=part,
                        bits=bits if len(parts) == 1 else None, mendable=mendable,
                    )
                )  # fmt: skip
        return rows

    def _flips_of(self, file: int, names: Names, at: NDArray[np.int64]) -> list[Damage]:
        named = names.bits(file, at)
        outside = [b.at for b in named if not b.tensor]
        rows = [self._outside(file, names, run) for run in _runs(outside)]
        return rows + [
            Damage(
                what="flip", file=self._name(file), start=b.at >> 3, end=(b.at >> 3) + 1, tensor=b.tensor,
                element=b.element, index=b.index, bit=b.bit, bits=1,
                part=b.part if b.bit is not None else _of_byte(b.at, b.part), mendable=True,
            )
            for b in named
            if b.tensor
        ]  # fmt: skip

    def _outside(self, file: int, names: Names, bits: Sequence[int]) -> Damage:
        """Neighbouring flips that are in no tensor: of a header, an index, a checksum."""
        start, end = bits[0] >> 3, (bits[-1] >> 3) + 1
        one, part = len(bits) == 1, names.other(file, start, end)
        return Damage(
            what="flip" if one else "changed",
            file=self._name(file),
            start=start,
            end=end,
            bits=len(bits),
            part=_of_byte(bits[0], part) if one else part,
            mendable=True,
        )

    def _whole_files(self, extra: Iterable[str]) -> list[Damage]:
        cuts = self._found.seal.cuts
        lost = {int(cuts.owner[c]) for c in self.unmended}
        rows = []
        for i, ((_, due), size) in enumerate(
            zip(self._found.seal.header.files, self._found.sizes, strict=True)
        ):
            name = self._name(i)
            if size is None:
                what, low, high = "missing", 0, due
            elif size != due:
                what, low, high = ("cut", size, due) if size < due else ("longer", due, size)
            else:
                continue
            good = what == "longer" or i not in lost
            rows.append(Damage(what=what, file=name, start=low, end=high, mendable=good))
        return rows + [Damage(what="extra", file=n, start=0, end=0) for n in extra]

    def _of_seal(self) -> list[Damage]:
        seal = self._found.seal
        name, block = seal.path.name, seal.header.block
        rows = [Damage(what="seal", file=name, start=0, end=0, part=fault) for fault in seal.faults]
        for number in sorted(self._found.bad_shares):
            at = seal.shares_at + number * block
            said = f"a share of group {number // seal.header.groups.shares if seal.header.groups else 0}"
            rows.append(Damage(what="seal", file=name, start=at, end=at + block, part=said))
        return rows

    def _name(self, file: int) -> str:
        header = self._found.seal.header
        # A file on its own may have been renamed since.
        return self._found.paths[0].name if header.kind == "file" else header.files[file][0]


def _of_byte(at: int, part: str) -> str:
    """Which bit of its byte a flip is, and where."""
    return f"bit {at & 7} of the byte" + (f": {part}" if part else "")


def _joined(ranges: Sequence[_Range]) -> list[_Range]:
    """Ranges in order; those of which no more is known, and that go on from each other, as one."""
    found: list[_Range] = []
    for each in sorted(ranges, key=lambda r: r[:2]):
        file, start, end, bits, mendable = each
        last = found[-1] if found else None
        if last and bits is None and last == (file, last[1], start, None, mendable):
            found[-1] = (file, last[1], end, None, mendable)
        else:
            found.append(each)
    return found


def _runs(bits: Sequence[int]) -> list[list[int]]:
    """Ascending bits, parted where eight bytes or more lie between."""
    found: list[list[int]] = []
    for bit in bits:
        if found and bit - found[-1][-1] < _NEAR:
            found[-1].append(bit)
        else:
            found.append([bit])
    return found
