"""Every command that reads a damaged store says so: none falls over it or takes it as it is."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from damaged_stores import damages
from sample_stores import filled

from ckptflip.cli.main import run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = filled(tmp_path_factory.mktemp("whole") / "runs.db")
    with closing(sqlite3.connect(store)) as connection:
        connection.execute("PRAGMA wal_checkpoint (TRUNCATE)")
    return store


def commands(store: Path, whole: Path) -> list[list[str]]:
    beside = store.parent
    tables = ("values", "trials", "flips", "propagation", "cells", "clean")
    return [
        ["status", str(store)],
        ["status", str(store), "--format", "json"],
        *(
            ["export", str(store), "-o", str(beside / "o.csv"), "--table", table, "--overwrite"]
            for table in tables
        ),
        ["export", str(store), "-o", str(beside / "o.parquet"), "--table", "trials", "--overwrite"],
        ["merge", str(store), str(whole), "-o", str(beside / "m.db"), "--overwrite"],
        ["merge", str(whole), str(store), "-o", str(beside / "m.db"), "--overwrite"],
    ]


@pytest.mark.parametrize("seed", range(4))
def test_no_damage_is_more_than_a_message(
    whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], seed: int
) -> None:
    store, refused = tmp_path / "runs.db", 0
    for what in damages(whole, store, 25, seed):
        for command in commands(store, whole):
            code = run(command)  # an exception ends the test
            told = capfd.readouterr()
            assert code in (0, 1), (what, command, told)
            assert "\x1b" not in told.out + told.err, (what, command)
            if code:
                refused += 1
                assert told.err.startswith("Error: "), (what, command, told)
                assert str(store) in told.err or "differ" in told.err, (what, command, told)
    assert refused > 50


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("UPDATE attempts SET ended = '2026-11-28T99:00:00.000+00:00'", "is damaged"),
        ("UPDATE attempts SET seconds = x'ff'", "attempts.seconds holds a value of the wrong kind"),
        ("UPDATE trials SET state = ''", "is damaged"),
        ("UPDATE cells SET wanted = 'x' WHERE id = 1", "cells.wanted holds a value of the wrong kind"),
        ("UPDATE cells SET swept = '[]' WHERE id = 1", "cells.swept holds a value of the wrong kind"),
        ("UPDATE trials SET seed = 'x' WHERE id = 1", "is damaged: "),
        ("UPDATE trial_values SET metric = metric + 8 WHERE trial = 1", "to one of metrics that is not"),
        ("UPDATE tensors SET shape = '{}'", "tensors.shape holds a value of the wrong kind"),
    ],
)  # fmt: skip
def test_a_merge_takes_no_damaged_row(
    whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], statement: str, said: str
) -> None:
    store, out = tmp_path / "runs.db", tmp_path / "m.db"
    store.write_bytes(whole.read_bytes())
    with closing(sqlite3.connect(store)) as connection:
        connection.execute("PRAGMA ignore_check_constraints = ON")
        for name in ("finished_trials_stay", "trial_values_UPDATE_of_finished"):
            connection.execute(f"DROP TRIGGER {name}")
        connection.execute(statement)
        connection.commit()
    for names in ([store, whole], [whole, store]):
        assert run(["merge", *map(str, names), "-o", str(out)]) == 1
        told = capfd.readouterr().err
        assert told.startswith(f"Error: {store} is damaged: ") and said in told
        assert not os.path.lexists(out)
