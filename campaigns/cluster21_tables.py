"""The tables of the published study's experiments, as rows of text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckptflip.campaign.statistics import compare_designs
from ckptflip.campaign.store.rows import Cell
from ckptflip.report.campaign.gathering import Gathered
from ckptflip.report.campaign.rates import CellRow, Rate, stratified
from ckptflip.report.campaign.words import NONE, percent

# Half widths of the interval for which the two ways of drawing faults are compared.
WIDTHS = (0.01, 0.005, 0.003, 0.002)
HEAD = (
    "condition", "workload", "trials", "identical", "masked", "slowed", "degraded", "collapsed",
    "ended badly, 95 %", "right after − clean", "at the end − clean, 95 %",
    "epochs until back, 95 %",
)  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Study:
    """An experiment's store, read.

    Attributes:
        name: such as ``E3``.
        gathered: the campaign.
        rows: its cells.
        nev: ids of the trials in which a weight was NaN, infinite or extreme at some epoch.
    """

    name: str
    gathered: Gathered
    rows: list[CellRow]
    nev: frozenset[int] = frozenset()

    def by_workload(self) -> Iterator[tuple[str, list[CellRow]]]:
        """The cells that have trials, for each workload."""
        for name in dict.fromkeys(row.cell.workload for row in self.rows):
            yield name, [row for row in self.rows if row.cell.workload == name and row.bad]


def table(study: Study) -> list[list[str]]:
    """The cells as rows of text, the head first."""
    several = study.gathered.several_epochs
    head = [HEAD[0], *(["epoch"] if several else []), *HEAD[1:]]
    return [head, *(_line(study, row, several) for row in study.rows)]


def control_table(study: Study) -> list[list[str]]:
    """The restarts without change as rows of text, the head first."""
    lines = [["workload", "epoch", "trials", "identical", "not identical"]]
    for cell in study.gathered.controls:
        outcomes = study.gathered.trials.outcome[study.gathered.of(cell)]
        same = int((outcomes == "identical").sum())
        lines.append(
            [cell.workload, str(cell.epoch), str(len(outcomes)), str(same), str(len(outcomes) - same)]
        )
    return lines


def _line(study: Study, row: CellRow, several: bool) -> list[str]:
    cell = row.cell
    before = right_after(study, cell)
    before = before[np.isfinite(before)]
    counts = [str(rate.events) for rate in row.rates] or [NONE] * 5
    return [
        cell.label, *([str(cell.epoch)] if several else []), cell.workload,
        str(row.done) + (f" ({row.failed} failed)" if row.failed else ""), *counts,
        _rate(row.bad), signed(float(before.mean())) if before.size else NONE, _difference(row),
        _recovery(row),
    ]  # fmt: skip


def right_after(study: Study, cell: Cell) -> NDArray[np.float64]:
    """The metric of each altered checkpoint less the clean one's, before any training; NaN: none."""
    found = study.gathered
    done, clean = found.of(cell), found.clean_judged
    at = clean.epoch == cell.epoch
    known = dict(zip(clean.owner[at].tolist(), clean.value[at].tolist(), strict=True))
    before = np.array([known.get(run, math.nan) for run in found.trials.run[done].tolist()])
    return np.asarray(found.trials.right_after[done] - before, np.float64)


def _rate(rate: Rate | None) -> str:
    return NONE if rate is None else f"{percent(rate.share)} ({between(rate.low, rate.high)})"


def between(low: float, high: float) -> str:
    return f"{percent(low, unit=False)}–{percent(high, unit=False).removeprefix('> ')}"


def _difference(row: CellRow) -> str:
    if row.difference is None:
        return NONE
    mean, interval = row.difference
    ends = "" if interval.note else f" ({signed(interval.low)} … {signed(interval.high)})"
    return f"{signed(mean)}{ends}" + (f", of {row.compared}" if row.compared < row.done else "")


def signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−") if round(value, 4) else "0"


def _recovery(row: CellRow) -> str:
    found = row.recovery
    if found is None:
        return NONE
    if math.isinf(found.median):
        return f"more than half not back ({found.never} of {found.trials})"
    never = f"; {found.never} never" if found.never else ""
    high = f"{found.median_high:g}" if math.isfinite(found.median_high) else "not back"
    return f"{found.median:g} ({found.median_low:g}–{high}){never}"


def strata_table(study: Study) -> list[list[str]]:
    """The strata, the most harmful first."""
    lines = [["layer", "bit field", "share of the bits", "trials", "ended badly, 95 %"]]
    for found in stratified(study.gathered):
        for row in found.rows:
            done = str(row.bad.trials) if row.bad else "0"
            stratum = row.stratum
            lines.append([stratum.layer, stratum.field, percent(stratum.weight), done, _rate(row.bad)])
    return lines


def designs_table(study: Study) -> list[list[str]]:
    """Trials that uniform and stratified sampling need for the same width, at the rates that were seen."""
    lines = [[
        "half width", "uniform, trials", "held", "strata, trials", "held", "ratio",
        "fixed beforehand: uniform", "strata", "ratio",
    ]]  # fmt: skip
    for found in stratified(study.gathered):
        weights = np.array([row.stratum.weight for row in found.rows])
        events = np.array([row.bad.events if row.bad else 0 for row in found.rows])
        trials = np.array([row.bad.trials if row.bad else 0 for row in found.rows])
        known = trials > 0
        if not events.any():
            return lines
        # A stratum that was never drawn holds hardly any bits: its rate moves nothing.
        rates = np.where(known, events / np.maximum(trials, 1), 0.0)
        for width in WIDTHS:
            made = compare_designs(weights / weights.sum(), rates, half_width=width, campaigns=100, seed=21)
            lines.append([
                f"{width:g}", f"{made.uniform.trials:.0f}", percent(made.uniform.coverage),
                f"{made.stratified.trials:.0f}", percent(made.stratified.coverage), f"{made.ratio:.2f}",
                str(made.uniform.fixed), str(made.stratified.fixed), f"{made.fixed_ratio:.2f}",
            ])  # fmt: skip
    return lines
