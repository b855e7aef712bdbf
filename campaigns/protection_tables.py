"""What the stores of the score of protections hold, cell by cell: numbers and tables."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cluster21_tables import between
from numpy.typing import NDArray

from ckptflip.campaign.statistics.paired import Differences, bca, differences
from ckptflip.campaign.store import reading
from ckptflip.campaign.store.rows import Cell
from ckptflip.report.campaign.gathering import CONFIDENCE, Gathered, gather
from ckptflip.report.campaign.rates import Rate, rates
from ckptflip.report.campaign.words import NONE, grouped, number, percent

Floats = NDArray[np.float64]
BARE = "bare"


@dataclass(frozen=True, slots=True, eq=False)
class Line:
    """A cell: its trials, and what every contender made of each.

    Attributes:
        cell: the cell.
        flips: mean number of altered bits.
        effective: bool[trials], whether the bare model's outputs on the test set are not the clean ones.
        clean: float64[trials], the clean model's metric.
        left: the metric under each contender that goes on with the faulty model, and of the bare one.
        found: bool[trials] for each contender that looks for faults.
    """

    cell: Cell
    flips: float
    effective: NDArray[np.bool_]
    clean: Floats
    left: dict[str, Floats]
    found: dict[str, NDArray[np.bool_]]

    @property
    def trials(self) -> int:
        """How many came to an end."""
        return len(self.clean)

    def lost(self, contender: str, chance: float) -> Floats:
        """float64[trials]: clean less left; what has no metric at all is as bad as chance."""
        left = self.left[contender]
        return self.clean - np.where(np.isfinite(left), left, chance)

    def noticed(self, detector: str) -> Rate:
        """How often it noticed faults that changed outputs."""
        return _rate(self.found[detector][self.effective])


@dataclass(frozen=True, slots=True, eq=False)
class Study:
    """A study's store, read.

    Attributes:
        name: such as ``S1``.
        gathered: the campaign.
        lines: its cells that have trials.
        controls: the restarts in which nothing was altered, by workload.
        chance: the metric of a model that knows nothing.
        memory: bytes of a contender's checks as a share of what they guard, where it tells.
    """

    name: str
    gathered: Gathered
    lines: list[Line]
    controls: list[Line]
    chance: float
    memory: dict[str, float]

    @classmethod
    def of(cls, name: str, store: Path) -> Study:
        """Read a store.

        Raises:
            CkptflipError: it cannot be read.
        """
        gathered = gather(store)
        judged = gathered.judged.name
        with reading(store) as reader:
            held = [metric for metric in reader.metrics() if "/" in metric or metric in ("changed", judged)]
            values = {metric: reader.curves(metric) for metric in held}
        by_trial = {
            metric: dict(zip(curve.owner.tolist(), curve.value.tolist(), strict=True))
            for metric, curve in values.items()
        }
        lines, controls = (
            [_line(gathered, cell, by_trial, judged) for cell in cells if len(gathered.of(cell))]
            for cells in (gathered.cells, gathered.controls)
        )
        memory = {
            metric.partition("/")[2]: float(curve.value.mean())
            for metric, curve in values.items()
            if metric.startswith("memory/")
        }
        chance = float(gathered.spec["metric"].get("chance", 0))
        return cls(name, gathered, lines, controls, chance, memory)

    @property
    def metric(self) -> str:
        """What is measured, as it is written."""
        return {"auc": "AUC"}.get(self.gathered.judged.name, self.gathered.judged.name)

    @property
    def survivors(self) -> list[str]:
        """Contenders that go on with the faulty model, in the order in which they ran; the bare one first."""
        return list(dict.fromkeys(name for line in self.lines for name in line.left))

    @property
    def detectors(self) -> list[str]:
        """Contenders that look for faults."""
        return list(dict.fromkeys(name for line in self.lines for name in line.found))

    def pooled(self, detector: str, *, effective: bool) -> Rate:
        """How often a detector noticed, over all cells."""
        parts = [
            line.found[detector][line.effective] if effective else line.found[detector]
            for line in self.lines
            if detector in line.found
        ]
        return _rate(np.concatenate(parts))

    def false_alarms(self, detector: str) -> Rate:
        """How often it noticed something where nothing was altered."""
        return _rate(np.concatenate([c.found[detector] for c in self.controls if detector in c.found]))

    def recovered(self, contender: str) -> tuple[float, float] | None:
        """Of the metric that bare models lost, over all cells, what a contender keeps: a sum, and a share."""
        lines = [line for line in self.lines if contender in line.left]
        bare = sum(float(line.lost(BARE, self.chance).sum()) for line in lines)
        left = sum(float(line.lost(contender, self.chance).sum()) for line in lines)
        return (bare - left, (bare - left) / bare) if bare else None

    def against(self, line: Line, one: str, other: str) -> Differences:
        """What one contender leaves less what the other leaves, trial by trial."""
        lost = {name: line.lost(name, self.chance) for name in (one, other)}
        return differences(-lost[one], -lost[other])


def _line(gathered: Gathered, cell: Cell, values: dict[str, dict[int, float]], judged: str) -> Line:
    done = gathered.of(cell)
    ids = gathered.trials.id[done].tolist()

    def column(metric: str) -> Floats:
        return np.array([values[metric].get(trial, np.nan) for trial in ids], np.float64)

    left = {BARE: column(judged)}
    found: dict[str, NDArray[np.bool_]] = {}
    for metric in values:
        what, slash, name = metric.partition("/")
        if not slash or not any(trial in values[metric] for trial in ids):
            continue
        if what == judged:
            left[name] = column(metric)
        elif what == "found":
            found[name] = column(metric) > 0
    return Line(
        cell=cell, flips=float(gathered.trials.bits_hit[done].mean()), effective=column("changed") > 0,
        clean=gathered.trials.clean_final[done], left=left, found=found,
    )  # fmt: skip


def _rate(events: NDArray[np.bool_]) -> Rate:
    if not len(events):
        return Rate(0, 0, float("nan"), 0.0, 1.0)
    return rates(np.array([int(events.sum())], np.int64), len(events))[0]


def of(rate: Rate) -> str:
    """A rate as the counts it is made of."""
    return f"{rate.events}/{rate.trials}" if rate.trials else NONE


def noticed_table(study: Study) -> list[list[str]]:
    """Every detector over all cells: of all faults, of effective ones, false alarms."""
    rows = [["contender", "of all faults, 95 %", "of effective faults, 95 %", "false alarms, 95 %"]]
    for name in study.detectors:
        every = (
            study.pooled(name, effective=False),
            study.pooled(name, effective=True),
            study.false_alarms(name),
        )
        rows.append([
            f"`{name}`",
            *(f"{of(rate)}: {percent(rate.share)} ({between(rate.low, rate.high)})" if rate.trials else NONE
              for rate in every),
        ])  # fmt: skip
    return rows


def noticed_cells(study: Study) -> list[list[str]]:
    """Every detector in every cell, of effective faults."""
    several = study.gathered.several_workloads
    rows = [["condition", *(["model"] if several else []), "flips, mean", "effective",
             *(f"`{name}`" for name in study.detectors)]]  # fmt: skip
    for line in study.lines:
        effective = _rate(line.effective)
        rows.append([
            line.cell.label, *([line.cell.workload] if several else []), flips(line.flips), of(effective),
            *(of(line.noticed(name)) if name in line.found else NONE for name in study.detectors),
        ])  # fmt: skip
    return rows


def left_table(study: Study) -> list[list[str]]:
    """What each contender leaves: mean loss against the clean model in every cell, with its interval."""
    several = study.gathered.several_workloads
    rows = [["condition", *(["model"] if several else []),
             *(name if name == BARE else f"`{name}`" for name in study.survivors)]]  # fmt: skip
    for line in (*study.controls, *study.lines):
        cells = [
            _loss(line.lost(name, study.chance)) if name in line.left else NONE for name in study.survivors
        ]
        rows.append([line.cell.label, *([line.cell.workload] if several else []), *cells])
    return rows


def _loss(lost: Floats) -> str:
    interval = bca(lost, "mean", CONFIDENCE)
    mean = places(float(lost.mean()))
    return mean if interval.note else f"{mean} ({places(interval.low)} to {places(interval.high)})"


def places(value: float) -> str:
    """A difference of the metric to four places."""
    return f"{value:.4f}".replace("-", "−") if round(value, 4) else "0"


def flips(mean: float) -> str:
    """A mean number of flips."""
    return grouped(round(mean)) if mean >= 100 else number(mean, 3)
