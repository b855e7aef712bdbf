"""The rows of one clean run or trial as SQL statements, for a transaction that is open."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from ckptflip.campaign.store.columns import signed
from ckptflip.campaign.store.rows import NewAttempt, NewTrial
from ckptflip.errors import CampaignError

if TYPE_CHECKING:
    from ckptflip.campaign.task import Flips, Spread
    from ckptflip.faults.record import TensorEntry

_TRIAL = (
    "id", "cell", "stratum", "number", "run", "seed", "state", "outcome", "message", "signal", "ended",
    "ended_epoch", "recovered", "right_after", "final", "clean_final", "bits_hit", "bits_effective",
    "words_hit", "words_effective", "flips_kept", "digest",
)  # fmt: skip
_PUT_TRIAL = f"INSERT INTO trials ({', '.join(_TRIAL)}) VALUES ({', '.join('?' * len(_TRIAL))})"
_LAYER = (
    "position", "layer", "elements", "changed", "from_zero", "nev", "minimum", "lower", "median", "upper",
    "maximum", "mean",
)  # fmt: skip
_PUT_LAYER = (
    f"INSERT INTO propagation (trial, epoch, {', '.join(_LAYER)}, changes) VALUES ({', '.join('?' * 15)})"
)


def json(value: Any) -> str:
    """A value as JSON, with keys in order: equal values are equal text."""
    return msgspec.json.encode(value, order="deterministic").decode()


def cell_id(connection: sqlite3.Connection, path: Path, key: str) -> int:
    """The id of a cell.

    Raises:
        CampaignError: there is none with this key.
    """
    found = connection.execute("SELECT id FROM cells WHERE key = ?", (key,)).fetchone()
    if found is None:
        raise CampaignError(f"{path} has no cell {key!r}: it belongs to another campaign, or to another spec")
    return int(found[0])


def run_id(
    connection: sqlite3.Connection,
    workload: str,
    seed: int,
    until: int,
    exact: bool | None,
    checkpoints: Mapping[int, str],
) -> int:
    """The id of a clean run, which is made or extended."""
    found = connection.execute(
        "SELECT id, checkpoints FROM runs WHERE workload = ? AND seed = ?", (workload, seed)
    ).fetchone()
    if found is None:
        cursor = connection.execute(
            "INSERT INTO runs (workload, seed, until, exact, checkpoints) VALUES (?, ?, ?, ?, ?)",
            (workload, seed, until, exact, _files(checkpoints)),
        )
        return int(cursor.lastrowid or 0)
    run, kept = found
    merged = {**msgspec.json.decode(kept, type=dict[int, str]), **checkpoints}
    connection.execute(
        "UPDATE runs SET until = MAX(until, ?), exact = COALESCE(?, exact), checkpoints = ? WHERE id = ?",
        (until, exact, _files(merged), run),
    )
    return int(run)


def put_states(connection: sqlite3.Connection, path: Path, run: int, digests: Mapping[int, str]) -> None:
    """The digests of a clean run's training state, by epoch; those that are empty are left out.

    Raises:
        CampaignError: one is known to be another.
    """
    known = dict(connection.execute("SELECT epoch, digest FROM run_states WHERE run = ?", (run,)))
    for epoch, digest in digests.items():
        if digest and known.get(epoch, digest) != digest:
            raise CampaignError(_other_bits(connection, path, run, epoch, "the training state"))
    connection.executemany(
        "INSERT OR IGNORE INTO run_states (run, epoch, digest) VALUES (?, ?, ?)",
        [(run, epoch, digest) for epoch, digest in digests.items() if digest],
    )


def put_run_values(
    connection: sqlite3.Connection,
    path: Path,
    run: int,
    measured: tuple[tuple[int, ...], Mapping[str, Sequence[float | None]]],
) -> None:
    """What was measured of a clean run.

    Raises:
        CampaignError: a value is known to be another.
    """
    rows = list(_measured(connection, run, measured))
    known = {
        (metric, epoch): value
        for metric, epoch, value in connection.execute(
            "SELECT metric, epoch, value FROM run_values WHERE run = ?", (run,)
        )
    }
    names = dict(connection.execute("SELECT id, name FROM metrics"))
    for _, metric, epoch, value in rows:
        new = None if value != value else value  # as SQLite keeps NaN
        if known.get((metric, epoch), new) != new:
            raise CampaignError(_other_bits(connection, path, run, epoch, names[metric]))
    connection.executemany(
        "INSERT OR IGNORE INTO run_values (run, metric, epoch, value) VALUES (?, ?, ?, ?)", rows
    )


def put_trial(connection: sqlite3.Connection, path: Path, trial: NewTrial) -> int:
    """A trial with its values, flips and propagation; a failed one of its name gives way.

    Returns:
        Its id.

    Raises:
        CampaignError: one that is done has its name; or its cell, stratum or clean run is missing.
    """
    cell, stratum, run = _owners(connection, path, trial)
    _make_way(connection, path, trial, cell, stratum)
    (number,) = connection.execute("SELECT COALESCE(MAX(id), 0) + 1 FROM trials").fetchone()
    connection.executemany(
        "INSERT INTO trial_values (trial, metric, epoch, value) VALUES (?, ?, ?, ?)",
        _measured(connection, number, trial.values),
    )
    if trial.flips is not None:
        _put_flips(connection, number, cell, trial.flips)
    for spread in trial.spread:
        connection.executemany(_PUT_LAYER, _layers(number, spread))
    counts = trial.counts
    amounts = (
        (None,) * 4
        if counts is None
        else (counts.bits_hit, counts.bits_effective, counts.words_hit, counts.words_effective)
    )
    row = (
        number, cell, stratum, trial.number, run, str(trial.seed), trial.state, trial.outcome, trial.message,
        trial.signal, trial.ended, trial.ended_epoch, trial.recovered, trial.right_after, trial.final,
        trial.clean_final, *amounts, trial.flips_kept, trial.digest,
    )  # fmt: skip
    connection.execute(_PUT_TRIAL, row)
    return int(number)


def put_attempt(connection: sqlite3.Connection, attempt: NewAttempt, trial: int | None, ended: str) -> None:
    """An attempt, with the id of the trial it gave."""
    connection.execute(
        "INSERT INTO attempts (task, trial, state, signal, message, ended, seconds, phases, executor, host, "
        "pid, versions) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            attempt.task, trial, attempt.state, attempt.signal, attempt.message, ended, attempt.seconds,
            json(attempt.phases), attempt.executor, attempt.host, attempt.pid, json(attempt.versions),
        ),
    )  # fmt: skip


def _files(checkpoints: Mapping[int, str]) -> str:
    return msgspec.json.encode({epoch: checkpoints[epoch] for epoch in sorted(checkpoints)}).decode()


def _measured(
    connection: sqlite3.Connection,
    owner: int,
    measured: tuple[tuple[int, ...], Mapping[str, Sequence[float | None]]],
) -> Iterator[tuple[int, int, int, float]]:
    """A row for each value that was measured."""
    epochs, values = measured
    for name, column in values.items():
        metric = _metric(connection, name)
        for epoch, value in zip(epochs, column, strict=True):
            if value is not None:
                yield owner, metric, epoch, float(value)


def _metric(connection: sqlite3.Connection, name: str) -> int:
    found = connection.execute("SELECT id FROM metrics WHERE name = ?", (name,)).fetchone()
    if found is None:
        return int(connection.execute("INSERT INTO metrics (name) VALUES (?)", (name,)).lastrowid or 0)
    return int(found[0])


def _owners(connection: sqlite3.Connection, path: Path, trial: NewTrial) -> tuple[int, int | None, int]:
    """Ids of a trial's cell, stratum and clean run."""
    cell = cell_id(connection, path, trial.cell)
    stratum = None
    if trial.stratum is not None:
        found = connection.execute(
            "SELECT id FROM strata WHERE cell = ? AND layer = ? AND field = ?", (cell, *trial.stratum)
        ).fetchone()
        if found is None:
            raise CampaignError(
                f"{path}: cell {trial.cell} has no stratum {trial.stratum}; note its strata first"
            )
        stratum = int(found[0])
    run = connection.execute(
        "SELECT id FROM runs WHERE seed = ? "
        "AND workload = COALESCE(?, (SELECT workload FROM cells WHERE id = ?))",
        (trial.run_seed, trial.workload, cell),
    ).fetchone()
    if run is None:
        raise CampaignError(f"{path} has no clean run with seed {trial.run_seed} for cell {trial.cell}")
    return cell, stratum, int(run[0])


def _make_way(
    connection: sqlite3.Connection, path: Path, trial: NewTrial, cell: int, stratum: int | None
) -> None:
    found = connection.execute(
        "SELECT id, state FROM trials WHERE cell = ? AND stratum IS ? AND number = ?",
        (cell, stratum, trial.number),
    ).fetchone()
    if found is None:
        return
    if found[1] == "done":
        raise CampaignError(f"{path}: trial {trial.number} of cell {trial.cell} is done; it never changes")
    connection.execute("DELETE FROM trials WHERE id = ?", (found[0],))


def _put_flips(connection: sqlite3.Connection, trial: int, cell: int, flips: Flips) -> None:
    (workload,) = connection.execute("SELECT workload FROM cells WHERE id = ?", (cell,)).fetchone()
    ids = np.array([_tensor(connection, workload, entry) for entry in flips.tensors], dtype=np.int64)
    positions = np.frombuffer(flips.tensor, dtype="<i4")
    sets = [np.frombuffer(each, dtype="<u8") for each in (flips.hit, flips.before, flips.after)]
    connection.executemany(
        "INSERT INTO flips (trial, tensor, word, hit, before, after) VALUES (?, ?, ?, ?, ?, ?)",
        zip(
            [trial] * len(positions),
            ids[positions].tolist() if len(positions) else [],
            np.frombuffer(flips.word, dtype="<i8").tolist(),
            *(signed(each.astype(np.uint64, copy=False)) for each in sets),
            strict=True,
        ),
    )


def _tensor(connection: sqlite3.Connection, workload: str, entry: TensorEntry) -> int:
    row = (workload, entry.name, json(entry.shape), entry.dtype)
    found = connection.execute(
        "SELECT id FROM tensors WHERE workload = ? AND name = ? AND shape = ? AND dtype = ?", row
    ).fetchone()
    if found is not None:
        return int(found[0])
    cursor = connection.execute(
        "INSERT INTO tensors (workload, name, shape, dtype, layer, role) VALUES (?, ?, ?, ?, ?, ?)",
        (*row, entry.layer, entry.role),
    )
    return int(cursor.lastrowid or 0)


def _layers(trial: int, spread: Spread) -> Iterator[tuple[Any, ...]]:
    for position, layer in enumerate(spread.layers):
        row = {"position": position, **layer}
        yield trial, spread.epoch, *(row[name] for name in _LAYER), _finite(row.get("changes", ()))


def _finite(numbers: Sequence[float]) -> str:
    """Numbers as JSON, which has none that are not finite: those are text."""
    return json([each if math.isfinite(each) else str(each) for each in numbers])


def _other_bits(connection: sqlite3.Connection, path: Path, run: int, epoch: int, what: str) -> str:
    workload, seed = connection.execute("SELECT workload, seed FROM runs WHERE id = ?", (run,)).fetchone()
    return (
        f"{path}: the clean run of {workload!r} with seed {seed} differs from the one that is stored, first "
        f"in {what} at epoch {epoch}. Other libraries, threads or processors compute other bits, so their "
        "trials cannot be compared: go on where the campaign was begun, or begin a new store"
    )
