"""A click log in memory: labels, dense features and one row number per embedding table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptflip.errors import UsageError, WorkloadError

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Tally:
    """What a reader met on its way.

    Attributes:
        lines: lines read, malformed ones included, empty ones and a header not.
        malformed: how many lines were set aside, by reason.
        missing: how many cells of the lines kept were missing, by field; fields without any are not listed.
        negative: how many dense cells were below 0 and became 0, by field, likewise.
        unknown: how many ids were not in the vocabulary, by field, likewise.
    """

    lines: int = 0
    malformed: dict[str, int] = field(default_factory=dict)
    missing: dict[str, int] = field(default_factory=dict)
    negative: dict[str, int] = field(default_factory=dict)
    unknown: dict[str, int] = field(default_factory=dict)

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.lines + other.lines,
            _added(self.malformed, other.malformed),
            _added(self.missing, other.missing),
            _added(self.negative, other.negative),
            _added(self.unknown, other.unknown),
        )

    @property
    def set_aside(self) -> int:
        """How many lines were malformed, for whatever reason."""
        return sum(self.malformed.values())


def _added(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    return {key: one.get(key, 0) + other.get(key, 0) for key in (*one, *other)}


@dataclass(frozen=True, slots=True)
class ClickLog:
    """Rows of a click log, as a recommendation model takes them.

    Attributes:
        labels: float32[n], 0 or 1.
        dense: float32[n, d]: Criteo's 13 as log(x + 1); MovieLens has none, d = 0.
        ids: int64[n, t]: the row of each table, 0 … size - 1.
        sizes: rows of each of the t tables.
        fields: names of the t tables.
        days: int64[n], the day of each row, where the log says it (Terabyte); else None.
        tally: what the reader met.
    """

    labels: Floats
    dense: Floats
    ids: Integers
    sizes: tuple[int, ...]
    fields: tuple[str, ...]
    days: Integers | None = None
    tally: Tally = field(default_factory=Tally)

    def __len__(self) -> int:
        return len(self.labels)


def check(log: ClickLog) -> ClickLog:
    """Give back the log if its arrays fit together.

    Raises:
        UsageError: shapes or dtypes do not fit, a label is neither 0 nor 1, a dense value is not finite.
        WorkloadError: an id lies beyond its table.

    Example:
        >>> nobody = np.zeros((2, 0), np.float32)
        >>> log = ClickLog(np.ones(2, np.float32), nobody, np.array([[0], [3]]), (3,), ("item",))
        >>> check(log)
        Traceback (most recent call last):
        ...
        ckptflip.errors.WorkloadError: row 1 of the log: id 3 of field item lies beyond its table of 3 rows...
    """
    count, tables = len(log.labels), len(log.sizes)
    wanted: dict[str, tuple[NDArray[Any], tuple[int, ...], type]] = {
        "labels": (log.labels, (count,), np.float32),
        "dense": (log.dense, (count, log.dense.shape[-1] if log.dense.ndim else 0), np.float32),
        "ids": (log.ids, (count, tables), np.int64),
    }
    if log.days is not None:
        wanted["days"] = (log.days, (count,), np.int64)
    for name, (array, shape, dtype) in wanted.items():
        if array.shape != shape or array.dtype != dtype:
            raise UsageError(
                f"a log's {name} are {np.dtype(dtype)} of shape {shape}, not {array.dtype} of {array.shape}"
            )
    if len(log.fields) != tables:
        raise UsageError(f"a log of {tables} tables needs as many names, not {len(log.fields)}")
    _check_values(log)
    return log


def _check_values(log: ClickLog) -> None:
    other = np.flatnonzero((log.labels != 0) & (log.labels != 1))
    if other.size:
        raise UsageError(f"row {other[0]} of the log: the label is {log.labels[other[0]]}, neither 0 nor 1")
    if not np.isfinite(log.dense).all():
        row, column = np.argwhere(~np.isfinite(log.dense))[0]
        raise UsageError(f"row {row} of the log: dense feature {column} is {log.dense[row, column]}")
    beyond = (log.ids < 0) | (log.ids >= np.array(log.sizes, np.int64))
    if beyond.any():
        row, table = np.argwhere(beyond)[0]
        raise WorkloadError(
            f"row {row} of the log: id {log.ids[row, table]} of field {log.fields[table]} lies beyond its "
            f"table of {log.sizes[table]} rows ({int(beyond.sum())} such ids in all). Give the table more "
            "rows, or hash the ids"
        )


def take(log: ClickLog, rows: Any) -> ClickLog:
    """Some rows of a log, in the order asked for: an index array, a mask or a slice. The tally stays."""
    days = None if log.days is None else log.days[rows]
    return ClickLog(log.labels[rows], log.dense[rows], log.ids[rows], log.sizes, log.fields, days, log.tally)


def join(logs: Iterable[ClickLog]) -> ClickLog:
    """Logs of the same tables one after the other, tallies added.

    Raises:
        UsageError: there is no log, or their tables differ.
    """
    parts = list(logs)
    if not parts:
        raise UsageError("there is no log to join")
    first = parts[0]
    tally = Tally()
    for part in parts:
        if (part.sizes, part.fields, part.days is None) != (first.sizes, first.fields, first.days is None):
            raise UsageError(f"logs of other tables cannot be joined: {first.fields} and {part.fields}")
        tally += part.tally
    days = [part.days for part in parts if part.days is not None]
    return ClickLog(
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.dense for part in parts]),
        np.concatenate([part.ids for part in parts]),
        first.sizes,
        first.fields,
        np.concatenate(days) if days else None,
        tally,
    )


def access_counts(logs: ClickLog | Iterable[ClickLog]) -> tuple[Integers, ...]:
    """How often each row of each table occurs: what makes a row hot or cold.

    Args:
        logs: a log, or several of the same tables, such as a stream's chunks.

    Returns:
        int64[size] for each table.

    Raises:
        UsageError: there is no log.
        WorkloadError: an id lies beyond its table.

    Example:
        >>> none = np.zeros((3, 0), np.float32)
        >>> log = ClickLog(np.ones(3, np.float32), none, np.array([[2], [0], [2]]), (3,), ("item",))
        >>> [counts.tolist() for counts in access_counts(log)]
        [[1, 0, 2]]
    """
    counts: list[Integers] = []
    sizes: tuple[int, ...] = ()
    for log in [logs] if isinstance(logs, ClickLog) else logs:
        if not counts:
            sizes = log.sizes
            counts = [np.zeros(size, np.int64) for size in sizes]
        if log.sizes != sizes:
            raise UsageError(f"logs of other tables cannot be counted together: {sizes} and {log.sizes}")
        check(log)
        for table, total in enumerate(counts):
            _count(total, log.ids[:, table])
    if not counts:
        raise UsageError("there is no log to count accesses in")
    return tuple(counts)


def _count(total: Integers, rows: Integers) -> None:
    """Add the rows' occurrences; a chunk is often far smaller than the table, which is then not gone over."""
    if rows.size > total.size // 8:
        total += np.bincount(rows, minlength=total.size)
    else:
        found, often = np.unique(rows, return_counts=True)
        total[found] += often


def described(log: ClickLog) -> list[str]:
    """What a user should hear about a log, a sentence each.

    Example:
        >>> none = np.zeros((2, 0), np.float32)
        >>> log = ClickLog(np.ones(2, np.float32), none, np.zeros((2, 1), np.int64), (3,), ("item",))
        >>> described(log)
        ['2 rows, 2 clicked (100.00 %)', 'every row is clicked: no AUC can be measured on them']
    """
    rows, clicked = len(log), int(log.labels.sum(dtype=np.float64))
    share = f" ({clicked / rows:.2%})".replace("%", " %") if rows else ""
    said = [f"{rows} rows, {clicked} clicked{share}"]
    if rows and clicked in (0, rows):
        which = "every row is" if clicked else "no row is"
        said.append(f"{which} clicked: no AUC can be measured on them")
    tally = log.tally
    if tally.set_aside:
        reasons = ", ".join(f"{count} {reason}" for reason, count in _most_first(tally.malformed))
        said.append(f"{tally.set_aside} of {tally.lines} lines are malformed and were set aside: {reasons}")
    for counts, told in (
        (tally.missing, "cells are missing and became 0"),
        (tally.negative, "dense values are negative and became 0"),
        (tally.unknown, "ids are not in the vocabulary"),
    ):
        if counts:
            named = ", ".join(f"{name} {count}" for name, count in _most_first(counts)[:3])
            more = ", …" if len(counts) > 3 else ""
            said.append(f"{sum(counts.values())} {told} ({named}{more})")
    return said


def _most_first(counts: dict[str, int]) -> Sequence[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))
