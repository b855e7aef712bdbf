"""Rates of cells, with the interval that holds for how their trials were drawn and stopped."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckptflip.campaign import loading
from ckptflip.campaign.cells import expand
from ckptflip.campaign.estimates import FIXED, SEQUENCE, WEIGHTED, estimate, estimates
from ckptflip.campaign.progress import progress
from ckptflip.campaign.scheduling import due, rounds_of, rule_of
from ckptflip.campaign.statistics import clopper_pearson, stopped, weighted_sequence
from ckptflip.campaign.store import reading, writing
from ckptflip.campaign.store.rows import Cell, NewAttempt, NewTrial, Stratum

WEIGHTS = [1 / 32, 31 / 32]


def made(**trials: Any) -> Any:
    spec = loading.convert({
        "name": "x", "workload": [{"name": "digits-mlp"}], "restart": {"epochs": [2], "until": 6},
        "policy": [{"roles": "model"}], "trials": {"control": 0, **trials},
    })  # fmt: skip
    return spec, expand(spec)[0]


def finished(spec: Any, cell: Any, rates: list[float], weights: list[float], seed: int = 0) -> dict[int, str]:
    found: dict[int, str] = {}
    while True:
        asked = due(spec, cell, found, weights)
        missing = [(n, at) for n, at in asked.trials if n not in found]
        if not missing:
            return found
        for n, at in missing:
            bad = random.Random(f"{seed}/{n}/{at}").random() < rates[at or 0]
            found[n] = "collapsed" if bad else "masked"


def test_a_fixed_number_of_trials_gets_an_exact_interval() -> None:
    spec, cell = made(per_cell=40)
    outcomes = {n: "collapsed" if n < 3 else "" if n == 39 else "masked" for n in range(40)}
    found = estimate(spec, cell, outcomes)
    assert found is not None
    low, high = clopper_pearson(3, 39, 0.95)
    assert (found.events, found.trials, found.low, found.high) == (3, 39, float(low), float(high))
    assert found.method == FIXED


def test_a_stopped_cell_gets_the_interval_that_stopped_it() -> None:
    spec, cell = made(stop={"half_width": 0.1, "batch": 10, "at_least": 10, "confidence": 0.9})
    outcomes = finished(spec, cell, [0.2], [])
    found = estimate(spec, cell, outcomes)
    decided = stopped([outcomes[n] == "collapsed" for n in range(len(outcomes))], rule_of(spec))
    assert found is not None and decided is not None
    assert (found.low, found.high, found.confidence) == (decided.low, decided.high, 0.9)
    assert found.method == SEQUENCE and found.high - found.low <= 0.2
    early = estimate(spec, cell, {n: outcomes[n] for n in range(7)})
    assert early is not None and early.high - early.low > 0.2


def test_a_stratified_cell_is_weighted_back() -> None:
    spec, cell = made(strata=["field"], per_cell=400)
    outcomes = finished(spec, cell, [0.6, 0.001], WEIGHTS)
    found = estimate(spec, cell, outcomes, WEIGHTS)
    rounds = rounds_of(spec, cell, outcomes, WEIGHTS)
    low, high = weighted_sequence(WEIGHTS, rounds.probabilities, rounds.events, rounds.trials)
    assert found is not None and found.method == WEIGHTED
    assert (found.low, found.high) == (low[-1], high[-1])
    plain = rounds.events.sum() / 400
    assert found.rate < plain / 3  # most trials were drawn from the small stratum that is hit hard
    assert found.effective > 400


def test_weighted_intervals_hold_and_rates_are_unbiased() -> None:
    spec, cell = made(strata=["field"], per_cell=150)
    truth = float(np.dot(WEIGHTS, [0.6, 0.02]))
    found = [
        estimate(spec, cell, finished(spec, cell, [0.6, 0.02], WEIGHTS, seed), WEIGHTS) for seed in range(60)
    ]
    rates = [each.rate for each in found if each is not None]
    assert sum(each is not None and each.low <= truth <= each.high for each in found) >= 57
    assert abs(np.mean(rates) - truth) < 4 * np.std(rates) / np.sqrt(60)


def test_nothing_finished_is_no_estimate() -> None:
    spec, cell = made(per_cell=4)
    assert estimate(spec, cell, {}) is None
    assert estimate(spec, cell, {0: ""}) is None


@pytest.mark.parametrize("trials", [{"stop": {"half_width": 0.1}}, {"strata": ["field"], "per_cell": 100}])
def test_status_shows_what_holds(tmp_path: Path, trials: dict[str, Any]) -> None:
    spec, cell = made(**trials)
    weights = WEIGHTS if "strata" in trials else []
    outcomes = finished(spec, cell, [0.2, 0.1], weights)
    drawn = rounds_of(spec, cell, outcomes, weights).drawn if weights else ()
    named = [("", "critical"), ("", "mantissa")]
    with writing(tmp_path / "x.db") as writer:
        writer.revise(loading.plain_of(spec), loading.fingerprint(spec), "x", {}, {})
        writer.put_cells([
            Cell(key=cell.key, position=0, workload="digits-mlp", epoch=2, until=6, label="x", wanted=1000)
        ])  # fmt: skip
        if weights:
            writer.put_strata(
                cell.key,
                [
                    Stratum(layer=a, field=b, bits=1, weight=w)
                    for (a, b), w in zip(named, weights, strict=True)
                ],
            )
        writer.put_run("digits-mlp", 0, 6, True, {}, [2], {"accuracy": (0.9,)})
        for n, outcome in outcomes.items():
            trial = NewTrial(
                cell=cell.key, number=n, run_seed=0, seed=n, outcome=outcome,
                stratum=named[drawn[n]] if drawn else None,
            )  # fmt: skip
            writer.put_trial(trial, NewAttempt(task=str(n), state="done", executor="local"))
    with reading(tmp_path / "x.db") as reader:
        (expected,) = estimates(reader).values()
    shown = progress(tmp_path / "x.db").cells[0]
    assert (shown.rate, shown.low, shown.high) == (expected.rate, expected.low, expected.high)
