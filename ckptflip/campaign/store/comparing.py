"""The contents of a store in terms that two stores share: names and keys in the place of ids."""

from __future__ import annotations

import sqlite3
from typing import Any

_NAME = "cells.key, COALESCE(strata.layer, ''), COALESCE(strata.field, ''), trials.number"
_OF_TRIAL = """JOIN trials ON trials.id = {0}.trial JOIN cells ON cells.id = trials.cell
    LEFT JOIN strata ON strata.id = trials.stratum"""
_TENSOR = "tensors.workload, tensors.name, tensors.shape, tensors.dtype"
_RESULT = """runs.workload, runs.seed, trials.seed, state, outcome, message, signal, ended, ended_epoch,
    recovered, right_after, final, clean_final, bits_hit, bits_effective, words_hit, words_effective,
    flips_kept, digest"""
_FLIP = f"{_TENSOR}, word, hit, before, after"
_LAYER = """propagation.epoch, propagation.position, propagation.layer, elements, changed, from_zero, nev,
    minimum, lower, median, upper, maximum, mean, changes"""

# Table -> its rows by natural keys, sorted. `current` and `position` say where a cell stands in the spec.
VALUES = {
    "cells": """SELECT key, position, current, workload, epoch, until, label, policy, swept, wanted, stopped
        FROM cells ORDER BY key""",
    "strata": """SELECT cells.key, layer, field, bits, weight FROM strata JOIN cells ON cells.id = strata.cell
        ORDER BY 1, 2, 3""",
    "runs": "SELECT workload, seed, until, exact, checkpoints FROM runs ORDER BY 1, 2",
    "run_states": """SELECT workload, seed, epoch, digest FROM run_states JOIN runs ON runs.id = run
        ORDER BY 1, 2, 3""",
    "run_values": """SELECT workload, seed, metrics.name, epoch, value FROM run_values
        JOIN runs ON runs.id = run JOIN metrics ON metrics.id = metric ORDER BY 1, 2, 3, 4""",
    "trials": f"""SELECT {_NAME}, {_RESULT}
        FROM trials JOIN cells ON cells.id = trials.cell JOIN runs ON runs.id = trials.run
        LEFT JOIN strata ON strata.id = trials.stratum ORDER BY 1, 2, 3, 4""",
    "trial_values": f"""SELECT {_NAME}, metrics.name, trial_values.epoch, value
        FROM trial_values {_OF_TRIAL.format("trial_values")} JOIN metrics ON metrics.id = metric
        ORDER BY 1, 2, 3, 4, 5, 6""",
    # Of tensors that are still referred to: a failed trial that was dropped leaves its own behind.
    "tensors": f"""SELECT {_TENSOR}, layer, role FROM tensors WHERE id IN (SELECT tensor FROM flips)
        ORDER BY 1, 2, 3, 4""",
    "flips": f"""SELECT {_NAME}, {_FLIP}
        FROM flips {_OF_TRIAL.format("flips")} JOIN tensors ON tensors.id = tensor
        ORDER BY 1, 2, 3, 4, 5, 6, 7, 8, 9""",
    "propagation": f"""SELECT {_NAME}, {_LAYER}
        FROM propagation {_OF_TRIAL.format("propagation")} ORDER BY 1, 2, 3, 4, 5, 6, 7""",
}

_TRIAL = {
    "result": f"SELECT {_RESULT} FROM trials JOIN runs ON runs.id = trials.run WHERE trials.id = ?",
    "values by epoch": """SELECT metrics.name, epoch, value FROM trial_values
        JOIN metrics ON metrics.id = metric WHERE trial = ? ORDER BY 1, 2""",
    "altered words": f"""SELECT {_FLIP} FROM flips JOIN tensors ON tensors.id = tensor WHERE trial = ?
        ORDER BY 1, 2, 3, 4, 5""",
    "propagation": f"SELECT {_LAYER} FROM propagation WHERE trial = ? ORDER BY 1, 2, 3",
}


def first_difference(
    connections: tuple[sqlite3.Connection, sqlite3.Connection], trials: tuple[int, int]
) -> str | None:
    """What of a trial differs between two stores.

    Args:
        connections: to both stores.
        trials: its id in each.

    Returns:
        ``result``, ``values by epoch``, ``altered words`` or ``propagation``; None: nothing differs.
    """
    for what, sql in _TRIAL.items():
        one, other = (_all(c, sql, t) for c, t in zip(connections, trials, strict=True))
        if one != other:
            return what
    return None


def _all(connection: sqlite3.Connection, sql: str, trial: int) -> list[tuple[Any, ...]]:
    return connection.execute(sql, (trial,)).fetchall()
