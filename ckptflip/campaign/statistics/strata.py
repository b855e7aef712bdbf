"""Strata of a population of faults, such as layer × bit field: where to look, and what the whole is then.

A few of a model's bits do nearly all the harm. Drawing faults uniformly spends most trials on the others;
drawing more from where events are, and weighing each stratum by its share of the population, gives the rate
of the same uniform flip from fewer trials.
"""

from __future__ import annotations

import numpy as np
from msgspec import Struct
from numpy.typing import ArrayLike

from ckptflip.campaign.statistics.checks import Floats, Whole, at_least, counted, inside, weighed
from ckptflip.campaign.statistics.intervals import Interval, exact_ends
from ckptflip.errors import UsageError
from ckptflip.faults.stream import Stream, check_seed

# A stratum's rate before its first trial: as if a tenth of an event had been seen in five trials. It steers
# the allocation alone and enters no estimate.
_SEEN, _TRIED = 0.1, 5.0
# Uniform draws below 1 with this many equal steps.
_STEPS = 2**53
# Faults use the lower places of a seed's streams; strata must not share their numbers.
_PLACES = 1 << 16


class WeightedRate(Struct, frozen=True):
    """The rate of a uniformly drawn fault, from strata.

    Attributes:
        rate: Σ w_k · events_k / trials_k.
        effective: how many uniformly drawn trials would know it as well.
        interval: for numbers of trials that were fixed beforehand.
    """

    rate: float
    effective: float
    interval: Interval


def allocation(
    weights: ArrayLike, events: ArrayLike = 0, trials: ArrayLike = 0, floor: float = 0.5
) -> Floats:
    """The chance of each stratum to be drawn next, in an adaptive campaign (`weighted_sequence`).

    floor · w_k + (1 − floor) · q_k, where q_k ∝ w_k · √p_k gives the weighted estimate the least variance
    (the second moment of w_k/q_k · Y), p_k as smoothed from what was seen so far. The first part, the
    *defensive mixture*, bounds a trial's weight by 1/floor; it is what excludes that events hide where none
    was seen.

    Source: Neyman, On the two different aspects of the representative method (JRSS 1934); Hesterberg,
    Weighted average importance sampling and defensive mixture distributions (Technometrics 1995).

    Args:
        weights: the strata's shares of the population, float64[strata], sum 1.
        events: events seen in each, int[…, strata].
        trials: trials made in each, likewise.
        floor: between 0 and 1.

    Returns:
        float64[…, strata], sum 1. Before the first trial: the weights.

    Raises:
        UsageError: arguments that make no sense.

    Example:
        >>> print(allocation([0.1, 0.9], [30, 0], [100, 100]).round(2))
        [0.38 0.62]
    """
    w = weighed(weights)
    share = inside("floor", floor)
    s, n = counted(events, trials)
    wanted = w * np.sqrt((s + _SEEN) / (n + _TRIED))
    drawn: Floats = share * w + (1 - share) * wanted / wanted.sum(-1, keepdims=True)
    return drawn


def drawn_strata(probabilities: ArrayLike, trials: int, seed: int, place: int = 0) -> Whole:
    """Which stratum each of the next trials is drawn from.

    Args:
        probabilities: of `allocation`, float64[strata].
        trials: how many.
        seed: 0 … 2^64−1; the same seed and place give the same strata, on every machine.
        place: of the round, from 0.

    Returns:
        Positions of strata, int64[trials], independent of each other.

    Raises:
        UsageError: arguments that make no sense.

    Example:
        >>> np.bincount(drawn_strata([0.25, 0.75], 1000, seed=7)).tolist()
        [261, 739]
    """
    q = weighed(probabilities)
    check_seed(seed)
    points = (
        Stream(seed, _PLACES + at_least("place", place, 0)).below(_STEPS, at_least("trials", trials, 0))
        / _STEPS
    )
    found = np.searchsorted(np.cumsum(q)[:-1], points, side="right")
    return np.asarray(found, np.int64)


def neyman(weights: ArrayLike, events: ArrayLike, trials: ArrayLike, more: int) -> Whole:
    """How many of the next trials each stratum gets, in a design that is fixed beforehand from a pilot.

    Proportional to w_k · √(p_k · (1 − p_k)), the p_k smoothed, so that a stratum without an event in the
    pilot is not left out. Whole numbers by largest remainder. For an interval at the end only
    (`weighted_rate`), which the pilot's own trials must not enter.

    Source: Neyman (JRSS 1934).

    Args:
        weights: the strata's shares of the population, float64[strata], sum 1.
        events: events of the pilot, int[strata].
        trials: its trials, likewise.
        more: trials to hand out.

    Returns:
        int64[strata], sum `more`.

    Raises:
        UsageError: arguments that make no sense.

    Example:
        >>> neyman([0.1, 0.9], [30, 0], [100, 100], 1000).tolist()
        [620, 380]
    """
    w = weighed(weights)
    s, n = counted(events, trials)
    rate = (s + _SEEN) / (n + _TRIED)
    wanted = w * np.sqrt(rate * (1 - rate))
    exact = at_least("more", more, 0) * wanted / wanted.sum()
    whole: Whole = np.floor(exact).astype(np.int64)
    largest = np.argsort(whole - exact, kind="stable")[: more - int(whole.sum())]
    whole[largest] += 1
    return whole


def weighted_rate(
    weights: ArrayLike, events: ArrayLike, trials: ArrayLike, confidence: float = 0.95
) -> WeightedRate:
    """The rate of a uniformly drawn fault from strata whose numbers of trials were fixed beforehand.

    The estimate is the stratified (Horvitz-Thompson) one, Σ w_k · s_k/n_k. The interval adds the squared
    distances of the strata's own limits: θ ± √Σ w_k² (limit_k − p_k)² (MOVER). With Clopper and Pearson's
    limits each stratum's part covers at least as often as it says, so that a stratum without an event adds
    its upper bound, where a variance would add nothing; the sum of squares is then approximate, and in
    simulation (campaigns/results/coverage.md) on the safe side. What holds without approximation, and while
    looking, is `weighted_sequence`.

    `effective` is θ(1−θ) / Σ w_k² p_k (1−p_k) / n_k, from rates (s + ½)/(n + 1).

    Source: Horvitz and Thompson (JASA 1952); Zou, Huang and Zhang, A note on confidence interval estimation
    for a linear function of binomial proportions (Computational Statistics and Data Analysis 2009); Kish,
    Survey Sampling (1965), for the effective size.

    Args:
        weights: the strata's shares of the population, float64[strata], sum 1.
        events: events in each, int[strata].
        trials: trials in each, at least 1.
        confidence: between 0 and 1.

    Raises:
        UsageError: arguments that make no sense, a stratum without trials.

    Example:
        >>> found = weighted_rate([0.1, 0.9], [30, 0], [100, 1000])
        >>> ends = found.interval.low, found.interval.high
        >>> print(f"{found.rate:.3f} {ends[0]:.3f} {ends[1]:.3f} {found.effective:.0f}")
        0.030 0.021 0.041 1383
    """
    w = weighed(weights)
    s, n = counted(events, trials)
    if s.shape != w.shape:
        raise UsageError(f"{w.size} weights do not fit events and trials of shape {s.shape}")
    if np.any(n < 1):
        raise UsageError(f"stratum {int(np.argmin(n))} has no trial; a fixed design needs one in each")
    ends = added_squares(w, s.astype(np.float64), n.astype(np.float64), inside("confidence", confidence))
    low, high = float(ends[0]), float(ends[1])
    rate = (s + 0.5) / (n + 1)
    theta = float(w @ rate)
    effective = theta * (1 - theta) / float((w**2 * rate * (1 - rate) / n).sum())
    method = "MOVER of Clopper-Pearson limits"
    return WeightedRate(float(w @ (s / n)), effective, Interval(low, high, confidence, method))


def added_squares(
    weights: Floats, events: Floats, trials: Floats, confidence: float
) -> tuple[Floats, Floats]:
    """The ends of `weighted_rate`'s interval, unchecked, for counts float64[…, strata]."""
    low, high = exact_ends(events, trials, confidence)
    p = events / trials
    theta = (weights * p).sum(-1)
    down, up = (np.sqrt(((weights * (end - p)) ** 2).sum(-1)) for end in (low, high))
    return np.maximum(0.0, theta - down), np.minimum(1.0, theta + up)


def expected_half_width(weights: Floats, rates: Floats, trials: Floats, confidence: float) -> float:
    """Half the width of `weighted_rate`'s interval when every stratum shows exactly its rate."""
    low, high = added_squares(weights, rates * trials, trials, confidence)
    return float(high - low) / 2
