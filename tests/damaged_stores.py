"""Stores damaged in every way that a disk, or somebody with an editor, may damage them."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

VALUES = (
    None, "x", "\x1b[31m\n", b"\xff\xfe", -1, 2**62, float("inf"), 1e308, "", "{}", "[]", "null", '{"a":1}',
    "[1,[2]]", 0, "nan",
)  # fmt: skip
PAGE = 4096


def damages(store: Path, out: Path, count: int, seed: int) -> Iterator[str]:
    """Damage copies of a store, one after the other.

    Args:
        store: an undamaged one, with no log beside it.
        out: the copy; replaced each time.
        count: of copies.
        seed: of what is damaged.

    Yields:
        What is wrong with `out` now.
    """
    chance, whole = random.Random(seed), store.read_bytes()
    for _ in range(count):
        for path in out.parent.glob(f"{out.name}*"):
            path.unlink()
        out.write_bytes(whole)
        yield chance.choice([_bytes, _value, _value, _value])(out, chance)


def _bytes(path: Path, chance: random.Random) -> str:
    held = bytearray(path.read_bytes())
    kind = chance.choice(["flipped", "zero", "cut"])
    at = chance.randrange(len(held))
    if kind == "flipped":
        for _ in range(chance.choice([1, 1, 5, 50])):
            held[chance.randrange(len(held))] ^= 1 << chance.randrange(8)
    elif kind == "zero":
        held[at : at + PAGE] = bytes(len(held[at : at + PAGE]))
    else:
        at = chance.choice([0, 1, 100, PAGE, at])
        del held[at:]
    path.write_bytes(held)
    return f"{kind} at {at}"


def _value(path: Path, chance: random.Random) -> str:
    """One value of one row, whatever the tables allow."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA foreign_keys = OFF")
        connection.execute("PRAGMA ignore_check_constraints = ON")
        names = [
            *connection.execute("SELECT type, name FROM sqlite_schema WHERE type IN ('trigger', 'table')")
        ]
        for kind, name in names:
            if kind == "trigger":
                connection.execute(f'DROP TRIGGER "{name}"')
        while True:
            table = chance.choice([name for kind, name in names if kind == "table"])
            key = [row[1] for row in connection.execute(f"PRAGMA table_info ({table})") if row[5]]
            rows = (
                connection.execute(f"SELECT {', '.join(key)} FROM {table} ORDER BY 1, 2").fetchall()
                if (len(key) > 1)
                else connection.execute(f"SELECT {key[0]} FROM {table} ORDER BY 1").fetchall()
            )
            if not rows:
                continue
            name = chance.choice([row[1] for row in connection.execute(f"PRAGMA table_info ({table})")])
            value = chance.choice(VALUES)
            where = " AND ".join(f"{each} = ?" for each in key)
            try:
                connection.execute(
                    f"UPDATE {table} SET {name} = ? WHERE {where}", (value, *chance.choice(rows))
                )
            except sqlite3.IntegrityError:  # nothing else fits there
                continue
            connection.execute("PRAGMA wal_checkpoint (TRUNCATE)")
            return f"{table}.{name} = {value!r}"
