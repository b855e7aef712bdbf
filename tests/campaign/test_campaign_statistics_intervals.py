"""Sample sizes and intervals against published values and scipy's, and how often they hold."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from ckptflip.campaign import statistics as s
from ckptflip.errors import UsageError


@pytest.mark.parametrize(
    ("events", "trials", "score", "exact"),
    [
        # Newcombe 1998, table I: methods 3 and 5.
        (81, 263, (0.2553, 0.3662), (0.2527, 0.3676)),
        (15, 148, (0.0624, 0.1605), (0.0578, 0.1617)),
        (0, 20, (0.0000, 0.1611), (0.0000, 0.1684)),
        (1, 29, (0.0061, 0.1718), (0.0009, 0.1776)),
    ],
)
def test_published_intervals(
    events: int, trials: int, score: tuple[float, float], exact: tuple[float, float]
) -> None:
    assert np.round(s.wilson(events, trials), 4).tolist() == list(score)
    assert np.round(s.clopper_pearson(events, trials), 4).tolist() == list(exact)


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.999])
def test_intervals_are_those_of_scipy(confidence: float) -> None:
    trials = np.array([1, 1, 2, 10, 10, 1000, 100_000])
    events = np.array([0, 1, 1, 0, 10, 3, 50_001])
    for ours, method in ((s.wilson, "wilson"), (s.clopper_pearson, "exact")):
        low, high = ours(events, trials, confidence)
        for i, (k, n) in enumerate(zip(events.tolist(), trials.tolist(), strict=True)):
            expected = stats.binomtest(k, n).proportion_ci(confidence, method)
            assert (low[i], high[i]) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_clopper_pearson_covers_exactly_summed_over_all_outcomes() -> None:
    n = 60
    events = np.arange(n + 1)
    low, high = s.clopper_pearson(events, n)
    for p in np.linspace(0.001, 0.999, 200):
        covered = stats.binom.pmf(events[(low <= p) & (p <= high)], n, p).sum()
        assert covered >= 0.95 - 1e-12


def test_the_upper_bound_is_the_one_sided_exact_limit() -> None:
    for n in (1, 10, 300, 10**6):
        assert s.upper_bound(n) == pytest.approx(
            stats.binomtest(0, n, alternative="less").proportion_ci().high
        )
    assert 0.99 < float(s.upper_bound(10_000)) * 10_000 / 3 < 1  # the rule of three


def test_leveugle_sample_sizes() -> None:
    # The usual table at 95 %, p = 0.5; and the correction approaches the whole of a small population.
    assert s.sample_size(0.05) == 385
    assert s.sample_size(0.01) == 9604
    assert s.sample_size(0.05, population=1000) == 278
    assert s.sample_size(0.05, population=1_000_000) == 384
    assert s.sample_size(0.01, 0.99, population=10**9) == 16_587
    assert [s.sample_size(0.001, population=n) for n in (1, 2, 100)] == [1, 2, 100]
    assert s.stratum_sizes([1000, 10**6], 0.05).tolist() == [278, 384]
    assert s.stratum_sizes([10**6, 10**6], 0.05, p=[0.5, 0.01]).tolist() == [384, 16]


@pytest.mark.parametrize(("margin", "p"), [(0.05, 0.5), (0.02, 0.1), (0.03, 0.0), (0.05, 0.95)])
def test_the_exact_size_holds_for_every_result_up_to_p_and_is_the_smallest(margin: float, p: float) -> None:
    n = s.exact_sample_size(margin, p=p)
    rate = min(p, 1 - p)
    for size in (n, n + 1, n + 17):
        events = np.arange(int(rate * size) + 1)
        low, high = s.clopper_pearson(events, size)
        assert (high - low).max() <= 2 * margin
    low, high = s.clopper_pearson(round(rate * (n - 2)), n - 2)
    assert high - low > 2 * margin * 0.99


def test_trials_without_an_event() -> None:
    for rate in (0.5, 0.03, 0.001):
        n = s.no_event_size(rate)
        assert (1 - rate) ** n <= 0.05 < (1 - rate) ** (n - 1)
        assert s.upper_bound(n) <= rate
    assert s.no_event_size(0.001, population=100) == 100


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: s.sample_size(0), "margin must be a number above 0 and below 1, not 0"),
        (lambda: s.sample_size(0.01, 95), "confidence .* not 95"),
        (lambda: s.sample_size(0.01, p=0), "p must be"),
        (lambda: s.sample_size(0.01, population=0), "population must be a whole number of at least 1, not 0"),
        (lambda: s.sample_size(float("nan")), "margin .* nan"),
        (lambda: s.exact_sample_size(1e-9, p=0.5), "so small that no campaign"),
        (lambda: s.exact_sample_size(0.1, p=1.5), "p must be .* 1.5"),
        (lambda: s.no_event_size(1), "upper bound"),
        (lambda: s.stratum_sizes([10.5], 0.1), "whole numbers"),
        (lambda: s.wilson(3, 2), "3 events in 2 trials"),
        (lambda: s.wilson(0, 0), "trials must be at least 1, not 0"),
        (lambda: s.wilson(0.5, 2), "events must be whole"),
        (lambda: s.wilson([1, 2], [3, 3, 3]), "must fit together"),
        (lambda: s.clopper_pearson(float("nan"), 2), "events must be whole"),
    ],
)
def test_bad_arguments_are_named(call: object, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        call()  # type: ignore[operator]
