"""Schedules: what is due depends on the outcomes of earlier trials alone, never on an order of finishing."""

from __future__ import annotations

import random
from typing import Any

import pytest

from ckptflip.campaign import loading, scheduling
from ckptflip.campaign.cells import expand
from ckptflip.campaign.scheduling import Past, due, rounds_of, rule_of
from ckptflip.campaign.statistics import stopped, weighted_sequence

BAD_RATE = {"sign": 0.02, "critical": 0.7}


def made(**trials: Any) -> Any:
    spec = loading.convert({
        "name": "x", "workload": [{"name": "digits-mlp"}], "restart": {"epochs": [2], "until": 6},
        "policy": [{"roles": "model"}], "trials": {"control": 0, **trials},
    })  # fmt: skip
    return spec, expand(spec)[0]


def outcome(number: int, stratum: int | None, rate: float) -> str:
    """Some outcome that a trial would have, whoever runs it and whenever."""
    return "collapsed" if random.Random(f"{number}/{stratum}").random() < rate else "masked"


def played(spec: Any, cell: Any, rates: list[float], weights: list[float], order: int) -> tuple[dict, str]:
    """Run a cell to its end; workers finish in an order of their own."""
    finished: dict[int, str] = {}
    shuffled = random.Random(order)
    while True:
        asked = due(spec, cell, finished, weights)
        missing = [(n, at) for n, at in asked.trials if n not in finished]
        if not missing:
            assert asked.reason is not None
            return finished, asked.reason
        shuffled.shuffle(missing)
        for n, at in missing[: shuffled.randint(1, len(missing))]:
            finished[n] = outcome(n, at, rates[at or 0])


def test_all_trials_of_a_plain_cell_are_due_at_once() -> None:
    spec, cell = made(per_cell=5)
    assert [n for n, _ in due(spec, cell, {}).trials] == [0, 1, 2, 3, 4]
    assert due(spec, cell, dict.fromkeys(range(4), "masked")).reason is None
    assert due(spec, cell, dict.fromkeys(range(5), "masked")).reason == "all trials"


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_a_stop_rule_ends_a_cell_at_the_same_trial_in_any_order(rate: float) -> None:
    spec, cell = made(stop={"half_width": 0.1, "at_most": 400, "batch": 10, "at_least": 10})
    results = [played(spec, cell, [rate], [], order) for order in range(5)]
    assert all(result == results[0] for result in results)
    finished, reason = results[0]
    decided = stopped([finished[n] == "collapsed" for n in range(len(finished))], rule_of(spec))
    assert decided is not None and (decided.trials, decided.reason) == (len(finished), reason)
    assert reason == "precise enough"


def test_a_stop_rule_gives_up_at_most() -> None:
    spec, cell = made(stop={"half_width": 0.01, "at_most": 35, "batch": 10})
    finished, reason = played(spec, cell, [0.5], [], 0)
    assert (len(finished), reason) == (35, "limit reached")


def test_failed_trials_are_no_observations() -> None:
    spec, cell = made(stop={"half_width": 0.2, "at_most": 200, "batch": 10, "at_least": 10})
    done = {n: "" if n % 2 else "masked" for n in range(10)}
    assert due(spec, cell, done).reason is None
    assert due(spec, cell, dict.fromkeys(range(200), "")).reason == "limit reached"


@pytest.mark.parametrize(
    "trials", [{"per_cell": 180}, {"stop": {"half_width": 0.05, "at_most": 2000, "batch": 60}}]
)
def test_strata_are_drawn_alike_in_any_order(trials: dict[str, Any]) -> None:
    spec, cell = made(strata=["field"], **trials)
    weights, rates = [1 / 32, 1 / 32, 30 / 32], [0.02, 0.7, 0.001]
    results = [played(spec, cell, rates, weights, order) for order in range(4)]
    assert all(result == results[0] for result in results)
    finished, _ = results[0]
    rounds = rounds_of(spec, cell, finished, weights)
    assert len(rounds.drawn) == len(finished) == rounds.trials.sum()
    # What was seen in the first round decides where the next ones look: more often at the critical bit.
    assert rounds.probabilities[0].tolist() == pytest.approx(weights)
    assert rounds.probabilities[-1][1] > 4 * weights[1]


@pytest.mark.parametrize(
    "trials",
    [
        {"per_cell": 180},
        {"stop": {"half_width": 0.05, "at_most": 2000, "batch": 60}},
        {"stop": {"half_width": 0.01, "at_most": 130, "batch": 20, "at_least": 60}},
    ],
)
def test_what_is_kept_of_finished_rounds_changes_nothing(
    trials: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, cell = made(strata=["field"], **trials)
    weights, rates = [1 / 32, 1 / 32, 30 / 32], [0.02, 0.7, 0.001]
    finished, reason = played(spec, cell, rates, weights, 0)
    draw, places, past, ended = scheduling.drawn_strata, [], Past(), None
    monkeypatch.setattr(
        scheduling, "drawn_strata", lambda *a, place: places.append(place) or draw(*a, place=place)
    )
    # Trial by trial, in the order of the numbers and, in each round, backwards.
    known: dict[int, str] = {}
    while ended is None:
        asked = due(spec, cell, known, weights, past)
        ended = asked.reason
        for n, _ in [each for each in asked.trials[::-1] if each[0] not in known]:
            known[n] = finished[n]
            due(spec, cell, known, weights, past)
    assert (known, ended) == (finished, reason)
    assert places == list(range(len(past.trials)))  # each round was drawn once
    anew, kept = rounds_of(spec, cell, known, weights), rounds_of(spec, cell, known, weights, past)
    assert kept.drawn == anew.drawn == tuple(past.drawn)
    for name in ("probabilities", "events", "trials"):
        assert getattr(kept, name).tolist() == getattr(anew, name).tolist()
    if (rule := spec.trials.stop) is not None:
        ends = weighted_sequence(weights, kept.probabilities, kept.events, kept.trials, rule.confidence)
        assert (past.ends.low[0], past.ends.high[0]) == (ends[0][-1], ends[1][-1])
