"""The tables that `export` writes, in batches: what holds for a trial, a run or a cell, and what varies."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ckptflip.campaign.spec import OUTCOMES
from ckptflip.campaign.store.columns import columns, integers, reals, unsigned
from ckptflip.campaign.store.opening import undamaged
from ckptflip.campaign.store.reading import Reader
from ckptflip.campaign.store.rows import Cell, Ints

# Rows in a batch, about: what is held in memory at a time.
_BATCH = 1 << 16


class Column(NamedTuple):
    """A column: its name, and ``text``, ``int``, ``uint``, ``real`` or ``flag``."""

    name: str
    kind: str


class Batch(NamedTuple):
    """Some rows.

    Attributes:
        owner: int64[n], positions in the listing's owners.
        columns: what varies, one array or list of n values each; masked, or None: nothing there.
    """

    owner: Ints
    columns: Sequence[Any]


class Listing(NamedTuple):
    """A table.

    Attributes:
        fixed: columns that hold for an owner.
        owners: their values; None: nothing there.
        varying: columns of each row.
        batches: the rows, in order.
    """

    fixed: tuple[Column, ...]
    owners: list[tuple[Any, ...]]
    varying: tuple[Column, ...]
    batches: Iterator[Batch]


def listing(reader: Reader, table: str) -> Listing:
    """A table of a store, of the cells that the spec has.

    Args:
        reader: of the store; the batches are read while they are asked for.
        table: one of `TABLES`.

    Raises:
        CampaignError: the store is damaged.
    """
    return TABLES[table](reader)


_TRIAL = (
    Column("clean_seed", "int"),
    Column("trial", "int"),
    Column("seed", "uint"),
    Column("state", "text"),
    Column("outcome", "text"),
)
_RESULT = (
    Column("message", "text"),
    Column("signal", "int"),
    Column("ended", "text"),
    Column("ended_epoch", "int"),
    Column("recovered", "int"),
    Column("right_after", "real"),
    Column("final", "real"),
    Column("clean_final", "real"),
    Column("bits_hit", "int"),
    Column("bits_effective", "int"),
    Column("words_hit", "int"),
    Column("words_effective", "int"),
    Column("flips_kept", "flag"),
    Column("digest", "text"),
)
_MEASURED = (Column("metric", "text"), Column("epoch", "int"), Column("value", "real"))


class _Trials(NamedTuple):
    """All trials in the order of their cells and numbers, with what holds for each."""

    fixed: tuple[Column, ...]
    owners: list[tuple[Any, ...]]
    keys: list[tuple[int, int]]


def _trials(reader: Reader, extra: tuple[Column, ...] = ()) -> _Trials:
    cells = reader.cells()
    described, swept = _swept(cells, (*_TRIAL, *extra, *_MEASURED))
    strata = {s.id: (s.layer, s.field) for s in reader.strata()}
    names = "".join(f", trials.{column.name}" for column in extra)
    with undamaged(reader.path):
        rows = reader.connection.execute(
            "SELECT trials.id, trials.run, trials.cell, trials.stratum, runs.seed, trials.number, "
            f"trials.seed, state, outcome{names} FROM trials JOIN runs ON runs.id = trials.run "
            "JOIN cells ON cells.id = trials.cell LEFT JOIN strata ON strata.id = trials.stratum "
            "WHERE cells.current ORDER BY cells.position, strata.layer, strata.field, trials.number"
        ).fetchall()
        seeds = [int(row[6]) for row in rows]
    stratum = (Column("stratum_layer", "text"), Column("stratum_field", "text")) if strata else ()
    flags = [9 + i for i, column in enumerate(extra) if column.kind == "flag"]
    owners = [
        (
            *described[row[2]],
            *(strata.get(row[3], (None, None)) if strata else ()),
            *row[4:6],
            seed,
            *(bool(each) if i in flags else each for i, each in enumerate(row[7:], 7)),
        )
        for seed, row in zip(seeds, rows, strict=True)
    ]
    return _Trials((*swept, *stratum, *_TRIAL, *extra), owners, [row[:2] for row in rows])


def _swept(cells: Sequence[Cell], taken: Iterable[Column]) -> tuple[dict[int, tuple[Any, ...]], list[Column]]:
    """By id, what each cell is: label, workload, epoch and its swept fields; and these columns."""
    fixed = [Column("cell", "text"), Column("workload", "text"), Column("checkpoint_epoch", "int")]
    names = list(dict.fromkeys(name for cell in cells for name in cell.swept))
    used = {column.name for column in (*fixed, *taken)}
    described = {cell.id: [cell.label, cell.workload, cell.epoch] for cell in cells}
    for name in names:
        values = [cell.swept.get(name) for cell in cells]
        kind = _kind(values)
        fixed.append(Column(f"swept_{name}" if name in used else name, kind))
        for cell, value in zip(cells, values, strict=True):
            described[cell.id].append(_as_kind(value, kind))
    return {number: tuple(row) for number, row in described.items()}, fixed


def _kind(values: Iterable[Any]) -> str:
    types = {type(value) for value in values if value is not None}
    if types <= {int}:
        return "int"
    return "real" if types <= {int, float} else "text"


def _as_kind(value: Any, kind: str) -> Any:
    if value is None:
        return None
    if kind == "real":
        return float(value)
    return json.dumps(value) if kind == "text" and not isinstance(value, str) else value


def _values(reader: Reader) -> Listing:
    trials, names = _trials(reader), _metrics(reader)
    batches = _of_each(
        reader,
        "SELECT v.metric, v.epoch, v.value, c.value, c.run IS NULL FROM trial_values v "
        "LEFT JOIN run_values c ON c.run = ?2 AND c.metric = v.metric AND c.epoch = v.epoch "
        "WHERE v.trial = ?1 ORDER BY v.metric, v.epoch",
        trials.keys,
        lambda c: [names(c[0]), integers(c[1]), reals(c[2]), _masked(c[3], c[4])],
    )
    return Listing(trials.fixed, trials.owners, (*_MEASURED, Column("clean_value", "real")), batches)


def _metrics(reader: Reader) -> Callable[[Sequence[int]], list[str]]:
    """What turns a column of metrics into one of their names; a join would have to sort."""
    with undamaged(reader.path):
        names: dict[int, str] = dict(reader.connection.execute("SELECT id, name FROM metrics"))
    return lambda column: [names[each] for each in column]


def _masked(stored: Sequence[float | None], absent: Sequence[int]) -> Any:
    """Numbers, float64[n], of which some are not there, which is not the same as NaN."""
    return np.ma.array(reals(stored), mask=np.array(absent, dtype=bool))


def _all_trials(reader: Reader) -> Listing:
    trials = _trials(reader, _RESULT)
    return Listing(trials.fixed, trials.owners, (), _alone(len(trials.owners)))


def _flips(reader: Reader) -> Listing:
    trials = _trials(reader)
    names = [Column(name, "text") for name in ("tensor", "layer", "role", "dtype")]
    words = [Column("word", "int"), *(Column(name, "uint") for name in ("hit", "before", "after"))]
    batches = _of_each(
        reader,
        "SELECT tensors.name, layer, role, dtype, word, hit, before, after FROM flips "
        "JOIN tensors ON tensors.id = tensor WHERE trial = ?1 AND ?2 ORDER BY tensors.name, word",
        [(trial, 1) for trial, _ in trials.keys],
        lambda c: [*map(list, c[:4]), integers(c[4]), *map(unsigned, c[5:])],
    )
    return Listing(trials.fixed, trials.owners, (*names, *words), batches)


def _propagation(reader: Reader) -> Listing:
    trials = _trials(reader)
    whole = [Column(name, "int") for name in ("elements", "changed", "from_zero", "nev")]
    spread = ("minimum", "lower", "median", "upper", "maximum", "mean")
    varying = (
        Column("epoch", "int"), Column("position", "int"), Column("layer", "text"), *whole,
        *(Column(name, "real") for name in spread),
    )  # fmt: skip
    batches = _of_each(
        reader,
        f"SELECT {', '.join(column.name for column in varying)} FROM propagation WHERE trial = ?1 AND ?2 "
        "ORDER BY epoch, position",
        [(trial, 1) for trial, _ in trials.keys],
        lambda c: [*map(integers, c[:2]), list(c[2]), *map(integers, c[3:7]), *map(reals, c[7:])],
    )
    return Listing(trials.fixed, trials.owners, varying, batches)


def _cells(reader: Reader) -> Listing:
    cells, counts = reader.cells(), reader.counts()
    states = ("done", "crashed", "hung", "out-of-memory")
    numbers = [Column(name, "int") for name in ("until", "wanted", *states, *OUTCOMES)]
    described, fixed = _swept(cells, numbers)
    owners = []
    for cell in cells:
        found = counts.get(cell.id)
        owners.append(
            (
                *described[cell.id], cell.until, cell.wanted,
                *((found.states.get(each, 0) if found else 0) for each in states),
                *((found.outcomes.get(each, 0) if found else 0) for each in OUTCOMES),
                cell.stopped,
            )
        )  # fmt: skip
    return Listing((*fixed, *numbers, Column("stopped", "text")), owners, (), _alone(len(owners)))


def _clean(reader: Reader) -> Listing:
    runs, names = reader.runs(), _metrics(reader)
    batches = _of_each(
        reader,
        "SELECT metric, epoch, value FROM run_values WHERE run = ?1 AND ?2 ORDER BY metric, epoch",
        [(run.id, 1) for run in runs],
        lambda c: [names(c[0]), integers(c[1]), reals(c[2])],
    )
    fixed = (Column("workload", "text"), Column("clean_seed", "int"), Column("exact_resume", "flag"))
    return Listing(fixed, [(run.workload, run.seed, run.exact) for run in runs], _MEASURED, batches)


def _alone(count: int) -> Iterator[Batch]:
    """Every owner once, with nothing beside it."""
    for start in range(0, count, _BATCH):
        yield Batch(np.arange(start, min(start + _BATCH, count)), ())


def _of_each(
    reader: Reader,
    sql: str,
    keys: Sequence[tuple[int, int]],
    arrays: Callable[[list[tuple[Any, ...]]], Sequence[Any]],
) -> Iterator[Batch]:
    """The rows of each owner in turn, about `_BATCH` at a time."""

    def batch() -> Batch:
        with undamaged(reader.path):
            return Batch(np.array(owners, dtype=np.int64), arrays(columns(rows, len(rows[0]))))

    rows: list[tuple[Any, ...]] = []
    owners: list[int] = []
    cursor = reader.connection.cursor()
    for position, key in enumerate(keys):
        with undamaged(reader.path):
            cursor.execute(sql, key)
        while True:
            with undamaged(reader.path):
                some = cursor.fetchmany(_BATCH)
            rows += some
            owners += itertools.repeat(position, len(some))
            if len(rows) >= _BATCH:
                yield batch()
                rows, owners = [], []
            if len(some) < _BATCH:
                break
    if rows:
        yield batch()


# What `export` writes, by name.
TABLES: dict[str, Callable[[Reader], Listing]] = {
    "values": _values,
    "trials": _all_trials,
    "flips": _flips,
    "propagation": _propagation,
    "cells": _cells,
    "clean": _clean,
}
