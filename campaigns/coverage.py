"""How often the intervals hold that campaigns stop on: simulated campaigns, each with a rate that is known.

    python campaigns/coverage.py                     writes campaigns/results/coverage.md
    python campaigns/coverage.py --campaigns 1000    a quick look

The interval, the rule and the allocation are the ones that campaigns use (`ckptflip.campaign.statistics`).
Outcomes are drawn; no model is trained. A few minutes on one core.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy
from numpy.typing import NDArray
from scipy.special import stdtrit

from ckptflip.campaign.statistics import Stop, clopper_pearson, compare_designs, first_stop, neyman, wald
from ckptflip.campaign.statistics.designs import rounds_of, simulate
from ckptflip.campaign.statistics.sequences import beta_binomial_sequence, running_intersection
from ckptflip.campaign.statistics.strata import added_squares

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from processes import machine

RESULTS = Path(__file__).parent / "results" / "coverage.md"
RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 0.5)
# The first looks as often as a spec's rule does unless it says otherwise (`at_least`, `at_most`, `batch`).
RULES = (
    Stop(half_width=0.05, at_least=20, at_most=1000, batch=20),
    Stop(half_width=0.03, at_least=100, at_most=5000, batch=50),
)
# Campaigns simulated together, so that their tables fit into memory.
TOGETHER = 500
PILOT = 50

Floats = NDArray[np.float64]
Ends = tuple[Floats, Floats]


class Strata(NamedTuple):
    """A population in strata: its name, the strata's shares and rates."""

    name: str
    weights: Floats
    rates: Floats


def populations() -> list[Strata]:
    """Populations like single flips in a small network (layers × bit fields), and two hard ones."""
    layers = np.array([0.004, 0.12, 0.856, 0.02])
    # Critical bit, sign, the other exponent bits, mantissa of float32.
    fields = np.array([1, 1, 7, 23]) / 32
    rates = np.array(
        [
            [0.7, 0.02, 0.02, 0.002],
            [0.5, 0.01, 0.01, 0.0005],
            [0.3, 0.005, 0.003, 0.0],
            [0.1, 0.01, 0.005, 0.0],
        ]
    )
    both = np.outer(layers, fields).ravel()
    return [
        Strata("like digits, layer × field (16)", both, rates.ravel()),
        Strata("like digits, field (4)", fields, layers @ rates),
        Strata("all events in the mantissa (4)", fields, np.array([0.0, 0.0, 0.0, 0.01])),
        Strata("events in 1/32 only (4)", fields, np.array([0.5, 0.0, 0.0, 0.0])),
    ]


def t_interval(events: NDArray[np.int64], trials: NDArray[np.int64], confidence: float = 0.95) -> Ends:
    """Student's interval of the mean of zeros and ones, as one would take for any metric."""
    p = events / trials
    half = stdtrit(trials - 1, (1 + confidence) / 2) * np.sqrt(p * (1 - p) / (trials - 1))
    return p - half, p + half


FIXED = {"Wald": wald, "t": t_interval, "Clopper-Pearson": clopper_pearson}


def peeked(
    rule: Stop, events: NDArray[np.int64], interval: Callable[[NDArray[np.int64], NDArray[np.int64]], Ends]
) -> Ends:
    """Where an interval for a fixed number of trials is first narrow enough for the rule, look after look."""
    low, high = interval(events, np.broadcast_to(rule.looks, events.shape))
    enough = (high - low <= 2 * rule.half_width) | (rule.looks == rule.at_most)
    at = enough.argmax(-1)[:, None]
    return np.take_along_axis(low, at, 1)[:, 0], np.take_along_axis(high, at, 1)[:, 0]


def held(ends: Ends, truth: float) -> float:
    """The share of intervals that hold the truth."""
    return float(((ends[0] <= truth) & (truth <= ends[1])).mean())


def single_cells(rule: Stop, campaigns: int, rng: np.random.Generator) -> Iterator[str]:
    """Coverage under a stop rule, for each rate."""
    yield (
        f"\nHalf width {rule.half_width}, looked at after every {rule.batch} trials from {rule.at_least} on, "
        f"at most {rule.at_most}:\n"
    )
    columns = ("rate", "trials (median)", "sequence", "always", *(f"{name}, peeking" for name in FIXED))
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    looks = rule.looks
    for rate in RATES:
        events = np.cumsum(rng.binomial(np.diff(looks, prepend=0), rate, (campaigns, looks.size)), axis=1)
        at, low, high = first_stop(events, rule)
        always = running_intersection(*beta_binomial_sequence(events, looks))
        others = [
            held(peeked(rule, events, interval), rate) for interval in (wald, t_interval, clopper_pearson)
        ]
        shares = [held((low, high), rate), held((always[0][:, -1], always[1][:, -1]), rate), *others]
        percent = " | ".join(f"{100 * share:.2f} %" for share in shares)
        yield f"| {rate:g} | {np.median(looks[at]):.0f} | {percent} |"


def stratified(campaigns: int, rng: np.random.Generator) -> Iterator[str]:
    """Coverage of the stratified sequence where it stopped, for each population and width."""
    for population in populations():
        for half_width in (0.01, 0.005, 0.003):
            rounds = rounds_of(100, 0.1, 1_000_000)
            parts = [
                simulate(*population[1:], half_width, 0.95, 0.5, rounds, min(TOGETHER, campaigns - done), rng)
                for done in range(0, campaigns, TOGETHER)
            ]
            trials, hits = (np.concatenate(column) for column in zip(*parts, strict=True))
            rate = population.weights @ population.rates
            yield (
                f"| {population.name} | {rate:.4f} | {half_width} | {np.median(trials):.0f} "
                f"| {100 * hits.mean():.2f} % |"
            )


def fixed(campaigns: int, rng: np.random.Generator) -> Iterator[str]:
    """Coverage of the fixed stratified interval after a pilot, for each population."""
    for population in populations():
        for trials in (1000, 5000):
            _, weights, rates = population
            pilot = np.full(weights.size, PILOT)
            truth = float(weights @ rates)
            # One pilot for a hundred campaigns: the coverage is that of any allocation, on average.
            hits = []
            for _ in range(max(1, campaigns // 100)):
                more = np.maximum(1, neyman(weights, rng.binomial(pilot, rates), pilot, trials))
                events = rng.binomial(more, rates, (100, weights.size)).astype(np.float64)
                hits.append(held(added_squares(weights, events, more.astype(np.float64), 0.95), truth))
            yield f"| {population.name} | {truth:.4f} | {trials} | {100 * np.mean(hits):.2f} % |"


def designs() -> Iterator[str]:
    """Trials that uniform and stratified sampling need."""
    for population in populations()[:2]:
        for half_width in (0.01, 0.005, 0.003, 0.002, 0.001):
            found = compare_designs(*population[1:], half_width=half_width, campaigns=200)
            columns = (
                population.name,
                half_width,
                f"{found.uniform.trials:.0f}",
                f"{found.stratified.trials:.0f}",
                f"{found.ratio:.2f}",
                found.uniform.fixed,
                found.stratified.fixed,
                f"{found.fixed_ratio:.2f}",
            )
            yield "| " + " | ".join(map(str, columns)) + " |"


def report(campaigns: int, seed: int) -> str:
    """All tables as one page."""
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))
    began = time.perf_counter()
    lines = [
        "# How often the intervals hold",
        "",
        f"Written by `python campaigns/coverage.py --campaigns {campaigns} --seed {seed}`: {campaigns:,}",
        "simulated campaigns for each line, each with a rate that is known. Nominal confidence 95 %; the",
        f"standard error of a coverage near 95 % is {100 * np.sqrt(0.95 * 0.05 / campaigns):.2f} %.",
        "",
        "## One cell that stops when it is precise enough",
        "",
        "*Sequence*: the beta-binomial confidence sequence (`stopped`), where the campaign stopped;",
        "*always*: at all looks up to the last at once. The others are intervals for a fixed number of",
        "trials, taken at the first look at which they were narrow enough: what not to do.",
        *(line for rule in RULES for line in single_cells(rule, campaigns, rng)),
        "",
        "## Strata chosen by what was seen",
        "",
        "`weighted_sequence` with `allocation`, in rounds of 100 trials or 10 %, until it was narrow enough.",
        "",
        "| population (strata) | rate | half width | trials (median) | coverage |",
        "|---|---|---|---|---|",
        *stratified(campaigns, rng),
        "",
        "## Strata fixed beforehand",
        "",
        f"`weighted_rate` with `neyman` from a pilot of {PILOT} trials a stratum, which do not enter.",
        "",
        "| population (strata) | rate | trials | coverage |",
        "|---|---|---|---|",
        *fixed(campaigns, rng),
        "",
        "## What strata save",
        "",
        "`compare_designs`, 200 campaigns of each: trials (mean) until the interval that allows looking is",
        "narrow enough, and trials of a campaign fixed beforehand.",
        "",
        "| population (strata) | half width | uniform | strata | ratio | uniform, fixed | strata, fixed "
        "| ratio |",
        "|---|---|---|---|---|---|---|---|",
        *designs(),
        "",
        machine(numpy=np.__version__, scipy=scipy.__version__)
        + f"; one core, {time.perf_counter() - began:.0f} s.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--campaigns", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=2024)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    text = report(args.campaigns, args.seed)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    main()
