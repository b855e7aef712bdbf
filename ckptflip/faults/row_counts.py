"""How often each row of a table was read: a file of counts, and the rows that were read most or least.

Counts are read in pieces, never as a whole: memory grows with the rows that are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from ckptflip.errors import SelectionError, UsageError
from ckptflip.faults.catalogue import Tensor, bare_name

# Pieces that stay in the processor's cache: twice as fast as larger ones.
_PIECE = 1 << 18


class Counts(Struct, frozen=True):
    """The counts of one table's rows.

    Attributes:
        path: the file.
        member: of an npz; "" in an npy file.
        dtype: of a count.
        rows: how many there are.
        start: the first byte of the counts, in the file or the member.
    """

    path: Path
    member: str
    dtype: np.dtype[Any]
    rows: int
    start: int

    def extreme(self, kind: str, count: int) -> NDArray[np.int64]:
        """The rows with the largest or the smallest counts, ascending.

        Rows are ordered by count, and those of equal counts by number, the lower one first. So the
        hottest k rows and the coldest n - k are always all n.

        Args:
            kind: ``hot`` or ``cold``.
            count: how many, 1 … rows.

        Raises:
            UsageError: the file cannot be read, or holds counts that are negative, infinite or NaN.
        """
        border, beyond = self._border(kind, count)
        found: list[NDArray[np.int64]] = []
        ties: list[NDArray[np.int64]] = []
        left, held, at = count - beyond, 0, 0
        for piece in self._pieces():
            inside = piece > border if kind == "hot" else piece < border
            found.append(np.flatnonzero(inside) + at)
            equal = np.flatnonzero(piece == border) + at
            at += piece.size
            if kind == "hot":
                ties.append(equal[: left - held])
                held += ties[-1].size
                continue
            ties.append(equal)
            held += equal.size
            while held - ties[0].size >= left:
                held -= ties.pop(0).size
        last = np.concatenate(ties)
        return np.sort(np.concatenate([*found, last if kind == "hot" else last[last.size - left :]]))

    def _border(self, kind: str, count: int) -> tuple[Any, int]:
        """The last count that belongs to the chosen rows, and how many rows lie strictly beyond it."""
        hot = kind == "hot"
        best = np.empty(0, self.dtype)
        waiting: list[NDArray[Any]] = []
        held, border = 0, None
        for piece in self._pieces():
            self._check(piece)
            if border is not None:
                piece = piece[piece > border if hot else piece < border]
            waiting.append(piece.copy())
            held += piece.size
            if held >= max(2 * count, _PIECE):
                best = _most(np.concatenate(waiting), count, hot=hot)
                border = best.min() if hot else best.max()
                waiting, held = [best], best.size
        best = _most(np.concatenate(waiting), count, hot=hot)
        border = best.min() if hot else best.max()
        return border, int(np.count_nonzero(best != border))

    def _check(self, piece: NDArray[Any]) -> None:
        low, high = piece.min(), piece.max()
        if not (low >= 0 and high < np.inf):  # NaN fails both
            raise UsageError(
                f"access counts {self.path}: a count is {low if not low >= 0 else high}; counts are finite "
                "numbers from 0"
            )

    def _pieces(self) -> Iterator[NDArray[Any]]:
        """All counts in order, in one buffer that is used again and again."""
        buffer = np.empty(min(_PIECE, self.rows), self.dtype)
        with _stream(self.path, self.member) as stream:
            stream.seek(self.start)
            for at in range(0, self.rows, _PIECE):
                piece = buffer[: self.rows - at]
                if not _filled(stream, piece.data.cast("B")):
                    raise UsageError(f"access counts {self.path}: the file ends before its last count")
                yield piece


class RowCounts:
    """A file of access counts: one array for all tables (npy), or one for each table by name (npz).

    Args:
        path: the file.

    Raises:
        UsageError: missing, or not a file of counts.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._known: dict[tuple[str, str, int], NDArray[np.int64]] = {}
        self._counts: dict[str, Counts] = {}
        if not self._path.is_file():
            raise UsageError(
                f"access counts {path}: there is no such file; ckptflip.recsys.tables.write_counts makes one"
            )
        with self._path.open("rb") as file:
            self._several = file.read(2) == b"PK"
        self._members = _members(self._path) if self._several else ("",)

    def extreme(self, tensor: Tensor, kind: str, count: int) -> NDArray[np.int64]:
        """The rows of a table with the largest or smallest counts, ascending; see `Counts.extreme`.

        Args:
            tensor: the table, or a field of it.
            kind: ``hot`` or ``cold``.
            count: how many, at most as many as it has.

        Raises:
            SelectionError: the file has no counts for this table, or another number of rows.
            UsageError: the file cannot be read.
        """
        member = self._member(tensor)
        if member not in self._counts:
            self._counts[member] = _counts(self._path, member)
        counts = self._counts[member]
        if counts.rows != tensor.shape[0]:
            hint = "" if self._several else "; for several tables, an npz has an array for each, by name"
            raise SelectionError(
                f"{tensor.name} has {tensor.shape[0]} rows, and access counts {self._path} "
                f"{counts.rows}{f' for {member!r}' if member else ''}{hint}"
            )
        key = (member, kind, count)
        # The fields of one table are asked for in turn.
        if key not in self._known:
            self._known = {key: counts.extreme(kind, count)}
        return self._known[key]

    def _member(self, tensor: Tensor) -> str:
        if not self._several:
            return ""
        names = [tensor.name, *tensor.aliases]
        # A field has the table's name and one part more.
        names += [n.rpartition(".")[0] for n in names]
        wanted = [*names, *(bare_name(n) for n in names), tensor.layer]
        found = next((n for n in wanted if n and n in self._members), None)
        if found is None:
            there = ", ".join(sorted(self._members)[:4]) + (" …" if len(self._members) > 4 else "")
            begins = {name.partition(".")[0] for name in self._members}
            example = f", as -t '{begins.pop()}*'" if len(begins) == 1 else ""
            raise SelectionError(
                f"access counts {self._path} have no array for {tensor.name}; there are {there or 'none'}. "
                f"Select these tensors alone{example}"
            )
        return found


def _most(values: NDArray[Any], count: int, *, hot: bool) -> NDArray[Any]:
    """The `count` largest or smallest values, in any order."""
    if values.size <= count:
        return values
    if hot:
        values.partition(values.size - count)
        return values[values.size - count :].copy()
    values.partition(count - 1)
    return values[:count].copy()


def _filled(stream: Any, view: memoryview) -> bool:
    """Fill a buffer; False when the stream ends first."""
    while view:
        got = stream.readinto(view)
        if not got:
            return False
        view = view[got:]
    return True


def _members(path: Path) -> tuple[str, ...]:
    import zipfile

    try:
        with zipfile.ZipFile(path) as archive:
            names = [n.removesuffix(".npy") for n in archive.namelist() if n.endswith(".npy")]
    except (OSError, zipfile.BadZipFile) as why:
        raise UsageError(f"access counts {path} cannot be read: {why}") from None
    return tuple(names)


@contextmanager
def _stream(path: Path, member: str) -> Iterator[Any]:
    """The bytes of an npy file, or of one in an npz.

    Raises:
        UsageError: it cannot be read.
    """
    errors: tuple[type[Exception], ...] = (OSError, EOFError)
    try:
        if not member:
            with path.open("rb", buffering=0) as file:
                yield file
            return
        import zipfile
        import zlib

        errors = (*errors, zipfile.BadZipFile, zlib.error)
        with zipfile.ZipFile(path) as archive, archive.open(f"{member}.npy") as inner:
            yield inner
    except errors as why:
        raise UsageError(f"access counts {path} cannot be read: {why}") from None


def _counts(path: Path, member: str) -> Counts:
    """What an npy file's header says."""
    from numpy.lib import format as npy

    where = f"access counts {path}{f', {member!r}' if member else ''}"
    with _stream(path, member) as stream:
        try:
            version = npy.read_magic(stream)
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, _, dtype = read(stream)
        except Exception as why:  # numpy parses the header as Python, with whatever that may raise
            raise UsageError(f"{where} is no array of numpy's (.npy or .npz): {why}") from None
        start = stream.tell()
    if dtype.kind not in "iuf" or len(shape) != 1 or dtype.itemsize > 8:
        raise UsageError(
            f"{where} must be integers or floats of one axis, a count per row; not {dtype} {shape}"
        )
    return Counts(path, member, dtype, shape[0], start)
