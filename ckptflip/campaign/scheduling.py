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
from ckptflip.campaign.statistics import Stop, allocation, drawn_strata, stopped, weighted_sequence
from ckptflip.campaign.statistics.stopping import EXHAUSTED, PRECISE

# Trials between two allocations, where no stop rule says it.
_ROUND = 50
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


def due(
    campaign: Campaign,
    cell: Planned,
    finished: Mapping[int, str],
    weights: Sequence[float] = (),
) -> Due:
    """What a cell wants next.

    Args:
        campaign: the spec.
        cell: one of its cells.
        finished: outcome of each finished trial by its number; empty where it failed.
        weights: of the cell's strata; empty where it has none.
    """
    if weights and cell.policy is not None:
        return _stratified(campaign, cell, finished, weights)
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
    campaign: Campaign, cell: Planned, finished: Mapping[int, str], weights: Sequence[float]
) -> Rounds:
    """The rounds of a stratified cell, as far as they are finished, and the draws of the round under way."""
    size = campaign.trials.stop.batch if campaign.trials.stop is not None else _ROUND
    most, events = cell.wanted, events_of(campaign)
    seed = int(cell.draws[:16], 16) ^ campaign.seed
    chances: list[np.ndarray] = []
    seen: list[np.ndarray] = []
    made: list[np.ndarray] = []
    drawn: list[int] = []
    while len(drawn) < most:
        q = allocation(
            weights, sum(seen, np.zeros(len(weights), int)), sum(made, np.zeros(len(weights), int))
        )
        first = len(drawn)
        drawn += drawn_strata(q, min(size, most - first), seed, place=len(chances)).tolist()
        numbers = range(first, len(drawn))
        if not all(number in finished for number in numbers):
            break
        chances.append(q)
        made.append(np.bincount(drawn[first:], minlength=len(weights)))
        # Left out, failed trials would change the chances that the interval rests on: they count as bad.
        bad = [drawn[n] for n in numbers if not finished[n] or finished[n] in events]
        seen.append(np.bincount(np.array(bad, int), minlength=len(weights)))
        if _precise(campaign, Rounds(*_stacked(chances, seen, made, len(weights)), tuple(drawn)), weights):
            break
    return Rounds(*_stacked(chances, seen, made, len(weights)), tuple(drawn))


def _stratified(
    campaign: Campaign, cell: Planned, finished: Mapping[int, str], weights: Sequence[float]
) -> Due:
    rounds = rounds_of(campaign, cell, finished, weights)
    trials = tuple(enumerate(rounds.drawn))
    if not all(number in finished for number, _ in trials):
        return Due(trials)
    if _precise(campaign, rounds, weights):
        return Due(trials, PRECISE)
    return Due(trials, EXHAUSTED if campaign.trials.stop is not None else ENOUGH)


def _precise(campaign: Campaign, rounds: Rounds, weights: Sequence[float]) -> bool:
    rule = campaign.trials.stop
    if rule is None or rounds.trials.sum() < rule.at_least:
        return False
    low, high = weighted_sequence(
        weights, rounds.probabilities, rounds.events, rounds.trials, rule.confidence
    )
    return bool(high[-1] - low[-1] <= 2 * rule.half_width)


def _stacked(
    chances: list[np.ndarray], seen: list[np.ndarray], made: list[np.ndarray], strata: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    shape = (-1, strata)
    return (
        np.array(chances, float).reshape(shape),
        np.array(seen, int).reshape(shape),
        np.array(made, int).reshape(shape),
    )
