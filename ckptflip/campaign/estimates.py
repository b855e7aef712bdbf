"""The rate of bad outcomes of each cell, with the interval that holds for the way its trials were drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from ckptflip.campaign import loading
from ckptflip.campaign.cells import Planned, expand
from ckptflip.campaign.scheduling import events_of, rounds_of, rule_of
from ckptflip.campaign.spec import Campaign
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


def estimates(reader: Reader, confidence: float = 0.95) -> dict[int, Estimate]:
    """The rates of all cells of the spec that have a trial, by id of the cell.

    Args:
        reader: of the store.
        confidence: of the intervals; where a stop rule holds, that of the rule.

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
            made = estimate(campaign, planned[row.key], outcomes[row.id], strata.get(row.id, []), confidence)
            if made is not None:
                found[row.id] = made
    return found


def estimate(
    campaign: Campaign,
    cell: Planned,
    finished: Mapping[int, str],
    weights: Sequence[float] = (),
    confidence: float = 0.95,
) -> Estimate | None:
    """The rate of one cell; None while it has no trial that counts.

    Args:
        campaign: the spec.
        cell: one of its cells.
        finished: outcome of each finished trial by its number; empty where it failed.
        weights: of the cell's strata, in their order; empty where it has none.
        confidence: of the interval, where no stop rule says it.
    """
    rule = rule_of(campaign)
    confidence = rule.confidence if rule is not None else confidence
    if weights and cell.policy is not None:
        return _weighted(campaign, cell, finished, weights, confidence)
    bad = events_of(campaign)
    seen = [finished[number] in bad for number in sorted(finished) if finished[number]]
    if not seen:
        return None
    method = FIXED
    if rule is not None and cell.policy is not None:
        low, high, method = *_sequence(seen, campaign), SEQUENCE
    else:
        from ckptflip.campaign.statistics import clopper_pearson

        low, high = (float(end) for end in clopper_pearson(sum(seen), len(seen), confidence))
    return Estimate(
        events=sum(seen), trials=len(seen), rate=sum(seen) / len(seen), low=low, high=high,
        confidence=confidence, method=method, effective=len(seen),
    )  # fmt: skip


def _sequence(seen: Sequence[bool], campaign: Campaign) -> tuple[float, float]:
    """The interval of a cell that a rule stops: as the rule decided on it, else as of now."""
    from ckptflip.campaign.statistics import beta_binomial_sequence, stopped

    rule = rule_of(campaign)
    assert rule is not None
    decided = stopped(seen, rule)
    if decided is not None:
        return decided.low, decided.high
    low, high = beta_binomial_sequence(sum(seen), len(seen), rule.confidence, rule.a, rule.b)
    return float(low), float(high)


def _weighted(
    campaign: Campaign,
    cell: Planned,
    finished: Mapping[int, str],
    weights: Sequence[float],
    confidence: float,
) -> Estimate | None:
    from ckptflip.campaign.statistics import weighted_sequence

    rounds = rounds_of(campaign, cell, finished, weights)
    if not rounds.trials.size:
        return None
    low, high = weighted_sequence(weights, rounds.probabilities, rounds.events, rounds.trials, confidence)
    trials = int(rounds.trials.sum())
    counts = rounds.events * (weights / rounds.probabilities)
    rate = float(counts.sum()) / trials
    # The variance of the mean of the trials' weighted counts, against that of as many plain ones.
    square = float((rounds.events * (weights / rounds.probabilities) ** 2).sum()) / trials
    spread = square - rate**2
    effective = trials * rate * (1 - rate) / spread if spread > 0 else float(trials)
    return Estimate(
        events=int(rounds.events.sum()), trials=trials, rate=rate, low=float(low[-1]), high=float(high[-1]),
        confidence=confidence, method=WEIGHTED, effective=effective,
    )  # fmt: skip
