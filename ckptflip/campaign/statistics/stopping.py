"""When a cell of a campaign has enough trials: by an interval that allows looking after each batch."""

from __future__ import annotations

from math import inf

import numpy as np
from msgspec import Struct
from numpy.typing import ArrayLike, NDArray

from ckptflip.campaign.statistics.checks import Floats, Whole, at_least, counted, inside
from ckptflip.campaign.statistics.sequences import beta_binomial_sequence, running_intersection
from ckptflip.errors import UsageError

PRECISE, EXHAUSTED = "precise enough", "limit reached"


class Stop(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A rule that ends a cell early.

    Attributes:
        half_width: the interval may be this far on both sides of its middle.
        confidence: of that interval.
        at_least: trials before the first look.
        at_most: trials after which it ends in any case.
        batch: trials between looks. Only whole batches are looked at, in the order of the trials' numbers, so
            that neither the order in which workers finish nor their number changes what is decided.
        a: of the mixing beta distribution, see `beta_binomial_sequence`.
        b: likewise.

    Raises:
        UsageError: values that make no sense, alone or together.

    Example:
        >>> Stop(half_width=0.1, at_most=400).looks[:3].tolist()
        [50, 100, 150]
    """

    half_width: float
    at_most: int
    confidence: float = 0.95
    at_least: int = 1
    batch: int = 50
    a: float = 0.5
    b: float = 0.5

    def __post_init__(self) -> None:
        inside("half_width", self.half_width, 0, 0.5)
        inside("confidence", self.confidence)
        inside("a", self.a, 0, inf)
        inside("b", self.b, 0, inf)
        at_least("at_least", self.at_least, 1)
        at_least("batch", self.batch, 1)
        if at_least("at_most", self.at_most, 1) < self.at_least:
            raise UsageError(f"at_most ({self.at_most}) is below at_least ({self.at_least})")

    @property
    def looks(self) -> Whole:
        """The numbers of trials after which the rule is asked, ascending, int64."""
        first = -(-self.at_least // self.batch) * self.batch
        whole = np.arange(first, self.at_most, self.batch, dtype=np.int64)
        return np.append(whole, np.int64(self.at_most))


class Stopped(Struct, frozen=True):
    """What a rule decided.

    Attributes:
        reason: ``precise enough`` or ``at most``.
        trials: after how many, from the first.
        events: among those.
        low: lower end of the confidence sequence there; to be reported as the cell's interval.
        high: its upper end.
        confidence: of that interval.
    """

    reason: str
    trials: int
    events: int
    low: float
    high: float
    confidence: float


def stopped(outcomes: ArrayLike, rule: Stop) -> Stopped | None:
    """Whether a cell has enough trials.

    Args:
        outcomes: whether each trial was an event, bool[trials], in the order of their numbers and without
            gaps: the trials up to the first that is not done yet.
        rule: the rule.

    Returns:
        The first look at which the rule is satisfied; None where it is not yet. More outcomes never change an
        answer that is not None.

    Raises:
        UsageError: outcomes that are not true or false.

    Example:
        >>> rule = Stop(half_width=0.1, at_most=400, batch=50)
        >>> stopped([False, True] * 30, rule)
        >>> stopped([False] * 100, rule).trials
        50
    """
    seen = np.asarray(outcomes)
    if seen.ndim != 1 or (seen.size and seen.dtype.kind not in "b" and not np.isin(seen, (0, 1)).all()):
        raise UsageError("outcomes must be one true or false for each trial, in the trials' order")
    looks = rule.looks[rule.looks <= seen.size]
    if not looks.size:
        return None
    events = np.cumsum(seen.astype(np.int64))[looks - 1]
    at, low, high = first_stop(events, rule)
    if at == looks.size:
        return None
    reason = PRECISE if high - low <= 2 * rule.half_width else EXHAUSTED
    return Stopped(reason, int(looks[at]), int(events[at]), float(low), float(high), rule.confidence)


def first_stop(events: ArrayLike, rule: Stop) -> tuple[NDArray[np.intp], Floats, Floats]:
    """The first look at which a rule is satisfied, of one cell or of thousands.

    Args:
        events: cumulative events at the first looks of `rule.looks`, int[…, looks].
        rule: the rule.

    Returns:
        The position of that look (the number of looks where there is none), int[…], and the ends of the
        running confidence sequence there, or at the last look.

    Raises:
        UsageError: events that cannot be.
    """
    given = np.asarray(events)
    if given.ndim < 1 or not 1 <= given.shape[-1] <= rule.looks.size:
        raise UsageError(f"events must have 1 to {rule.looks.size} looks along the last axis")
    s, n = counted(given, rule.looks[: given.shape[-1]])
    low, high = running_intersection(*beta_binomial_sequence(s, n, rule.confidence, rule.a, rule.b))
    enough = (high - low <= 2 * rule.half_width) | (n == rule.at_most)
    at = np.where(enough.any(-1), enough.argmax(-1), s.shape[-1])
    there = np.minimum(at, s.shape[-1] - 1)[..., None]
    return at, np.take_along_axis(low, there, -1)[..., 0], np.take_along_axis(high, there, -1)[..., 0]
