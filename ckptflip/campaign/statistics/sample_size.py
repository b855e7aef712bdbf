"""How many trials a claim needs, before the first one runs."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, log, log1p

import numpy as np
from numpy.typing import ArrayLike

from ckptflip.campaign.statistics.checks import Floats, Whole, at_least, inside, numbers
from ckptflip.campaign.statistics.intervals import exact_ends, normal_quantile
from ckptflip.errors import UsageError

# More trials than this are no answer.
_MOST = 1 << 52


def sample_size(
    margin: float, confidence: float = 0.95, p: float = 0.5, population: int | None = None
) -> int:
    """Faults to inject so that a rate is known within ± `margin`.

    n = N / (1 + e²·(N−1) / (t²·p·(1−p))), rounded up; without a population t²·p·(1−p) / e². A normal
    approximation, as fault injection campaigns quote it; `exact_sample_size` holds without one.

    Source: Leveugle, Calvez, Maistri and Vanhauwaert, Statistical fault injection: quantified error and
    confidence (DATE 2009), equation 1.

    Args:
        margin: e, the half width wanted; above 0, below 1.
        confidence: between 0 and 1.
        p: the rate that is expected; 0.5 needs the most.
        population: N, the possible faults (bits, for single flips), drawn without replacement; None: without
            end.

    Raises:
        UsageError: values that make no sense.

    Example:
        >>> sample_size(0.01), sample_size(0.01, population=10_000)
        (9604, 4900)
    """
    e, rate = inside("margin", margin), inside("p", p)
    most = normal_quantile(confidence) ** 2 * rate * (1 - rate) / e / e
    if population is None:
        return max(1, ceil(round(_reachable("margin", most), 9)))
    n = at_least("population", population, 1)
    if not most:  # a rate this near to 0 or 1
        return 1
    return min(n, max(1, ceil(round(n / (1 + (n - 1) / most), 9))))


def stratum_sizes(
    populations: ArrayLike, margin: float, confidence: float = 0.95, p: float | ArrayLike = 0.5
) -> Whole:
    """Faults for each stratum, so that the rate *of each* is known within ± `margin`.

    A sample for the whole model says little about one layer or one bit; a claim for each layer × bit needs
    `sample_size` of each.

    Source: Ruospo, Gavarini, de Sio, Guerrero, Sonza Reorda, Bosio et al., Assessing convolutional neural
    networks reliability through statistical fault injections (DATE 2023).

    Args:
        populations: possible faults of each stratum, int[strata].
        margin: half width wanted, of each.
        confidence: between 0 and 1, of each.
        p: the expected rate, one for all or one each.

    Returns:
        int64[strata].

    Raises:
        UsageError: values that make no sense.

    Example:
        >>> stratum_sizes([1_000, 1_000_000], 0.05).tolist()
        [278, 384]
    """
    sizes = numbers("populations", populations)
    rates = np.broadcast_to(np.asarray(p, np.float64), sizes.shape)
    if np.any(sizes != np.floor(sizes)):
        raise UsageError("populations must be whole numbers of possible faults")
    each = [
        sample_size(margin, confidence, float(rate), int(n)) for n, rate in zip(sizes, rates, strict=True)
    ]
    return np.array(each, np.int64)


def exact_sample_size(margin: float, confidence: float = 0.95, p: float = 0.5) -> int:
    """Trials after which Clopper and Pearson's interval is at most ± `margin`, exactly.

    It is so for every number of events up to p·n (or from p·n on, for p above 0.5), since the interval is the
    wider the nearer the rate is to a half; for p = 0.5 whatever is seen.

    Args:
        margin: the half width wanted; above 0, below 1.
        confidence: between 0 and 1.
        p: the rate that is expected, 0 to 1.

    Raises:
        UsageError: values that make no sense.

    Example:
        >>> exact_sample_size(0.01), exact_sample_size(0.01, p=0.05)
        (9701, 1927)
    """
    e = inside("margin", margin)
    inside("confidence", confidence)
    if not 0 <= p <= 1:
        raise UsageError(f"p must be a number from 0 to 1, not {p!r}")
    rate = min(p, 1 - p)

    def enough(n: int) -> bool:
        low, high = exact_ends(_one(rate * n), _one(n), confidence)
        return bool(high[0] - low[0] <= 2 * e)

    return smallest(enough)


def no_event_size(rate: float, confidence: float = 0.95, population: int | None = None) -> int:
    """Trials without an event after which the rate is below `rate`: the smallest n with (1−r)^n ≤ 1−C.

    The rule of three (3/r at 95 %), exact; see `upper_bound`.

    Args:
        rate: the bound wanted; above 0, below 1.
        confidence: between 0 and 1.
        population: never more than these are needed.

    Raises:
        UsageError: values that make no sense.

    Example:
        >>> no_event_size(0.01), no_event_size(0.001)
        (299, 2995)
    """
    needed = log(1 - inside("confidence", confidence)) / log1p(-inside("upper bound", rate)) - 1e-9
    if population is None:
        return max(1, ceil(_reachable("upper bound", needed)))
    return max(1, ceil(min(needed, at_least("population", population, 1))))


def _reachable(name: str, trials: float) -> float:
    if not trials <= _MOST:
        raise UsageError(f"{name} is so small that no campaign reaches it; ask for a wider one")
    return trials


def _one(value: float) -> Floats:
    return np.array([value], np.float64)


def smallest(enough: Callable[[int], bool]) -> int:
    """The smallest whole number that is enough, where all larger ones are too."""
    high = 1
    while not enough(high):
        high *= 2
        _reachable("margin", high)
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
