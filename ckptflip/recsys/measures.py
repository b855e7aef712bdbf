"""How good click predictions are: AUC with DeLong's variance, paired comparison, entropy, calibration.

Labels are 0 or 1, one per row. **A score that is NaN ranks below every other score, and NaNs are ties**: a
row that gets no score is shown last, and a model that gives none at all has an AUC of one half. How many
there are is told beside the AUC, never hidden in it. Measures of probabilities (loss, normalised entropy,
calibration) are NaN as soon as one probability is.

With labels of one class alone there is no AUC: it is then None, and `Evaluation.note` says so.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from ckptflip.errors import UsageError

Floats = NDArray[np.float64]
# A row's loss at most, as in PyTorch's BCELoss and with it the reference DLRM: log(0) counts as -100.
MOST_LOSS = 100.0


class Auc(msgspec.Struct, frozen=True, kw_only=True):
    """The area under the ROC curve, and how sure it is.

    Attributes:
        value: the chance that a random positive row has a higher score than a random negative one, ties
            counting one half; 0 to 1.
        variance: DeLong's estimate.
        low: lower end of the interval.
        high: upper end.
        positives: rows with label 1.
        negatives: rows with label 0.
        unscored: rows whose score is NaN.
    """

    value: float
    variance: float
    low: float
    high: float
    positives: int
    negatives: int
    unscored: int


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """Two sets of scores for the same rows.

    Attributes:
        first: AUC of the first.
        second: AUC of the second.
        difference: second less first.
        variance: of the difference, by DeLong, which takes into account that the rows are the same.
        low: lower end of the difference's interval.
        high: upper end.
        p: two-sided p value of the two being equal; 1 where all ranks are the same.
    """

    first: float
    second: float
    difference: float
    variance: float
    low: float
    high: float
    p: float


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """All measures of one set of probabilities; None where one is not defined.

    Attributes:
        rows: how many.
        positives: rows with label 1.
        unscored: rows whose probability is NaN.
        loss: mean binary cross-entropy in nats.
        auc: area under the ROC curve.
        auc_se: its standard error by DeLong.
        ne: normalised entropy.
        calibration: mean probability over mean label.
        ece: expected calibration error.
        note: why something is None; empty where nothing is.
    """

    rows: int
    positives: int
    unscored: int
    loss: float
    auc: float | None
    auc_se: float | None
    ne: float | None
    calibration: float | None
    ece: float
    note: str = ""


def auc(labels: ArrayLike, scores: ArrayLike) -> float | None:
    """The area under the ROC curve by ranks, ties at their middle rank (Mann and Whitney 1947).

    Args:
        labels: [n], 0 or 1, or bool.
        scores: float[n], higher for likelier clicks; NaN ranks lowest (see the module).

    Returns:
        0 to 1, or None where all labels are the same.

    Raises:
        UsageError: other labels, or not as many labels as scores.

    Example:
        >>> auc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
        0.75
        >>> auc([1, 1], [0.2, 0.9]) is None
        True
    """
    clicked, ranked = _checked(labels, scores)
    positives = int(clicked.sum())
    negatives = clicked.size - positives
    if not positives or not negatives:
        return None
    return _area(float(_ranks(ranked)[clicked].sum()), positives, negatives)


def delong(labels: ArrayLike, scores: ArrayLike, confidence: float = 0.95) -> Auc | None:
    """The AUC with DeLong's variance and an interval.

    Sources: DeLong, DeLong and Clarke-Pearson, Biometrics 44 (1988); the O(n log n) algorithm of Sun and Xu,
    IEEE Signal Processing Letters 21 (2014). The interval is normal on the logit scale (Pepe 2003), so that
    it stays within 0 and 1. Where the variance is 0, as with perfect separation, it is the Wilson interval at
    the largest variance that any pair of distributions has, A(1 - A) / min(positives, negatives) (Birnbaum
    and Klose, Annals of Mathematical Statistics 28, 1957).

    Args:
        labels: as for `auc`.
        scores: as for `auc`.
        confidence: of the interval, between 0 and 1.

    Returns:
        None where all labels are the same.

    Example:
        >>> found = delong([0, 0, 1, 1, 0, 1], [0.1, 0.4, 0.35, 0.8, 0.2, 0.9])
        >>> round(found.value, 4), found.low < found.value < found.high
        (0.8889, True)
    """
    z = _quantile(confidence)
    clicked, ranked = _checked(labels, scores)
    if clicked.all() or not clicked.any():
        return None
    value, of_positives, of_negatives = _placements(clicked, ranked)
    positives, negatives = of_positives.size, of_negatives.size
    variance = _variance(of_positives) + _variance(of_negatives)
    low, high = _interval(value, variance, z, min(positives, negatives))
    return Auc(
        value=value, variance=variance, low=low, high=high, positives=positives, negatives=negatives,
        unscored=int(np.isnan(np.asarray(scores, np.float64)).sum()),
    )  # fmt: skip


def compare(
    labels: ArrayLike, first: ArrayLike, second: ArrayLike, confidence: float = 0.95
) -> Comparison | None:
    """Compare the AUC of two sets of scores for the same rows, such as a clean and a faulty model's.

    Where DeLong's variance of the difference is 0 (one model separates the classes perfectly, the other gives
    nothing but ties), the interval has no width and p is 0 for any number of rows: read the two AUCs instead.

    Source: DeLong, DeLong and Clarke-Pearson (1988), by the algorithm of Sun and Xu (2014).

    Args:
        labels: as for `auc`.
        first: float[n].
        second: float[n].
        confidence: of the interval, between 0 and 1.

    Returns:
        None where all labels are the same.

    Example:
        >>> labels, clean = [0, 0, 1, 1, 0, 1], [0.1, 0.4, 0.35, 0.8, 0.2, 0.9]
        >>> compare(labels, clean, [0.1, 0.4, 0.0, 0.8, 0.2, 0.9]).difference < 0
        True
        >>> compare(labels, clean, clean).p
        1.0
    """
    z = _quantile(confidence)
    clicked, one = _checked(labels, first)
    _, other = _checked(labels, second)
    if clicked.all() or not clicked.any():
        return None
    area, positives, negatives = _placements(clicked, one)
    area_other, positives_other, negatives_other = _placements(clicked, other)
    # The variance of a difference is that of the rows' own differences: no cancellation of large terms.
    variance = _variance(positives_other - positives) + _variance(negatives_other - negatives)
    difference, error = area_other - area, math.sqrt(variance)
    return Comparison(
        first=area, second=area_other, difference=difference, variance=variance,
        low=max(difference - z * error, -1.0), high=min(difference + z * error, 1.0),
        p=_two_sided(difference, error),
    )  # fmt: skip


def log_loss(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Mean binary cross-entropy in nats; a row's is 100 at most, as in PyTorch's ``BCELoss``.

    Example:
        >>> round(log_loss([0, 1], [0.5, 0.5]), 4), log_loss([0, 1], [1.0, 1.0])
        (0.6931, 50.0)
    """
    clicked, given = _probabilities(labels, probabilities)
    return _log_loss(clicked, given)


def normalised_entropy(labels: ArrayLike, probabilities: ArrayLike) -> float | None:
    """The log loss over that of always predicting the mean label; below 1 is better than knowing nothing.

    Source: He et al., "Practical lessons from predicting clicks on ads at Facebook" (ADKDD 2014), eq. 1.

    Returns:
        None where all labels are the same: then knowing the mean is knowing everything.

    Example:
        >>> normalised_entropy([0, 1], [0.5, 0.5])
        1.0
    """
    clicked, given = _probabilities(labels, probabilities)
    return _normalised(_log_loss(clicked, given), clicked)


def calibration(labels: ArrayLike, probabilities: ArrayLike) -> float | None:
    """Mean probability over mean label: 1 where as many clicks come as were predicted (He et al. 2014).

    Returns:
        None where there is no positive label.

    Example:
        >>> calibration([0, 1, 0, 1], [0.25, 0.5, 0.25, 0.5])
        0.75
    """
    clicked, given = _probabilities(labels, probabilities)
    return _calibration(clicked, given)


def calibration_error(labels: ArrayLike, probabilities: ArrayLike, bins: int = 15) -> float:
    """Expected calibration error: the mean over rows of |mean probability - mean label| of a row's bin.

    Source: Guo et al., "On calibration of modern neural networks" (ICML 2017), eq. 3, on the probability of a
    click rather than that of the likelier class; bins of equal width.

    Args:
        labels: as for `auc`.
        probabilities: float[n], 0 to 1; one that is NaN makes the result NaN.
        bins: how many.

    Example:
        >>> calibration_error([0, 1, 1, 1], [0.5, 0.5, 0.75, 0.75])
        0.125
    """
    clicked, given = _probabilities(labels, probabilities)
    if bins < 1:
        raise UsageError(f"bins must be 1 or more, not {bins}")
    return _calibration_error(clicked, given, bins)


def evaluate(labels: ArrayLike, probabilities: ArrayLike) -> Evaluation:
    """All measures at once.

    Args:
        labels: [n], 0 or 1.
        probabilities: float[n], 0 to 1 or NaN.

    Raises:
        UsageError: no rows, other labels, probabilities outside 0 to 1.

    Example:
        >>> found = evaluate([0, 0, 0], [0.1, 0.2, 0.3])
        >>> found.auc, found.note
        (None, 'all 3 labels are 0: there is no AUC, no normalised entropy and no calibration')
    """
    clicked, given = _probabilities(labels, probabilities)
    loss, found = _log_loss(clicked, given), delong(clicked, given)
    return Evaluation(
        rows=clicked.size, positives=int(clicked.sum()), unscored=int(np.isnan(given).sum()), loss=loss,
        auc=found.value if found else None, auc_se=math.sqrt(found.variance) if found else None,
        ne=_normalised(loss, clicked), calibration=_calibration(clicked, given),
        ece=_calibration_error(clicked, given, 15), note="" if found else _one_class(clicked),
    )  # fmt: skip


def _one_class(clicked: NDArray[np.bool_]) -> str:
    lacks = "no normalised entropy" if clicked.all() else "no normalised entropy and no calibration"
    there = f"no AUC and {lacks}" if clicked.all() else f"no AUC, {lacks}"
    return f"all {clicked.size} labels are {int(clicked[0])}: there is {there}"


def _checked(labels: ArrayLike, scores: ArrayLike) -> tuple[NDArray[np.bool_], Floats]:
    """Labels as bool, scores as float64 with NaN put below everything."""
    given, ranked = np.asarray(labels), np.asarray(scores, np.float64)
    if given.ndim != 1 or given.shape != ranked.shape:
        raise UsageError(
            f"labels and scores are one number per row; their shapes are {given.shape} and {ranked.shape}"
        )
    if not given.size:
        raise UsageError("there are no rows to evaluate: the split is empty")
    clicked = given == 1
    if not (clicked | (given == 0)).all():
        odd = given[~(clicked | (given == 0))][0]
        raise UsageError(f"a label is 0 or 1, not {odd}")
    return clicked, np.where(np.isnan(ranked), -np.inf, ranked)


def _probabilities(labels: ArrayLike, probabilities: ArrayLike) -> tuple[NDArray[np.bool_], Floats]:
    given = np.asarray(probabilities, np.float64)
    clicked, _ = _checked(labels, given)
    if (outside := (given < 0) | (given > 1)).any():
        raise UsageError(f"a probability is 0 to 1, not {given[outside][0]:g}; are these logits?")
    return clicked, given


def _ranks(scores: Any) -> Floats:
    """Ranks from 1, ties at their middle."""
    from scipy.stats import rankdata

    found: Floats = rankdata(scores)
    return found


def _area(rank_sum: float, positives: int, negatives: int) -> float:
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)


def _placements(clicked: NDArray[np.bool_], scores: Floats) -> tuple[float, Floats, Floats]:
    """The AUC, and of each positive (negative) row the share of negative (positive) rows on its right side.

    Sun and Xu (2014), eqs. 5 and 6: the ranks within all rows less those within the own class.
    """
    overall = _ranks(scores)
    above, below = overall[clicked], overall[~clicked]
    positives, negatives = above.size, below.size
    of_positives = (above - _ranks(scores[clicked])) / negatives
    of_negatives = 1 - (below - _ranks(scores[~clicked])) / positives
    return _area(float(above.sum()), positives, negatives), of_positives, of_negatives


def _variance(placements: Floats) -> float:
    """Of their mean; a single row tells nothing of it and adds nothing."""
    return float(placements.var(ddof=1) / placements.size) if placements.size > 1 else 0.0


def _interval(value: float, variance: float, z: float, fewest: int) -> tuple[float, float]:
    if not variance or not 0 < value < 1:
        centre = (value + z * z / (2 * fewest)) / (1 + z * z / fewest)
        half = z / (1 + z * z / fewest) * math.sqrt(value * (1 - value) / fewest + (z / (2 * fewest)) ** 2)
        # At 0 and 1 one end is that number itself, but for rounding.
        return (0.0 if value == 0 else max(centre - half, 0.0)), (1.0 if value == 1 else centre + half)
    logit = math.log(value / (1 - value))
    half = z * math.sqrt(variance) / (value * (1 - value))
    return _expit(logit - half), _expit(logit + half)


def _expit(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def _quantile(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise UsageError(f"a confidence lies between 0 and 1, not {confidence}")
    from scipy.special import ndtri

    return float(ndtri((1 + confidence) / 2))


def _two_sided(difference: float, error: float) -> float:
    if not error:
        return 0.0 if difference else 1.0
    return math.erfc(abs(difference) / error / math.sqrt(2))


def _log_loss(clicked: NDArray[np.bool_], given: Floats) -> float:
    with np.errstate(divide="ignore"):
        losses = -np.log(np.where(clicked, given, 1 - given))
    return float(np.minimum(losses, MOST_LOSS).mean())


def _normalised(loss: float, clicked: NDArray[np.bool_]) -> float | None:
    rate = float(clicked.mean())
    if rate in (0, 1):
        return None
    return loss / -(rate * math.log(rate) + (1 - rate) * math.log1p(-rate))


def _calibration(clicked: NDArray[np.bool_], given: Floats) -> float | None:
    return float(given.mean() / clicked.mean()) if clicked.any() else None


def _calibration_error(clicked: NDArray[np.bool_], given: Floats, bins: int) -> float:
    if np.isnan(given).any():
        return math.nan
    place = np.minimum((given * bins).astype(np.int64), bins - 1)
    return float(np.abs(np.bincount(place, given - clicked, bins)).sum() / given.size)
