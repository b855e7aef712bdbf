"""One store of several: the shards of a campaign, or parts of it that ran on different machines."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ckptflip.campaign.store.comparing import first_difference
from ckptflip.campaign.store.lock import only_writer
from ckptflip.campaign.store.opening import (
    damaged,
    draft_store,
    explained,
    explanation,
    opened_to_write,
    undamaged,
)
from ckptflip.campaign.store.reading import Reader, reading
from ckptflip.campaign.store.uniting import Ids, unite_cells, unite_runs, unite_tensors
from ckptflip.campaign.store.writing import Writer
from ckptflip.checkpoints.files import check_new, new_file
from ckptflip.errors import CampaignError, UsageError

# A trial by its cell, stratum and number, as ids of the new store.
_Name = tuple[int, int | None, int]
_ATTEMPT = "task, trial, state, signal, message, ended, seconds, phases, executor, host, pid, versions"
_REVISION = "fingerprint, spec, created, command, versions, machine"


class Merged(msgspec.Struct, frozen=True, kw_only=True):
    """What a merged store holds.

    Attributes:
        cells: that the spec has.
        trials: all finished ones.
        failed: those of them that crashed, hung or ran out of memory.
        shared: trials that were in several stores, and the same in all.
    """

    cells: int
    trials: int
    failed: int
    shared: int


def merge(stores: Sequence[str | Path], out: str | Path, *, overwrite: bool = False) -> Merged:
    """Make one store of several of the same campaign.

    Trials are united by cell, stratum and number; a failed one gives way to one that is done. Every attempt
    and every revision of the spec is kept. Cells that now have all they want are marked so. The result equals
    the store that one machine would have made.

    Args:
        stores: the stores; they are not changed.
        out: the new store, which appears when it is whole.
        overwrite: whether `out` may be replaced.

    Returns:
        What it holds.

    Raises:
        UsageError: no stores, one named twice, or `out` exists or is one of them.
        CampaignError: a store cannot be read; they are of different campaigns; or a clean run or a trial
            that is in two of them differs.
    """
    from ckptflip.campaign.settling import settle  # it stands on the store itself

    paths, target = [Path(store) for store in stores], Path(out)
    _check_names(paths, target, overwrite=overwrite)
    with only_writer(target):
        _retire(target)
        with new_file(target, overwrite=overwrite) as draft, draft_store(draft) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("PRAGMA defer_foreign_keys = ON")
            sources = _Sources(connection, target)
            for path in paths:
                with reading(path) as reader:
                    sources.add(reader)
            with explained(target):
                sources.finish()
                connection.execute("COMMIT")
            settle(Writer(connection, target))
            counts = Reader(connection, target).counts().values()
            cells = Reader(connection, target).cells()
    return Merged(
        cells=len(cells),
        trials=sum(each.trials for each in counts),
        failed=sum(each.failed for each in counts),
        shared=sources.shared,
    )


class _Sources:
    """What has been put into a new store, source by source."""

    def __init__(self, connection: sqlite3.Connection, target: Path) -> None:
        self._connection = connection
        self._target = target
        self._read: list[Path] = []
        self._fingerprint = ""
        self._revisions: dict[tuple[Any, ...], int] = {}
        self._attempts: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        self._trials: dict[_Name, tuple[int, str, Path]] = {}
        self.shared = 0

    def add(self, reader: Reader) -> None:
        """Put in all that a store has and those before it had not."""
        source, seen = reader.connection, tuple(self._read)
        with _from(reader.path, self._target):
            _check_whole(reader)
            self._check_campaign(reader)
            for row in source.execute(f"SELECT {_REVISION}, number FROM revisions ORDER BY number"):
                self._revisions[row[:-1]] = max(row[-1], self._revisions.get(row[:-1], 0))
            cells, strata = unite_cells(self._connection, reader, seen)
            runs, metrics = unite_runs(self._connection, reader, seen)
            tensors = unite_tensors(self._connection, reader)
            ids, places = self._unite_trials(reader, cells, strata)
            self._copy_details(source, ids, metrics, tensors)
            self._copy_trials(source, ids, cells, strata, runs)
            for task, trial, *rest in source.execute(f"SELECT {_ATTEMPT} FROM attempts ORDER BY id"):
                # The same attempt is in both where one store was merged from the other.
                self._attempts.setdefault((task, *rest), (task, places.get(trial), *rest))
        self._read.append(reader.path)

    def finish(self) -> None:
        """Put in what all stores have together, in order of time."""
        # Two of one store may be of the same millisecond.
        revisions = sorted(self._revisions, key=lambda row: (row[2], self._revisions[row], *row))
        self._connection.executemany(
            f"INSERT INTO revisions ({_REVISION}) VALUES (?, ?, ?, ?, ?, ?)", revisions
        )
        kept = {number for number, _, _ in self._trials.values()}
        rows: list[tuple[Any, ...]] = [
            (task, trial if trial in kept else None, *rest)
            for task, trial, *rest in sorted(self._attempts.values(), key=lambda row: row[5])
        ]
        self._connection.executemany(
            f"INSERT INTO attempts ({_ATTEMPT}) VALUES ({', '.join('?' * 12)})", rows
        )

    def _check_campaign(self, reader: Reader) -> None:
        reader.spec()
        fingerprint = reader.revisions()[-1].fingerprint
        if self._read and fingerprint != self._fingerprint:
            raise CampaignError(
                f"{reader.path} and {self._read[0]} are of different campaigns, or of different states of "
                f"one spec (fingerprints {fingerprint[:12]} and {self._fingerprint[:12]}); merge those that "
                "one and the same spec made"
            )
        self._fingerprint = fingerprint

    def _unite_trials(self, reader: Reader, cells: Ids, strata: Ids) -> tuple[Ids, Ids]:
        """Ids of the source's trials that are to be copied; and of those that were in both already, too."""
        ids: Ids = {}
        shared: Ids = {}
        rows = reader.connection.execute("SELECT id, cell, stratum, number, state FROM trials ORDER BY id")
        top = max((number for number, _, _ in self._trials.values()), default=0)
        for number, cell, stratum, position, state in rows:
            name = (cells[cell], None if stratum is None else strata[stratum], position)
            held = self._trials.get(name)
            if held is not None and not self._replaced(reader, held, number, state):
                if held[1] == state:
                    shared[number] = held[0]
                continue
            top += 1
            ids[number] = top
            self._trials[name] = (top, state, reader.path)
        return ids, ids | shared

    def _replaced(self, reader: Reader, held: tuple[int, str, Path], number: int, state: str) -> bool:
        """Whether a trial that is there gives way to the source's."""
        if held[1] == "done":
            if state == "done":
                self.shared += 1
                self._check_same(reader, held, number)
            return False
        if state == "done":
            self._connection.execute("DELETE FROM trials WHERE id = ?", (held[0],))
        return state == "done"

    def _check_same(self, reader: Reader, held: tuple[int, str, Path], number: int) -> None:
        what = first_difference((self._connection, reader.connection), (held[0], number))
        if what is None:
            return
        position, label = reader.connection.execute(
            "SELECT number, cells.label FROM trials JOIN cells ON cells.id = cell WHERE trials.id = ?",
            (number,),
        ).fetchone()
        raise CampaignError(
            f"{held[2]} and {reader.path} differ: trial {position} of {label!r} is in both, with another "
            f"{what}. They were computed by machines that give other bits, and cannot be one campaign"
        )

    def _copy_details(
        self,
        source: sqlite3.Connection,
        ids: Ids,
        metrics: Ids,
        tensors: Ids,
    ) -> None:
        """Copy what was measured and hit: before the trials themselves, which triggers then protect."""
        plans: list[tuple[str, str, Callable[[int], int]]] = [
            ("trial_values", "metric, epoch, value", metrics.__getitem__),
            ("flips", "tensor, word, hit, before, after", tensors.__getitem__),
            (
                "propagation",
                "epoch, position, layer, elements, changed, from_zero, nev, minimum, lower, median, upper, "
                "maximum, mean, changes",
                lambda epoch: epoch,
            ),
        ]
        for table, names, renamed in plans:
            self._connection.executemany(
                f"INSERT INTO {table} (trial, {names}) VALUES (?{', ?' * (names.count(',') + 1)})",
                (
                    (ids[row[0]], renamed(row[1]), *row[2:])
                    for row in source.execute(f"SELECT trial, {names} FROM {table}")
                    if row[0] in ids
                ),
            )

    def _copy_trials(
        self,
        source: sqlite3.Connection,
        ids: Ids,
        cells: Ids,
        strata: Ids,
        runs: Ids,
    ) -> None:
        names = [name for _, name, *_ in source.execute("PRAGMA table_info (trials)")]
        new: dict[str, Callable[[Any], int | None]] = {
            "id": ids.__getitem__,
            "cell": cells.__getitem__,
            "stratum": strata.get,
            "run": runs.__getitem__,
        }
        self._connection.executemany(
            f"INSERT INTO trials ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})",
            (
                tuple(new[n](each) if n in new else each for n, each in zip(names, row, strict=True))
                for row in source.execute(f"SELECT {', '.join(names)} FROM trials ORDER BY id")
                if row[names.index("id")] in ids
            ),
        )


def _check_names(paths: Sequence[Path], target: Path, *, overwrite: bool) -> None:
    if not paths:
        raise UsageError("name the stores to merge")
    real = [path.resolve() for path in paths]
    for path, resolved in zip(paths, real, strict=True):
        if real.count(resolved) > 1:
            raise UsageError(f"{path} is named twice")
    if target.resolve() in real:
        raise UsageError(f"{target} is one of the stores to merge; name a new one with -o")
    check_new(target, overwrite=overwrite)


def _retire(target: Path) -> None:
    """Close the log of a store that is about to be replaced: the new one would take it for its own."""
    log = target.with_name(f"{target.name}-wal")
    if not log.exists():
        return
    if target.exists():
        with contextlib.suppress(CampaignError):
            opened_to_write(target, make=False).close()
    if log.exists():
        raise CampaignError(
            f"{log} lies where the new store's log must be: another program has the store open, or it is "
            "left of one that is gone. Close or delete it, or name another store"
        )


@contextlib.contextmanager
def _from(source: Path, target: Path) -> Iterator[None]:
    """Explain what goes wrong while rows go from one store into a new one: which of the two is at fault."""
    with undamaged(source):
        try:
            yield
        except sqlite3.IntegrityError as why:  # the same holds for the rows where they come from
            raise CampaignError(damaged(source, str(why))) from None
        except sqlite3.Error as why:
            if getattr(why, "sqlite_errorcode", -1) & 0xFF == sqlite3.SQLITE_FULL:
                raise CampaignError(explanation(target, why)) from None
            raise


def _check_whole(reader: Reader) -> None:
    (found,) = reader.connection.execute("PRAGMA quick_check (1)").fetchone()
    if found != "ok":
        raise sqlite3.DatabaseError(found)
    reader.check()
    # What is copied without a look at it: JSON, times, how trials ended.
    for method in (reader.tensors, reader.attempts, reader.trials, reader.runs):
        method()
    reader.cells(current=False)
