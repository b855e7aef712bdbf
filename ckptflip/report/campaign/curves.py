"""Convergence: the metric of a cell's trials over the epochs, as bands, beside the clean runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ckptflip.report.campaign.gathering import Gathered

if TYPE_CHECKING:
    from ckptflip.campaign.store.rows import Cell, Curves

Floats = NDArray[np.float64]
# The median, and the quantiles that bands lie between.
SHARES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True, slots=True, eq=False)
class Band:
    """The trials of a cell, epoch by epoch.

    Attributes:
        epochs: int64[e], from the restart on.
        values: float64[trials, e]; infinite, on the bad side, where a trial has collapsed; NaN where nothing
            was measured.
        quantiles: float64[shares, e] for `SHARES`, from bad to good; infinite where they fall on collapsed
            trials.
        collapsed: how many trials did.
    """

    epochs: NDArray[np.int64]
    values: Floats
    quantiles: Floats
    collapsed: int


def band(gathered: Gathered, cell: Cell) -> Band:
    """What became of the drawn metric in a cell: of the trials that came to an end."""
    epochs = np.arange(cell.epoch, cell.until + 1)
    chosen = gathered.of(cell)
    values, stored = _table(gathered.curves, gathered.trials.id[chosen], epochs)
    higher = gathered.judged.drawn_higher
    worst = -np.inf if higher else np.inf
    values[stored & ~np.isfinite(values)] = worst
    _continue(gathered, chosen, epochs, values, stored, worst)
    collapsed = int((gathered.trials.outcome[chosen] == "collapsed").sum())
    return Band(epochs, values, _quantiles(values if higher else -values) * (1 if higher else -1), collapsed)


def measured(gathered: Gathered, cell: Cell) -> tuple[Floats, NDArray[np.bool_]]:
    """The drawn metric of a cell's altered checkpoints, of the trials that came to an end.

    Returns:
        float64[trials], NaN where there is none that is finite; and whether each trial collapsed.
    """
    chosen = gathered.of(cell)
    table, _ = _table(gathered.curves, gathered.trials.id[chosen], np.array([cell.epoch]))
    values = np.where(np.isfinite(table[:, 0]), table[:, 0], np.nan)
    return values, gathered.trials.outcome[chosen] == "collapsed"


def clean_table(gathered: Gathered, workload: str) -> tuple[NDArray[np.int64], Floats]:
    """The clean runs of a workload: epochs, and float64[runs, epochs] with NaN where nothing was measured."""
    runs = np.array([run.id for run in gathered.runs if run.workload == workload], np.int64)
    of_these = np.isin(gathered.clean.owner, runs)
    last = int(gathered.clean.epoch[of_these].max(initial=0))
    epochs = np.arange(last + 1)
    return epochs, _table(gathered.clean, runs, epochs)[0]


def _table(curves: Curves, owners: NDArray[np.int64], epochs: NDArray[np.int64]) -> tuple[Floats, Any]:
    """Rows of curves as a table, owner by epoch, and where the store has a value (be it NaN)."""
    values = np.full((len(owners), len(epochs)), np.nan)
    stored = np.zeros(values.shape, bool)
    if not values.size:
        return values, stored
    order = np.argsort(owners)
    place = np.searchsorted(owners[order], curves.owner)
    place = order[np.minimum(place, len(owners) - 1)]
    column = curves.epoch - epochs[0]
    found = (owners[place] == curves.owner) & (column >= 0) & (column < len(epochs))
    values[place[found], column[found]] = curves.value[found]
    stored[place[found], column[found]] = True
    return values, stored


def _continue(
    gathered: Gathered, chosen: Any, epochs: NDArray[np.int64], values: Floats, stored: Any, worst: float
) -> None:
    """Go on where trials ended early: lost for good, or the same as the clean run."""
    trials = gathered.trials
    ended = trials.ended_epoch[chosen][:, None]
    lost = (trials.ended[chosen] == "collapsed")[:, None] & (epochs >= ended)
    values[lost] = worst
    same = (trials.ended[chosen] == "identical")[:, None] & (epochs > ended) & ~stored
    if same.any():
        ids = np.array([run.id for run in gathered.runs], np.int64)
        table, _ = _table(gathered.clean, ids, epochs)
        order = np.argsort(ids)
        rows = order[np.searchsorted(ids[order], trials.run[chosen])]
        values[same] = table[rows][same]


def _quantiles(values: Floats) -> Floats:
    """`SHARES` of each column, each a value that occurred (between two, the mean could be infinite)."""
    ordered = np.sort(values, axis=0)  # NaN last
    counts = (~np.isnan(values)).sum(axis=0)
    found = np.full((len(SHARES), values.shape[1]), np.nan)
    columns = np.flatnonzero(counts)
    for place, share in enumerate(SHARES):
        ranks = np.maximum(np.ceil(share * counts[columns] - 1e-9).astype(np.int64) - 1, 0)
        found[place, columns] = ordered[ranks, columns]
    return found
