"""Faulty against clean runs of the same seed: the noise between clean runs, and differences beyond it.

Values are final metrics of trials (accuracies, say), differences are faulty − clean, in the metric's own
unit.
"""

from __future__ import annotations

from math import inf, sqrt
from typing import Any

import numpy as np
from msgspec import Struct
from numpy.typing import ArrayLike

from ckptflip.campaign.statistics.checks import Floats, inside, numbers, one_of
from ckptflip.campaign.statistics.intervals import Interval, normal_quantile
from ckptflip.errors import UsageError
from ckptflip.faults.stream import check_seed

_STATISTICS = ("mean", "median")
_DRAWN_AT_ONCE = 1 << 22


class NoiseFloor(Struct, frozen=True):
    """How much clean runs of different seeds differ.

    Attributes:
        seeds: how many.
        mean: of their metrics.
        sd: standard deviation (n − 1).
        spread: largest − smallest.
        bound: |difference| of two clean seeds that is exceeded by at most the share asked for, with the
            confidence asked for. A smaller effect of a fault cannot be told from another seed.
    """

    seeds: int
    mean: float
    sd: float
    spread: float
    bound: float


class Differences(Struct, frozen=True):
    """Paired differences, summed up.

    Attributes:
        trials: how many.
        mean: of the differences.
        median: likewise.
        sd: standard deviation (n − 1); NaN for one trial.
        mean_interval: of the mean, by `bca`.
        median_interval: of the median, by `bca`.
        p_value: of Wilcoxon's signed-rank test that the differences are symmetric around 0, two-sided; 1
            where all are 0.
    """

    trials: int
    mean: float
    median: float
    sd: float
    mean_interval: Interval
    median_interval: Interval
    p_value: float


class NonInferiority(Struct, frozen=True):
    """Whether faulty runs are worse than clean ones by less than a margin.

    Attributes:
        holds: whether the one-sided lower bound of the mean difference lies above −margin.
        margin: as asked.
        mean: of the differences.
        bound: that lower bound.
        confidence: of it.
        method: ``t`` or ``bca``.
        note: what kept the bound from being one; empty where nothing did.
    """

    holds: bool
    margin: float
    mean: float
    bound: float
    confidence: float
    method: str
    note: str = ""


def noise_floor(metrics: ArrayLike, share: float = 0.95, confidence: float = 0.95) -> NoiseFloor:
    """What clean runs of different seeds differ by.

    The bound is z·√2·s·√((n−1)/χ²), z the normal quantile that holds `share` of both sides and χ² the
    (1 − confidence) quantile with n − 1 degrees of freedom: exact for normally distributed metrics. It is
    wide for few seeds, because their standard deviation is hardly known.

    Source: Hahn and Meeker, Statistical Intervals (1991), on tolerance bounds; the standard deviation's
    upper bound is the usual one of a normal sample.

    Args:
        metrics: final metric of each clean seed, float64[seeds], at least 2.
        share: of pairs of clean seeds that differ by no more than the bound.
        confidence: that this is so.

    Raises:
        UsageError: fewer than two seeds, values that are not finite, shares that make no sense.

    Example:
        >>> floor = noise_floor([0.970, 0.975, 0.968, 0.972, 0.971])
        >>> print(f"{floor.sd:.4f} {floor.spread:.4f} {floor.bound:.4f}")
        0.0026 0.0070 0.0170
    """
    from scipy.special import chdtri

    x = numbers("metrics", metrics, 2)
    sd = float(x.std(ddof=1))
    freedom = x.size - 1
    widest = sd * sqrt(freedom / float(chdtri(freedom, inside("confidence", confidence))))
    bound = normal_quantile(inside("share", share)) * sqrt(2) * widest
    return NoiseFloor(x.size, float(x.mean()), sd, float(np.ptp(x)), bound)


def bca(
    values: ArrayLike,
    statistic: str = "mean",
    confidence: float = 0.95,
    *,
    one_sided: bool = False,
    resamples: int = 9999,
    seed: int = 0,
) -> Interval:
    """Bootstrap interval of a mean or median, bias-corrected and accelerated.

    Source: Efron, Better bootstrap confidence intervals (JASA 1987); computed by `scipy.stats.bootstrap`.

    Args:
        values: float64[trials].
        statistic: ``mean`` or ``median``.
        confidence: between 0 and 1.
        one_sided: a lower bound alone; the upper end is infinite.
        resamples: how many.
        seed: of the resampling; the same values and seed give the same interval.

    Returns:
        The interval. Where there is none (one value, all values alike, a median that almost no resample
        moves), the point itself with a `note` that says so.

    Raises:
        UsageError: values that are not finite, arguments that make no sense.

    Example:
        >>> found = bca([0.0, -0.01, 0.02, -0.03, -0.02, 0.01, -0.04, 0.0])
        >>> print(f"{found.low:.3f} {found.high:.3f}")
        -0.023 0.004
        >>> bca([0.5, 0.5, 0.5]).note
        'all 3 values are 0.5'
    """
    x = numbers("values", values)
    inside("confidence", confidence)
    measure: Any = np.mean if one_of("statistic", statistic, _STATISTICS) == "mean" else np.median
    check_seed(seed)
    point = float(measure(x))
    if np.ptp(x) == 0:
        alike = f"all {x.size} values are {x[0]:g}" if x.size > 1 else "a single value has no spread"
        return Interval(point, point, confidence, "BCa bootstrap", alike)
    low, high = _bootstrapped(x, measure, confidence, one_sided, resamples, seed)
    if not low < high:
        return Interval(
            point,
            point,
            confidence,
            "BCa bootstrap",
            f"resampling hardly moves the {statistic}: too many ties",
        )
    return Interval(low, high, confidence, "BCa bootstrap")


def _bootstrapped(
    x: Floats, measure: Any, confidence: float, one_sided: bool, resamples: int, seed: int
) -> tuple[float, float]:
    import warnings

    from scipy import stats

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        # Degenerate distributions come as NaN with a warning; the caller says in words what they are.
        warnings.simplefilter("ignore")
        found = stats.bootstrap(
            (x,),
            measure,
            confidence_level=confidence,
            n_resamples=resamples,
            alternative="greater" if one_sided else "two-sided",
            method="BCa",
            batch=max(1, _DRAWN_AT_ONCE // x.size),
            rng=np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed))),
        ).confidence_interval
    return float(found.low), float(found.high)


def differences(
    faulty: ArrayLike, clean: ArrayLike, confidence: float = 0.95, *, resamples: int = 9999, seed: int = 0
) -> Differences:
    """Paired differences of the final metrics, faulty − clean.

    Source: Wilcoxon, Individual comparisons by ranking methods (Biometrics Bulletin 1945), zeros ranked as
    Pratt (JASA 1959) does; Efron (JASA 1987) for the intervals.

    Args:
        faulty: final metric of each trial, float64[trials].
        clean: that of the clean run of the same seed, likewise; or one for all.
        confidence: of the intervals.
        resamples: of `bca`.
        seed: of `bca`.

    Raises:
        UsageError: values that are not finite, lengths that differ.

    Example:
        >>> found = differences([0.96, 0.95, 0.97, 0.90, 0.96, 0.97], 0.97)
        >>> print(f"{found.mean:.4f} {found.median:.4f} {found.p_value:.3f}")
        -0.0183 -0.0100 0.125
    """
    d = paired(faulty, clean)
    mean, median = (bca(d, name, confidence, resamples=resamples, seed=seed) for name in _STATISTICS)
    sd = float(d.std(ddof=1)) if d.size > 1 else float("nan")
    return Differences(d.size, float(d.mean()), float(np.median(d)), sd, mean, median, _signed_rank(d))


def paired(faulty: ArrayLike, clean: ArrayLike) -> Floats:
    """faulty − clean, as float64[trials].

    Raises:
        UsageError: values that are not finite, lengths that differ.
    """
    x = numbers("faulty", faulty)
    y = numbers("clean", np.atleast_1d(np.asarray(clean)))
    if y.size not in (1, x.size):
        raise UsageError(f"{x.size} faulty and {y.size} clean values cannot be paired")
    return x - y


def _signed_rank(d: Floats) -> float:
    # Differences of equal accuracies are equal; what subtraction adds in the last digits must not order them.
    rounded = np.round(d, 12)
    if not rounded.any():
        return 1.0
    from scipy import stats

    return float(stats.wilcoxon(rounded, zero_method="pratt").pvalue)


def non_inferiority(
    faulty: ArrayLike,
    clean: ArrayLike,
    margin: float,
    confidence: float = 0.95,
    *,
    method: str = "bca",
    seed: int = 0,
) -> NonInferiority:
    """Whether faults cost less than `margin` of a metric of which more is better, with this confidence.

    That a difference is not significant does not say that there is none; this says how large it can be.

    Source: Piaggio et al., Reporting of noninferiority and equivalence randomized trials (JAMA 2012).

    Args:
        faulty: final metric of each trial, float64[trials].
        clean: that of the clean run of the same seed, likewise; or one for all.
        margin: the loss that would matter; above 0. To be chosen beforehand.
        confidence: of the one-sided lower bound.
        method: ``bca``, or ``t`` (Student's, exact for normal differences).
        seed: of the bootstrap.

    Raises:
        UsageError: values that are not finite, a margin or method that makes no sense; one trial alone.

    Example:
        >>> found = non_inferiority([0.96, 0.97, 0.965, 0.97, 0.96, 0.97], 0.97, margin=0.02)
        >>> found.holds, round(found.bound, 3)
        (True, -0.008)
    """
    d = numbers("differences", paired(faulty, clean), 2)
    inside("margin", margin, 0, inf)
    note = ""
    if one_of("method", method, ("bca", "t")) == "t":
        from scipy.special import stdtrit

        quantile = float(stdtrit(d.size - 1, inside("confidence", confidence)))
        bound = float(d.mean() - quantile * d.std(ddof=1) / sqrt(d.size))
    else:
        found = bca(d, "mean", confidence, one_sided=True, seed=seed)
        bound, note = found.low, found.note
    return NonInferiority(bound > -margin, margin, float(d.mean()), bound, confidence, method, note)
