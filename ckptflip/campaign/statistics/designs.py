"""Strata or not: how many trials each design needs for the same width, at rates seen or believed."""

from __future__ import annotations

import numpy as np
from msgspec import Struct
from numpy.typing import ArrayLike

from ckptflip.campaign.statistics.checks import Floats, Whole, at_least, counted, inside, numbers, weighed
from ckptflip.campaign.statistics.intervals import exact_ends
from ckptflip.campaign.statistics.sample_size import smallest
from ckptflip.campaign.statistics.sequences import beta_binomial_sequence
from ckptflip.campaign.statistics.strata import allocation, expected_half_width
from ckptflip.campaign.statistics.weighted import advanced, unseen
from ckptflip.errors import UsageError


class Needed(Struct, frozen=True):
    """What one design needs.

    Attributes:
        trials: until the confidence sequence is narrow enough, mean over the campaigns.
        most: the same, 90th percentile.
        coverage: share of campaigns whose interval, where they stopped, held the rate.
        fixed: trials of a campaign planned beforehand, whose interval at its end is narrow enough.
    """

    trials: float
    most: float
    coverage: float
    fixed: int


class Comparison(Struct, frozen=True):
    """Uniform and stratified sampling for the same half width.

    Attributes:
        rate: of a uniformly drawn fault.
        half_width: of both designs' intervals.
        uniform: what uniform sampling needs.
        stratified: what strata need.
        ratio: stratified / uniform, of `trials`.
        fixed_ratio: the same, of `fixed`.
    """

    rate: float
    half_width: float
    uniform: Needed
    stratified: Needed
    ratio: float
    fixed_ratio: float


def compare_designs(
    weights: ArrayLike,
    rates: ArrayLike | None = None,
    *,
    events: ArrayLike | None = None,
    trials: ArrayLike | None = None,
    half_width: float,
    confidence: float = 0.95,
    floor: float = 0.5,
    batch: int = 100,
    growth: float = 0.05,
    at_most: int = 1_000_000,
    campaigns: int = 100,
    seed: int = 0,
) -> Comparison:
    """Run simulated campaigns of both designs, at known rates of the strata, until both are narrow enough.

    Both stop by an interval that may be looked at: uniform sampling by `beta_binomial_sequence`, which gets
    the prior that suits it best (its mean is the true rate); strata by `weighted_sequence` with `allocation`,
    which starts knowing nothing but the weights. For designs fixed beforehand, Clopper and Pearson's interval
    and `weighted_rate`'s with the allocation of known rates are compared at their expected counts.

    Args:
        weights: the strata's shares of the population, float64[strata], sum 1.
        rates: the strata's rates, float64[strata]; or
        events: recorded events of each stratum, int[strata], and
        trials: recorded trials: the rates are their quotient.
        half_width: wanted.
        confidence: of both.
        floor: of `allocation`.
        batch: trials of a round, at least.
        growth: trials of a round, as a share of those made.
        at_most: where a campaign is given up; its trials then count as that many.
        campaigns: how many of each design.
        seed: of the simulation.

    Raises:
        UsageError: arguments that make no sense.

    Example:
        >>> weights, rates = [1 / 32, 8 / 32, 23 / 32], [0.32, 0.004, 0.0]
        >>> found = compare_designs(weights, rates, half_width=0.003, campaigns=10)
        >>> found.ratio < 1 / 3
        True
    """
    w = weighed(weights)
    p = _rates(rates, events, trials, w.size)
    h = inside("half_width", half_width, 0, 0.5)
    theta = float(w @ p)
    rounds = rounds_of(at_least("batch", batch, 1), inside("growth", growth, 0, np.inf), at_most)
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))
    many = at_least("campaigns", campaigns, 1)
    uniform = _uniform(theta, h, inside("confidence", confidence), rounds, many, rng)
    strata = simulate(w, p, h, confidence, inside("floor", floor), rounds, many, rng)
    needed = [
        Needed(float(n.mean()), float(np.quantile(n, 0.9)), float(held.mean()), fixed)
        for (n, held), fixed in zip((uniform, strata), _fixed(w, p, h, confidence, floor), strict=True)
    ]
    ratios = needed[1].trials / needed[0].trials, needed[1].fixed / needed[0].fixed
    return Comparison(theta, h, needed[0], needed[1], *ratios)


def simulate(
    weights: Floats,
    rates: Floats,
    half_width: float,
    confidence: float,
    floor: float,
    rounds: Whole,
    campaigns: int,
    rng: np.random.Generator,
) -> tuple[Floats, Floats]:
    """Stratified campaigns, each until its confidence sequence is narrow enough.

    Args:
        weights: float64[strata].
        rates: float64[strata].
        half_width, confidence, floor: as of `compare_designs`.
        rounds: trials of each round, int64[rounds].
        campaigns: how many.
        rng: draws strata and outcomes.

    Returns:
        Trials of each campaign where it stopped, and whether its interval then held the rate (1.0 or 0.0).
    """
    theta = float(weights @ rates)
    open_ones = np.arange(campaigns)
    state = unseen(campaigns)
    s = n = np.zeros((campaigns, weights.size), np.int64)
    needed, held = np.full(campaigns, float(rounds.sum())), np.ones(campaigns)
    for more in rounds.tolist():
        q = allocation(weights, s, n, floor)
        drawn = rng.multinomial(more, q)
        seen = rng.binomial(drawn, rates)
        s, n = s + seen, n + drawn
        made = np.full(open_ones.size, float(more))
        state = advanced(state, weights, q, seen.astype(np.float64), made, confidence=confidence, floor=floor)
        needed[open_ones] = state.trials
        held[open_ones] = (state.low <= theta) & (theta <= state.high)
        going = state.high - state.low > 2 * half_width
        if not going.any():
            break
        open_ones, s, n = open_ones[going], s[going], n[going]
        columns = (state.values, state.counts, state.trials, state.low, state.high)
        state = type(state)(*(column[going] for column in columns))
    return needed, held


def _uniform(
    rate: float, half_width: float, confidence: float, rounds: Whole, campaigns: int, rng: np.random.Generator
) -> tuple[Floats, Floats]:
    """As `simulate`, of faults drawn uniformly."""
    prior = 0.5, 0.5 * (1 - rate) / rate
    s = np.zeros(campaigns, np.int64)
    low, high = np.zeros(campaigns), np.ones(campaigns)
    needed, held, going = np.zeros(campaigns), np.ones(campaigns), np.ones(campaigns, bool)
    for more, made in zip(rounds.tolist(), np.cumsum(rounds).tolist(), strict=True):
        s = s + rng.binomial(more, rate, campaigns)
        ends = beta_binomial_sequence(s, made, confidence, *prior)
        low, high = np.maximum(low, ends[0]), np.minimum(high, ends[1])
        needed[going] = made
        held[going] = ((low <= rate) & (rate <= high))[going]
        going = going & (high - low > 2 * half_width)
        if not going.any():
            break
    return needed, held


def rounds_of(batch: int, growth: float, at_most: int) -> Whole:
    """Trials of each round, int64[rounds]: batches that grow with what was made, up to the last."""
    most = at_least("at_most", at_most, 1)
    found, made = [], 0
    while made < most:
        found.append(min(max(batch, int(growth * made)), most - made))
        made += found[-1]
    return np.array(found, np.int64)


def _rates(
    rates: ArrayLike | None, events: ArrayLike | None, trials: ArrayLike | None, strata: int
) -> Floats:
    if (rates is None) == (events is None or trials is None):
        raise UsageError("give either rates, or events and trials, of the strata")
    if rates is not None:
        p = numbers("rates", rates)
    else:
        assert events is not None and trials is not None
        s, n = counted(events, trials, 1)
        p = s / n
    if p.shape != (strata,):
        raise UsageError(f"{strata} weights do not fit rates of shape {p.shape}")
    if np.any((p < 0) | (p > 1)) or not p.max() > 0 or p.min() == 1:
        raise UsageError(
            "rates must lie in 0 to 1, not all 0 and not all 1: nothing would be left to compare"
        )
    return p


def _fixed(w: Floats, p: Floats, half_width: float, confidence: float, floor: float) -> tuple[int, int]:
    """Trials of the two fixed designs, at their expected counts."""
    theta = np.array([w @ p])
    wanted = w * np.sqrt(p * (1 - p))
    q = floor * w + (1 - floor) * (wanted / wanted.sum() if wanted.any() else w)

    def uniform(n: int) -> bool:
        low, high = exact_ends(theta * n, np.array([float(n)]), confidence)
        return bool(high[0] - low[0] <= 2 * half_width)

    return smallest(uniform), smallest(lambda n: expected_half_width(w, p, q * n, confidence) <= half_width)
