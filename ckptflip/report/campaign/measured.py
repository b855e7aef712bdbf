"""The figures of campaigns that only measure: each trial's metric, by condition, beside the clean runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ckptflip.report.campaign.curves import Floats, clean_table, measured
from ckptflip.report.campaign.drawing import INK, Drawn, canvas, legend_below, pages, stem
from ckptflip.report.campaign.gathering import Gathered, groups, heading
from ckptflip.report.style import COLOURS, NAMES, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ckptflip.campaign.store.rows import Cell

_ROWS = 24
_CAPTION = (
    "Each mark is a trial, measured as it was altered and not trained on; crosses are those that collapsed. "
    "Marks at the edge could not be measured, and rank as the worst of all; the bar is the median. "
    "Lines from top to bottom are the clean runs."
)
# Multiples of the golden ratio spread dots over a line's height, however many there are.
_GOLDEN = (5**0.5 - 1) / 2


class _Row(NamedTuple):
    """A condition: the metric of its trials, NaN where it could not be measured, and which collapsed."""

    name: str
    values: Floats
    collapsed: NDArray[np.bool_]


def figures(gathered: Gathered) -> Iterator[Drawn]:
    """One figure for each workload and epoch with trials that are only measured, or more for many cells."""
    found = []
    for key, cells in groups(gathered).items():
        rows = list(_rows(gathered, cells))
        limits = _limits(gathered, key, rows)
        found += [(key, page, limits) for page in pages(rows, _ROWS)]
    for place, (key, page, limits) in enumerate(found):
        title = heading(*key)
        yield Drawn(
            stem("measured", place, len(found)), title, _CAPTION, _figure(gathered, key, page, limits)
        )


def _rows(gathered: Gathered, cells: Sequence[Cell]) -> Iterator[_Row]:
    for cell in cells:
        if cell.until > cell.epoch:
            continue
        values, collapsed = measured(gathered, cell)
        # The drawn metric may be another than outcomes are judged by: one that was not measured at all.
        shown = collapsed | ~np.isnan(values)
        if shown.any():
            name = short(cell.label or cell.workload, 44, keep="both")
            yield _Row(f"{name} (n = {shown.sum()})", values[shown], collapsed[shown])


def _clean(gathered: Gathered, key: tuple[str, int]) -> Floats:
    """The metric of the clean runs at the epoch that is altered."""
    workload, epoch = key
    epochs, table = clean_table(gathered, workload)
    values: Floats = table[:, epochs == epoch].ravel()
    return values[np.isfinite(values)]


def _limits(gathered: Gathered, key: tuple[str, int], rows: Sequence[_Row]) -> tuple[float, float]:
    """From the least to the largest value, and room on the bad side for what could not be measured."""
    values = np.concatenate([_clean(gathered, key), *(row.values for row in rows)])
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    pad = max(0.04 * (high - low), 1e-3 * max(abs(low), abs(high)), 1e-12)
    lost = 2 * pad if len(finite) < len(values) else 0.0
    higher = gathered.judged.drawn_higher
    return low - pad - lost * higher, high + pad + lost * (not higher)


def _figure(
    gathered: Gathered, key: tuple[str, int], rows: Sequence[_Row], limits: tuple[float, float]
) -> Any:
    from matplotlib.lines import Line2D

    figure, (axes,) = canvas(0.3 * len(rows) + 1.5)
    for value in _clean(gathered, key):
        axes.axvline(value, color=INK, linewidth=1.2, alpha=0.6, zorder=1)
    edge = limits[0] if gathered.judged.drawn_higher else limits[1]
    for place, row in enumerate(rows):
        _draw(axes, place, row, edge, higher=gathered.judged.drawn_higher)
    axes.set_xlim(*limits)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.set_xlabel(NAMES.get(gathered.judged.drawn, short(gathered.judged.drawn)))
    axes.grid(True, axis="x")
    marks: dict[str, Any] = {"linestyle": "", "color": COLOURS[1]}
    handles: list[Any] = [
        Line2D([], [], color=INK, linewidth=1.2, label="clean runs"),
        Line2D([], [], marker="o", markersize=4, label="a trial", **marks),
        Line2D([], [], marker="|", markersize=10, markeredgewidth=2, label="median", **marks),
        Line2D([], [], marker="x", markersize=6, markeredgewidth=1.8, label="collapsed", **marks),
    ]
    legend_below(figure, handles, 4)
    return figure


def _draw(axes: Axes, place: int, row: _Row, edge: float, *, higher: bool) -> None:
    colour, lost = COLOURS[1], row.collapsed
    at = np.where(np.isnan(row.values), edge, row.values)
    height = place + (np.arange(len(at)) * _GOLDEN % 1 - 0.5) * 0.6
    axes.plot(at[~lost], height[~lost], "o", color=colour, markersize=3.5, alpha=0.45, markeredgewidth=0)
    axes.plot(
        at[lost], height[lost], "x", color=colour, markersize=5, markeredgewidth=1.4, clip_on=False, zorder=5
    )
    # From bad to good; of an even number the worse one of the middle two, since one may be missing.
    ranked = np.sort(np.where(np.isnan(row.values), -np.inf, row.values if higher else -row.values))
    median = ranked[(len(ranked) - 1) // 2] * (1 if higher else -1)
    if np.isfinite(median):
        axes.plot([median] * 2, [place - 0.38, place + 0.38], color=colour, linewidth=2, zorder=4)
