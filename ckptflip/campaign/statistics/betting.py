"""An interval of a bounded mean that holds at every number of trials at once, by betting against each mean.

Somebody who believes that the mean is θ sells bets at fair prices. A gambler who puts the fraction λ on
larger values multiplies his capital by 1 + λ·(x − θ) with each value x. If θ is the true mean, his capital is
a martingale that, by Ville's inequality, ever reaches 1/α with probability at most α: every θ against which a
gambler has become that rich is excluded. Here several gamblers share the first capital, each true to his own
λ, so that the rich ones carry the average; one company bets on larger values and excludes θ that are too
small, another on smaller ones, each with α/2. Both capitals are monotone in θ, so what is left is an
interval.

Source: Waudby-Smith and Ramdas, Estimating means of bounded random variables by betting (JRSS B 2024),
section 4 and its appendix on mixtures of bets; Ville (1939).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from ckptflip.campaign.statistics.checks import Floats, Whole, at_least, inside, numbers
from ckptflip.errors import UsageError

# The bets, as powers of two times the largest that can lose no more than everything at the upper end.
_SMALLEST, _LARGEST = -8, 5
# Nobody bets everything: a capital of 0 could never recover.
_MOST = 0.999
_HALVINGS = 30


def bounded_sequence(
    values: ArrayLike,
    low: float = 0.0,
    high: float = 1.0,
    confidence: float = 0.95,
    looks: ArrayLike | None = None,
) -> tuple[Floats, Floats]:
    """A confidence sequence of the mean of bounded values, such as differences of accuracies (−1 to 1).

    Source: see the module; Waudby-Smith and Ramdas (JRSS B 2024).

    Args:
        values: float64[trials], in the order in which they were drawn.
        low: what no value can be below. To be known beforehand, not read off the values.
        high: what no value can be above, likewise.
        confidence: between 0 and 1, of all looks together.
        looks: numbers of trials, ascending, at which one wants to know; None: after each trial.

    Returns:
        Lower and upper ends, float64[looks], each the intersection of all looks so far.

    Raises:
        UsageError: values outside the bounds, or arguments that make no sense.

    Example:
        >>> differences = np.array([0.0, -0.01, 0.02, -0.03] * 50)
        >>> low, high = bounded_sequence(differences, -1, 1, looks=[50, 200])
        >>> print(np.round(low, 3), np.round(high, 3))
        [-0.097 -0.028] [0.085 0.018]
    """
    x = numbers("values", values)
    if not low < high:
        raise UsageError(f"low must be below high, not {low!r} and {high!r}")
    if x.min() < low or x.max() > high:
        raise UsageError(f"values lie in {x.min():g} to {x.max():g}, outside the bounds {low:g} to {high:g}")
    at = np.arange(1, x.size + 1) if looks is None else _ascending(looks, x.size)
    scaled = ((x - low) / (high - low))[None]
    ends = np.zeros((2, at.size))
    lower, upper = np.zeros(1), np.ones(1)
    for i, n in enumerate(at.tolist()):
        seen = scaled[:, :n]
        lower, upper = narrowed(seen, np.ones_like(seen), 1.0, confidence, lower, upper)
        ends[:, i] = lower[0], upper[0]
    return low + (high - low) * ends[0], low + (high - low) * ends[1]


def narrowed(
    values: Floats, counts: Floats, bound: float, confidence: float, lower: Floats, upper: Floats
) -> tuple[Floats, Floats]:
    """What several campaigns' values leave of intervals of their means.

    Args:
        values: distinct values in 0 … `bound`, float64[campaigns, distinct]; the means are at most 1.
        counts: how often each came, likewise.
        bound: what no value can exceed, whatever is drawn; at least 1.
        confidence: between 0 and 1.
        lower: the lower ends so far, float64[campaigns]; 0 at first.
        upper: the upper ends so far, likewise; 1 at first.

    Returns:
        The ends now.
    """
    threshold = float(np.log(2 / (1 - inside("confidence", confidence))))
    mean = (values * counts).sum(1) / counts.sum(1)
    ends = []
    for outer, rising in ((lower, True), (upper, False)):
        inner = np.maximum(mean, outer) if rising else np.minimum(mean, outer)
        for _ in range(_HALVINGS):
            middle = (outer + inner) / 2
            excluded = _log_capital(values, counts, middle, bound, rising) >= threshold
            outer, inner = np.where(excluded, middle, outer), np.where(excluded, inner, middle)
        ends.append(outer)
    return ends[0], ends[1]


def _log_capital(values: Floats, counts: Floats, theta: Floats, bound: float, rising: bool) -> Floats:
    """The logarithm of what a company owns that bet against each campaign's θ, having begun with 1."""
    powers = np.arange(_SMALLEST, (_LARGEST if rising else 0) + 1)
    price = theta[:, None, None]
    if rising:
        bets = np.minimum(2.0 ** powers[:, None] / bound, _MOST / np.maximum(price, 1e-300))
    else:
        bets = -(2.0 ** powers[:, None]) * _MOST / (bound - price)
    # Most of the first capital goes to bets near the largest safe one: rare events are excluded by those.
    shares = np.log(1.0 / (1 + np.abs(powers)) / np.sum(1.0 / (1 + np.abs(powers))))
    owned = shares + np.sum(counts[:, None, :] * np.log1p(bets * (values[:, None, :] - price)), axis=2)
    most = owned.max(1)
    total: Floats = most + np.log(np.exp(owned - most[:, None]).sum(1))
    return total


def _ascending(looks: ArrayLike, most: int) -> Whole:
    at = np.asarray(looks)
    if at.ndim != 1 or at.dtype.kind not in "iu" or not at.size or np.any(np.diff(at) <= 0):
        raise UsageError(f"looks must be ascending whole numbers of trials, not {looks!r}")
    at_least("looks[0]", int(at[0]), 1)
    if at[-1] > most:
        raise UsageError(f"looks end at {int(at[-1])}, after the last of {most} values")
    return at.astype(np.int64)
