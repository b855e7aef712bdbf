"""Writing a store: one process, and one transaction for all that belongs together."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ckptflip.campaign.store import details
from ckptflip.campaign.store.lock import only_writer
from ckptflip.campaign.store.opening import explained, opened_to_write
from ckptflip.campaign.store.reading import Reader
from ckptflip.campaign.store.rows import Cell, NewAttempt, NewTrial, Revision, Stratum
from ckptflip.errors import CampaignError

# What of a cell may change under the same key.
_EDITED = "position, label, swept, wanted, current"


@contextlib.contextmanager
def writing(path: str | Path, *, create: bool = True) -> Iterator[Writer]:
    """Be the one process that writes a store.

    Args:
        path: the store; an older one is brought up to date.
        create: make one where there is none.

    Yields:
        What writes it.

    Raises:
        CampaignError: another process writes it; or it is missing, no store, damaged, of a newer version, or
            cannot be written.
    """
    path = Path(path)
    with contextlib.ExitStack() as held:
        if create or path.is_file():  # else the error below says what is wrong, without a lock beside it
            held.enter_context(only_writer(path))
        connection = held.enter_context(contextlib.closing(opened_to_write(path, make=create)))
        yield Writer(connection, path)


class Writer:
    """Puts into a store what a campaign finds out. Each call is done whole, or (CampaignError) not at all.

    Attributes:
        reader: reads the same store, what was just written included.
        path: the store.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection = connection
        self.path = path
        self.reader = Reader(connection, path)

    def revise(
        self,
        spec: Mapping[str, Any],
        fingerprint: str,
        command: str,
        versions: Mapping[str, str],
        machine: Mapping[str, Any],
    ) -> int:
        """Note the spec, unless it is what it was.

        Args:
            spec: the whole spec, as JSON takes it.
            fingerprint: digest of what defines the campaign's results.
            command: the command line.
            versions: of the libraries.
            machine: processor, cores, memory, system.

        Returns:
            The number of the revision that holds.
        """
        last: Revision | None = (self.reader.revisions() or [None])[-1]  # type: ignore[list-item]
        text = details.json(spec)
        if last is not None and (last.fingerprint, details.json(last.spec)) == (fingerprint, text):
            return last.number
        row = (fingerprint, text, _now(), command, details.json(versions), details.json(machine))
        with self._transaction() as connection:
            cursor = connection.execute(
                "INSERT INTO revisions (fingerprint, spec, created, command, versions, machine) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                row,
            )
        return int(cursor.lastrowid or 0)

    def put_cells(self, cells: Sequence[Cell], *, reopen: bool = False) -> None:
        """Make these the campaign's cells: new ones are added, known ones edited, all others set aside.

        A cell that is known by its key keeps its trials. Where more are wanted than before, it is no longer
        stopped.

        Args:
            cells: all cells of the spec.
            reopen: none is stopped any longer: another spec may want more of them.
        """
        edits = ", ".join(f"{name} = excluded.{name}" for name in _EDITED.split(", "))
        with self._transaction() as connection:
            connection.execute("UPDATE cells SET current = 0")
            connection.executemany(
                "INSERT INTO cells (key, position, current, workload, epoch, until, label, policy, swept, "
                "wanted, stopped) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (key) DO UPDATE SET "
                f"stopped = CASE WHEN excluded.wanted > wanted OR {int(reopen)} THEN NULL ELSE stopped END, "
                f"{edits}",
                [
                    (
                        cell.key, cell.position, cell.current, cell.workload, cell.epoch, cell.until,
                        cell.label, None if cell.policy is None else details.json(cell.policy),
                        details.json(cell.swept), cell.wanted, cell.stopped,
                    )
                    for cell in cells
                ],
            )  # fmt: skip

    def put_strata(self, cell_key: str, strata: Iterable[Stratum]) -> None:
        """Note the strata of a cell.

        Raises:
            CampaignError: it is known to have others: the checkpoint is not the one it was.
        """
        with self._transaction() as connection:
            cell = details.cell_id(connection, self.path, cell_key)
            rows = [(cell, s.layer, s.field, s.bits, s.weight) for s in strata]
            held = connection.execute(
                "SELECT cell, layer, field, bits, weight FROM strata WHERE cell = ?", (cell,)
            ).fetchall()
            if held and sorted(held) != sorted(rows):
                raise CampaignError(
                    f"{self.path}: the strata of cell {cell_key} are not those its trials were drawn from: "
                    "the clean checkpoint is another one. Begin a new store, or put back the old clean runs"
                )
            if not held:
                connection.executemany(
                    "INSERT INTO strata (cell, layer, field, bits, weight) VALUES (?, ?, ?, ?, ?)", rows
                )

    def put_run(
        self,
        workload: str,
        seed: int,
        until: int,
        exact: bool | None,
        checkpoints: Mapping[int, str],
        epochs: Sequence[int],
        values: Mapping[str, Sequence[float | None]],
        digests: Sequence[str] = (),
    ) -> int:
        """Note a clean run, or further epochs of one that is known.

        Args:
            workload: label of the workload.
            seed: of the run.
            until: epochs trained.
            exact: whether a resume repeated it bit for bit; None: not tried.
            checkpoints: file names by epoch.
            epochs: of each row.
            values: by metric, one per row; None: not measured.
            digests: of the whole training state, one per row; empty where there are none.

        Returns:
            Its id.

        Raises:
            CampaignError: it is known with other values: this machine computes other bits.
        """
        with self._transaction() as connection:
            run = details.run_id(connection, workload, seed, until, exact, checkpoints)
            if digests:
                details.put_states(connection, self.path, run, dict(zip(epochs, digests, strict=True)))
            details.put_run_values(connection, self.path, run, (tuple(epochs), values))
        return run

    def put_trial(self, trial: NewTrial, attempt: NewAttempt) -> int:
        """Note a trial with all that was measured, and the attempt that gave it; a failed one gives way.

        Returns:
            Its id.

        Raises:
            CampaignError: it is there already and done; or its cell, stratum or clean run is not.
        """
        with self._transaction() as connection:
            # The trial's row comes last: from then on triggers keep its details as they are.
            connection.execute("PRAGMA defer_foreign_keys = ON")
            number = details.put_trial(connection, self.path, trial)
            details.put_attempt(connection, attempt, number, _now())
        return number

    def put_attempt(self, attempt: NewAttempt, trial: int | None = None) -> None:
        """Note an attempt that ended, with the id of the trial it gave, if it gave one."""
        with self._transaction() as connection:
            details.put_attempt(connection, attempt, trial, _now())

    def stop_cell(self, key: str, reason: str | None) -> None:
        """Note why no more trials of a cell are run; None: more are."""
        with self._transaction() as connection:
            cell = details.cell_id(connection, self.path, key)
            connection.execute("UPDATE cells SET stopped = ? WHERE id = ?", (reason, cell))

    def drop_failed(self, cells: Iterable[str] | None = None) -> int:
        """Forget trials that crashed, hung or ran out of memory, so that they are tried again.

        Args:
            cells: keys of the cells that are meant; None: all. Their cells are no longer stopped.

        Returns:
            How many. Their attempts are kept.
        """
        where = (
            ""
            if cells is None
            else "AND cell IN (SELECT id FROM cells WHERE key IN (SELECT value FROM json_each(?)))"
        )
        values = () if cells is None else (details.json(list(cells)),)
        with self._transaction() as connection:
            failed = f"FROM trials WHERE state != 'done' {where}"
            connection.execute(f"UPDATE cells SET stopped = NULL WHERE id IN (SELECT cell {failed})", values)
            return connection.execute(f"DELETE {failed}", values).rowcount

    def finished(self) -> dict[str, dict[tuple[str, str] | None, dict[int, str]]]:
        """States of the finished trials: by the cell's key, layer and field (None: no strata), and number."""
        found: dict[str, dict[tuple[str, str] | None, dict[int, str]]] = {}
        with explained(self.path):
            rows = self._connection.execute(
                "SELECT cells.key, strata.layer, strata.field, trials.number, trials.state FROM trials "
                "JOIN cells ON cells.id = trials.cell LEFT JOIN strata ON strata.id = trials.stratum"
            ).fetchall()
        for key, layer, field, number, state in rows:
            stratum = None if layer is None else (layer, field)
            found.setdefault(key, {}).setdefault(stratum, {})[number] = state
        return found

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with explained(self.path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                # A full disk makes SQLite roll back by itself.
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
