"""The figures of recovery: the share of trials that are not yet back, by epochs since the restart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ckptflip.report.campaign.bands import MOST_IN_A_PANEL
from ckptflip.report.campaign.drawing import MUTED, Drawn, canvas, legend_below, name_axes, pages, stem
from ckptflip.report.campaign.gathering import Gathered, groups, heading
from ckptflip.report.campaign.rates import CellRow
from ckptflip.report.style import COLOURS, LINES, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ckptflip.campaign.statistics.survival import Survival

_PANELS = 10
_CAPTION = (
    "Kaplan-Meier estimates of the share of trials whose metric is not yet within the tolerance to stay, "
    "with pointwise 95 % intervals. The step at 0: trials that never left it. A bar across the end of a "
    "line: trials that were not back by the last epoch (censored); collapsed ones are among them."
)


class _Curve(NamedTuple):
    name: str
    colour: str
    line: str
    found: Survival
    horizon: int


def figures(gathered: Gathered, rows: Sequence[CellRow]) -> Iterator[Drawn]:
    """One figure for each workload and checkpoint epoch, or more where it has many conditions."""
    by_cell = {row.cell.id: row for row in rows}
    parts: list[tuple[tuple[str, int], list[list[_Curve]]]] = []
    for key, cells in groups(gathered).items():
        curves: list[_Curve] = []
        for cell in cells:
            row = by_cell[cell.id]
            # Trials that are only measured have no time to come back in.
            if row.recovery is not None and cell.until > cell.epoch:
                place = len(curves)
                name = f"{short(cell.label or cell.workload, 44, keep='both')} (n = {row.done})"
                line = LINES[place % len(LINES)] if len(cells) <= MOST_IN_A_PANEL else LINES[0]
                colour = COLOURS[place % len(COLOURS)]
                curves.append(_Curve(name, colour, line, row.recovery, cell.until - cell.epoch))
        # Where every trial was back at once, the curve is a point.
        if not any(
            curve.found.share.size == 0 or (curve.found.epochs > 0).any() or curve.found.never
            for curve in curves
        ):
            continue
        if len(curves) <= MOST_IN_A_PANEL:
            parts.append((key, [curves]))
        else:
            apart = [[curve._replace(colour=COLOURS[1])] for curve in curves]
            parts += [(key, page) for page in pages(apart, _PANELS)]
    for place, ((workload, epoch), panels) in enumerate(parts):
        title = heading(workload, epoch)
        yield Drawn(stem("recovery", place, len(parts)), title, _CAPTION, _figure(panels))


def _figure(panels: list[list[_Curve]]) -> Any:
    from matplotlib.lines import Line2D

    columns = 1 if len(panels) == 1 else 2
    rows = -(-len(panels) // columns)
    figure, axes = canvas(4.2 if columns == 1 else 1.8 * rows + 0.9, rows, columns, sharex=True, sharey=True)
    for one, curves in zip(axes, panels, strict=False):
        for curve in curves:
            _draw(one, curve)
        one.set_ylim(-0.03, 1.03)
        one.set_xlim(-0.02 * curves[0].horizon, 1.03 * curves[0].horizon)
        one.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]
        one.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100"])
        one.grid(True)
        if columns > 1:
            one.set_title(curves[0].name, loc="left", y=1.0, fontsize=9)
    for one in axes[len(panels) :]:
        one.set_visible(False)
    name_axes(axes[: len(panels)], columns, "epochs after the restart", "trials that are not back, in %")
    handles: list[Any] = []
    if columns == 1:
        handles = [
            Line2D([], [], color=c.colour, linestyle=c.line, linewidth=2, label=c.name) for c in panels[0]
        ]
    handles.append(
        Line2D(
            [],
            [],
            color=MUTED,
            marker="|",
            markersize=9,
            markeredgewidth=1.8,
            linestyle="",
            label="not back by the end",
        )
    )
    legend_below(figure, handles, 1 if any(len(h.get_label()) > 38 for h in handles) else 2)
    return figure


def _draw(axes: Axes, curve: _Curve) -> None:
    found, end = curve.found, float(curve.horizon)
    # A step at 0 is drawn at 0: what is left there is what had to recover at all.
    at = np.concatenate([[0.0], found.epochs, [end]])
    share, low, high = (
        np.concatenate([[1.0], each, each[-1:] if each.size else [1.0]])
        for each in (found.share, found.low, found.high)
    )
    axes.step(at, share, where="post", color=curve.colour, linestyle=curve.line, linewidth=2, zorder=3)
    axes.fill_between(at, low, high, step="post", color=curve.colour, alpha=0.16, linewidth=0, zorder=2)
    if found.never:
        axes.plot(
            end, share[-1], "|", color=curve.colour, markersize=10, markeredgewidth=2, clip_on=False, zorder=4
        )
