"""An interval of a stratified rate that holds while strata are chosen by what was seen, and at every look.

A trial drawn from stratum k with chance q_k counts w_k/q_k if it is an event and 0 if not: whatever the q_k,
its mean is Σ w_k p_k, the rate of a uniformly drawn fault. So the q_k of a round may follow from all earlier
rounds, and the bets of `ckptflip.campaign.statistics.betting` exclude rates as they do for any bounded value.

Instead, one could multiply the beta-binomial martingales of the strata and search Σ w_k p_k over the rates
whose product is small. That pays for not knowing each of K rates (about ½ log n each) where only their sum is
asked; with rates like those of small networks it needed more than twice the trials for four strata, and more
than uniform sampling for sixteen. Its one advantage, strata allocated without chance, is not worth that.
"""

from __future__ import annotations

import numpy as np
from msgspec import Struct
from numpy.typing import ArrayLike

from ckptflip.campaign.statistics.betting import narrowed
from ckptflip.campaign.statistics.checks import Floats, counted, inside, weighed
from ckptflip.errors import UsageError


class Progress(Struct, frozen=True, eq=False):
    """Several campaigns of the same strata, round by round: what their intervals follow from.

    Attributes:
        values: what an event of each past round and stratum counts, float64[campaigns, rounds × strata].
        counts: how many there were, likewise.
        trials: of all rounds together, float64[campaigns].
        low: lower ends so far, float64[campaigns].
        high: upper ends so far, likewise.
    """

    values: Floats
    counts: Floats
    trials: Floats
    low: Floats
    high: Floats


def unseen(campaigns: int = 1) -> Progress:
    """Campaigns before their first round."""
    return Progress(
        np.zeros((campaigns, 0)),
        np.zeros((campaigns, 0)),
        np.zeros(campaigns),
        np.zeros(campaigns),
        np.ones(campaigns),
    )


def advanced(
    past: Progress,
    weights: Floats,
    probabilities: Floats,
    events: Floats,
    trials: Floats,
    *,
    confidence: float,
    floor: float,
) -> Progress:
    """Campaigns after one more round, unchecked.

    Args:
        past: before it.
        weights: float64[strata].
        probabilities: with which this round's trials were drawn, float64[campaigns, strata].
        events: of this round, float64[campaigns, strata].
        trials: of this round, float64[campaigns].
        confidence: of all rounds together.
        floor: no chance is below floor · weight, in any round.
    """
    values = np.concatenate([past.values, weights / probabilities], 1)
    counts = np.concatenate([past.counts, events], 1)
    total = past.trials + trials
    # All trials without an event count alike, 0, whatever their stratum.
    without = (total - counts.sum(1))[:, None]
    low, high = narrowed(
        np.concatenate([values, np.zeros_like(without)], 1),
        np.concatenate([counts, without], 1),
        1 / floor,
        confidence,
        past.low,
        past.high,
    )
    return Progress(values, counts, total, low, high)


def weighted_sequence(
    weights: ArrayLike,
    probabilities: ArrayLike,
    events: ArrayLike,
    trials: ArrayLike,
    confidence: float = 0.95,
    floor: float = 0.5,
) -> tuple[Floats, Floats]:
    """A confidence sequence of Σ w_k p_k for strata that are drawn adaptively, in rounds.

    Source: Horvitz and Thompson (JASA 1952) for the weights; Waudby-Smith and Ramdas (JRSS B 2024) for the
    bets; Waudby-Smith, Wu, Ramdas, Karampatziakis and Mineiro, Anytime-valid off-policy inference for
    contextual bandits (2024), for the two together.

    Args:
        weights: the strata's shares of the population, float64[strata], sum 1.
        probabilities: with which each trial of a round was drawn, float64[rounds, strata], such as
            `allocation` gives from *earlier* rounds. Trials must have been drawn with these chances,
            independently (`drawn_strata`): with fixed numbers per stratum the sequence is not known to cover.
        events: int[rounds, strata], of each round alone.
        trials: likewise.
        confidence: between 0 and 1, of all rounds together.
        floor: that of `allocation`, the same in every round.

    Returns:
        Lower and upper ends after each round, float64[rounds].

    Raises:
        UsageError: arguments that make no sense or do not fit together.

    Example:
        >>> weights = [0.1, 0.9]
        >>> from ckptflip.campaign.statistics.strata import allocation
        >>> second = allocation(weights, [5, 0], [20, 180])
        >>> events, trials = [[5, 0], [20, 0]], [[20, 180], [70, 130]]
        >>> low, high = weighted_sequence(weights, [weights, second], events, trials)
        >>> print(low.round(3), high.round(3))
        [0.003 0.011] [0.079 0.053]
    """
    w = weighed(weights)
    q = np.atleast_2d(np.asarray(probabilities, np.float64))
    s, n = counted(np.atleast_2d(np.asarray(events)), np.atleast_2d(np.asarray(trials)))
    if q.shape != s.shape or q.shape[1] != w.size:
        raise UsageError(
            f"{w.size} weights, probabilities of shape {q.shape} and events of shape {s.shape} do not fit "
            "together: one row for each round, one column for each stratum"
        )
    share = inside("floor", floor)
    if not np.allclose(q.sum(1), 1, rtol=0, atol=1e-6) or np.any(q < share * w * (1 - 1e-9)):
        raise UsageError(
            f"probabilities of each round must sum to 1 and be at least {share:g} times the weights"
        )
    if np.any(n.sum(1) < 1):
        raise UsageError(f"round {int(np.argmin(n.sum(1)))} has no trial; leave it out")
    state, ends = unseen(), np.zeros((2, len(q)))
    for i in range(len(q)):
        made = n[i : i + 1].sum(1).astype(np.float64)
        state = advanced(
            state, w, q[i : i + 1], s[i : i + 1].astype(np.float64), made, confidence=confidence, floor=share
        )
        ends[:, i] = state.low[0], state.high[0]
    return ends[0], ends[1]
