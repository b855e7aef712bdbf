"""The tables of a store, and how older ones are brought up to date.

Finished trials never change: triggers refuse it, of what was measured of them and hit in them too (a trial's
own row is put in last). What differs between two runs of the same campaign (times,
hosts, attempts) is kept apart, in `attempts` and `revisions`, so that all other tables of a campaign that was
killed and resumed equal those of one that was not.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping

VERSION = 1
# "ckpf" in ASCII, in the header of every store: tells it from other SQLite files.
APPLICATION = 0x636B7066
# How a trial may end; those that are done have an outcome.
STATES = ("done", "crashed", "hung", "out-of-memory")

# NaN has no place in SQLite, where it becomes NULL: a NULL value is NaN, a value that was not measured has no
# row. Words and bit sets are unsigned; SQLite keeps them as the signed number of the same 64 bits.
_TABLES = """
CREATE TABLE revisions (            -- the spec, each time it was new or edited; the last one holds
    number INTEGER PRIMARY KEY,
    fingerprint TEXT NOT NULL,
    spec TEXT NOT NULL,             -- JSON
    created TEXT NOT NULL,          -- UTC, ISO 8601
    command TEXT NOT NULL,
    versions TEXT NOT NULL,         -- JSON: library -> version
    machine TEXT NOT NULL           -- JSON: processor, cores, memory, system
);
CREATE TABLE runs (                 -- clean runs
    id INTEGER PRIMARY KEY,
    workload TEXT NOT NULL,         -- label of the workload
    seed INTEGER NOT NULL,
    until INTEGER NOT NULL,         -- epochs trained
    exact INTEGER,                  -- 1: a resume repeated the run bit for bit; 0: it did not; NULL: untried
    checkpoints TEXT NOT NULL,      -- JSON: epoch -> file name in the folder of clean runs
    UNIQUE (workload, seed)
);
CREATE TABLE run_states (           -- digest of the whole training state of a clean run, where it gives one
    run INTEGER NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
    epoch INTEGER NOT NULL,
    digest TEXT NOT NULL,
    PRIMARY KEY (run, epoch)
) WITHOUT ROWID;
CREATE TABLE metrics (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE run_values (
    run INTEGER NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
    metric INTEGER NOT NULL REFERENCES metrics (id),
    epoch INTEGER NOT NULL,
    value REAL,
    PRIMARY KEY (run, metric, epoch)
) WITHOUT ROWID;
CREATE TABLE cells (                -- workload x checkpoint epoch x policy
    id INTEGER PRIMARY KEY,
    key TEXT NOT NULL UNIQUE,       -- digest of what defines the cell
    position INTEGER NOT NULL,      -- in the spec
    current INTEGER NOT NULL,       -- 0: an earlier revision's, no longer in the spec
    workload TEXT NOT NULL,         -- label
    epoch INTEGER NOT NULL,         -- of the checkpoint that is altered
    until INTEGER NOT NULL,         -- epoch of the last row
    label TEXT NOT NULL,            -- the condition, in words
    policy TEXT,                    -- JSON; NULL: a restart without change
    swept TEXT NOT NULL,            -- JSON: swept field -> value in this cell
    wanted INTEGER NOT NULL,        -- trials wanted; with a stop rule, at most
    stopped TEXT                    -- why no more trials are run, once that is so: 'enough', 'interval', ...
);
CREATE TABLE strata (               -- of cells that draw by layer and bit field
    id INTEGER PRIMARY KEY,
    cell INTEGER NOT NULL REFERENCES cells (id) ON DELETE CASCADE,
    layer TEXT NOT NULL,            -- '' where layers are not told apart
    field TEXT NOT NULL,            -- sign, critical, exponent (without the critical bit), mantissa; '' too
    bits INTEGER NOT NULL,          -- eligible bits in it
    weight REAL NOT NULL,           -- their share of the cell's
    UNIQUE (cell, layer, field)
);
CREATE TABLE trials (               -- finished ones only
    id INTEGER PRIMARY KEY,
    cell INTEGER NOT NULL REFERENCES cells (id),
    stratum INTEGER REFERENCES strata (id),
    number INTEGER NOT NULL,        -- in its cell (and stratum), from 0
    run INTEGER NOT NULL REFERENCES runs (id),   -- the clean run it starts from and is compared with
    seed TEXT NOT NULL,             -- of its draw, 0 to 2^64-1
    state TEXT NOT NULL CHECK (state IN ('done', 'crashed', 'hung', 'out-of-memory')),
    outcome TEXT CHECK (outcome IN ('identical', 'masked', 'slowed', 'degraded', 'collapsed')),
    message TEXT NOT NULL DEFAULT '',
    signal INTEGER,
    ended TEXT,                     -- horizon, collapsed, identical: why no further epoch was trained
    ended_epoch INTEGER,            -- the last epoch that was trained and measured
    recovered INTEGER,              -- epochs after the restart until the metric is within tolerance to
                                    -- the end; NULL: not by the last epoch
    right_after REAL,               -- the metric of the altered checkpoint, before any training
    final REAL,                     -- at the last epoch; NULL of a collapsed trial
    clean_final REAL,               -- the clean run's
    bits_hit INTEGER, bits_effective INTEGER, words_hit INTEGER, words_effective INTEGER,
    flips_kept INTEGER NOT NULL DEFAULT 1,       -- 0: too many to keep one by one
    digest TEXT NOT NULL DEFAULT '',             -- of the whole training state at the end
    UNIQUE (cell, stratum, number),
    CHECK ((state = 'done') = (outcome IS NOT NULL))
);
CREATE UNIQUE INDEX trial_of_cell ON trials (cell, number) WHERE stratum IS NULL;
CREATE TABLE trial_values (
    trial INTEGER NOT NULL REFERENCES trials (id) ON DELETE CASCADE,
    metric INTEGER NOT NULL REFERENCES metrics (id),
    epoch INTEGER NOT NULL,
    value REAL,
    PRIMARY KEY (trial, metric, epoch)
) WITHOUT ROWID;
CREATE TABLE tensors (
    id INTEGER PRIMARY KEY,
    workload TEXT NOT NULL,
    name TEXT NOT NULL,
    shape TEXT NOT NULL,            -- JSON
    dtype TEXT NOT NULL,
    layer TEXT NOT NULL,
    role TEXT NOT NULL,
    UNIQUE (workload, name, shape, dtype)
);
CREATE TABLE flips (                -- one row per word that was hit
    trial INTEGER NOT NULL REFERENCES trials (id) ON DELETE CASCADE,
    tensor INTEGER NOT NULL REFERENCES tensors (id),
    word INTEGER NOT NULL,          -- flat position in C order (of complex parts: twice that, and one)
    hit INTEGER NOT NULL,           -- the bits that were drawn, as a set
    before INTEGER NOT NULL,
    after INTEGER NOT NULL,
    PRIMARY KEY (trial, tensor, word)
) WITHOUT ROWID;
CREATE TABLE propagation (
    trial INTEGER NOT NULL REFERENCES trials (id) ON DELETE CASCADE,
    epoch INTEGER NOT NULL,
    position INTEGER NOT NULL,      -- of the layer in the network
    layer TEXT NOT NULL,
    elements INTEGER NOT NULL, changed INTEGER NOT NULL, from_zero INTEGER NOT NULL, nev INTEGER NOT NULL,
    minimum REAL, lower REAL, median REAL, upper REAL, maximum REAL, mean REAL,
    changes TEXT NOT NULL,          -- JSON: minimum, quartiles, maximum of magnitudes other than 0; or []
    PRIMARY KEY (trial, epoch, layer)
) WITHOUT ROWID;
CREATE TABLE attempts (             -- every attempt at a task, in the order they ended
    id INTEGER PRIMARY KEY,
    task TEXT NOT NULL,             -- key of the job
    trial INTEGER REFERENCES trials (id) ON DELETE SET NULL,
    state TEXT NOT NULL,
    signal INTEGER,
    message TEXT NOT NULL DEFAULT '',
    ended TEXT NOT NULL,            -- UTC, ISO 8601
    seconds REAL NOT NULL,
    phases TEXT NOT NULL DEFAULT '{}',           -- JSON: load, inject, train, total in seconds
    executor TEXT NOT NULL,
    host TEXT NOT NULL DEFAULT '',
    pid INTEGER NOT NULL DEFAULT 0,
    versions TEXT NOT NULL DEFAULT '{}'
);
-- Answers how many trials ended how, without a look at the trials themselves.
CREATE INDEX trials_by_outcome ON trials (cell, stratum, state, outcome);
CREATE TRIGGER finished_trials_stay BEFORE UPDATE ON trials WHEN OLD.state = 'done'
BEGIN SELECT RAISE (ABORT, 'a finished trial never changes'); END;
CREATE TRIGGER finished_trials_are_kept BEFORE DELETE ON trials WHEN OLD.state = 'done'
BEGIN SELECT RAISE (ABORT, 'a finished trial is never deleted'); END;
"""

# What was measured of a finished trial and hit in it stays, too.
_DETAIL = """CREATE TRIGGER {table}_{event}_of_finished BEFORE {event} ON {table}
WHEN (SELECT state FROM trials WHERE id = {row}.trial) = 'done'
BEGIN SELECT RAISE (ABORT, 'a finished trial never changes'); END;
"""

_VIEW = """
-- For questions by hand: each altered word beside what became of its trial.
CREATE VIEW faults AS
SELECT cells.label AS cell, cells.workload, cells.epoch, trials.id AS trial, trials.number, trials.state,
    trials.outcome, tensors.name AS tensor, tensors.layer, tensors.role, tensors.dtype, flips.word,
    printf('%x', flips.hit) AS hit, printf('%x', flips.before) AS before,
    printf('%x', flips.after) AS after
FROM flips JOIN trials ON trials.id = flips.trial JOIN cells ON cells.id = trials.cell
    JOIN tensors ON tensors.id = flips.tensor;
"""
SCHEMA = (
    _TABLES
    + "".join(
        _DETAIL.format(table=table, event=event, row="NEW" if event == "INSERT" else "OLD")
        for table in ("trial_values", "flips", "propagation")
        for event in ("INSERT", "UPDATE", "DELETE")
    )
    + _VIEW
)

# What brings a store of each version to the next one: SQL statements. None yet: version 1 is the first.
STEPS: Mapping[int, str] = {}


def create(connection: sqlite3.Connection) -> None:
    """Make the tables in an empty file, all or none."""
    _apply(connection, SCHEMA, VERSION)


def migrate(connection: sqlite3.Connection) -> None:
    """Bring an older store up to date, one version after the other; each step is done whole or not at all.

    Args:
        connection: to a store that may be written, of a version that there is a way from.
    """
    (found,) = connection.execute("PRAGMA user_version").fetchone()
    for old in range(found, VERSION):
        _apply(connection, STEPS[old], old + 1)


def _apply(connection: sqlite3.Connection, statements: str, version: int) -> None:
    # `executescript` first commits what is open; a script that begins on its own stays one transaction.
    try:
        connection.executescript(
            f"BEGIN IMMEDIATE; {statements}; PRAGMA application_id = {APPLICATION}; "
            f"PRAGMA user_version = {version}; COMMIT;"
        )
    except sqlite3.Error:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
