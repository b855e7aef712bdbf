"""How a raw categorical value becomes a row of an embedding table: hashed, as it is, or by a vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ckptflip.errors import UsageError

Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]

_MOST_VALUE = 2**32 - 1


class Ids(Protocol):
    """What a reader asks for rows."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows of each table."""

    def rows(self, values: Integers, missing: Flags) -> tuple[Integers, Flags | None, Flags | None]:
        """Rows of raw values.

        Args:
            values: int64[n, tables], 0 … 2^32 - 1.
            missing: bool[n, tables]; the value of a missing cell is 0.

        Returns:
            int64[n, tables]; which cells lie beyond their table, and which are not in the vocabulary; None
            where that cannot happen.
        """


@dataclass(frozen=True, slots=True)
class Hashed:
    """The raw value modulo the table's size, as DLRM takes Criteo's values, which are hashes already.

    A missing value is row 0.

    Example:
        >>> ids = Hashed((10, 3))
        >>> ids.rows(np.array([[27, 8]]), np.array([[False, False]]))[0].tolist()
        [[7, 2]]
    """

    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_sizes(self.sizes)

    def rows(self, values: Integers, missing: Flags) -> tuple[Integers, Flags | None, Flags | None]:
        """See `Ids.rows`."""
        return values % np.array(self.sizes, np.int64), None, None


@dataclass(frozen=True, slots=True)
class Exact:
    """The raw value is the row, a missing value row 0; a line with a row beyond its table is malformed."""

    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_sizes(self.sizes)

    def rows(self, values: Integers, missing: Flags) -> tuple[Integers, Flags | None, Flags | None]:
        """See `Ids.rows`."""
        return values, values >= np.array(self.sizes, np.int64), None


@dataclass(frozen=True, slots=True, eq=False)
class Vocabulary:
    """A row for each value seen often enough; row 0 for all others, row 1 for a missing value.

    Attributes:
        values: uint32[size - 2] for each table, ascending: value k has row k + 2.
    """

    values: tuple[NDArray[np.uint32], ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows of each table."""
        return tuple(known.size + 2 for known in self.values)

    def rows(self, values: Integers, missing: Flags) -> tuple[Integers, Flags | None, Flags | None]:
        """See `Ids.rows`."""
        found = np.zeros(values.shape, np.int64)
        for table, known in enumerate(self.values):
            if known.size:
                asked = values[:, table].astype(np.uint32)
                place = np.minimum(np.searchsorted(known, asked), known.size - 1)
                found[:, table] = np.where(known[place] == asked, place + 2, 0)
        unknown = (found == 0) & ~missing
        found[missing] = 1
        return found, None, unknown


class Counter:
    """Counts values by table with memory for the distinct ones alone.

    Example:
        >>> counter = Counter(1)
        >>> counter.add(np.array([[5], [9], [5]]), np.array([[False], [False], [False]]))
        >>> counter.vocabulary(least=2).values[0].tolist()
        [5]
    """

    def __init__(self, tables: int) -> None:
        self._merged = [(np.empty(0, np.uint32), np.empty(0, np.int64)) for _ in range(tables)]
        self._fresh: list[list[tuple[NDArray[np.uint32], Integers]]] = [[] for _ in range(tables)]

    def add(self, values: Integers, missing: Flags) -> None:
        """Count a chunk's values, int64[n, tables]."""
        for table, fresh in enumerate(self._fresh):
            present = values[~missing[:, table], table].astype(np.uint32)
            fresh.append(np.unique(present, return_counts=True))
            # Merged when as much is new as is old: each value is gone over a few times, not once a chunk.
            if sum(found.size for found, _ in fresh) > self._merged[table][0].size + (1 << 16):
                self._merge(table)

    def _merge(self, table: int) -> None:
        parts = [self._merged[table], *self._fresh[table]]
        values, place = np.unique(np.concatenate([found for found, _ in parts]), return_inverse=True)
        often = np.zeros(values.size, np.int64)
        np.add.at(often, place, np.concatenate([count for _, count in parts]))
        self._merged[table], self._fresh[table] = (values, often), []

    def vocabulary(self, least: int = 1) -> Vocabulary:
        """The values that occurred `least` times or more.

        Raises:
            UsageError: `least` is below 1.
        """
        if least < 1:
            raise UsageError(f"a value is kept when it occurs once or more often, not {least} times")
        for table in range(len(self._fresh)):
            self._merge(table)
        return Vocabulary(tuple(values[often >= least] for values, often in self._merged))


def _check_sizes(sizes: Sequence[int]) -> None:
    if not sizes or not all(isinstance(size, int) and 1 <= size <= _MOST_VALUE + 1 for size in sizes):
        raise UsageError(f"sizes of tables are whole numbers from 1 to 2^32, not {sizes!r}")
