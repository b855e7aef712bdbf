"""What the stores of the recommendation study hold, cell by cell: numbers, tables, figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cluster21_tables import between
from numpy.typing import NDArray

from ckptflip.campaign.statistics.intervals import Interval
from ckptflip.campaign.statistics.paired import bca
from ckptflip.campaign.store import reading
from ckptflip.campaign.store.rows import Cell
from ckptflip.faults.plan import Plan
from ckptflip.faults.record import Counts, Header, Record, TensorEntry
from ckptflip.recsys import recipes
from ckptflip.recsys.touched import Touched, touched
from ckptflip.report.campaign.drawing import canvas, powers
from ckptflip.report.campaign.gathering import CONFIDENCE, Gathered, gather
from ckptflip.report.campaign.rates import Rate, rates
from ckptflip.report.campaign.words import NONE, grouped, many, number, percent

CHANCE = 0.5
_ROUNDING = 1e-12
# Studies with a figure, and what lies below it.
_RATE, _FLIPS = "bit error rate", "flips"
FIGURES = {
    "T1": _RATE, "T2": _RATE, "T4": _FLIPS, "T5": _RATE, "T5-int8": _FLIPS, "T5-int4": _FLIPS,
}  # fmt: skip
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


@dataclass(frozen=True, slots=True, eq=False)
class Line:
    """A cell in numbers.

    Attributes:
        cell: the cell.
        done: trials that came to an end.
        failed: those that did not.
        flips: mean number of altered bits.
        after: mean loss of AUC right after the restart; equals `loss` where nothing was trained.
        lost: how often the AUC ended more than the tolerance below the clean one.
        useless: how often it ended below halfway to chance.
        loss: mean of clean less faulty AUC.
        interval: of that mean.
        unharmed: trials with NaN or infinite weights that lost no AUC.
    """

    cell: Cell
    done: int
    failed: int
    flips: float
    after: float
    lost: Rate
    useless: Rate
    loss: float
    interval: Interval
    unharmed: int

    @property
    def group(self) -> str:
        """The label of the cell's policy without what was swept; its workload where it has none."""
        head, comma, _ = self.cell.label.partition(", ")
        return head if comma else self.cell.workload

    @property
    def amount(self) -> float:
        """Bit error rate, or number of faults."""
        return float(self._held.get("ber") or self._held.get("count") or 1)

    @property
    def is_rate(self) -> bool:
        """Whether the amount is a bit error rate."""
        return bool(self._held.get("ber"))

    @property
    def _held(self) -> dict[str, Any]:
        return {**(self.cell.policy or {}), **self.cell.swept}


@dataclass(frozen=True, slots=True, eq=False)
class Study:
    """A study's store, read.

    Attributes:
        name: such as ``T5-int8``.
        store: its file.
        gathered: the campaign.
        lines: its cells that have trials.
    """

    name: str
    store: Path
    gathered: Gathered
    lines: list[Line]

    @classmethod
    def of(cls, name: str, store: Path) -> Study:
        """Read a store and sum up its cells.

        Raises:
            CkptflipError: it cannot be read.
        """
        gathered = gather(store)
        cells = (cell for cell in gathered.cells if len(gathered.of(cell)))
        return cls(name, store, gathered, [_line(gathered, cell) for cell in cells])

    @property
    def tolerance(self) -> float:
        """Of the AUC."""
        return self.gathered.judged.tolerance

    def by(self, key: Callable[[Line], str]) -> Iterator[tuple[str, list[Line]]]:
        """The lines of each group, in the order of the spec."""
        for name in dict.fromkeys(map(key, self.lines)):
            yield name, [line for line in self.lines if key(line) == name]

    def clean(self, workload: str) -> float:
        """Mean AUC of a workload's clean runs, where its trials end."""
        found = self.gathered
        runs = [run.id for run in found.runs if run.workload == workload]
        until = next(cell.until for cell in found.cells if cell.workload == workload)
        curve = found.clean_judged
        return float(curve.value[np.isin(curve.owner, runs) & (curve.epoch == until)].mean())


def _line(gathered: Gathered, cell: Cell) -> Line:
    done, trials = gathered.of(cell), gathered.trials
    clean, final = trials.clean_final[done], trials.final[done]
    # What has no AUC at the end is as bad as chance.
    final = np.where(np.isfinite(final), final, CHANCE)
    after = trials.right_after[done]
    lost = ~(final >= clean - gathered.judged.tolerance - _ROUNDING)
    useless = ~(final >= (clean + CHANCE) / 2)
    events = np.array([lost.sum(), useless.sum()], np.int64)
    lost_rate, useless_rate = rates(events, len(done))
    return Line(
        cell=cell, done=len(done), failed=len(gathered.of(cell, done=False)) - len(done),
        flips=float(trials.bits_hit[done].mean()),
        after=_restart_loss(gathered, cell, done, after),
        lost=lost_rate, useless=useless_rate, loss=float((clean - final).mean()),
        interval=bca(clean - final, "mean", CONFIDENCE),
        unharmed=int(((trials.outcome[done] == "collapsed") & ~lost).sum()),
    )  # fmt: skip


def _restart_loss(
    gathered: Gathered, cell: Cell, done: NDArray[np.int64], after: NDArray[np.float64]
) -> float:
    curve = gathered.clean_judged
    at = curve.epoch == cell.epoch
    clean = dict(zip(curve.owner[at].tolist(), curve.value[at].tolist(), strict=True))
    before = np.array([clean[run] for run in gathered.trials.run[done].tolist()])
    return float((before - np.where(np.isfinite(after), after, CHANCE)).mean())


def size(study: Study) -> str:
    """How large a study is, in words."""
    gathered = study.gathered
    spec = gathered.spec
    trials = len(gathered.trials.id)
    cells = len(gathered.cells) + len(gathered.controls)
    epochs = ", ".join(str(epoch) for epoch in spec["restart"]["epochs"])
    until = {cell.until - cell.epoch for cell in (*gathered.cells, *gathered.controls)}
    then = "measured as they are" if until == {0} else f"trained for {many(max(until), 'more epoch')}"
    seeds = len(spec["clean"]["seeds"])
    return (
        f"{many(trials, 'trial')} in {many(cells, 'cell')}, from checkpoints of epoch {epochs} of "
        f"{many(seeds, 'clean run')} per workload, {then}; tolerance {study.tolerance:g}."
    )


def table(study: Study) -> list[list[str]]:
    """The cells as rows of text, the head first."""
    if study.name == "T3":
        return _grid(study)
    trained = any(line.cell.until > line.cell.epoch for line in study.lines)
    several = study.gathered.several_workloads
    head = [
        "condition", *(["model"] if several else []), "trials", "flips, mean",
        "lost AUC, 95 %", "useless, 95 %", *(["loss right after, mean"] if trained else []),
        "loss of AUC, mean, 95 %",
    ]  # fmt: skip
    extra = _touched_column(study)
    lines = [head + (["faulty rows read"] if extra else [])]
    for line in study.lines:
        cell = line.cell
        lines.append([
            cell.label, *([cell.workload] if several else []),
            str(line.done) + (f" ({line.failed} failed)" if line.failed else ""), _flips(line.flips),
            rate(line.lost), rate(line.useless), *([auc(line.after)] if trained else []), loss(line),
            *([extra[cell.id]] if extra else []),
        ])  # fmt: skip
    return lines


def _grid(study: Study) -> list[list[str]]:
    """A row for each model, since there are many: what each part that is hit loses, by error rate."""
    groups = dict.fromkeys(line.group for line in study.lines)
    bers = sorted({line.amount for line in study.lines})
    lost = "/".join(f"{ber:g}" for ber in bers)
    head = ["model"]
    for group in groups:
        head += [f"{group} hit: lost AUC at BER {lost}", f"{group} hit: loss at {bers[-1]:g}, mean, 95 %"]
    rows = [head]
    for model, lines in study.by(lambda line: line.cell.workload):
        row = [model]
        for group in groups:
            of_group = sorted((line for line in lines if line.group == group), key=lambda line: line.amount)
            row.append(", ".join(f"{line.lost.events} of {line.lost.trials}" for line in of_group))
            row.append(loss(of_group[-1]) if of_group else NONE)
        rows.append(row)
    return rows


def _flips(mean: float) -> str:
    return grouped(round(mean)) if mean >= 100 else number(mean, 3)


def rate(found: Rate) -> str:
    """A rate and its interval."""
    return f"{percent(found.share)} ({between(found.low, found.high)})"


def loss(line: Line) -> str:
    """A mean loss and its interval."""
    ends = "" if line.interval.note else f" ({auc(line.interval.low)} to {auc(line.interval.high)})"
    return f"{auc(line.loss)}{ends}"


def auc(value: float) -> str:
    """A difference of AUC to four places."""
    return f"{value:.4f}".replace("-", "−") if round(value, 4) else "0"


def _touched_column(study: Study) -> dict[int, str]:
    if study.name != "T4":
        return {}
    found = read_rows(study)
    return {cell: percent(each.read / each.rows) if each.rows else NONE for cell, each in found.items()}


def read_rows(study: Study) -> dict[int, Touched]:
    """Rows with a fault, and those of them that the evaluation reads, over all trials of each cell."""
    gathered = study.gathered
    options = gathered.spec["workload"][0]["options"]
    plain = {name: value for name, value in options.items() if name != "config"}
    ids = recipes.made("dlrm", plain, options.get("config")).logs[1].ids
    with reading(study.store) as reader:
        flips = reader.flips(gathered.trials.id.tolist())
    found: dict[int, Touched] = {}
    for line in study.lines:
        parts = [
            touched(_record(gathered, flips, trial), ids)
            for trial in gathered.trials.id[gathered.of(line.cell)].tolist()
        ]
        total = {name: sum(getattr(part, name) for part in parts) for name in Touched.__struct_fields__}
        found[line.cell.id] = Touched(**total)
    return found


def _record(gathered: Gathered, flips: Any, trial: int) -> Record:
    """The record of a trial, made again from what the store keeps of it."""
    at = flips.trial == trial
    ids, positions = np.unique(flips.tensor[at], return_inverse=True)
    entries = tuple(
        TensorEntry(name=row.name, shape=tuple(row.shape), dtype=row.dtype)
        for row in (gathered.tensors[int(each)] for each in ids)
    )
    plan = Plan(
        positions.astype(np.int32), flips.word[at], flips.hit[at], flips.before[at], flips.after[at],
        np.ones(int(at.sum()), np.uint16),
    )  # fmt: skip
    nothing = Counts(bits_hit=0, bits_effective=0, words_hit=0, words_effective=0, tensors=0)
    header = Header(
        ckptflip="", schema=1, created="", checkpoint="", output="", format="", checksum="leave", seed=0,
        policies=(), size=0, counts=nothing, tensors=entries,
    )  # fmt: skip
    return Record(header, plan)


def figure(study: Study) -> Any:
    """Mean loss of AUC over the amount of faults, a line for each group; None where none is drawn."""
    below = FIGURES.get(study.name)
    if below is None or not study.lines:
        return None
    drawn, (panel,) = canvas(2.9)
    groups = (
        (name, [line for line in lines if line.is_rate == (below == _RATE)])
        for name, lines in study.by(lambda line: line.group)
    )
    for place, (name, lines) in enumerate((name, lines) for name, lines in groups if lines):
        x = [line.amount for line in lines]
        y = np.array([line.loss for line in lines])
        ends = np.array([[line.interval.low, line.interval.high] for line in lines])
        panel.errorbar(
            x, y, np.clip(np.abs(ends.T - y), 0, None), label=name, color=_COLOURS[place % len(_COLOURS)],
            marker="o", markersize=3.5, linewidth=1.3, capsize=2,
        )  # fmt: skip
    panel.set_xscale("log")
    powers(panel.xaxis)
    panel.set_xlabel(below)
    panel.set_ylabel("loss of AUC, mean and 95 %")
    panel.grid(axis="y")
    panel.legend(loc="upper left", ncols=2)
    return drawn
