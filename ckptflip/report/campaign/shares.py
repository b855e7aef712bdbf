"""The figures of outcomes: stacked bars of shares, by whatever differs between the trials of a campaign."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ckptflip.campaign.spec import OUTCOMES
from ckptflip.report.campaign.drawing import (
    INK,
    MUTED,
    OUTCOME_COLOURS,
    PAPER,
    Drawn,
    canvas,
    legend_below,
    pages,
    stem,
)
from ckptflip.report.campaign.gathering import Axis, Gathered, axes
from ckptflip.report.campaign.hits import Hits
from ckptflip.report.campaign.words import listed
from ckptflip.report.style import short

if TYPE_CHECKING:
    from ckptflip.campaign.store.rows import Cell

_BARS = 30
# Bars narrower than this share have no room for their number.
_READABLE = 0.06


class Bar(NamedTuple):
    """One bar.

    Attributes:
        name: what its trials have in common: strangers' text.
        counts: trials by outcome, int64[outcomes].
        shares: float64[outcomes], sum 1: of the trials, or weighted where faults were drawn by stratum.
        failed: trials that came to no end.
        weighted: whether shares are weighted.
        group: what tells its cell's group from others: strangers' text.
    """

    name: str
    counts: NDArray[np.int64]
    shares: NDArray[np.float64]
    failed: int = 0
    weighted: bool = False
    group: str = ""


def figures(gathered: Gathered, hits: Hits) -> Iterator[Drawn]:
    """Bars of all cells, then by each thing that differs between them, then by what single flips hit."""
    sets: list[tuple[str, str, str, list[Bar]]] = []
    cells = [bar for bar in by_cell(gathered) if bar.counts.sum() or bar.failed]
    found = axes(gathered.cells)
    if cells and len(found) != 1:
        yield from _of_cells(gathered, cells)
    alike: dict[tuple[int, ...], list[Axis]] = {}
    for axis in found:
        alike.setdefault(tuple(map(axis.values.index, axis.values)), []).append(axis)
    for same in alike.values():
        axis = _as_one(same, gathered.cells)
        if len(found) > 1 and len(axis.order) == len(gathered.cells):
            continue  # the bars of the cells again
        bars = by_axis(gathered, axis.values, axis.order)
        pooled = " Cells that differ in other ways are pooled." if len(alike) > 1 else ""
        sets.append((f"outcomes-{axis.field}", f"Outcomes by {axis.name}", pooled, bars))
    for what, name, bars in by_hit(gathered, hits):
        said = " Of trials that hit a single bit alone, from all cells, each counted once."
        sets.append((f"outcomes-hit-{what}", f"Outcomes by {name}", said, bars))
    for family, title, said, bars in sets:
        parts = pages(bars, _BARS)
        for place, part in enumerate(parts):
            caption = _caption(part) + said
            yield Drawn(stem(family, place, len(parts)), title, caption, _figure(part))


def _as_one(same: Sequence[Axis], cells: Sequence[Cell]) -> Axis:
    """Fields that divide the cells alike, as those of a few policies do: one figure is enough."""
    first, labels = same[0], [cell.label for cell in cells]
    if len(same) == 1:
        return first
    alike = set(zip(first.values, labels, strict=True))
    if all(labels) and len(alike) == len(set(labels)) == len(first.order):
        name, values = "policy", labels
    else:
        name = listed([axis.name for axis in same])
        values = [
            ", ".join(f"{axis.name} {value}" for axis, value in zip(same, each, strict=True))
            for each in zip(*(axis.values for axis in same), strict=True)
        ]
    return Axis(first.field, name, values, [values[first.values.index(value)] for value in first.order])


def _of_cells(gathered: Gathered, bars: list[Bar]) -> Iterator[Drawn]:
    """Bars of all cells; where there are many, a figure for each workload and checkpoint epoch."""
    by_group: dict[str, list[Bar]] = {}
    for bar in bars:
        by_group.setdefault(bar.group, []).append(bar)
    if len(bars) <= _BARS and len(by_group) > 1:
        by_group = {"": [bar._replace(name=f"{bar.name}, {bar.group}") for bar in bars]}
    parts = [(group, part) for group, of_these in by_group.items() for part in pages(of_these, _BARS)]
    for place, (group, part) in enumerate(parts):
        title = f"Outcomes of each cell: {group}" if group and len(by_group) > 1 else "Outcomes of each cell"
        yield Drawn(stem("outcomes-cells", place, len(parts)), title, _caption(part), _figure(part))


def counted(outcomes: NDArray[Any], weights: NDArray[np.float64] | None = None) -> tuple[Any, Any]:
    """Trials by outcome, and the shares."""
    counts = np.array([(outcomes == outcome).sum() for outcome in OUTCOMES], np.int64)
    if weights is None:
        shares = counts.astype(np.float64)
    else:
        shares = np.array([weights[outcomes == outcome].sum() for outcome in OUTCOMES])
    return counts, shares / max(float(shares.sum()), 1e-300)


def by_cell(gathered: Gathered) -> list[Bar]:
    """A bar for each cell, in the order of the spec."""
    bars = []
    for cell in gathered.cells:
        done = gathered.of(cell)
        failed = len(gathered.of(cell, done=False)) - len(done)
        weights = stratum_weights(gathered, cell.id, done)
        counts, shares = counted(gathered.trials.outcome[done], weights)
        group = f"{cell.workload}, epoch {cell.epoch}"
        name = cell.label or cell.workload
        bars.append(Bar(name, counts, shares, failed, weights is not None, group))
    return bars


def stratum_weights(gathered: Gathered, cell: int, done: NDArray[np.int64]) -> NDArray[np.float64] | None:
    """What each trial counts where faults were drawn by stratum: its stratum's share, over its trials."""
    if cell not in gathered.strata:
        return None
    drawn = gathered.trials.stratum[done]
    weights = np.zeros(len(done))
    for stratum in gathered.strata[cell]:
        inside = drawn == stratum.id
        weights[inside] = stratum.weight / max(int(inside.sum()), 1)
    return weights


def _weights(gathered: Gathered) -> NDArray[np.float64] | None:
    """What every trial counts among all; None where nothing was drawn by stratum."""
    if not gathered.strata:
        return None
    found = np.ones(len(gathered.trials.id))
    for cell in gathered.strata:
        done = np.flatnonzero((gathered.trials.cell == cell) & (gathered.trials.state == "done"))
        weights = stratum_weights(gathered, cell, done)
        if weights is not None:
            # A cell counts by its trials, as cells without strata do.
            found[done] = weights * len(done)
    return found


def by_axis(gathered: Gathered, values: Sequence[str], order: Sequence[str]) -> list[Bar]:
    """A bar for each value of something that differs between cells; each cell counts by its trials."""
    cells = by_cell(gathered)
    bars = []
    for value in order:
        of_these = [bar for bar, held in zip(cells, values, strict=True) if held == value]
        counts = np.sum([bar.counts for bar in of_these], axis=0)
        sums = np.sum([bar.shares * bar.counts.sum() for bar in of_these], axis=0)
        failed = sum(bar.failed for bar in of_these)
        weighted = any(bar.weighted for bar in of_these)
        if counts.sum() or failed:
            bars.append(Bar(value, counts, sums / max(float(sums.sum()), 1e-300), failed, weighted))
    return bars


def by_hit(gathered: Gathered, hits: Hits) -> Iterator[tuple[str, str, list[Bar]]]:
    """Bars by the bit field and by the layer that single flips hit, where these differ."""
    outcomes, weights = gathered.trials.outcome[hits.trial], _weights(gathered)
    for what, name, names, of_each in (
        ("field", "bit field that was hit", hits.fields, hits.field),
        ("layer", "layer that was hit", hits.layers, hits.layer),
    ):
        bars = []
        for place, one in enumerate(names):
            chosen = of_each == place
            some = None if weights is None else weights[hits.trial[chosen]]
            counts, shares = counted(outcomes[chosen], some)
            if counts.sum():
                bars.append(Bar(one, counts, shares, weighted=some is not None))
        if len(bars) > 1:
            yield what, name, bars


def _figure(bars: list[Bar]) -> Any:
    from matplotlib.patches import Patch

    figure, (panel,) = canvas(1.5 + 0.32 * len(bars))
    at = np.arange(len(bars))
    left = np.zeros(len(bars))
    shares = np.array([bar.shares for bar in bars])
    for place, outcome in enumerate(OUTCOMES):
        widths = shares[:, place]
        panel.barh(
            at, widths, left=left, height=0.72, color=OUTCOME_COLOURS[outcome], edgecolor=PAPER, linewidth=0.8
        )
        for row in np.flatnonzero(widths >= _READABLE).tolist():
            panel.text(
                left[row] + widths[row] / 2, row, f"{100 * widths[row]:.0f}", ha="center", va="center",
                fontsize=8, color="#ffffff" if outcome == "identical" else "#000000",
            )  # fmt: skip
        left += widths
    for row, bar in enumerate(bars):
        panel.annotate(
            _beside(bar), (1.0, row), xytext=(6, 0), textcoords="offset points", va="center", fontsize=8.5,
            color=MUTED, annotation_clip=False,
        )  # fmt: skip
    panel.set_yticks(at, [short(bar.name, 40, keep="both") for bar in bars])
    panel.set_ylim(len(bars) - 0.4, -0.6)
    panel.set_xlim(0, 1)
    panel.set_xticks(np.linspace(0, 1, 6), [f"{share:.0f}" for share in np.linspace(0, 100, 6)])
    panel.set_xlabel("share of the trials that came to an end, in %")
    panel.tick_params(axis="y", length=0)
    panel.spines["left"].set_visible(False)
    seen = [name for name, share in zip(OUTCOMES, shares.sum(axis=0), strict=True) if share]
    handles = [Patch(facecolor=OUTCOME_COLOURS[name], label=name) for name in seen]
    none = Patch(facecolor="none", edgecolor=INK, label="no trial came to an end")
    legend_below(figure, handles or [none], 5)
    return figure


def _beside(bar: Bar) -> str:
    failed = f" + {bar.failed} failed" if bar.failed else ""
    return f"n = {int(bar.counts.sum())}{failed}{'*' if bar.weighted else ''}"


def _caption(bars: list[Bar]) -> str:
    said = ["Numbers in the bars are percentages; n counts trials that came to an end."]
    if any(bar.failed for bar in bars):
        said.append("Trials that crashed, hung or ran out of memory have no outcome and are counted beside.")
    if any(bar.weighted for bar in bars):
        said.append("* drawn by stratum: the shares are weighted to those of a flip drawn uniformly.")
    return " ".join(said)
