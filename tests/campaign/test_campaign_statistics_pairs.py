"""Noise floor, paired differences, survival, many cells: published values, scipy and simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from ckptflip.campaign import statistics as s
from ckptflip.errors import UsageError

# Freireich et al. 1963, weeks of remission: 6-mercaptopurine (censored where False) against placebo.
TREATED = np.array([6, 6, 6, 6, 7, 9, 10, 10, 11, 13, 16, 17, 19, 20, 22, 23, 25, 32, 32, 34, 35])
SEEN = np.array([1, 1, 1, 0, 1, 0, 1, 0, 0, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0], bool)
PLACEBO = np.array([1, 1, 2, 2, 3, 4, 4, 5, 5, 8, 8, 8, 8, 11, 11, 12, 12, 15, 17, 22, 23])


def rng(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def test_the_noise_floor_bounds_the_difference_of_two_clean_seeds() -> None:
    draw, exceeded = rng(1), []
    for _ in range(2000):
        bound = s.noise_floor(draw.normal(0.9, 0.01, 6), share=0.9, confidence=0.8).bound
        # Share of pairs beyond it, exactly, for normal metrics.
        exceeded.append(2 * stats.norm.sf(bound / (0.01 * np.sqrt(2))))
    assert np.mean(np.array(exceeded) <= 0.1) == pytest.approx(0.8, abs=0.03)


def test_the_noise_floor_says_what_was_seen() -> None:
    floor = s.noise_floor([0.9, 0.92, 0.91])
    assert (floor.seeds, floor.mean, floor.sd, floor.spread) == pytest.approx((3, 0.91, 0.01, 0.02))
    assert s.noise_floor([0.9, 0.9]).bound == 0


def test_bca_is_scipys_and_covers_a_skewed_mean() -> None:
    draw, held = rng(2), 0
    for i in range(300):
        x = draw.exponential(1.0, 40)
        found = s.bca(x, resamples=999, seed=i)
        held += found.low <= 1 <= found.high
    assert 0.89 <= held / 300 <= 0.98
    expected = stats.bootstrap(
        (x,), np.mean, n_resamples=999, rng=np.random.Generator(np.random.PCG64(np.random.SeedSequence(299)))
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([0.5], "a single value has no spread"),
        ([0.0] * 5, "all 5 values are 0"),
        ([0.0] * 60 + [1.0], "ties"),
    ],
)
def test_degenerate_values_are_said_to_be(values: list[float], said: str) -> None:
    found = s.bca(values, "median" if "ties" in said else "mean")
    assert said in found.note and found.low == found.high == float(np.median(values))


def test_differences_of_trials_that_all_ended_as_the_clean_run() -> None:
    found = s.differences([0.9] * 4, [0.9] * 4)
    assert (found.mean, found.median, found.sd, found.p_value) == (0, 0, 0, 1)
    assert found.mean_interval.note == "all 4 values are 0"
    one = s.differences([0.8], 0.9)
    assert one.trials == 1 and np.isnan(one.sd) and one.p_value == 1


def test_the_signed_rank_test_is_the_published_one() -> None:
    # Hollander and Wolfe, Hamilton depression scale factor IV: W = 5, exact p = 0.0391 (two-sided).
    before = [1.83, 0.50, 1.62, 2.48, 1.68, 1.88, 1.55, 3.06, 1.30]
    after = [0.878, 0.647, 0.598, 2.05, 1.06, 1.29, 1.06, 3.14, 1.29]
    assert s.differences(after, before, resamples=99).p_value == pytest.approx(0.0390625)


def test_equal_accuracies_are_ties_whatever_subtraction_leaves() -> None:
    noisy = s.differences([0.1 + 0.2, 0.9, 0.7, 0.8], [0.3, 1.0, 0.8, 0.9], resamples=99)
    exact = s.differences([0.0, -0.1, -0.1, -0.1], 0.0, resamples=99)
    assert noisy.p_value == exact.p_value


@pytest.mark.parametrize("method", ["t", "bca"])
def test_non_inferiority_errs_as_often_as_it_says(method: str) -> None:
    """At a loss of exactly the margin, it is claimed to be smaller in 10 % of studies, not more."""
    draw, claimed = rng(3), 0
    for i in range(400):
        faulty = draw.normal(0.88, 0.02, 30)
        found = s.non_inferiority(faulty, 0.9, 0.02, 0.9, method=method, seed=i)
        claimed += found.holds
    assert 0.06 <= claimed / 400 <= 0.145
    assert s.non_inferiority(faulty, 0.9, 0.05, method=method).holds
    same = s.non_inferiority([0.9, 0.9], 0.9, 0.01, method=method)
    assert same.holds and same.bound == 0


def test_the_bootstrap_bound_is_one_sided() -> None:
    d = rng(8).normal(-0.01, 0.02, 40)
    bound = s.non_inferiority(d, 0, 0.1, 0.9).bound
    assert bound == pytest.approx(s.bca(d, confidence=0.8).low)
    assert bound > s.bca(d, confidence=0.9).low


def test_the_t_bound_is_the_textbooks() -> None:
    d = np.array([-0.01, -0.02, 0.0, 0.01, -0.015])
    expected = stats.ttest_1samp(d, 0).confidence_interval(0.9).low
    assert s.non_inferiority(d, 0, 0.1, method="t").bound == pytest.approx(expected)


def test_kaplan_meier_of_the_remission_data() -> None:
    found = s.recovery(TREATED, SEEN)
    assert found.epochs.tolist() == [6, 7, 10, 13, 16, 22, 23]
    assert found.share.round(3).tolist() == [0.857, 0.807, 0.753, 0.69, 0.627, 0.538, 0.448]
    assert found.at_risk.tolist() == [21, 17, 15, 12, 11, 7, 6]
    assert (found.never, found.trials, found.recovered.sum()) == (12, 21, 9)
    # R, survfit(conf.type = "log-log"): median 23, 13 to NA.
    assert (found.median, found.median_low, found.median_high) == (23, 13, np.inf)
    placebo = s.recovery(PLACEBO, np.ones(21, bool))
    assert (placebo.median, placebo.median_low, placebo.median_high) == (8, 4, 11)


def test_kaplan_meier_and_its_intervals_are_scipys() -> None:
    curve = stats.ecdf(stats.CensoredData.right_censored(TREATED, ~SEEN)).sf
    ends = curve.confidence_interval(method="log-log")
    found = s.recovery(TREATED, SEEN)
    at = np.isin(curve.quantiles, found.epochs)
    assert found.share == pytest.approx(curve.probabilities[at])
    assert found.low == pytest.approx(ends.low.probabilities[at])
    assert found.high == pytest.approx(ends.high.probabilities[at])


def test_greenwoods_interval_covers() -> None:
    draw, held = rng(4), 0
    for _ in range(500):
        time, watched = draw.exponential(5, 40), draw.uniform(3, 12, 40)
        found = s.recovery(np.minimum(time, watched), time <= watched)
        i = np.searchsorted(found.epochs, 4, side="right") - 1
        held += bool(found.low[i] <= np.exp(-4 / 5) <= found.high[i])
    assert 0.92 <= held / 500 <= 0.98


def test_cells_in_which_all_or_none_recover() -> None:
    none = s.recovery([10, 10, 12], [False] * 3)
    assert (none.epochs.size, none.never, none.median, none.median_high) == (0, 3, np.inf, np.inf)
    every = s.recovery([1, 1, 2], [True] * 3)
    assert (every.share.tolist(), every.never, every.median) == ([pytest.approx(1 / 3), 0.0], 0, 1)
    at_once = s.recovery([3, 3], [True, True])
    assert at_once.share.tolist() == at_once.low.tolist() == at_once.high.tolist() == [0.0]
    assert s.logrank([10, 10], [False] * 2, [9, 12], [False] * 2) == 1


def test_logrank_of_the_remission_data() -> None:
    # χ² = 16.79 with 1 degree of freedom.
    found = s.logrank(TREATED, SEEN, PLACEBO, np.ones(21, bool))
    assert found == pytest.approx(stats.chi2.sf(16.79, 1), rel=0.01)
    assert s.logrank([1, 1], [True] * 2, [1, 1], [True] * 2) == 1


def test_newcombes_published_differences() -> None:
    # Newcombe 1998, table II, method 10.
    published = {
        (56, 70, 48, 80): (0.0524, 0.3339),
        (9, 10, 3, 10): (0.1705, 0.8090),
        (6, 7, 2, 7): (0.0582, 0.8062),
        (5, 56, 0, 29): (-0.0381, 0.1926),
        (0, 10, 0, 20): (-0.1611, 0.2775),
        (10, 10, 0, 20): (0.6791, 1.0),
    }
    for counts, ends in published.items():
        found = s.newcombe(*counts)
        assert (round(found.low, 4), round(found.high, 4)) == ends


def test_newcombes_interval_covers() -> None:
    draw, held = rng(5), 0
    for _ in range(1000):
        found = s.newcombe(draw.binomial(60, 0.1), 60, draw.binomial(80, 0.02), 80)
        held += found.low <= 0.08 <= found.high
    assert 0.93 <= held / 1000 <= 0.98


def test_cells_are_compared_exactly() -> None:
    # Barnard's own example as scipy gives it, and Fisher's tea.
    assert s.compare_rates(7, 15, 12, 15, test="barnard").p_value == pytest.approx(0.0681, abs=1e-4)
    assert s.compare_rates(3, 4, 1, 4).p_value == pytest.approx(0.4857, abs=1e-4)
    for test in ("fisher", "boschloo", "barnard"):
        assert s.compare_rates(0, 10, 0, 20, test=test).p_value == 1
        assert s.compare_rates(10, 10, 20, 20, test=test).p_value == 1
        assert s.compare_rates(10, 10, 0, 20, test=test).p_value < 1e-6


def test_fishers_test_errs_no_more_often_than_it_says() -> None:
    draw = rng(6)
    p = [s.compare_rates(draw.binomial(40, 0.2), 40, draw.binomial(40, 0.2), 40).p_value for _ in range(400)]
    assert np.mean(np.array(p) <= 0.05) <= 0.05


def test_holm_and_false_discovery() -> None:
    assert s.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert s.holm([0.5, 0.9]).tolist() == [1, 1]
    # Benjamini and Hochberg 1995, their fifteen p-values: four are claimed at 5 %, Holm's three.
    p = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.324, 0.4262, 0.5719]
    p += [0.6528, 0.759, 1.0]
    assert (s.false_discovery(p) <= 0.05).sum() == 4
    assert (s.holm(p) <= 0.05).sum() == 3
    assert np.all(s.false_discovery(p, dependent=True) >= s.false_discovery(p))


def test_holm_bounds_the_chance_of_any_false_alarm() -> None:
    p = rng(7).random((2000, 10))
    plain = (p.min(1) <= 0.05).mean()
    adjusted = np.mean([s.holm(row).min() <= 0.05 for row in p])
    assert plain > 0.35 and adjusted <= 0.06


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: s.noise_floor([0.9]), "metrics must be a list of at least 2"),
        (lambda: s.bca([0.1, np.inf]), r"values\[1\] is inf: 1 of 2 are not finite"),
        (lambda: s.bca([0.1, 0.2], "mode"), "statistic 'mode' is not one of mean, median"),
        (lambda: s.differences([1, 2], [1, 2, 3]), "2 faulty and 3 clean"),
        (lambda: s.differences(["a"], 1), "faulty must be numbers"),
        (lambda: s.non_inferiority([1, 2], 1, 0), "margin must be"),
        (lambda: s.non_inferiority([1, 2], 1, 0.1, method="z"), "method 'z'"),
        (lambda: s.recovery([1, -1], [True, True]), "epochs must not be negative"),
        (lambda: s.recovery([1, 2], [True]), "2 epochs do not fit"),
        (lambda: s.recovery([1, 2], [3, 1]), "true or false"),
        (lambda: s.newcombe(3, 2, 1, 2), "3 events in 2 trials"),
        (lambda: s.compare_rates(1, 400, 2, 400, test="barnard"), "up to 500 trials, not 800"),
        (lambda: s.compare_rates(1, 4, 2, 4, test="chi2"), "test 'chi2'"),
        (lambda: s.holm([0.5, 1.5]), "p_values must lie in 0 to 1: 1.5"),
    ],
)
def test_bad_arguments_are_named(call: object, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        call()  # type: ignore[operator]
