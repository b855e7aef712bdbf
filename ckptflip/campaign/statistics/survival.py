"""Epochs until a faulty run is back with the clean one; some never are: right-censored survival."""

from __future__ import annotations

from math import inf

import numpy as np
from msgspec import Struct
from numpy.typing import ArrayLike

from ckptflip.campaign.statistics.checks import Floats, Whole, inside, numbers
from ckptflip.campaign.statistics.intervals import normal_quantile
from ckptflip.errors import UsageError


class Survival(Struct, frozen=True, eq=False):
    """The share of trials that have not recovered, by epochs since the fault.

    Attributes:
        epochs: at which at least one trial recovered, ascending, float64[steps].
        share: not recovered after that epoch, float64[steps].
        low: lower end of its pointwise interval, float64[steps].
        high: upper end.
        at_risk: trials neither recovered nor out of sight before that epoch, int64[steps].
        recovered: trials that recovered in that epoch, int64[steps].
        trials: all of them.
        never: those that were not seen to recover.
        median: epochs until half have recovered; infinite where half never did.
        median_low: lower end of its interval.
        median_high: upper end, infinite where the data set no limit.
        confidence: of all intervals, each alone.
    """

    epochs: Floats
    share: Floats
    low: Floats
    high: Floats
    at_risk: Whole
    recovered: Whole
    trials: int
    never: int
    median: float
    median_low: float
    median_high: float
    confidence: float


def recovery(epochs: ArrayLike, recovered: ArrayLike, confidence: float = 0.95) -> Survival:
    """Kaplan and Meier's estimate, with log-log intervals of Greenwood's variance.

    The interval of the median holds the epochs at which the curve's interval holds one half.

    Source: Kaplan and Meier, Nonparametric estimation from incomplete observations (JASA 1958); Greenwood
    (1926); Kalbfleisch and Prentice, The Statistical Analysis of Failure Time Data (1980), for the log-log
    form; Brookmeyer and Crowley (Biometrics 1982) for the median.

    Args:
        epochs: epochs from the fault to the recovery; for a trial that was not seen to recover, how long it
            was watched. float64[trials], not negative.
        recovered: whether it recovered, bool[trials].
        confidence: between 0 and 1.

    Raises:
        UsageError: lengths that differ, negative or infinite epochs.

    Example:
        >>> found = recovery([1, 2, 2, 3, 10, 10], [True, True, True, True, False, False])
        >>> found.share.round(2).tolist(), found.never, found.median
        ([0.83, 0.5, 0.33], 2, 2.0)
    """
    time, event = _checked(epochs, recovered)
    z = normal_quantile(inside("confidence", confidence))
    steps, inverse = np.unique(time[event], return_inverse=True)
    d = np.bincount(inverse, minlength=steps.size)
    r = time.size - np.searchsorted(np.sort(time), steps, side="left")
    share: Floats = np.cumprod(1 - d / r).astype(np.float64)
    # Where everyone left recovers, the curve is 0 and neither its variance nor its logarithm is finite.
    inner = (share > 0) & (share < 1)
    greenwood = np.cumsum(d / np.maximum(r * (r - d), 1).astype(np.float64))
    safe = np.where(inner, share, 0.5)
    factor = np.exp(z * np.sqrt(greenwood) / np.abs(np.log(safe)))
    low, high = np.where(inner, safe**factor, share), np.where(inner, safe ** (1 / factor), share)
    return Survival(
        steps, share, low, high, r.astype(np.int64), d.astype(np.int64), time.size, int((~event).sum()),
        _first(steps, share), _first(steps, low), _first(steps, high), confidence,
    )  # fmt: skip


def logrank(
    epochs: ArrayLike, recovered: ArrayLike, other_epochs: ArrayLike, other_recovered: ArrayLike
) -> float:
    """P-value that two cells recover alike: the log-rank test, two-sided.

    Source: Mantel, Evaluation of survival data (Cancer Chemotherapy Reports 1966); computed by
    `scipy.stats.logrank`.

    Args:
        epochs, recovered: one cell, as for `recovery`.
        other_epochs, other_recovered: the other.

    Returns:
        The p-value; 1 where no trial of either cell recovered.

    Raises:
        UsageError: as for `recovery`.

    Example:
        >>> fast, slow = [1, 1, 2, 2, 3, 3], [4, 5, 6, 8, 9, 9]
        >>> print(f"{logrank(fast, [True] * 6, slow, [True] * 5 + [False]):.4f}")
        0.0007
    """
    from scipy import stats

    cells = [_checked(epochs, recovered), _checked(other_epochs, other_recovered)]
    if not any(event.any() for _, event in cells):
        return 1.0
    x, y = (stats.CensoredData.right_censored(time, ~event) for time, event in cells)
    # Where all recover at the same epoch there is no variance, and nothing to tell apart.
    with np.errstate(invalid="ignore"):
        found = float(stats.logrank(x, y).pvalue)
    return 1.0 if np.isnan(found) else found


def _checked(
    epochs: ArrayLike, recovered: ArrayLike
) -> tuple[Floats, np.ndarray[tuple[int], np.dtype[np.bool_]]]:
    time = numbers("epochs", epochs)
    event = np.asarray(recovered)
    if event.shape != time.shape:
        raise UsageError(f"{time.size} epochs do not fit recovered of shape {event.shape}")
    if event.dtype.kind != "b" and not np.isin(event, (0, 1)).all():
        raise UsageError("recovered must be true or false for each trial")
    if np.any(time < 0):
        raise UsageError(f"epochs must not be negative: {time.min():g}")
    return time, event.astype(bool)


def _first(steps: Floats, curve: Floats) -> float:
    """The first step at which a curve is at or below one half."""
    below = np.flatnonzero(curve <= 0.5)
    return float(steps[below[0]]) if below.size else inf
