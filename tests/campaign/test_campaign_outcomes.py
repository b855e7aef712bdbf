"""Outcomes: judged by hand-made rows."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptflip.campaign.outcomes import Judgement, judge, nonfinite
from ckptflip.campaign.spec import Metric

CLEAN = {5: 0.90, 6: 0.92, 7: 0.94, 8: 0.95}


def judged(accuracy: list[float], *, identical: bool = False, **columns: list[float | None]) -> Judgement:
    epochs = list(range(5, 5 + len(accuracy)))
    return judge(epochs, {"accuracy": accuracy, **columns}, CLEAN, Metric(), identical=identical, until=8)


@pytest.mark.parametrize(
    ("accuracy", "outcome", "recovered"),
    [
        ([0.90, 0.92, 0.94, 0.95], "masked", 0),
        ([0.89, 0.91, 0.93, 0.94], "masked", 0),  # just within tolerance, every time
        ([0.99, 0.99, 0.99, 0.99], "masked", 0),  # better than clean is no damage
        ([0.10, 0.92, 0.94, 0.95], "slowed", 1),
        ([0.90, 0.92, 0.90, 0.95], "slowed", 3),
        ([0.90, 0.92, 0.94, 0.93], "degraded", None),
        ([0.90, 0.92, 0.94, 0.46], "collapsed", None),
    ],
)
def test_outcomes(accuracy: list[float], outcome: str, recovered: int | None) -> None:
    made = judged(accuracy)
    assert (made.outcome, made.recovered) == (outcome, recovered)
    assert (made.right_after, made.final, made.clean_final) == (accuracy[0], accuracy[-1], 0.95)


@pytest.mark.parametrize(
    "columns", [{"loss": [0.1, math.nan]}, {"train_loss": [None, math.inf]}, {"nan": [0, 3]}, {"inf": [0, 1]}]
)
def test_what_is_not_finite_has_collapsed(columns: dict[str, list[float | None]]) -> None:
    made = judged([0.9, 0.92], **columns)
    assert (made.outcome, made.recovered) == ("collapsed", None)
    assert math.isnan(made.final)


def test_a_trial_that_became_identical_goes_on_as_the_clean_run() -> None:
    assert judged([0.90], identical=True) == Judgement(
        outcome="identical", recovered=0, right_after=0.90, final=0.95, clean_final=0.95
    )
    assert judged([0.10, 0.92], identical=True).recovered == 1


def test_lower_may_be_better_and_chance_is_no_zero() -> None:
    loss = Metric(name="loss", better="lower", tolerance=0.1)
    clean = {5: 1.0, 6: 0.5}
    rows = [
        judge([5, 6], {"loss": [1.0, x]}, clean, loss, identical=False, until=6) for x in (0.55, 0.7, 1e9)
    ]
    assert [made.outcome for made in rows] == ["masked", "degraded", "degraded"]
    auc = Metric(name="auc", chance=0.5)
    made = judge([5, 6], {"auc": [0.8, 0.6]}, {5: 0.8, 6: 0.8}, auc, identical=False, until=6)
    assert made.outcome == "collapsed"


def test_counts_that_were_not_made_are_no_damage() -> None:
    assert not nonfinite({"accuracy": [0.5], "nan": [None], "loss": [None]}, 0)


@given(st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_recovery_and_outcome_agree(accuracy: list[float]) -> None:
    made = judged(accuracy)
    expected = {"masked": made.recovered == 0, "slowed": bool(made.recovered)}
    assert expected.get(made.outcome, made.recovered is None)
