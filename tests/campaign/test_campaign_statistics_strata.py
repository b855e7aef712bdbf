"""Strata: what they estimate, how often their intervals hold, and what they save."""

from __future__ import annotations

import numpy as np
import pytest

from ckptflip.campaign import statistics as s
from ckptflip.campaign.statistics.designs import rounds_of, simulate
from ckptflip.campaign.statistics.strata import added_squares
from ckptflip.errors import UsageError

FIELDS = np.array([1, 1, 7, 23]) / 32
LAYERS = np.array([0.004, 0.12, 0.856, 0.02])
RATES = np.array(
    [[0.7, 0.02, 0.02, 0.002], [0.5, 0.01, 0.01, 0.0005], [0.3, 0.005, 0.003, 0.0], [0.1, 0.01, 0.005, 0.0]]
)
WEIGHTS, P = np.outer(LAYERS, FIELDS).ravel(), RATES.ravel()


def rng(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def test_neyman_gives_what_the_textbook_gives() -> None:
    # w·√(p(1−p)): 0.5·0.5 and 0.5·0.3 share 800 as 500 to 300.
    found = s.neyman([0.5, 0.5], [500_000, 100_000], [10**6, 10**6], 800)
    assert found.tolist() == [500, 300]
    assert s.neyman([0.2, 0.3, 0.5], 0, 0, 101).sum() == 101
    assert s.neyman([0.2, 0.3, 0.5], 0, 0, 10).tolist() == [2, 3, 5]


def test_the_allocation_never_falls_below_its_floor_and_goes_where_events_are() -> None:
    assert s.allocation(FIELDS).tolist() == pytest.approx(FIELDS.tolist())
    q = s.allocation(FIELDS, [300, 0, 0, 0], [1000, 1000, 1000, 1000], floor=0.4)
    assert q.sum() == pytest.approx(1) and np.all(q >= 0.4 * FIELDS)
    assert q[0] > 5 * FIELDS[0]


def test_the_drawn_strata_have_the_chances_asked_for_and_depend_on_the_key_alone() -> None:
    q = [0.1, 0.2, 0.7]
    drawn = s.drawn_strata(q, 20_000, seed=3)
    assert np.abs(np.bincount(drawn) / 20_000 - q).max() < 0.012
    assert np.array_equal(drawn, s.drawn_strata(q, 20_000, seed=3))
    assert not np.array_equal(drawn, s.drawn_strata(q, 20_000, seed=3, place=1))
    assert np.array_equal(drawn[:50], s.drawn_strata(q, 50, seed=3))


def test_the_weighted_rate_is_unbiased_and_its_interval_holds() -> None:
    trials = np.array([300, 60, 200, 300])
    rates = LAYERS @ RATES
    truth = float(FIELDS @ rates)
    events = rng(1).binomial(trials, rates, (2000, 4))
    estimates = events / trials @ FIELDS
    assert estimates.mean() == pytest.approx(truth, abs=4 * estimates.std() / np.sqrt(2000))
    low, high = added_squares(FIELDS, events.astype(float), trials.astype(float), 0.95)
    assert ((low <= truth) & (truth <= high)).mean() >= 0.945
    found = s.weighted_rate(FIELDS, events[0], trials)
    assert (found.rate, found.interval.low, found.interval.high) == pytest.approx(
        (estimates[0], low[0], high[0])
    )


def test_a_variance_alone_would_claim_too_much_of_strata_without_events() -> None:
    # 50 trials in a stratum of 72 % with rate 0.02: usually no event, and then no variance.
    weights, rates, trials = np.array([0.28, 0.72]), np.array([0.3, 0.02]), np.array([400, 50])
    truth = float(weights @ rates)
    events = rng(2).binomial(trials, rates, (2000, 2))
    p = events / trials
    half = 1.96 * np.sqrt((weights**2 * p * (1 - p) / trials).sum(1))
    assert (np.abs(p @ weights - truth) <= half).mean() < 0.9
    low, high = added_squares(weights, events.astype(float), trials.astype(float), 0.95)
    assert ((low <= truth) & (truth <= high)).mean() >= 0.945


def test_one_stratum_is_uniform_sampling() -> None:
    found = s.weighted_rate([1.0], [30], [1000])
    low, high = s.clopper_pearson([30], [1000])
    assert (found.interval.low, found.interval.high) == pytest.approx((low[0], high[0]))
    assert found.rate == 0.03 and found.effective == pytest.approx(1000)
    ends = s.weighted_sequence([1.0], [[1.0]], [[30]], [[1000]], floor=0.999999)
    sequence = s.bounded_sequence(np.repeat([1.0, 0.0], [30, 970]), looks=[1000])
    assert [float(e[0]) for e in ends] == pytest.approx([float(e[0]) for e in sequence], abs=1e-5)


def test_effective_trials_follow_the_variance() -> None:
    # All of a rate's spread in one stratum of a tenth: sampling it alone is worth ten times as much.
    good = s.weighted_rate([0.1, 0.9], [5000, 0], [10_000, 10_000])
    even = s.weighted_rate([0.1, 0.9], [1000, 0], [2000, 18_000])
    assert good.effective > 4 * even.effective
    assert even.effective == pytest.approx(20_000 * 1.9, rel=0.05)


def test_the_weighted_sequence_is_what_simulated_campaigns_use() -> None:
    draw, q, events, trials = rng(3), [], [], []
    s_seen, n_seen = np.zeros(4, int), np.zeros(4, int)
    rates = LAYERS @ RATES
    for _ in range(12):
        q.append(s.allocation(FIELDS, s_seen, n_seen))
        trials.append(draw.multinomial(100, q[-1]))
        events.append(draw.binomial(trials[-1], rates))
        s_seen, n_seen = s_seen + events[-1], n_seen + trials[-1]
    low, high = s.weighted_sequence(FIELDS, q, events, trials)
    assert np.all(np.diff(low) >= 0) and np.all(np.diff(high) <= 0)
    assert low[-1] < FIELDS @ rates < high[-1]
    part = s.weighted_sequence(FIELDS, q[:5], events[:5], trials[:5])
    assert part[0].tolist() == low[:5].tolist() and part[1].tolist() == high[:5].tolist()


@pytest.mark.parametrize(
    "rates",
    [LAYERS @ RATES, np.array([0, 0, 0, 0.01]), np.array([0.5, 0, 0, 0]), np.full(4, 0.02)],
    ids=["like digits", "mantissa only", "critical only", "everywhere"],
)
def test_the_sequence_of_adaptive_strata_holds_where_it_stopped(rates: np.ndarray) -> None:
    _, held = simulate(FIELDS, rates, 0.01, 0.9, 0.5, rounds_of(100, 0.2, 10**5), 400, rng(4))
    assert held.mean() >= 0.9


def test_a_wrong_weight_would_be_noticed() -> None:
    """The test above can fail: with another population's weights the sequence misses nearly always."""
    draw, missed = rng(5), 0
    wrong = FIELDS[::-1].copy()
    for _ in range(50):
        trials = draw.multinomial(2000, FIELDS)
        events = draw.binomial(trials, [0.5, 0, 0, 0])
        low, high = s.weighted_sequence(wrong, [FIELDS], [events], [trials], floor=0.04)
        missed += not low[-1] <= 0.5 / 32 <= high[-1]
    assert missed > 45


@pytest.mark.parametrize("half_width", [0.003, 0.002])
def test_strata_need_a_third_of_the_trials(half_width: float) -> None:
    found = s.compare_designs(WEIGHTS, P, half_width=half_width, campaigns=30)
    assert found.ratio <= 1 / 3
    assert found.rate == pytest.approx(float(WEIGHTS @ P))
    assert found.stratified.fixed < found.uniform.fixed < found.uniform.trials
    assert found.fixed_ratio < 0.6


def test_recorded_counts_stand_for_rates_and_the_seed_for_the_answer() -> None:
    counts = {"events": [160, 4, 4, 0], "trials": [500, 500, 1000, 500]}
    one = s.compare_designs(FIELDS, **counts, half_width=0.01, campaigns=10, seed=1)
    rates = [0.32, 0.008, 0.004, 0.0]
    assert one == s.compare_designs(FIELDS, rates, half_width=0.01, campaigns=10, seed=1)
    assert one != s.compare_designs(FIELDS, rates, half_width=0.01, campaigns=10, seed=2)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: s.allocation([0.5, 0.6]), "weights must sum to 1, not 1.1"),
        (lambda: s.allocation([1.0, 0.0]), "weights must be above 0"),
        (lambda: s.allocation(FIELDS, floor=0), "floor must be"),
        (lambda: s.weighted_rate([0.5, 0.5], [1, 0], [5, 0]), "stratum 1 has no trial"),
        (lambda: s.weighted_rate([0.5, 0.5], [1], [5]), "2 weights do not fit"),
        (lambda: s.weighted_sequence([0.5, 0.5], [[0.9, 0.1]], [[0, 0]], [[1, 1]]), "at least 0.5 times"),
        (lambda: s.weighted_sequence([0.5, 0.5], [[0.5, 0.5]], [[0, 0]], [[0, 0]]), "round 0 has no trial"),
        (lambda: s.weighted_sequence([0.5, 0.5], [[0.5, 0.5]], [[0, 0, 0]], [[1, 1, 1]]), "do not fit"),
        (lambda: s.compare_designs([1.0], half_width=0.1), "either rates, or events and trials"),
        (lambda: s.compare_designs([1.0], [0.0], half_width=0.1), "not all 0"),
        (lambda: s.compare_designs([1.0], [1.2], half_width=0.1), "rates must lie in"),
        (lambda: s.neyman([1.0], [0], [1], -1), "more must be"),
        (lambda: s.drawn_strata([1.0], 5, seed=-1), "seed must be"),
    ],
)
def test_bad_arguments_are_named(call: object, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        call()  # type: ignore[operator]
