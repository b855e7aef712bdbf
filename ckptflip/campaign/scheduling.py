"""Which trials of a cell are due, and when it has enough: told by the outcomes of earlier trials alone.

Decisions are made at the ends of batches, on trials in the order of their numbers. Neither the order in which
workers finish, nor their number, nor an interruption changes one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from ckptflip.campaign.cells import Planned
from ckptflip.campaign.spec import BAD, Campaign
from ckptflip.campaign.statistics import Stop, allocation, drawn_strata, stopped
from ckptflip.campaign.statistics.checks import weighed
from ckptflip.campaign.statistics.stopping import EXHAUSTED, PRECISE
from ckptflip.campaign.statistics.weighted import Progress, advanced, unseen

# Trials between two allocations, where no stop rule says it.
_ROUND = 50
# No stratum's chance is below this share of its weight.
_FLOOR = 0.5
ENOUGH = "all trials"


class Due(msgspec.Struct, frozen=True):
    """What a cell wants next.

    Attributes:
        trials: (number, position of its stratum or None) of all trials that are due up to the next decision,
            those that are finished included.
        reason: why no more are due; None: more are, or some of these are not finished.
    """

    trials: tuple[tuple[int, int | None], ...]
    reason: str | None = None


class Rounds(msgspec.Struct, frozen=True, eq=False):
    """What the strata of a cell gave, round by round.

    Attributes:
        probabilities: of each stratum to be drawn, float64[rounds, strata].
        events: trials that ended badly or failed, int64[rounds, strata].
        trials: int64[rounds, strata].
        drawn: position of the stratum of each trial, by its number.
    """

    probabilities: np.ndarray
    events: np.ndarray
    trials: np.ndarray
    drawn: tuple[int, ...]


class Past(msgspec.Struct, eq=False):
    """What is known of a stratified cell, kept from batch to batch: finished rounds never change.

    Attributes:
        chances: float64[strata] of each round, of the one under way too: with which its trials are drawn.
        events: int64[strata] of each finished round: trials that ended badly or failed.
        trials: int64[strata] of each finished round.
        drawn: position of the stratum of each trial, by its number; of the round under way too.
        ends: the interval after the finished rounds, where a stop rule looks at it.
        precise: whether that is narrow enough.
    """

    chances: list[np.ndarray] = []
    events: list[np.ndarray] = []
    trials: list[np.ndarray] = []
    drawn: list[int] = []
    ends: Progress = msgspec.field(default_factory=unseen)
    precise: bool = False


def due(
    campaign: Campaign,
    cell: Planned,
    finished: Mapping[int, str],
    weights: Sequence[float] = (),
    past: Past | None = None,
) -> Due:
    """What a cell wants next.

    Args:
        campaign: the spec.
        cell: one of its cells.
        finished: outcome of each finished trial by its number; empty where it failed.
        weights: of the cell's strata; empty where it has none.
        past: of earlier calls for this cell, see `rounds_of`.
    """
    if weights and cell.policy is not None:
        return _stratified(campaign, cell, finished, weights, past)
    rule = rule_of(campaign)
    if rule is None or cell.policy is None:
        trials = tuple((number, None) for number in range(cell.wanted))
        return Due(trials, ENOUGH if all(n in finished for n, _ in trials) else None)
    events = events_of(campaign)
    for look in rule.looks.tolist():
        trials = tuple((number, None) for number in range(look))
        if not all(number in finished for number, _ in trials):
            return Due(trials)
        # A failed trial is no observation: the looks count those that are done.
        if made := stopped([finished[n] in events for n, _ in trials if finished[n]], rule):
            return Due(trials, made.reason)
    return Due(trials, EXHAUSTED)


def rule_of(campaign: Campaign) -> Stop | None:
    """The stop rule in the words of the statistics."""
    rule = campaign.trials.stop
    if rule is None:
        return None
    return Stop(
        half_width=rule.half_width, at_most=rule.at_most, confidence=rule.confidence,
        at_least=min(rule.at_least, rule.at_most), batch=rule.batch,
    )  # fmt: skip


def events_of(campaign: Campaign) -> tuple[str, ...]:
    """The outcomes whose rate is estimated."""
    return campaign.trials.stop.outcomes if campaign.trials.stop is not None else BAD


def rounds_of(
    campaign: Campaign,
    cell: Planned,
    finished: Mapping[int, str],
    weights: Sequence[float],
    past: Past | None = None,
) -> Rounds:
    """The rounds of a stratified cell, as far as they are finished, and the draws of the round under way.

    Args:
        campaign: the spec.
        cell: one of its cells.
        finished: outcome of each finished trial by its number; empty where it failed.
        weights: of the cell's strata.
        past: what earlier calls for this cell found, with fewer trials finished; it is gone on from, and
            brought up to date. None: all rounds are worked out.
    """
    past = Past() if past is None else past
    _catch_up(campaign, cell, finished, weights, past)
    complete = past.chances[: len(past.trials)]
    return Rounds(*_stacked(complete, past.events, past.trials, len(weights)), tuple(past.drawn))


def _catch_up(
    campaign: Campaign, cell: Planned, finished: Mapping[int, str], weights: Sequence[float], past: Past
) -> None:
    """Note each round that is finished, and draw the next one."""
    size = campaign.trials.stop.batch if campaign.trials.stop is not None else _ROUND
    events, seed = events_of(campaign), int(cell.draws[:16], 16) ^ campaign.seed
    seen, made = (sum(each, np.zeros(len(weights), int)) for each in (past.events, past.trials))
    while not past.precise:
        first = int(made.sum())
        if first == len(past.drawn):
            if first >= cell.wanted:
                return
            q = allocation(weights, seen, made, _FLOOR)
            more = min(size, cell.wanted - first)
            past.chances.append(q)
            past.drawn += drawn_strata(q, more, seed, place=len(past.trials)).tolist()
        numbers = range(first, len(past.drawn))
        if not all(number in finished for number in numbers):
            return
        # Left out, failed trials would change the chances that the interval rests on: they count as bad.
        bad = [past.drawn[n] for n in numbers if not finished[n] or finished[n] in events]
        past.events.append(np.bincount(np.array(bad, int), minlength=len(weights)))
        past.trials.append(np.bincount(past.drawn[first:], minlength=len(weights)))
        seen, made = seen + past.events[-1], made + past.trials[-1]
        _look(campaign, weights, past, int(made.sum()))


def _look(campaign: Campaign, weights: Sequence[float], past: Past, trials: int) -> None:
    """Follow the stop rule's interval through the round that was finished last."""
    rule = campaign.trials.stop
    if rule is None:
        return
    past.ends = advanced(
        past.ends,
        weighed(weights),
        past.chances[-1][None],
        past.events[-1][None].astype(np.float64),
        past.trials[-1].sum(keepdims=True).astype(np.float64),
        confidence=rule.confidence,
        floor=_FLOOR,
    )
    width = past.ends.high[0] - past.ends.low[0]
    past.precise = trials >= rule.at_least and bool(width <= 2 * rule.half_width)


def _stratified(
    campaign: Campaign,
    cell: Planned,
    finished: Mapping[int, str],
    weights: Sequence[float],
    past: Past | None,
) -> Due:
    past = Past() if past is None else past
    _catch_up(campaign, cell, finished, weights, past)
    trials = tuple(enumerate(past.drawn))
    # Finished rounds are; only the one under way may not be.
    if len(past.chances) > len(past.trials):
        return Due(trials)
    if past.precise:
        return Due(trials, PRECISE)
    return Due(trials, EXHAUSTED if campaign.trials.stop is not None else ENOUGH)


def _stacked(
    chances: list[np.ndarray], seen: list[np.ndarray], made: list[np.ndarray], strata: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    shape = (-1, strata)
    return (
        np.array(chances, float).reshape(shape),
        np.array(seen, int).reshape(shape),
        np.array(made, int).reshape(shape),
    )
