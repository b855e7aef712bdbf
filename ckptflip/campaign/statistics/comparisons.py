"""Two cells, or many at once: differences of rates, and p-values that were looked at together."""

from __future__ import annotations

from math import sqrt

import numpy as np
from msgspec import Struct
from numpy.typing import ArrayLike

from ckptflip.campaign.statistics.checks import Floats, counted, numbers, one_of
from ckptflip.campaign.statistics.intervals import Interval, wilson
from ckptflip.errors import UsageError

TESTS = ("fisher", "boschloo", "barnard")
# Above this, the unconditional tests take minutes for what Fisher's says as well.
_MOST_UNCONDITIONAL = 500


class RateDifference(Struct, frozen=True):
    """Two cells' rates, compared.

    Attributes:
        difference: the first cell's rate − the second's.
        interval: of the difference.
        p_value: that the rates are equal, two-sided.
        test: which test gave it.
    """

    difference: float
    interval: Interval
    p_value: float
    test: str


def newcombe(
    events: int, trials: int, other_events: int, other_trials: int, confidence: float = 0.95
) -> Interval:
    """Newcombe's hybrid score interval of the difference of two independent rates.

    Source: Newcombe, Interval estimation for the difference between independent proportions (Statistics in
    Medicine 1998), method 10.

    Args:
        events, trials: of the first cell.
        other_events, other_trials: of the second.
        confidence: between 0 and 1.

    Raises:
        UsageError: counts or a confidence that make no sense.

    Example:
        >>> found = newcombe(56, 70, 48, 80)
        >>> print(f"{found.low:.4f} {found.high:.4f}")
        0.0524 0.3339
    """
    s, n = counted([events, other_events], [trials, other_trials], 1)
    low, high = wilson(s, n, confidence)
    p = s / n
    down = sqrt((p[0] - low[0]) ** 2 + (high[1] - p[1]) ** 2)
    up = sqrt((high[0] - p[0]) ** 2 + (p[1] - low[1]) ** 2)
    difference = float(p[0] - p[1])
    return Interval(
        max(-1.0, difference - down), min(1.0, difference + up), confidence, "Newcombe's hybrid score"
    )


def compare_rates(
    events: int,
    trials: int,
    other_events: int,
    other_trials: int,
    confidence: float = 0.95,
    *,
    test: str = "fisher",
) -> RateDifference:
    """Two independent cells with numbers of trials fixed beforehand: difference, interval and exact test.

    Source: Fisher (1922); Barnard (Biometrika 1947); Boschloo (Statistica Neerlandica 1970), more powerful
    than Fisher's for few trials; all as in `scipy.stats`. The interval is `newcombe`'s.

    Args:
        events, trials: of the first cell.
        other_events, other_trials: of the second.
        confidence: of the interval.
        test: ``fisher``, ``boschloo`` or ``barnard``, the last two for up to 500 trials in all.

    Raises:
        UsageError: counts that make no sense, an unknown test, too many trials for it.

    Example:
        >>> found = compare_rates(7, 20, 1, 20)
        >>> print(f"{found.difference:.2f} {found.p_value:.3f}")
        0.30 0.044
    """
    from scipy import stats

    interval = newcombe(events, trials, other_events, other_trials, confidence)
    one_of("test", test, TESTS)
    if test != "fisher" and trials + other_trials > _MOST_UNCONDITIONAL:
        raise UsageError(
            f"test {test!r} is for up to {_MOST_UNCONDITIONAL} trials, not {trials + other_trials}; "
            "take 'fisher'"
        )
    table = np.array([[events, other_events], [trials - events, other_trials - other_events]])
    if not table.any(axis=1).all():
        p_value = 1.0  # all trials of both cells ended alike
    elif test == "fisher":
        p_value = float(stats.fisher_exact(table).pvalue)
    else:
        exact = {"barnard": stats.barnard_exact, "boschloo": stats.boschloo_exact}[test]
        p_value = float(exact(table).pvalue)
    return RateDifference(events / trials - other_events / other_trials, interval, min(1.0, p_value), test)


def holm(p_values: ArrayLike) -> Floats:
    """P-values adjusted so that the chance of even one false alarm among all is bounded.

    Source: Holm, A simple sequentially rejective multiple test procedure (Scandinavian Journal of
    Statistics 1979).

    Args:
        p_values: float64[tests], 0 to 1.

    Returns:
        Adjusted p-values in the same order: claim those that are at most the level.

    Raises:
        UsageError: values that are no p-values.

    Example:
        >>> holm([0.01, 0.04, 0.03, 0.005]).round(3).tolist()
        [0.03, 0.06, 0.06, 0.02]
    """
    p = _p_values(p_values)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1)))
    return adjusted


def false_discovery(p_values: ArrayLike, *, dependent: bool = False) -> Floats:
    """P-values adjusted so that the expected share of false ones among the claims is bounded.

    Source: Benjamini and Hochberg (JRSS B 1995); for tests that depend on each other in unknown ways
    Benjamini and Yekutieli (Annals of Statistics 2001). Computed by `scipy.stats.false_discovery_control`.

    Args:
        p_values: float64[tests], 0 to 1.
        dependent: take the second.

    Returns:
        Adjusted p-values in the same order.

    Raises:
        UsageError: values that are no p-values.

    Example:
        >>> false_discovery([0.01, 0.04, 0.03, 0.005]).round(3).tolist()
        [0.02, 0.04, 0.04, 0.02]
    """
    from scipy import stats

    p = _p_values(p_values)
    return np.asarray(stats.false_discovery_control(p, method="by" if dependent else "bh"), np.float64)


def _p_values(given: ArrayLike) -> Floats:
    p = numbers("p_values", given)
    if np.any((p < 0) | (p > 1)):
        raise UsageError(f"p_values must lie in 0 to 1: {p[(p < 0) | (p > 1)][0]:g}")
    return p
