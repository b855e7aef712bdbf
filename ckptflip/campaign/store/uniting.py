"""What stores of one campaign share (cells, clean runs, tensors …), put into a new store."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from ckptflip.campaign.store.reading import Reader
from ckptflip.errors import CampaignError

_CELL = "key, position, current, workload, epoch, until, label, policy, swept, wanted, stopped"
# Ids of the source -> ids of the new store.
Ids = dict[int, int]


def unite_cells(connection: sqlite3.Connection, reader: Reader, seen: Sequence[Path]) -> tuple[Ids, Ids]:
    """Put in a store's cells and strata.

    Args:
        connection: to the new store.
        reader: of the store.
        seen: the stores that were put in before.

    Returns:
        Ids of the cells, and of the strata.

    Raises:
        CampaignError: a cell has other strata than before.
    """
    source = reader.connection
    connection.executemany(
        f"INSERT INTO cells ({_CELL}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (key) DO "
        "UPDATE SET current = MAX(current, excluded.current), wanted = MAX(wanted, excluded.wanted), "
        "stopped = COALESCE(stopped, excluded.stopped)",
        source.execute(f"SELECT {_CELL} FROM cells ORDER BY id"),
    )
    new = dict(connection.execute("SELECT key, id FROM cells"))
    cells = {number: new[key] for number, key in source.execute("SELECT id, key FROM cells")}
    return cells, _unite_strata(connection, reader, cells, seen)


def _unite_strata(connection: sqlite3.Connection, reader: Reader, cells: Ids, seen: Sequence[Path]) -> Ids:
    ids: Ids = {}
    for number, cell, layer, field, bits, weight in reader.connection.execute(
        "SELECT id, cell, layer, field, bits, weight FROM strata ORDER BY id"
    ):
        held = connection.execute(
            "SELECT id, bits, weight FROM strata WHERE cell = ? AND layer = ? AND field = ?",
            (cells[cell], layer, field),
        ).fetchone()
        if held is None:
            cursor = connection.execute(
                "INSERT INTO strata (cell, layer, field, bits, weight) VALUES (?, ?, ?, ?, ?)",
                (cells[cell], layer, field, bits, weight),
            )
            ids[number] = int(cursor.lastrowid or 0)
            continue
        if held[1:] != (bits, weight):
            raise CampaignError(
                f"{reader.path} and {_named(seen)} differ: stratum {layer!r} {field!r} of a cell has {bits} "
                f"bits in one and {held[1]} in the other; their trials hit different checkpoints"
            )
        ids[number] = held[0]
    return ids


def unite_runs(connection: sqlite3.Connection, reader: Reader, seen: Sequence[Path]) -> tuple[Ids, Ids]:
    """Put in a store's clean runs.

    Args:
        connection: to the new store.
        reader: of the store.
        seen: the stores that were put in before.

    Returns:
        Ids of the runs, and of the metrics.

    Raises:
        CampaignError: a run differs from the one that is there; the message names the first value that does.
    """
    source = reader.connection
    connection.executemany(
        "INSERT OR IGNORE INTO metrics (name) VALUES (?)",
        source.execute("SELECT name FROM metrics ORDER BY id"),
    )
    named = dict(connection.execute("SELECT name, id FROM metrics"))
    metrics = {number: named[name] for number, name in source.execute("SELECT id, name FROM metrics")}
    names = {number: name for name, number in named.items()}
    runs: Ids = {}
    rows = source.execute(
        "SELECT id, workload, seed, until, exact, checkpoints FROM runs ORDER BY workload, seed"
    ).fetchall()
    for number, *row in rows:
        runs[number] = _unite_run(connection, tuple(row))
        values = {
            (epoch, names[metrics[metric]], metrics[metric]): value
            for metric, epoch, value in source.execute(
                "SELECT metric, epoch, value FROM run_values WHERE run = ?", (number,)
            )
        }
        _unite_values(connection, runs[number], values, f"{reader.path} and {_named(seen)}", row)
        states = dict(source.execute("SELECT epoch, digest FROM run_states WHERE run = ?", (number,)))
        _unite_states(connection, runs[number], states, f"{reader.path} and {_named(seen)}", row)
    return runs, metrics


def _unite_run(connection: sqlite3.Connection, row: tuple[Any, ...]) -> int:
    workload, seed, until, exact, checkpoints = row
    held = connection.execute(
        "SELECT id, checkpoints FROM runs WHERE workload = ? AND seed = ?", (workload, seed)
    ).fetchone()
    if held is None:
        cursor = connection.execute(
            "INSERT INTO runs (workload, seed, until, exact, checkpoints) VALUES (?, ?, ?, ?, ?)", row
        )
        return int(cursor.lastrowid or 0)
    files = {**_files(held[1]), **_files(checkpoints)}
    kept = msgspec.json.encode({epoch: files[epoch] for epoch in sorted(files)}).decode()
    connection.execute(
        "UPDATE runs SET until = MAX(until, ?1), exact = MIN(COALESCE(exact, ?2), COALESCE(?2, exact)), "
        "checkpoints = ?3 WHERE id = ?4",
        (until, exact, kept, held[0]),
    )
    return int(held[0])


def _unite_values(
    connection: sqlite3.Connection,
    run: int,
    values: dict[tuple[int, str, int], float | None],
    stores: str,
    row: Sequence[Any],
) -> None:
    held = {
        (metric, epoch): value
        for metric, epoch, value in connection.execute(
            "SELECT metric, epoch, value FROM run_values WHERE run = ?", (run,)
        )
    }
    for (epoch, name, metric), value in sorted(values.items(), key=lambda item: item[0]):
        known = held.get((metric, epoch), value)
        if known != value:
            raise CampaignError(
                f"{stores} differ: the clean run of {row[0]!r} with seed {row[1]} has {name} {_shown(value)} "
                f"at epoch {epoch} in one and {_shown(known)} in the other. {_WHY}"
            )
    connection.executemany(
        "INSERT OR IGNORE INTO run_values (run, metric, epoch, value) VALUES (?, ?, ?, ?)",
        [(run, metric, epoch, value) for (epoch, _, metric), value in values.items()],
    )


def _unite_states(
    connection: sqlite3.Connection, run: int, states: dict[int, str], stores: str, row: Sequence[Any]
) -> None:
    held = dict(connection.execute("SELECT epoch, digest FROM run_states WHERE run = ?", (run,)))
    for epoch, digest in sorted(states.items()):
        if held.get(epoch, digest) != digest:
            raise CampaignError(
                f"{stores} differ: the clean run of {row[0]!r} with seed {row[1]} has another training state "
                f"at epoch {epoch}. {_WHY}"
            )
    connection.executemany(
        "INSERT OR IGNORE INTO run_states (run, epoch, digest) VALUES (?, ?, ?)",
        [(run, epoch, digest) for epoch, digest in states.items()],
    )


def unite_tensors(connection: sqlite3.Connection, reader: Reader) -> Ids:
    """Put in a store's tensors.

    Args:
        connection: to the new store.
        reader: of the store.

    Returns:
        Their ids.
    """
    rows = reader.connection.execute(
        "SELECT id, workload, name, shape, dtype, layer, role FROM tensors"
    ).fetchall()
    connection.executemany(
        "INSERT OR IGNORE INTO tensors (workload, name, shape, dtype, layer, role) VALUES (?, ?, ?, ?, ?, ?)",
        [row[1:] for row in rows],
    )
    new = {
        tuple(row[1:]): row[0]
        for row in connection.execute("SELECT id, workload, name, shape, dtype FROM tensors")
    }
    return {row[0]: new[row[1:5]] for row in rows}


_WHY = (
    "Other libraries, threads or processors compute other bits, so their trials cannot be one campaign: run "
    "all shards on machines that give the same"
)


def _files(text: str) -> dict[int, str]:
    return msgspec.json.decode(text, type=dict[int, str])


def _named(seen: Sequence[Path]) -> str:
    return str(seen[0]) if len(seen) == 1 else "those before it"


def _shown(value: float | None) -> str:
    return repr(math.nan if value is None else value)
