"""Names for damage: which tensor, element and bit a place in a file is, if the checkpoint still opens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from msgspec import Struct

from ckptflip.checkpoints import Checkpoint, opened
from ckptflip.checkpoints.extents import Extent, Mapped, Positions
from ckptflip.errors import CkptflipError
from ckptflip.faults.catalogue import Tensor


class Bit(Struct, frozen=True):
    """A bit of a file, and what it is.

    Attributes:
        at: 8 · byte + bit in the file.
        tensor: that it belongs to; "" where it belongs to none, or that is not known.
        element: flat index; None where the words lie coded.
        index: the same along each axis.
        bit: of the element, 0 the least significant; None likewise.
        part: of the file, where words lie coded.
    """

    at: int
    tensor: str = ""
    element: int | None = None
    index: tuple[int, ...] = ()
    bit: int | None = None
    part: str = ""


class _Known(Struct, frozen=True, eq=False):
    """What lies in one file, by ascending first bytes."""

    tensors: Sequence[Tensor]
    extents: Sequence[Extent]
    starts: Positions
    ends: Positions
    checksums: Sequence[int]

    def meeting(self, start: int, end: int) -> list[Extent]:
        """Extents that share bytes with a range."""
        return [self.extents[i] for i in np.flatnonzero((self.starts < end) & (self.ends > start)).tolist()]


class Names:
    """The names of places in a checkpoint's files.

    Args:
        checkpoint: as its framework names it; or a folder of files, which are opened one by one.
        paths: the files, in the seal's order.

    Attributes:
        why: why names are not known; "" where they are.
    """

    def __init__(self, checkpoint: Path, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._known: dict[int, _Known | None] = {}
        self.why = ""
        self._one_by_one = False
        try:
            self._open(checkpoint)
        except CkptflipError as why:
            self._one_by_one = checkpoint.is_dir()
            self.why = "" if self._one_by_one else str(why)

    def bits(self, file: int, at: Positions) -> list[Bit]:
        """What some bits of a file are.

        Args:
            file: its position.
            at: ascending, as 8 · byte + bit.
        """
        named = {int(a): Bit(int(a)) for a in at.tolist()}
        known = self._of(file)
        if known is None or not at.size:
            return list(named.values())
        for extent in known.meeting(int(at[0]) >> 3, (int(at[-1]) >> 3) + 1):
            tensor = known.tensors[extent.tensor]
            inside = at[(at >> 3 >= extent.start) & (at >> 3 < extent.end)]
            if extent.locate is None:
                named |= {a: Bit(a, tensor.name, part=extent.part) for a in inside.tolist()}
                continue
            held = extent.locate(inside)
            for row, word, bit in zip(
                held.rows.tolist(), held.words.tolist(), held.bits.tolist(), strict=True
            ):
                a = int(inside[row])
                named[a] = _bit(a, tensor, word, bit)
        return list(named.values())

    def ranges(self, file: int, start: int, end: int) -> list[tuple[int, int, str, str]]:
        """The tensors in a range of bytes, as (first byte, end, name, part); what is none has no name."""
        known = self._of(file)
        if known is None:
            return [(start, end, "", "")]
        found = []
        at = start
        for extent in sorted(known.meeting(start, end), key=lambda e: e.start):
            low, high = max(start, extent.start), min(end, extent.end)
            if low > at:
                found.append((at, low, "", ""))
            found.append((low, high, known.tensors[extent.tensor].name, extent.part))
            at = max(at, high)
        return [*found, (at, end, "", "")] if at < end else found

    def other(self, file: int, start: int, end: int) -> str:
        """What a range is that is in no tensor, as far as that is known."""
        known = self._of(file)
        if known is None:
            return ""
        if any(at < end and start < at + 4 for at in known.checksums):
            return "stored checksum"
        beside = [known.tensors[e.tensor].name for e in known.meeting(start, end)]
        return f"checksum or padding of {beside[0]}" if beside else "no tensor"

    def _of(self, file: int) -> _Known | None:
        if file not in self._known and self._one_by_one:
            try:
                self._open(self._paths[file], [file])
            except CkptflipError:
                self._known[file] = None
        return self._known.get(file)

    def _open(self, checkpoint: Path, files: Sequence[int] | None = None) -> None:
        with opened(checkpoint) as target:
            if not isinstance(target, Mapped):
                return
            wanted = range(len(self._paths)) if files is None else files
            numbers = {self._paths[i].resolve(): i for i in wanted}
            self._known |= _by_file(target, numbers)


def _by_file(target: Checkpoint, numbers: dict[Path, int]) -> dict[int, _Known | None]:
    """What lies in each file that is sealed."""
    assert isinstance(target, Mapped)
    by_file: dict[int, list[Extent]] = {}
    for each in target.extents():
        by_file.setdefault(each.file, []).append(each)
    checksums: dict[int, list[int]] = {}
    for stored in getattr(target, "crcs", ()):
        for file, at in stored.places:
            checksums.setdefault(file, []).append(at)
    found: dict[int, _Known | None] = {}
    for file, path in enumerate(target.files):
        extents = by_file.get(file, [])
        number = numbers.get(path.resolve())
        if number is not None:
            extents.sort(key=lambda e: e.start)
            starts = np.array([e.start for e in extents], np.int64)
            ends = np.array([e.end for e in extents], np.int64)
            found[number] = _Known(target.tensors, extents, starts, ends, checksums.get(file, ()))
    return found


def _bit(at: int, tensor: Tensor, word: int, bit: int) -> Bit:
    number = tensor.number
    element, part = divmod(word, number.parts)
    index = tuple(int(i) for i in np.unravel_index(element, tensor.shape)) if tensor.shape else ()
    return Bit(at, tensor.name, element, index, part * number.part_width + bit)
