"""Sequences that allow looking: their formula, how often they hold at all looks, what stops a cell."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import betaln

from ckptflip.campaign import statistics as s
from ckptflip.campaign.statistics import Stop
from ckptflip.errors import UsageError


def rng(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


@pytest.mark.parametrize(("a", "b"), [(0.5, 0.5), (1, 1), (0.5, 20)])
def test_at_its_ends_the_martingale_is_one_over_alpha(a: float, b: float) -> None:
    events, trials = np.array([[0, 1, 30], [7, 500, 999]]), np.array([[5, 50, 100], [7, 1000, 1000]])
    low, high = s.beta_binomial_sequence(events, trials, 0.9, a, b)
    for p, inner in ((low, low > 0), (high, high < 1)):
        k, n, at = events[inner], trials[inner], p[inner]
        log_m = betaln(a + k, b + n - k) - betaln(a, b) - k * np.log(at) - (n - k) * np.log1p(-at)
        assert log_m == pytest.approx(np.log(10), abs=1e-6)
    assert (low[0, 0], high[1, 0]) == (0, 1)
    assert np.all((low < events / trials) | (low == 0)) and np.all((high > events / trials) | (high == 1))


def test_the_uniform_mixture_is_the_known_one() -> None:
    # a = b = 1: M_n(p) = 1 / ((n+1) · P(S = s)); with no event in n, (1−p)^n (n+1) = α.
    low, high = s.beta_binomial_sequence(0, 100, 0.95, 1, 1)
    assert (float(low), float(high)) == (0, pytest.approx(1 - (0.05 / 101) ** (1 / 100)))


def test_before_the_first_trial_everything_is_possible() -> None:
    low, high = s.beta_binomial_sequence(0, 0)
    assert (float(low), float(high)) == (0, 1)


@pytest.mark.parametrize("rate", [0.003, 0.1, 0.5])
def test_the_sequence_holds_at_all_looks_at_once_where_a_fixed_interval_does_not(rate: float) -> None:
    campaigns, looks = 1000, np.arange(20, 2001, 20)
    events = np.cumsum(rng(1).binomial(20, rate, (campaigns, looks.size)), axis=1)
    low, high = s.running_intersection(*s.beta_binomial_sequence(events, looks))
    always = ((low[:, -1] <= rate) & (rate <= high[:, -1])).mean()
    assert always >= 0.95
    fixed = s.running_intersection(*s.wilson(events, looks))
    assert ((fixed[0][:, -1] <= rate) & (rate <= fixed[1][:, -1])).mean() < 0.9


def test_the_sequence_is_not_much_wider_than_it_must_be() -> None:
    low, high = s.beta_binomial_sequence(3000, 10_000)
    exact = s.clopper_pearson(3000, 10_000)
    assert 1.5 < (high - low) / (exact[1] - exact[0]) < 2.1


def test_the_bounded_sequence_holds_at_all_looks_for_differences() -> None:
    # Skewed: mostly 0, sometimes a large loss. A t interval at the same looks misses the mean often.
    draw, looks, mean = rng(2), [10, 20, 40, 80, 160], -0.5 * 0.08
    held = held_t = 0
    for _ in range(300):
        values = -0.5 * (draw.random(160) < 0.08)
        low, high = s.bounded_sequence(values, -1, 1, looks=looks)
        held += bool((low[-1] <= mean) & (mean <= high[-1]))
        sums = np.cumsum(values)[np.array(looks) - 1]
        sd = np.array([values[:n].std(ddof=1) for n in looks])
        held_t += bool(np.all(np.abs(sums / looks - mean) <= 1.96 * sd / np.sqrt(looks)))
    assert held >= 0.95 * 300
    assert held_t < 0.85 * 300


def test_the_bounded_sequence_narrows_around_the_mean_in_the_values_unit() -> None:
    values = rng(4).normal(-0.02, 0.01, 400).clip(-1, 1)
    low, high = s.bounded_sequence(values, -1, 1, looks=[100, 400])
    assert np.all(np.diff(low) >= 0) and np.all(np.diff(high) <= 0)
    assert low[-1] < -0.02 < high[-1] and high[-1] - low[-1] < 0.03
    every = s.bounded_sequence(values[:20], -1, 1)
    assert every[0].shape == (20,)
    scaled = s.bounded_sequence(10 * values, -10, 10, looks=[100, 400])
    assert scaled[0] == pytest.approx(10 * low) and scaled[1] == pytest.approx(10 * high)


def test_for_zeros_and_ones_both_sequences_agree_roughly() -> None:
    outcomes = (np.arange(2000) % 10 == 0).astype(float)
    low, high = s.bounded_sequence(outcomes, looks=[2000])
    expected = s.beta_binomial_sequence(200, 2000)
    assert (low[0], high[0]) == (pytest.approx(expected[0], rel=0.1), pytest.approx(expected[1], rel=0.1))


RULE = Stop(half_width=0.05, at_most=2000, batch=50, at_least=120)


def test_a_rule_looks_at_whole_batches_only() -> None:
    assert RULE.looks[:3].tolist() == [150, 200, 250] and RULE.looks[-1] == 2000
    assert Stop(half_width=0.1, at_most=120).looks.tolist() == [50, 100, 120]
    nothing = np.zeros(149, bool)
    assert s.stopped(nothing, RULE) is None
    found = s.stopped(np.zeros(180, bool), RULE)
    assert found is not None
    assert (found.reason, found.trials, found.events, found.low) == ("precise enough", 150, 0, 0.0)
    assert found.high == pytest.approx(float(s.beta_binomial_sequence(0, 150)[1]))


def test_more_trials_never_change_what_was_decided() -> None:
    outcomes = rng(5).random(2000) < 0.2
    decided = [s.stopped(outcomes[:n], RULE) for n in range(0, 2001, 7)]
    firsts = [d for d in decided if d is not None]
    assert firsts and all(d == firsts[0] for d in firsts)
    assert decided.index(firsts[0]) * 7 >= firsts[0].trials


def test_what_an_earlier_look_excluded_stays_excluded() -> None:
    outcomes = np.repeat([False, True], [100, 20])
    found = s.stopped(outcomes, Stop(half_width=0.01, at_most=120))
    earlier, now = s.beta_binomial_sequence(0, 100), s.beta_binomial_sequence(20, 120)
    assert found is not None and earlier[1] < now[1]
    assert (found.low, found.high) == (float(now[0]), float(earlier[1]))


def test_a_cell_that_stays_wide_ends_at_most() -> None:
    found = s.stopped(np.arange(120) % 2 == 0, Stop(half_width=0.01, at_most=120))
    assert found is not None and (found.reason, found.trials, found.events) == ("limit reached", 120, 60)


def test_thousands_of_cells_stop_as_one_does() -> None:
    draws = rng(6).random((20, 2000)) < np.linspace(0.001, 0.6, 20)[:, None]
    events = np.cumsum(draws, axis=1)[:, RULE.looks - 1]
    at, low, high = s.first_stop(events, RULE)
    for i, outcomes in enumerate(draws):
        one = s.stopped(outcomes, RULE)
        assert one is not None
        assert (one.trials, one.low, one.high) == (RULE.looks[at[i]], low[i], high[i])


@pytest.mark.parametrize("rate", [0.001, 0.03, 0.3])
def test_what_a_stopped_cell_reports_holds(rate: float) -> None:
    rule = Stop(half_width=0.04, at_most=2000, batch=25)
    events = np.cumsum(rng(7).binomial(25, rate, (2000, rule.looks.size)), axis=1)
    _, low, high = s.first_stop(events, rule)
    assert ((low <= rate) & (rate <= high)).mean() >= 0.95


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: Stop(half_width=0.6, at_most=10), "half_width .* below 0.5, not 0.6"),
        (lambda: Stop(half_width=0.1, at_most=10, at_least=20), r"at_most \(10\) is below at_least \(20\)"),
        (lambda: Stop(half_width=0.1, at_most=10, batch=0), "batch must be a whole number of at least 1"),
        (lambda: Stop(half_width=0.1, at_most=10, confidence=1.0), "confidence"),
        (lambda: Stop(half_width=0.1, at_most=10, a=0), "a must be a number above 0"),
        (lambda: s.stopped([0.5], RULE), "true or false"),
        (lambda: s.first_stop([5, 500], RULE), "500 events in 200 trials"),
        (lambda: s.beta_binomial_sequence(1, 2**31), "below 2"),
        (lambda: s.bounded_sequence([0.5, 1.5]), "outside the bounds 0 to 1"),
        (lambda: s.bounded_sequence([0.5, np.nan]), r"values\[1\] is nan"),
        (lambda: s.bounded_sequence([0.5], 1, 0), "low must be below high"),
        (lambda: s.bounded_sequence([0.5], looks=[2]), "after the last"),
        (lambda: s.bounded_sequence([0.5, 0.1], looks=[2, 1]), "ascending"),
    ],
)
def test_bad_arguments_are_named(call: object, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        call()  # type: ignore[operator]
