"""Whether the rows of a store are what its tables say: each value of its column's kind, each id of a row."""

from __future__ import annotations

import contextlib
import functools
import sqlite3
from collections.abc import Iterable
from datetime import datetime

from ckptflip.campaign.spec import OUTCOMES
from ckptflip.campaign.store import schema

_KINDS = {"INTEGER": "integer", "REAL": "real", "TEXT": "text"}
# Columns of text that holds JSON, and of which type.
_JSON = {
    "spec": "object", "versions": "object", "machine": "object", "checkpoints": "object",
    "policy": "object", "swept": "object", "phases": "object", "shape": "array", "changes": "array",
}  # fmt: skip


def check_rows(connection: sqlite3.Connection) -> None:
    """Look at every value of every table once, as SQLite itself does not: any column takes any kind of value.

    Raises:
        ValueError: a value is of another kind than its column's, or a row refers to one that is not there.
    """
    for table, kinds in _columns().items():
        wrong = [_wrong(name, allowed) for name, allowed in kinds]
        if connection.execute(f"SELECT 1 FROM {table} WHERE {' OR '.join(wrong)} LIMIT 1").fetchone():
            bad = next(
                name
                for (name, _), condition in zip(kinds, wrong, strict=True)
                if connection.execute(f"SELECT 1 FROM {table} WHERE {condition} LIMIT 1").fetchone()
            )
            raise ValueError(f"{table}.{bad} holds a value of the wrong kind")
    for table, _, other, _ in connection.execute("PRAGMA foreign_key_check"):
        raise ValueError(f"a row of {table} refers to one of {other} that is not there")


def _wrong(name: str, allowed: tuple[str, ...]) -> str:
    """An SQL condition that holds where a column's value is none that is allowed."""
    kinds = f"typeof({name}) NOT IN ({', '.join(map(repr, allowed))})"
    if name not in _JSON:
        return kinds
    return (
        f"CASE WHEN {kinds} THEN 1 WHEN {name} IS NULL THEN 0 WHEN NOT json_valid({name}) THEN 1 "
        f"ELSE json_type({name}) != '{_JSON[name]}' END"
    )


def check_ends(ends: Iterable[tuple[str | None, str | None]]) -> None:
    """Look at how trials ended.

    Args:
        ends: state and outcome (None or empty: none).

    Raises:
        ValueError: one ended in no way that there is.
    """
    for state, outcome in ends:
        if state not in schema.STATES or (outcome or None) not in (OUTCOMES if state == "done" else (None,)):
            raise ValueError(f"a trial is {state!r} with the outcome {outcome!r}")


def check_time(text: str) -> None:
    """Look at a time of day.

    Raises:
        ValueError: it is none, or says not where on Earth.
    """
    if datetime.fromisoformat(text).tzinfo is None:
        raise ValueError(f"{text!r} is a time without its zone")


@functools.cache
def _columns() -> dict[str, list[tuple[str, tuple[str, ...]]]]:
    """By table, its columns and the kinds of value each may have."""
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        schema.create(connection)
        tables = connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'").fetchall()
        return {
            table: [
                (name, (_KINDS[kind],) if needed or key else (_KINDS[kind], "null"))
                for _, name, kind, needed, _, key in connection.execute(f"PRAGMA table_info ({table})")
            ]
            for (table,) in tables
        }
