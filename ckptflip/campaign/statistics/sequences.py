"""An interval of a rate that holds at every number of trials at once: one may look and stop at will."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from ckptflip.campaign.statistics.checks import Floats, Whole, counted, inside
from ckptflip.errors import UsageError

# Halvings of the bracket of a root; 2^-50 is the spacing of float64 below 1.
_HALVINGS = 50
_MOST_TRIALS = 1 << 31


def beta_binomial_sequence(
    events: ArrayLike,
    trials: ArrayLike,
    confidence: float = 0.95,
    a: float = 0.5,
    b: float = 0.5,
) -> tuple[Floats, Floats]:
    """Robbins' confidence sequence of a rate, by the beta-binomial mixture.

    M_n(p) = B(a+s, b+f) / B(a, b) / (p^s (1−p)^f) is a martingale under p, of s events and f others in n
    trials. By Ville's inequality it stays below 1/α for ever with probability 1 − α; the interval holds the p
    for which it is. So the truth lies in the intervals of *all* n at once, with this confidence, and a
    campaign may stop whenever it likes.

    Source: Robbins, Statistical methods related to the law of the iterated logarithm (Annals of
    Mathematical Statistics 1970); Howard, Ramdas, McAuliffe and Sekhon, Time-uniform, nonparametric,
    nonasymptotic confidence sequences (Annals of Statistics 2021); Ville (1939).

    Args:
        events: s, after the trials counted in `trials`; whole numbers of any shape.
        trials: n, likewise; 0 gives 0 to 1.
        confidence: 1 − α.
        a: of the mixing beta distribution, above 0.
        b: likewise. 0.5 and 0.5 suit every rate; a/(a+b) near the rate makes the interval somewhat
            narrower. They must be chosen before the first trial.

    Returns:
        Lower and upper ends, float64, of the arguments' common shape.

    Raises:
        UsageError: values that make no sense.

    Example:
        >>> low, high = beta_binomial_sequence(10, 1000)
        >>> print(f"{low:.4f} {high:.4f}")
        0.0024 0.0262
    """
    s, n = counted(events, trials)
    if n.size and int(n.max()) >= _MOST_TRIALS:
        raise UsageError(f"trials must be below 2^31, not {int(n.max())}")
    prior = inside("a", a, 0, np.inf), inside("b", b, 0, np.inf)
    # Thousands of campaigns share few pairs of counts; each is solved once.
    pairs, back = np.unique((n.astype(np.int64) << 32) | s, return_inverse=True)
    each_n, each_s = pairs >> 32, pairs & 0xFFFFFFFF
    threshold = -np.log1p(-inside("confidence", confidence))
    low = _lower(each_s, each_n, threshold, *prior)
    high = 1 - _lower(each_n - each_s, each_n, threshold, *prior[::-1])
    return low[back].reshape(s.shape), high[back].reshape(s.shape)


def running_intersection(low: ArrayLike, high: ArrayLike) -> tuple[Floats, Floats]:
    """The intersection of each interval of a sequence with all before it, along the last axis.

    The truth lies in all intervals of a confidence sequence at once, so it lies in their intersection too,
    which only shrinks. Where an intersection is empty (with probability at most α) its ends are crossed.

    Args:
        low: lower ends, float64[…, looks].
        high: upper ends, likewise.

    Returns:
        Lower and upper ends, likewise.

    Example:
        >>> running_intersection([0.1, 0.2, 0.15], [0.9, 0.6, 0.7])
        (array([0.1, 0.2, 0.2]), array([0.9, 0.6, 0.6]))
    """
    return (
        np.maximum.accumulate(np.asarray(low, np.float64), axis=-1),
        np.minimum.accumulate(np.asarray(high, np.float64), axis=-1),
    )


def _lower(s: Whole, n: Whole, threshold: float, a: float, b: float) -> Floats:
    """The smallest p with log M(p) ≤ threshold, for each pair of counts; log M is convex, least at s/n."""
    from scipy.special import betaln, xlog1py, xlogy

    f = n - s
    constant = betaln(a + s, b + f) - betaln(a, b) - threshold
    outer, inner = np.zeros(n.shape), s / np.maximum(n, 1)
    for _ in range(_HALVINGS):
        middle = (outer + inner) / 2
        excluded = constant > xlogy(s, middle) + xlog1py(f, -middle)
        outer, inner = np.where(excluded, middle, outer), np.where(excluded, inner, middle)
    return np.where(s == 0, 0.0, outer)
