"""Rates of cells, with the interval that holds for how their trials were drawn and stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from played_campaigns import finished, made, write

from ckptflip.campaign.estimates import FIXED, SEQUENCE, WEIGHTED, Estimate, estimates, rates
from ckptflip.campaign.progress import progress
from ckptflip.campaign.scheduling import rounds_of, rule_of
from ckptflip.campaign.statistics import clopper_pearson, stopped, weighted_sequence
from ckptflip.campaign.store import reading

WEIGHTS = [1 / 32, 31 / 32]


def estimate(*arguments: Any) -> Estimate | None:
    """The rate that is estimated when no other is asked for."""
    return next(iter(rates(*arguments)), None)


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
    seen = [each.rate for each in found if each is not None]
    assert sum(each is not None and each.low <= truth <= each.high for each in found) >= 57
    assert abs(np.mean(seen) - truth) < 4 * np.std(seen) / np.sqrt(60)


def test_rates_of_all_outcomes_add_up() -> None:
    spec, cell = made(strata=["field"], per_cell=200)
    outcomes = finished(spec, cell, [0.6, 0.1], WEIGHTS)
    sets = [("collapsed",), ("masked",), ("slowed",)]
    collapsed, masked, slowed = rates(spec, cell, outcomes, WEIGHTS, 0.95, sets)
    assert collapsed.events + masked.events == 200 and slowed.rate == 0.0
    assert collapsed.rate == pytest.approx(rates(spec, cell, outcomes, WEIGHTS)[0].rate)
    assert slowed.high < 0.05


def test_nothing_finished_is_no_estimate() -> None:
    spec, cell = made(per_cell=4)
    assert estimate(spec, cell, {}) is None
    assert estimate(spec, cell, {0: ""}) is None


@pytest.mark.parametrize("trials", [{"stop": {"half_width": 0.1}}, {"strata": ["field"], "per_cell": 100}])
def test_status_shows_what_holds(tmp_path: Path, trials: dict[str, Any]) -> None:
    spec, cell = made(**trials)
    strata = list(zip(["critical", "mantissa"], WEIGHTS, strict=True)) if "strata" in trials else []
    write(tmp_path / "x.db", spec, cell, finished(spec, cell, [0.2, 0.1], WEIGHTS if strata else []), strata)
    with reading(tmp_path / "x.db") as reader:
        ((expected,),) = estimates(reader).values()
    shown = progress(tmp_path / "x.db").cells[0]
    assert (shown.rate, shown.low, shown.high) == (expected.rate, expected.low, expected.high)
