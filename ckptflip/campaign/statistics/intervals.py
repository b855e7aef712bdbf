"""Intervals of a rate from a number of trials that was fixed beforehand."""

from __future__ import annotations

import numpy as np
from msgspec import Struct
from numpy.typing import ArrayLike

from ckptflip.campaign.statistics.checks import Floats, counted, inside


class Interval(Struct, frozen=True):
    """A confidence interval.

    Attributes:
        low: its lower end.
        high: its upper end.
        confidence: how often, at least or nearly, such intervals hold the true value.
        method: how it was made.
        note: why it says less than it seems to, or is no interval; empty where it is one.
    """

    low: float
    high: float
    confidence: float
    method: str
    note: str = ""


def normal_quantile(confidence: float) -> float:
    """How many standard deviations on both sides of the mean hold this share of a normal distribution.

    Example:
        >>> round(normal_quantile(0.95), 4)
        1.96
    """
    from scipy.special import ndtri

    return float(ndtri((1 + inside("confidence", confidence)) / 2))


def wilson(events: ArrayLike, trials: ArrayLike, confidence: float = 0.95) -> tuple[Floats, Floats]:
    """Wilson's score interval of a rate: for display.

    Its coverage is near the nominal one on average and may lie below it for single rates; for claims take
    `clopper_pearson`.

    Source: Wilson, Probable inference, the law of succession, and statistical inference (JASA 1927);
    Newcombe (Statistics in Medicine 1998), method 3.

    Args:
        events: whole numbers, of any shape.
        trials: likewise, at least 1 each.
        confidence: between 0 and 1.

    Returns:
        Lower and upper ends, float64, of the arguments' common shape.

    Raises:
        UsageError: counts or a confidence that make no sense.

    Example:
        >>> low, high = wilson(81, 263)
        >>> print(f"{low:.4f} {high:.4f}")
        0.2553 0.3662
    """
    s, n = counted(events, trials, 1)
    z = normal_quantile(confidence)
    centre = (s + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * np.sqrt(s * (n - s) / n + z * z / 4)
    # At 0 and at n events an end is exactly 0 or 1; rounding would leave 1e-17.
    return np.where(s == 0, 0.0, centre - half), np.where(s == n, 1.0, centre + half)


def clopper_pearson(events: ArrayLike, trials: ArrayLike, confidence: float = 0.95) -> tuple[Floats, Floats]:
    """Clopper and Pearson's exact interval of a rate: for claims. It covers at least as often as it says.

    That holds for a number of trials fixed beforehand. A campaign that looks at its results and stops when
    they please needs `beta_binomial_sequence`.

    Source: Clopper and Pearson, The use of confidence or fiducial limits illustrated in the case of the
    binomial (Biometrika 1934), through quantiles of the beta distribution.

    Args:
        events: whole numbers, of any shape.
        trials: likewise, at least 1 each.
        confidence: between 0 and 1.

    Returns:
        Lower and upper ends, float64, of the arguments' common shape.

    Raises:
        UsageError: counts or a confidence that make no sense.

    Example:
        >>> low, high = clopper_pearson(15, 148)
        >>> print(f"{low:.4f} {high:.4f}")
        0.0578 0.1617
    """
    s, n = counted(events, trials, 1)
    return exact_ends(s.astype(np.float64), n.astype(np.float64), inside("confidence", confidence))


def exact_ends(events: Floats, trials: Floats, confidence: float) -> tuple[Floats, Floats]:
    """As `clopper_pearson`, unchecked, also for counts that are not whole; 0 to 1 for no trials."""
    from scipy.special import betaincinv

    tail = (1 - confidence) / 2
    rest = trials - events
    low = betaincinv(np.maximum(events, 1e-300), rest + 1, tail)
    high = betaincinv(events + 1, np.maximum(rest, 1e-300), 1 - tail)
    return np.where(events <= 0, 0.0, low), np.where(rest <= 0, 1.0, high)


def upper_bound(trials: ArrayLike, confidence: float = 0.95) -> Floats:
    """The rate that is not exceeded, with this confidence, when no event was seen: 1 − (1−C)^(1/n), exact.

    Close to 3/n at 95 % (the rule of three: Hanley and Lippman-Hand, If nothing goes wrong, is everything all
    right?, JAMA 1983).

    Args:
        trials: whole numbers of at least 1, of any shape.
        confidence: between 0 and 1.

    Returns:
        Rates, float64.

    Raises:
        UsageError: numbers of trials or a confidence that make no sense.

    Example:
        >>> print(f"{upper_bound(300):.5f}")
        0.00994
    """
    _, n = counted(0, trials, 1)
    return np.asarray(-np.expm1(np.log1p(-inside("confidence", confidence)) / n))


def wald(events: ArrayLike, trials: ArrayLike, confidence: float = 0.95) -> tuple[Floats, Floats]:
    """p ± z·√(p(1−p)/n): the textbook interval, here to show what it misses. Do not claim anything with it.

    Source of the warning: Brown, Cai and DasGupta, Interval estimation for a binomial proportion (Statistical
    Science 2001).

    Example:
        >>> [float(end) for end in wald(0, 100)]
        [0.0, 0.0]
    """
    s, n = counted(events, trials, 1)
    p = s / n
    half = normal_quantile(confidence) * np.sqrt(p * (1 - p)) / np.sqrt(n)
    return p - half, p + half
