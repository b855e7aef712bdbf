"""The figures of convergence: bands of the faulty trials beside the clean runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ckptflip.report.campaign.curves import Band, Floats, band, clean_table
from ckptflip.report.campaign.drawing import (
    INK,
    MUTED,
    Drawn,
    canvas,
    legend_below,
    name_axes,
    pages,
    powers,
    stem,
)
from ckptflip.report.campaign.gathering import Gathered, groups, heading
from ckptflip.report.style import COLOURS, NAMES, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ckptflip.campaign.store.rows import Cell

# More conditions than these hide each other in one panel; each then gets its own.
MOST_IN_A_PANEL = 5
_PANELS = 10
# Trials that are drawn one by one, instead of a band.
_FEW = 4
# The clean run's surroundings get a picture of their own when they are so much smaller than the whole.
_ZOOM = 5.0
# Losses further apart than this factor are drawn on a logarithmic scale.
_LOGARITHMIC = 1e3


class _Condition(NamedTuple):
    name: str
    colour: str
    band: Band


class _Panel(NamedTuple):
    title: str
    conditions: Sequence[_Condition]
    near: tuple[float, float] | None


class _Scene(NamedTuple):
    """What the panels of one workload and checkpoint epoch share."""

    epoch: int
    clean_epochs: Any
    clean: Floats
    label: str
    higher: bool
    whole: tuple[float, float]
    log: bool


def figures(gathered: Gathered) -> Iterator[Drawn]:
    """One figure for each workload and checkpoint epoch, or more where it has many conditions."""
    found = [
        (key, drawn) for key, cells in groups(gathered).items() for drawn in _of_group(gathered, key, cells)
    ]
    for place, ((workload, epoch), (panels, scene)) in enumerate(found):
        figure = _figure(panels, scene)
        title = heading(workload, epoch)
        yield Drawn(stem("convergence", place, len(found)), title, _caption(panels, scene), figure)


def _of_group(
    gathered: Gathered, key: tuple[str, int], cells: Sequence[Cell]
) -> Iterator[tuple[list[_Panel], _Scene]]:
    workload, epoch = key
    conditions: list[_Condition] = []
    for cell in cells:
        # Trials that are only measured have no curve; `measured` shows them.
        found = band(gathered, cell)
        if len(found.values) and cell.until > cell.epoch:
            name = short(cell.label or workload, 44, keep="both")
            conditions.append(_Condition(name, COLOURS[len(conditions) % len(COLOURS)], found))
    if not conditions:
        return
    epochs, clean = clean_table(gathered, workload)
    drawn, higher = gathered.judged.drawn, gathered.judged.drawn_higher
    near, whole, log = _limits(conditions, clean[:, epochs >= epoch], higher)
    scene = _Scene(epoch, epochs, clean, NAMES.get(drawn, short(drawn)), higher, whole, log)
    if len(conditions) <= MOST_IN_A_PANEL:
        panels = [_Panel("around the clean runs", conditions, near)] if near else []
        yield [*panels, _Panel("all of it" if near else "", conditions, None)], scene
        return
    apart = [condition._replace(colour=COLOURS[1]) for condition in conditions]
    for limits in (near, None) if near else (None,):
        for page in pages(apart, _PANELS):
            yield [_Panel(condition.name, [condition], limits) for condition in page], scene


def _limits(
    conditions: Sequence[_Condition], clean: Floats, higher: bool
) -> tuple[tuple[float, float] | None, tuple[float, float], bool]:
    """The clean runs' surroundings, where the whole picture would hide them; the limits of the whole, and
    whether it needs a logarithmic scale.
    """
    faulty = np.concatenate([condition.band.values.ravel() for condition in conditions])
    faulty, clean = faulty[np.isfinite(faulty)], clean[np.isfinite(clean)]
    everything = np.concatenate([faulty, clean]) if len(faulty) + len(clean) else np.array([0.0, 1.0])
    low, high = float(everything.min()), float(everything.max())
    lost = any(condition.band.collapsed for condition in conditions)
    if not higher and low > 0 and high > _LOGARITHMIC * low:
        return None, (low / 2, high * (high / low) ** (0.15 if lost else 0.03)), True
    # A collapsed trial lies below all others; the whole picture has room for it.
    pad = max(0.03 * (high - low), 1e-9 * max(abs(low), abs(high)), 1e-12)
    down, up = (5 if lost and higher else 1) * pad, (5 if lost and not higher else 1) * pad
    whole = (low - down, high + up)
    if not len(clean):
        return None, whole, False
    tight = max(float(clean.max() - clean.min()), 0.01 * max(abs(float(clean.max())), 1e-12))
    near = (float(clean.min()) - tight, float(clean.max()) + tight)
    if low >= 0 and high <= 1:
        near = near[0], min(near[1], 1.005)  # a share has no surroundings above 1
    if whole[1] - whole[0] < _ZOOM * (near[1] - near[0]):
        return None, whole, False
    return near, whole, False


def _figure(panels: list[_Panel], scene: _Scene) -> Any:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    overlaid = len(panels) <= 2 and (len(panels) < 2 or panels[0].conditions == panels[1].conditions)
    columns = 1 if overlaid else 2
    rows = -(-len(panels) // columns)
    height = (3.4 if rows == 1 else 2.7 * rows if overlaid else 1.9 * rows) + 0.9
    figure, axes = canvas(height, rows, columns, sharex=True, sharey=not overlaid)
    for one, panel in zip(axes, panels, strict=False):
        _draw(one, panel, scene)
    for one in axes[len(panels) :]:
        one.set_visible(False)
    name_axes(axes[: len(panels)], columns, "epoch", scene.label)
    handles: list[Any] = [Line2D([], [], color=INK, linewidth=2.6, label=_runs("clean", len(scene.clean)))]
    if overlaid:
        handles += [
            Line2D(
                [], [], color=c.colour, linewidth=2, label=_runs(c.name, len(c.band.values), c.band.collapsed)
            )
            for c in panels[-1].conditions
        ]
    else:
        handles += [
            Line2D([], [], color=COLOURS[1], linewidth=2, label="median of the trials"),
            Patch(facecolor=COLOURS[1], alpha=0.45, label="middle 50 %"),
            Patch(facecolor=COLOURS[1], alpha=0.2, label="middle 90 %"),
        ]
    legend_below(figure, handles, 1 if any(len(h.get_label()) > 38 for h in handles) else 2)
    return figure


def _runs(name: str, count: int, collapsed: int = 0) -> str:
    noted = f"{count} run{'s' * (count != 1)}" + (f", {collapsed} collapsed" if collapsed else "")
    return f"{name} ({noted})"


def _draw(axes: Axes, panel: _Panel, scene: _Scene) -> None:
    limits = panel.near or scene.whole
    for row in scene.clean:
        axes.plot(scene.clean_epochs, row, color=INK, linewidth=2.6, alpha=0.85, zorder=2)
    for condition in panel.conditions:
        _draw_band(axes, condition, limits, scene.higher, alone=len(panel.conditions) == 1)
    axes.axvline(scene.epoch, color=MUTED, linestyle=(0, (1, 2)), linewidth=1.2, zorder=1)
    if scene.log:
        axes.set_yscale("log")
        powers(axes.yaxis)
    axes.set_ylim(*limits)
    axes.grid(True)
    axes.margins(x=0.02)
    axes.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]
    overlaid = len(panel.conditions) > 1 or panel.title in ("", "all of it", "around the clean runs")
    axes.set_title(
        panel.title if overlaid else f"{panel.title}\n{_noted(panel.conditions[0].band)}",
        loc="right" if overlaid else "left", y=1.0, fontsize=9, color=MUTED if overlaid else INK,
    )  # fmt: skip


def _noted(found: Band) -> str:
    return _runs("", len(found.values), found.collapsed).strip(" ()")


def _draw_band(
    axes: Axes, condition: _Condition, limits: tuple[float, float], higher: bool, *, alone: bool
) -> None:
    found, colour = condition.band, condition.colour
    floor, top = limits[0] if higher else limits[1], limits
    held = np.clip(np.where(np.isnan(found.quantiles), np.nan, found.quantiles), top[0], top[1])
    if len(found.values) <= _FEW:
        for row in found.values:
            axes.plot(
                found.epochs, np.where(np.isfinite(row), row, np.nan), color=colour, linewidth=1.6,
                marker=_marker(row), markersize=4, zorder=3,
            )  # fmt: skip
            _cross(axes, found.epochs, row, floor, colour)
        return
    if alone:
        axes.fill_between(found.epochs, held[0], held[4], color=colour, alpha=0.2, linewidth=0, zorder=2.5)
    axes.fill_between(found.epochs, held[1], held[3], color=colour, alpha=0.25, linewidth=0, zorder=2.6)
    median = found.quantiles[2]
    axes.plot(
        found.epochs, np.where(np.isfinite(median), median, np.nan), color=colour, linewidth=2,
        marker=_marker(median), markersize=4, zorder=3,
    )  # fmt: skip
    _cross(axes, found.epochs, median, floor, colour)


def _marker(values: Floats) -> str | None:
    """A dot for a curve of one point alone, which no line would show."""
    return "o" if np.isfinite(values).sum() == 1 else None


def _cross(axes: Axes, epochs: Any, values: Floats, floor: float, colour: str) -> None:
    """A cross at the edge, where a curve leaves what can be drawn."""
    lost = np.flatnonzero(np.isinf(values))
    if len(lost):
        axes.plot(
            epochs[lost[0]],
            floor,
            "x",
            color=colour,
            markersize=7,
            markeredgewidth=1.8,
            clip_on=False,
            zorder=5,
        )


def _caption(panels: list[_Panel], scene: _Scene) -> str:
    every = [condition.band for panel in panels for condition in panel.conditions]
    bands = any(len(found.values) > _FEW for found in every)
    said = []
    if bands and all(len(panel.conditions) == 1 for panel in panels):
        said.append(
            "Lines are medians; the darker band holds the middle half of the trials, the lighter one 90 %."
        )
    elif bands:
        said.append("Lines are medians; bands hold the middle half of the trials.")
    if any(len(found.values) <= _FEW for found in every):
        said.append(f"Up to {_FEW} trials are drawn one by one.")
    said.append("The thickest lines are the clean runs. Dotted: the epoch whose checkpoint was altered.")
    if any(found.collapsed for found in every):
        said.append(
            "Collapsed trials rank as the worst of all: a band that reaches the edge holds some, "
            "a cross marks where a median or a trial is lost."
        )
    if panels[0].near is not None:
        said.append("What lies outside the surroundings of the clean runs is cut off there.")
    return " ".join(said)
