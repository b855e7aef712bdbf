"""Reading a store: each table as rows or columns, all of one moment, beside a running writer too."""

from __future__ import annotations

import contextlib
import functools
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import msgspec
import numpy as np

from ckptflip.campaign.store.checking import check_ends, check_rows, check_time
from ckptflip.campaign.store.columns import columns, integers, reals, texts, unsigned
from ckptflip.campaign.store.opening import explained, opened_to_read, undamaged
from ckptflip.campaign.store.rows import (
    Attempt,
    Cell,
    CellCounts,
    Curves,
    FlipColumns,
    Revision,
    Run,
    SpreadRow,
    Stratum,
    TensorRow,
    Trials,
    Words,
)
from ckptflip.errors import CampaignError

P = ParamSpec("P")
T = TypeVar("T")

_TRIALS = """SELECT id, cell, stratum, number, run, seed, state, outcome, message, ended, signal, ended_epoch,
    recovered, right_after, final, clean_final, bits_hit, bits_effective, words_hit, words_effective,
    flips_kept FROM trials ORDER BY id"""


@contextlib.contextmanager
def reading(path: str | Path) -> Iterator[Reader]:
    """Read a store, as it is at this moment: what is written meanwhile is not seen.

    Args:
        path: the store.

    Yields:
        What reads it.

    Raises:
        CampaignError: it is missing, no store, damaged, of a newer version, or cannot be read.

    Example:
        >>> with reading("no-such-folder/runs.db"):
        ...     pass
        Traceback (most recent call last):
        ckptflip.errors.CampaignError: no-such-folder/runs.db does not exist; ...
    """
    path = Path(path)
    with contextlib.closing(opened_to_read(path)) as connection:
        with explained(path):
            connection.execute("BEGIN")
            connection.execute("SELECT 1 FROM revisions LIMIT 1").fetchone()  # the moment is now
        yield Reader(connection, path)


def _explained(method: Callable[Concatenate[Reader, P], T]) -> Callable[Concatenate[Reader, P], T]:
    @functools.wraps(method)
    def wrapped(reader: Reader, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with undamaged(reader.path):
            return method(reader, *args, **kwargs)

    return wrapped


class Reader:
    """The tables of a store. Every method raises CampaignError where the store turns out to be damaged.

    Attributes:
        connection: to the store; nothing may be written through it.
        path: the store.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self.connection = connection
        self.path = path

    @_explained
    def revisions(self) -> list[Revision]:
        """The spec, each time it was new or edited; the last one holds."""
        rows = self._rows(
            "SELECT number, fingerprint, spec, created, command, versions, machine FROM revisions "
            "ORDER BY number"
        )
        return [
            _checked(
                Revision(
                    number=row[0], fingerprint=row[1], spec=_json(row[2]), created=row[3], command=row[4],
                    versions=_json(row[5]), machine=_json(row[6]),
                )
            )
            for row in rows
        ]  # fmt: skip

    def spec(self) -> dict[str, Any]:
        """The spec that holds.

        Raises:
            CampaignError: there is none yet.
        """
        revisions = self.revisions()
        if not revisions:
            raise CampaignError(f"{self.path} has no campaign yet: `ckptflip run` was ended before it began")
        return revisions[-1].spec

    @_explained
    def cells(self, *, current: bool = True) -> list[Cell]:
        """The conditions, in the spec's order.

        Args:
            current: those alone that the spec still has; else those of earlier revisions, too.
        """
        rows = self._rows(
            "SELECT id, key, position, current, workload, epoch, until, label, policy, swept, wanted, "
            "stopped FROM cells WHERE current OR ? ORDER BY current DESC, position, id",
            (not current,),
        )
        return [
            _checked(
                Cell(
                    id=row[0], key=row[1], position=row[2], current=bool(row[3]), workload=row[4],
                    epoch=row[5], until=row[6], label=row[7],
                    policy=None if row[8] is None else _json(row[8]), swept=_json(row[9]), wanted=row[10],
                    stopped=row[11],
                )
            )
            for row in rows
        ]  # fmt: skip

    @_explained
    def strata(self) -> list[Stratum]:
        """The strata of all cells that have some."""
        rows = self._rows("SELECT id, cell, layer, field, bits, weight FROM strata ORDER BY id")
        return [
            _checked(Stratum(id=a, cell=b, layer=c, field=d, bits=e, weight=f)) for a, b, c, d, e, f in rows
        ]

    @_explained
    def runs(self) -> list[Run]:
        """The clean runs, by workload and seed."""
        rows = self._rows(
            "SELECT id, workload, seed, until, exact, checkpoints FROM runs ORDER BY workload, seed"
        )
        return [
            _checked(
                Run(
                    id=row[0], workload=row[1], seed=row[2], until=row[3],
                    exact=None if row[4] is None else bool(row[4]), checkpoints=_epochs(row[5]),
                )
            )
            for row in rows
        ]  # fmt: skip

    @_explained
    def run_states(self) -> dict[int, dict[int, str]]:
        """Digests of the whole training state: by id of the clean run, then by epoch."""
        found: dict[int, dict[int, str]] = {}
        for run, epoch, digest in self._rows("SELECT run, epoch, digest FROM run_states ORDER BY run, epoch"):
            found.setdefault(run, {})[epoch] = digest
        return found

    @_explained
    def metrics(self) -> list[str]:
        """Names of all metrics, sorted."""
        return [name for (name,) in self._rows("SELECT name FROM metrics ORDER BY name")]

    @_explained
    def trials(self) -> Trials:
        """All finished trials, in the order they ended."""
        stored = columns(self._rows(_TRIALS), len(Trials._fields))
        absent = {"stratum": -1, "ended_epoch": -1, "recovered": -1}
        found: dict[str, Any] = {}
        for name, column in zip(Trials._fields, stored, strict=True):
            if name in ("state", "outcome", "message", "ended"):
                found[name] = texts(column)
            elif name in ("right_after", "final", "clean_final"):
                found[name] = reals(column)
            else:
                found[name] = integers(column, absent.get(name, 0)) if name != "seed" else _seeds(column)
        found["flips_kept"] = found["flips_kept"] != 0
        check_ends(set(zip(found["state"], found["outcome"], strict=True)))
        return Trials(**found)

    @_explained
    def curves(self, metric: str) -> Curves:
        """A metric of all trials, epoch by epoch; empty where it was never measured."""
        return self._curves("trial_values", "trial", metric)

    @_explained
    def clean_curves(self, metric: str) -> Curves:
        """A metric of all clean runs, epoch by epoch; empty where it was never measured."""
        return self._curves("run_values", "run", metric)

    @_explained
    def flips(self, trials: Iterable[int] | None = None) -> FlipColumns:
        """The words that were hit.

        Args:
            trials: ids of the trials that are asked for; None: all.
        """
        sql = "SELECT trial, tensor, word, hit, before, after FROM flips {} ORDER BY trial, tensor, word"
        if trials is None:
            rows = self._rows(sql.format(""))
        else:
            ids = msgspec.json.encode([int(trial) for trial in trials]).decode()
            rows = self._rows(sql.format("WHERE trial IN (SELECT value FROM json_each(?))"), (ids,))
        trial, tensor, word, *sets = columns(rows, 6)
        hit, before, after = map(unsigned, sets)
        return FlipColumns(integers(trial), integers(tensor), integers(word), hit, before, after)

    @_explained
    def tensors(self) -> dict[int, TensorRow]:
        """The tensors that were hit, by id."""
        rows = self._rows("SELECT id, workload, name, shape, dtype, layer, role FROM tensors ORDER BY id")
        return {
            row[0]: _checked(
                TensorRow(
                    id=row[0], workload=row[1], name=row[2],
                    shape=msgspec.json.decode(row[3], type=tuple[int, ...]), dtype=row[4], layer=row[5],
                    role=row[6],
                )
            )
            for row in rows
        }  # fmt: skip

    @_explained
    def propagation(self) -> list[SpreadRow]:
        """How far faults had spread, by trial, epoch and the layer's position."""
        fields = SpreadRow.__struct_fields__
        rows = self._rows(f"SELECT {', '.join(fields)} FROM propagation ORDER BY trial, epoch, position")
        return [_checked(SpreadRow(*_spread(row))) for row in rows]

    @_explained
    def attempts(self, *, latest: int | None = None) -> list[Attempt]:
        """The attempts at all tasks, in the order they ended.

        Args:
            latest: this many of the last ones that gave a trial; None: all.
        """
        sql = (
            "SELECT id, task, trial, state, signal, message, ended, seconds, phases, executor, host, pid, "
            "versions FROM attempts {}"
        )
        if latest is None:
            rows = self._rows(sql.format("ORDER BY id"))
        else:
            rows = self._rows(sql.format("WHERE trial IS NOT NULL ORDER BY id DESC LIMIT ?"), (latest,))[::-1]
        for row in rows:
            check_time(row[6])
        return [
            _checked(
                Attempt(
                    id=row[0], task=row[1], trial=row[2], state=row[3], signal=row[4], message=row[5],
                    ended=row[6], seconds=row[7], phases=_json(row[8]), executor=row[9], host=row[10],
                    pid=row[11], versions=_json(row[12]),
                )
            )
            for row in rows
        ]  # fmt: skip

    @_explained
    def counts(self) -> dict[int, CellCounts]:
        """How many trials ended how, by id of the cell; cells without trials have no entry."""
        found: dict[int, CellCounts] = {}
        rows = self._rows(
            "SELECT cell, stratum, state, outcome, COUNT(*) FROM trials "
            "GROUP BY cell, stratum, state, outcome"
        )
        check_ends(row[2:4] for row in rows)
        for cell, stratum, state, outcome, count in rows:
            counts = found.setdefault(cell, CellCounts())
            counts.states[state] = counts.states.get(state, 0) + count
            if outcome is None:
                continue
            counts.outcomes[outcome] = counts.outcomes.get(outcome, 0) + count
            if stratum is not None:
                counts.strata.setdefault(stratum, {})[outcome] = count
        return found

    @_explained
    def values(self) -> dict[str, list[tuple[Any, ...]]]:
        """Everything that a campaign's result is, to compare two stores value for value.

        Returns:
            The rows of every table but `revisions` and `attempts`, sorted, with the names of cells, runs,
            tensors and metrics in the place of ids. Equal for two stores of the same campaign, whatever was
            killed, resumed or merged on the way.
        """
        from ckptflip.campaign.store.comparing import VALUES

        return {table: self._rows(sql) for table, sql in VALUES.items()}

    @_explained
    def check(self) -> None:
        """Look at every row of every table, as nothing else does: each value is of its column's kind."""
        check_rows(self.connection)

    def _curves(self, table: str, owner: str, metric: str) -> Curves:
        rows = self._rows(
            f"SELECT {owner}, epoch, value FROM {table} "
            f"WHERE metric = (SELECT id FROM metrics WHERE name = ?) ORDER BY {owner}, epoch",
            (metric,),
        )
        owners, epochs, values = columns(rows, 3)
        return Curves(integers(owners), integers(epochs), reals(values))

    def _rows(self, sql: str, values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        return self.connection.execute(sql, values).fetchall()


def _checked(made: T) -> T:
    """A struct whose fields are of the types that they are said to be; else a ValidationError."""
    return msgspec.convert(msgspec.to_builtins(made, builtin_types=(bytes,)), type(made))


def _spread(row: tuple[Any, ...]) -> tuple[Any, ...]:
    differences = (float("nan") if each is None else each for each in row[8:14])
    changes = msgspec.json.decode(row[14], type=tuple[float | str, ...])
    return *row[:8], *differences, tuple(map(float, changes))


def _json(text: str) -> dict[str, Any]:
    return msgspec.json.decode(text, type=dict[str, Any])


def _epochs(text: str) -> dict[int, str]:
    return msgspec.json.decode(text, type=dict[int, str])


def _seeds(column: tuple[str, ...]) -> Words:
    return np.array([int(each) for each in column], dtype=np.uint64)
