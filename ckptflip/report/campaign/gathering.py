"""What a report is about: everything it needs of a store, read once, as numpy's columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ckptflip.campaign.spec import BAD, OUTCOMES
from ckptflip.errors import UsageError

if TYPE_CHECKING:
    from ckptflip.campaign.estimates import Estimate
    from ckptflip.campaign.store.reading import Reader
    from ckptflip.campaign.store.rows import (
        Cell,
        Curves,
        FlipColumns,
        Revision,
        Run,
        SpreadRow,
        Stratum,
        TensorRow,
        Trials,
    )

# So many of the worst trials are listed with their flips.
_WORST = 10
# Fields of a policy that are named otherwise in figures, with what is written below an axis.
AXES = {
    "workload": "workload", "epoch": "epoch of the altered checkpoint", "count": "flips",
    "fraction": "share of the eligible bits", "ber": "bit error rate", "fault": "fault model",
}  # fmt: skip
# Labels are no condition of their own: they follow from the other fields.
_NO_AXIS = ("label", "sweep")


class Judged(NamedTuple):
    """What outcomes are judged by, and which metric is drawn.

    Attributes:
        name: of the metric that outcomes are judged by.
        higher: whether more of it is better.
        tolerance: within this of the clean run counts as the same.
        drawn: of the metric whose curves are drawn.
        drawn_higher: whether more of that is better.
    """

    name: str
    higher: bool
    tolerance: float
    drawn: str
    drawn_higher: bool


CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True, eq=False)
class Gathered:
    """A campaign as its report needs it.

    Attributes:
        store: file name of the store.
        revisions: of the spec, oldest first.
        spec: the last one, as plain data.
        cells: those of the current spec in which something is altered, in its order.
        controls: those in which nothing is.
        former: trials of cells that are no longer in the spec; they are in no figure.
        strata: by cell id.
        estimates: of cells that a rule stops, or whose faults are drawn by stratum: the rates of each outcome
            and of degraded and collapsed together, by cell id.
        runs: the clean runs.
        trials: those of `cells` and `controls`, as columns.
        judged: the metric.
        curves: the drawn metric of the trials.
        clean: the drawn metric of the clean runs.
        clean_judged: likewise the metric that outcomes are judged by.
        tensors: by id.
        spread: how far faults had spread, of the trials where it was measured.
        singles: the flips of trials that hit a single bit, a row each.
        worst: positions in `trials` of the worst ones, the worst first.
        worst_flips: their flips.
    """

    store: str
    revisions: Sequence[Revision]
    spec: dict[str, Any]
    cells: Sequence[Cell]
    controls: Sequence[Cell]
    former: int
    strata: dict[int, list[Stratum]]
    estimates: dict[int, list[Estimate]]
    runs: Sequence[Run]
    trials: Trials
    judged: Judged
    curves: Curves
    clean: Curves
    clean_judged: Curves
    tensors: dict[int, TensorRow]
    spread: Sequence[SpreadRow]
    singles: FlipColumns
    worst: list[int]
    worst_flips: FlipColumns

    def of(self, cell: Cell, *, done: bool = True) -> NDArray[np.int64]:
        """Positions in `trials` of a cell's trials; with `done`, of those alone that came to an end."""
        found = self.trials.cell == cell.id
        if done:
            found &= self.trials.state == "done"
        return np.flatnonzero(found)

    @property
    def several_workloads(self) -> bool:
        """Whether cells must be told apart by their workload."""
        return len({cell.workload for cell in self.cells}) > 1

    @property
    def several_epochs(self) -> bool:
        """Whether cells must be told apart by their checkpoint's epoch."""
        return len({cell.epoch for cell in self.cells}) > 1

    def name(self, cell: Cell) -> str:
        """What tells a cell from all others, in words: strangers' text."""
        parts = [cell.label] if cell.label else []
        parts += [cell.workload] if self.several_workloads or not parts else []
        return ", ".join(parts + ([f"epoch {cell.epoch}"] if self.several_epochs else []))


def gather(store: str | Path, metric: str | None = None) -> Gathered:
    """Read a store, beside a campaign that may still be running.

    Args:
        store: its path.
        metric: whose curves are drawn; by default the one that outcomes are judged by.

    Raises:
        UsageError: the store holds no such metric.
        CampaignError: the store cannot be read.
    """
    from ckptflip.campaign.store.opening import undamaged
    from ckptflip.campaign.store.reading import reading

    with reading(Path(store)) as reader, undamaged(reader.path):
        reader.check()
        spec = reader.spec()
        judged = _judged(spec, metric, reader.metrics())
        current = sorted(reader.cells(current=True), key=lambda cell: cell.position)
        everything = reader.trials()
        trials = _rows(everything, np.isin(everything.cell, [cell.id for cell in current]))
        worst = _worst(trials, [cell.id for cell in current if cell.policy is not None], judged.higher)
        single = (trials.state == "done") & (trials.bits_hit == 1) & (trials.words_hit == 1)
        return Gathered(
            store=Path(store).name,
            revisions=list(reader.revisions()),
            spec=spec,
            cells=[cell for cell in current if cell.policy is not None],
            controls=[cell for cell in current if cell.policy is None],
            former=len(everything.id) - len(trials.id),
            strata=_by_cell(reader.strata(), {cell.id for cell in current}),
            estimates=_estimates(reader),
            runs=list(reader.runs()),
            trials=trials,
            judged=judged,
            curves=reader.curves(judged.drawn),
            clean=reader.clean_curves(judged.drawn),
            clean_judged=reader.clean_curves(judged.name),
            tensors=reader.tensors(),
            spread=_known(reader.propagation(), trials.id),
            singles=reader.flips(trials.id[single].tolist()),
            worst=worst,
            worst_flips=reader.flips(trials.id[worst].tolist()),
        )


def _estimates(reader: Reader) -> dict[int, list[Estimate]]:
    from ckptflip.campaign.estimates import FIXED, estimates

    sets = [*((outcome,) for outcome in OUTCOMES), BAD]
    found = estimates(reader, CONFIDENCE, sets)
    return {cell: made for cell, made in found.items() if made[0].method != FIXED}


def _by_cell(strata: Sequence[Stratum], cells: set[int]) -> dict[int, list[Stratum]]:
    """The strata of each of these cells."""
    found: dict[int, list[Stratum]] = {}
    for stratum in strata:
        if stratum.cell in cells:
            found.setdefault(stratum.cell, []).append(stratum)
    return found


def _judged(spec: dict[str, Any], metric: str | None, held: Sequence[str]) -> Judged:
    said = spec.get("metric", {})
    name = str(said.get("name", "accuracy"))
    higher = said.get("better", "higher") != "lower"
    drawn = metric or name
    if metric is not None and metric not in held:
        raise UsageError(
            f"--metric {metric}: the store holds no such metric; held are: {', '.join(held) or 'none yet'}"
        )
    drawn_higher = higher if drawn == name else not drawn.endswith(("loss", "norm", "nan", "inf", "extreme"))
    return Judged(name, higher, float(said.get("tolerance", 0.01)), drawn, drawn_higher)


def _rows(columns: Any, chosen: NDArray[Any]) -> Any:
    """Some rows of columns, as the same kind of tuple."""
    return type(columns)(*(column[chosen] for column in columns))


def _worst(trials: Trials, cells: Sequence[int], higher: bool) -> list[int]:
    """Collapsed trials first, those with the fewest altered bits before others; then by how much was lost.

    As many of each cell as there is room for.
    """
    lost = (trials.clean_final - trials.final) * (1 if higher else -1)
    collapsed = trials.outcome == "collapsed"
    bad = np.isin(trials.cell, cells) & (collapsed | (trials.outcome == "degraded"))
    order = np.lexsort(
        (
            trials.number,
            trials.cell,
            np.where(collapsed, 0, -np.nan_to_num(lost, nan=0.0)),
            np.where(collapsed, trials.bits_effective, 0),
            ~collapsed,
        )
    )
    order = order[bad[order]]
    # The cells take turns, so that one of them alone does not fill the list.
    turns = np.zeros(len(order), np.int64)
    for cell in cells:
        of_cell = trials.cell[order] == cell
        turns[of_cell] = np.arange(of_cell.sum())
    chosen = np.sort(np.argsort(turns, kind="stable")[:_WORST])
    worst: list[int] = order[chosen].tolist()
    return worst


def _known(rows: Sequence[SpreadRow], trials: NDArray[np.int64]) -> list[SpreadRow]:
    known = set(trials.tolist())
    return [row for row in rows if row.trial in known]


# What a policy that does not say so has.
_UNSAID = {"bits": "all", "fault": "flip", "design": "uniform"}


class Axis(NamedTuple):
    """Something that differs between the cells of a campaign.

    Attributes:
        field: ``workload``, ``epoch`` or a field of the policy.
        name: as it stands below an axis.
        values: of the cells, in the order of `cells`.
        order: the different values, as they are shown from first to last.
    """

    field: str
    name: str
    values: list[str]
    order: list[str]


def axes(cells: Sequence[Cell]) -> list[Axis]:
    """What differs between cells: their workload, their epoch, fields of their policies."""
    held = [
        {"workload": c.workload, "epoch": c.epoch, **_UNSAID, **(c.policy or {}), **c.swept} for c in cells
    ]
    found = []
    for field in dict.fromkeys(key for values in held for key in values):
        raw = [_one_if_unsaid(values) if field == "count" else values.get(field) for values in held]
        shown = [_said(value) for value in raw]
        if field not in _NO_AXIS and len(set(shown)) > 1:
            found.append(Axis(field, AXES.get(field, field), shown, _ordered(raw, shown)))
    return found


def _one_if_unsaid(policy: Mapping[str, Any]) -> Any:
    """The count of a policy: one fault, where it says no amount."""
    unsaid = policy.get("fraction") is None and policy.get("ber") is None
    return policy.get("count") or (1 if unsaid else None)


def _said(value: Any) -> str:
    if value is None or value in ("", [], ()):
        return "not set"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _ordered(raw: Sequence[Any], shown: Sequence[str]) -> list[str]:
    by_text = dict(zip(shown, raw, strict=True))
    if all(isinstance(value, int | float) for value in raw):
        return sorted(by_text, key=lambda text: float(by_text[text]))
    return list(by_text)


def groups(gathered: Gathered) -> dict[tuple[str, int], list[Cell]]:
    """The cells of each workload and checkpoint epoch, in the order of the spec."""
    found: dict[tuple[str, int], list[Cell]] = {}
    for cell in gathered.cells:
        found.setdefault((cell.workload, cell.epoch), []).append(cell)
    return found


def heading(workload: str, epoch: int) -> str:
    """What a group of cells is called."""
    return f"{workload}, restarted from epoch {epoch}"
