"""The numbers of the page: what the statistics say of each cell, each stratum and the clean runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ckptflip.campaign.spec import BAD, OUTCOMES
from ckptflip.report.campaign.gathering import CONFIDENCE, Gathered

if TYPE_CHECKING:
    from ckptflip.campaign.estimates import Estimate
    from ckptflip.campaign.statistics.intervals import Interval
    from ckptflip.campaign.statistics.paired import NoiseFloor
    from ckptflip.campaign.statistics.survival import Survival
    from ckptflip.campaign.store.rows import Cell, Stratum

# Values that all bootstraps of a page may draw together, and resamples that none goes below or needs more of.
_DRAWS, _FEWEST, _MOST = 50_000_000, 1999, 9999


class Rate(NamedTuple):
    """How often something happened.

    Attributes:
        events: how often.
        trials: in how many.
        share: of the trials, or weighted where faults were drawn by stratum; NaN where it cannot be yet.
        low: lower end of the interval.
        high: its upper end; of no events the upper bound alone.
    """

    events: int
    trials: int
    share: float
    low: float
    high: float


class CellRow(NamedTuple):
    """A cell's line of the table.

    Attributes:
        cell: the cell.
        done: trials that came to an end.
        failed: those that did not.
        rates: of each outcome, in the order of `OUTCOMES`; empty where no trial came to an end.
        bad: of degraded and collapsed together; None likewise.
        weighted: whether faults were drawn by stratum, and the rates weighted to those of a uniform flip.
        compared: trials that have a final metric.
        difference: mean of their final metrics less the clean runs'; None where there are none.
        recovery: how the trials came back; None where none came to an end.
    """

    cell: Cell
    done: int
    failed: int
    rates: list[Rate]
    bad: Rate | None
    weighted: bool
    compared: int
    difference: tuple[float, Interval] | None
    recovery: Survival | None


class StrataRow(NamedTuple):
    """One stratum of a cell.

    Attributes:
        stratum: the stratum.
        bad: how often its trials ended degraded or collapsed; None: no trial came to an end.
    """

    stratum: Stratum
    bad: Rate | None


class Stratified(NamedTuple):
    """A cell whose faults were drawn by stratum.

    Attributes:
        cell: the cell.
        rows: its strata, the most harmful first.
        weighted: the rate of a uniformly drawn flip; None before the first round of trials is complete.
        covered: the share of the eligible bits whose strata have trials.
    """

    cell: Cell
    rows: list[StrataRow]
    weighted: Estimate | None
    covered: float


class Floor(NamedTuple):
    """The noise floor of a workload.

    Attributes:
        workload: its label.
        finals: final metric of each clean run.
        floor: what the statistics say of them; None of fewer than two.
    """

    workload: str
    finals: list[float]
    floor: NoiseFloor | None


def stop_rule(gathered: Gathered) -> dict[str, Any] | None:
    """The rule that ends cells, as the spec gives it."""
    rule = (gathered.spec.get("trials") or {}).get("stop")
    return rule if isinstance(rule, dict) else None


def rates(events: NDArray[np.int64], trials: int) -> list[Rate]:
    """Rates with exact intervals; of no events the upper bound alone.

    Args:
        events: how often each thing happened.
        trials: in how many, at least 1; fixed beforehand.
    """
    from ckptflip.campaign.statistics.intervals import clopper_pearson, upper_bound

    low, high = clopper_pearson(events, trials, CONFIDENCE)
    high = np.where(events == 0, upper_bound(trials, CONFIDENCE), high)
    return [
        Rate(int(e), trials, float(e) / trials, float(a), float(b))
        for e, a, b in zip(events, low, high, strict=True)
    ]


def cell_rows(gathered: Gathered) -> list[CellRow]:
    """The table of cells, in the order of the spec."""
    everything = int((gathered.trials.state == "done").sum())
    resamples = int(np.clip(_DRAWS // max(everything, 1), _FEWEST, _MOST))
    return [_cell_row(gathered, cell, resamples) for cell in gathered.cells]


def _cell_row(gathered: Gathered, cell: Cell, resamples: int) -> CellRow:
    done = gathered.of(cell)
    failed = len(gathered.of(cell, done=False)) - len(done)
    weighted, found = cell.id in gathered.strata, []
    if cell.id in gathered.estimates:
        found = [Rate(e.events, e.trials, e.rate, e.low, e.high) for e in gathered.estimates[cell.id]]
    elif len(done) and not weighted and stop_rule(gathered) is None:
        outcomes = gathered.trials.outcome[done]
        happened = [*(outcomes == outcome for outcome in OUTCOMES), np.isin(outcomes, BAD)]
        found = rates(np.array([int(events.sum()) for events in happened], np.int64), len(done))
    faulty, clean = gathered.trials.final[done], gathered.trials.clean_final[done]
    both = np.isfinite(faulty) & np.isfinite(clean)
    return CellRow(
        cell, len(done), failed, found[:-1], found[-1] if found else None, weighted, int(both.sum()),
        _difference(faulty[both], clean[both], resamples), recovery_of(gathered, cell),
    )  # fmt: skip


def _difference(
    faulty: NDArray[np.float64], clean: NDArray[np.float64], resamples: int
) -> tuple[float, Interval] | None:
    from ckptflip.campaign.statistics.paired import bca, paired

    if not len(faulty):
        return None
    apart = paired(faulty, clean)
    return float(apart.mean()), bca(apart, "mean", CONFIDENCE, resamples=resamples)


def recovery_of(gathered: Gathered, cell: Cell) -> Survival | None:
    """How the trials of a cell came back to the clean run; None where none came to an end.

    A trial that did not is watched until the cell's last epoch, also one that collapsed before: it was not
    lost from sight, it will never come back.
    """
    from ckptflip.campaign.statistics.survival import recovery

    done = gathered.of(cell)
    if not len(done):
        return None
    took = gathered.trials.recovered[done]
    return recovery(np.where(took >= 0, took, cell.until - cell.epoch), took >= 0, CONFIDENCE)


def stratified(gathered: Gathered) -> list[Stratified]:
    """The cells whose faults were drawn by stratum."""
    found = []
    for cell in gathered.cells:
        if cell.id in gathered.strata:
            found.append(_stratified(gathered, cell, gathered.strata[cell.id]))
    return found


def _stratified(gathered: Gathered, cell: Cell, strata: Sequence[Stratum]) -> Stratified:
    done = gathered.of(cell)
    drawn, bad = gathered.trials.stratum[done], np.isin(gathered.trials.outcome[done], BAD)
    rows, covered = [], 0.0
    for stratum in strata:
        of_these = bad[drawn == stratum.id]
        rate = rates(of_these.sum(keepdims=True), len(of_these))[0] if len(of_these) else None
        covered += stratum.weight if len(of_these) else 0.0
        rows.append(StrataRow(stratum, rate))
    rows.sort(key=lambda row: (-row.bad.share if row.bad else 1, -row.stratum.weight))
    weighted = gathered.estimates.get(cell.id)
    return Stratified(cell, rows, weighted[-1] if weighted else None, covered)


def noise_floors(gathered: Gathered) -> list[Floor]:
    """What the clean runs of each workload differ by, at the last epoch that trials are followed to."""
    from ckptflip.campaign.statistics.paired import noise_floor

    found = []
    curves = gathered.clean_judged
    last = {cell.workload: cell.until for cell in sorted(gathered.cells, key=lambda cell: cell.until)}
    for workload in dict.fromkeys(run.workload for run in gathered.runs):
        ids = [run.id for run in gathered.runs if run.workload == workload]
        chosen = np.isin(curves.owner, ids)
        if workload in last:
            chosen &= curves.epoch == last[workload]
        else:
            chosen &= curves.epoch == curves.epoch[chosen].max(initial=0)
        finals = curves.value[chosen & np.isfinite(curves.value)]
        floor = noise_floor(finals, confidence=CONFIDENCE) if len(finals) > 1 else None
        found.append(Floor(workload, finals.tolist(), floor))
    return found
