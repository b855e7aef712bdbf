"""The best AUC that any model can reach on rows whose click probabilities are known.

No score orders rows better than the true probability does (Neyman and Pearson; for the AUC, Clémençon,
Lugosi and Vayatis, Annals of Statistics 2008). Its expected AUC over the labels' draws follows from the
probabilities.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptflip.errors import UsageError

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class BestAuc:
    """The best AUC of a log.

    Attributes:
        auc: of the true probabilities, expected over the labels of these rows.
        error: standard error of `auc` as an estimate for the whole log that these rows were drawn from.
        spread: standard deviation of the AUC that the true probabilities reach on these rows' labels: how far
            chance moves the AUC of one test set.
    """

    auc: float
    error: float
    spread: float


def best_auc(probabilities: Any) -> BestAuc:
    """The best AUC from the click probabilities of some rows.

    The expectation is that of the pairs put in order divided by that of the pairs: Σ p_i (1-p_j) [p_i > p_j]
    with ties counted half, over Σ p_i (1-p_j), i ≠ j. Both deviations follow by the delta method.

    Args:
        probabilities: float64[n], n at least 2, from 0 to 1.

    Raises:
        UsageError: fewer than two rows, or numbers that are no probabilities, or no two rows can differ.

    Example:
        >>> round(best_auc([0.2, 0.8]).auc, 6)  # 0.64 of 0.68 expected pairs are in order
        0.941176
    """
    p: Floats = np.asarray(probabilities, np.float64)
    if p.ndim != 1 or p.size < 2 or not ((p >= 0) & (p <= 1)).all():
        raise UsageError("the best AUC needs two or more probabilities from 0 to 1, in one row")
    q = 1.0 - p
    pairs = p.sum() * q.sum() - (p * q).sum()
    if not pairs > 0:
        raise UsageError("all rows are sure to be of one class: there is no AUC")
    lost, won = _ordered(p, q)
    ordered = float((p * lost).sum())
    auc = ordered / pairs
    # How the AUC changes with a row (twice in the pairs: as a click and as none), and with its label.
    row = (p * lost + q * won - auc * (p * (q.sum() - q) + q * (p.sum() - p))) / pairs
    label = (lost - won - auc * ((q.sum() - q) - (p.sum() - p))) / pairs
    n = p.size
    error = math.sqrt(float((row**2).sum()) * n / max(n - 1, 1))
    return BestAuc(float(auc), error, math.sqrt(float((p * q * label**2).sum())))


def _ordered(p: Floats, q: Floats) -> tuple[Floats, Floats]:
    """For each row: the expected non-clicks it outranks, and the expected clicks that outrank it.

    Ties count half; a row is not compared with itself.
    """
    values, place = np.unique(p, return_inverse=True)
    none = np.bincount(place, q, values.size)
    clicks = np.bincount(place, p, values.size)
    below = np.cumsum(none) - none
    above = clicks.sum() - np.cumsum(clicks)
    return (
        below[place] + 0.5 * (none[place] - q),
        above[place] + 0.5 * (clicks[place] - p),
    )
