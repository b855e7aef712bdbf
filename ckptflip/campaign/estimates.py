"""The rate of bad outcomes of each cell, with the interval that holds for the way its trials were drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from ckptflip.campaign import loading
from ckptflip.campaign.cells import Planned, expand
from ckptflip.campaign.scheduling import Rounds, events_of, rounds_of, rule_of
from ckptflip.campaign.spec import BAD, Campaign
from ckptflip.campaign.store import Reader
from ckptflip.errors import CkptflipError

# How an interval was made.
FIXED, SEQUENCE, WEIGHTED = "Clopper-Pearson", "confidence sequence", "weighted confidence sequence"


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """The rate of bad outcomes of a cell.

    Attributes:
        events: trials that ended so; in cells drawn by stratum, failed ones among them.
        trials: all that count.
        rate: events / trials, or weighted by the strata's shares.
        low: lower end of the interval.
        high: upper end.
        confidence: of the interval.
        method: one of `FIXED`, `SEQUENCE` and `WEIGHTED`.
        effective: trials of uniform sampling that would tell as much, for `WEIGHTED`; else `trials`.
    """

    events: int
    trials: int
    rate: float
    low: float
    high: float
    confidence: float
    method: str
    effective: float


def estimates(
    reader: Reader, confidence: float = 0.95, wanted: Sequence[Sequence[str]] = ()
) -> dict[int, list[Estimate]]:
    """The rates of all cells of the spec that have a trial, by id of the cell.

    Args:
        reader: of the store.
        confidence: of the intervals; where a stop rule holds, that of the rule.
        wanted: sets of outcomes, whose rates are asked for; by default those of the stop rule alone, else
            degraded or collapsed.

    Returns:
        One estimate for each of `wanted`.

    Raises:
        CampaignError: the store is damaged.
    """
    try:
        campaign = loading.convert(reader.spec())
        planned = {cell.key: cell for cell in expand(campaign)}
    except CkptflipError:
        return {}  # an older release's spec: its cells cannot be drawn again
    outcomes: dict[int, dict[int, str]] = {}
    trials = reader.trials()
    for cell, number, outcome in zip(
        trials.cell.tolist(), trials.number.tolist(), trials.outcome, strict=True
    ):
        outcomes.setdefault(cell, {})[number] = outcome
    strata: dict[int, list[float]] = {}
    for stratum in reader.strata():
        strata.setdefault(stratum.cell, []).append(stratum.weight)
    found = {}
    for row in reader.cells():
        if row.key in planned and row.id in outcomes:
            weights = strata.get(row.id, [])
            made = rates(campaign, planned[row.key], outcomes[row.id], weights, confidence, wanted)
            if made:
                found[row.id] = made
    return found


def rates(
    campaign: Campaign,
    cell: Planned,
    finished: Mapping[int, str],
    weights: Sequence[float] = (),
    confidence: float = 0.95,
    wanted: Sequence[Sequence[str]] = (),
) -> list[Estimate]:
    """The rates of one cell; empty while it has no trial that counts.

    Args:
        campaign: the spec.
        cell: one of its cells.
        finished: outcome of each finished trial by its number; empty where it failed.
        weights: of the cell's strata, in their order; empty where it has none.
        confidence: of the intervals, where no stop rule says it.
        wanted: sets of outcomes, see `estimates`.
    """
    rule = rule_of(campaign)
    confidence = rule.confidence if rule is not None else confidence
    sets = [tuple(each) for each in wanted] or [events_of(campaign)]
    if weights and cell.policy is not None:
        rounds = rounds_of(campaign, cell, finished, weights)
        return [_weighted(rounds, finished, weights, each, confidence) for each in sets if rounds.trials.size]
    outcomes = [finished[number] for number in sorted(finished) if finished[number]]
    if not outcomes:
        return []
    sequential = rule is not None and cell.policy is not None
    return [_plain(outcomes, each, confidence, campaign if sequential else None) for each in sets]


def _plain(
    outcomes: Sequence[str], events: Sequence[str], confidence: float, sequential: Campaign | None
) -> Estimate:
    """Uniform draws: an exact interval, or with a stop rule (its campaign) one that may be looked at."""
    seen = [outcome in events for outcome in outcomes]
    if sequential is not None:
        low, high = _sequence(seen, sequential, events)
    else:
        from ckptflip.campaign.statistics import clopper_pearson

        low, high = (float(end) for end in clopper_pearson(sum(seen), len(seen), confidence))
    return Estimate(
        events=sum(seen), trials=len(seen), rate=sum(seen) / len(seen), low=low, high=high,
        confidence=confidence, method=FIXED if sequential is None else SEQUENCE, effective=len(seen),
    )  # fmt: skip


def _sequence(seen: Sequence[bool], campaign: Campaign, events: Sequence[str]) -> tuple[float, float]:
    """The interval of a cell that a rule stops: of what the rule decides by as it decided, else as of now."""
    from ckptflip.campaign.statistics import beta_binomial_sequence, stopped

    rule = rule_of(campaign)
    assert rule is not None
    decided = stopped(seen, rule) if set(events) == set(events_of(campaign)) else None
    if decided is not None:
        return decided.low, decided.high
    low, high = beta_binomial_sequence(sum(seen), len(seen), rule.confidence, rule.a, rule.b)
    return float(low), float(high)


def _weighted(
    rounds: Rounds,
    finished: Mapping[int, str],
    weights: Sequence[float],
    events: Sequence[str],
    confidence: float,
) -> Estimate:
    """Draws by stratum: an event counts by how much likelier its stratum was than in a uniform draw."""
    from ckptflip.campaign.statistics import weighted_sequence

    ends = np.cumsum(rounds.trials.sum(1))
    counts = np.zeros_like(rounds.events)
    # A failed trial may have been any bad one.
    bad = {*events, ""} if {*BAD} & {*events} else {*events}
    for number in range(int(ends[-1])):
        if finished[number] in bad:
            counts[np.searchsorted(ends, number, side="right"), rounds.drawn[number]] += 1
    low, high = weighted_sequence(weights, rounds.probabilities, counts, rounds.trials, confidence)
    trials, ratio = int(ends[-1]), np.asarray(weights) / rounds.probabilities
    rate = float((counts * ratio).sum()) / trials
    # The variance of the mean of the trials' weighted counts, against that of as many plain ones.
    spread = float((counts * ratio**2).sum()) / trials - rate**2
    effective = trials * rate * (1 - rate) / spread if spread > 0 else float(trials)
    return Estimate(
        events=int(counts.sum()), trials=trials, rate=rate, low=float(low[-1]), high=float(high[-1]),
        confidence=confidence, method=WEIGHTED, effective=effective,
    )  # fmt: skip
