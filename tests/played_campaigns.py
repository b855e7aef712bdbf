"""Stores of campaigns that were never run: their schedules are real, their outcomes drawn."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ckptflip.campaign import loading
from ckptflip.campaign.cells import Planned, expand
from ckptflip.campaign.scheduling import due, rounds_of
from ckptflip.campaign.spec import Campaign
from ckptflip.campaign.store import writing
from ckptflip.campaign.store.rows import Cell, NewAttempt, NewTrial, Stratum

UNTIL = 6


def made(**trials: Any) -> tuple[Campaign, Planned]:
    """A campaign of one cell."""
    spec = loading.convert({
        "name": "x", "workload": [{"name": "digits-mlp"}], "restart": {"epochs": [2], "until": UNTIL},
        "policy": [{"roles": "model", "label": "flips"}], "trials": {"control": 0, **trials},
    })  # fmt: skip
    return spec, expand(spec)[0]


def finished(
    spec: Campaign, cell: Planned, rates: Sequence[float], weights: Sequence[float] = (), seed: int = 0
) -> dict[int, str]:
    """Outcomes of all trials that the cell wants, collapsed at the rate of their stratum."""
    found: dict[int, str] = {}
    while True:
        asked = due(spec, cell, found, weights)
        missing = [(n, at) for n, at in asked.trials if n not in found]
        if not missing:
            return found
        for n, at in missing:
            bad = random.Random(f"{seed}/{n}/{at}").random() < rates[at or 0]
            found[n] = "collapsed" if bad else "masked"


def write(
    path: Path,
    spec: Campaign,
    cell: Planned,
    outcomes: Mapping[int, str],
    strata: Sequence[tuple[str, float]] = (),
) -> None:
    """A store of these outcomes; strata are fields with their weights."""
    weights = [weight for _, weight in strata]
    drawn = rounds_of(spec, cell, outcomes, weights).drawn if strata else ()
    clean = tuple(0.9 for _ in range(2, UNTIL + 1))
    with writing(path) as writer:
        writer.revise(loading.plain_of(spec), loading.fingerprint(spec), "x", {}, {})
        writer.put_cells([
            Cell(key=cell.key, position=0, workload="digits-mlp", epoch=2, until=UNTIL, label=cell.label,
                 wanted=cell.wanted, policy={"roles": ["model"]}, stopped="all trials")
        ])  # fmt: skip
        if strata:
            rows = [Stratum(layer="", field=f, bits=round(3200 * w), weight=w) for f, w in strata]
            writer.put_strata(cell.key, rows)
        writer.put_run("digits-mlp", 0, UNTIL, True, {}, range(2, UNTIL + 1), {"accuracy": clean})
        for n, outcome in outcomes.items():
            end = 2 if outcome == "collapsed" else UNTIL
            trial = NewTrial(
                cell=cell.key, number=n, run_seed=0, seed=n, outcome=outcome,
                stratum=("", strata[drawn[n]][0]) if strata else None, ended_epoch=end,
                recovered=None if outcome == "collapsed" else 0, clean_final=0.9,
                final=None if outcome == "collapsed" else 0.9, right_after=0.9,
                values=(tuple(range(2, end + 1)), {"accuracy": clean[: end - 1]}),
            )  # fmt: skip
            writer.put_trial(trial, NewAttempt(task=str(n), state="done", executor="local"))
