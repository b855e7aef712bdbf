"""The propagation figure: how far each layer of a faulty checkpoint lies from the clean one, as box plots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptflip.errors import UsageError
from ckptflip.propagation import LayerPropagation
from ckptflip.report.style import SUFFIXES as SUFFIXES
from ckptflip.report.style import blank, checked, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito, "Color Universal Design" (2008), told apart with every kind of colour vision.
_BOX, _MEDIAN, _STRANGE = "#56B4E9", "#000000", "#D55E00"
_LONGEST = 36
_INCHES_PER_LAYER = 0.3
_TALLEST = 60.0
# Points from the axes to the right edge of the columns beside them.
_FIRST_COLUMN, _COLUMN = 62, 46
_NONE = "–"


def plot(rows: Sequence[LayerPropagation], out: str | Path, *, title: str | None = None) -> None:
    """Draw one box per layer, the first layer on top: magnitudes of the relative differences that are not 0.

    Boxes show the quartiles, whiskers the smallest and the largest, on a logarithmic scale. The share of
    elements that are the same in both is written beside, with how many were 0 and no longer are, and how
    many are NaN, infinite or extreme: none of these lies on the scale.

    Args:
        rows: what `ckptflip.propagation.propagation` found.
        out: a file ending in .png, .svg or .pdf.
        title: over the figure; none by default.

    Raises:
        UsageError: another suffix, no rows, or a file that cannot be written.
    """
    out = checked(out)
    if not rows:
        raise UsageError("there are no layers to draw")
    save(_figure(rows, title), out)


def _figure(rows: Sequence[LayerPropagation], title: str | None) -> Figure:
    height = min(1.5 + _INCHES_PER_LAYER * len(rows), _TALLEST)
    figure = blank(9.6, height, dpi=150 if height < _TALLEST else 100)
    axes = figure.subplots()
    _boxes(axes, rows)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), [_short(row.layer) for row in rows], fontsize=8.5)
    axes.set_ylabel("layer")
    axes.set_xlabel("|A2 − A1| / |A1| of the elements that differ (A1 clean, A2 faulty)")
    axes.grid(axis="x", color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    _beside(axes, rows)
    if title:
        figure.suptitle(title)
    return figure


def _boxes(axes: Axes, rows: Sequence[LayerPropagation]) -> None:
    drawn = [(at, row.changes) for at, row in enumerate(rows) if row.changes]
    finite = [value for _, box in drawn for value in box if isfinite(value)]
    axes.set_xscale("log")
    if not finite:
        axes.set_xlim(1e-8, 1.0)
        return
    low, high = min(finite), max(finite)
    axes.set_xlim(low / 2, high * 2)
    stats: list[dict[str, Any]] = []
    for _, box in drawn:
        # What is beyond float64 ends at the edge of the figure.
        values = [value if isfinite(value) else high * 2 for value in box]
        stats.append(dict(zip(("whislo", "q1", "med", "q3", "whishi"), values, strict=True)))
    axes.bxp(
        stats, positions=[at for at, _ in drawn], orientation="horizontal", showfliers=False, widths=0.6,
        patch_artist=True, manage_ticks=False, boxprops={"facecolor": _BOX, "edgecolor": "0.25"},
        medianprops={"color": _MEDIAN, "linewidth": 2}, whiskerprops={"color": "0.25"},
        capprops={"color": "0.25"},
    )  # fmt: skip


def _beside(axes: Axes, rows: Sequence[LayerPropagation]) -> None:
    """Columns of numbers at the right: what the boxes do not show."""
    columns: tuple[tuple[str, Callable[[LayerPropagation], str], str], ...] = (
        ("unchanged", _unchanged, "0.2"),
        ("from 0", lambda row: str(row.from_zero or _NONE), "0.2"),
        ("N-EV", lambda row: str(row.nev or _NONE), _STRANGE),
    )
    for place, (head, text, colour) in enumerate(columns):
        # In points, so that they keep their distance whatever the width of the axes.
        beside: dict[str, Any] = {
            "xytext": (_FIRST_COLUMN + _COLUMN * place, 0), "textcoords": "offset points", "fontsize": 8.5,
            "ha": "right", "annotation_clip": False,
        }  # fmt: skip
        axes.annotate(head, (1.0, 1.0), xycoords="axes fraction", va="bottom", color="0.35", **beside)
        for at, row in enumerate(rows):
            said = text(row)
            axes.annotate(
                said, (1.0, at), xycoords=axes.get_yaxis_transform(), va="center",
                color=colour if said != _NONE else "0.6", **beside,
            )  # fmt: skip


def _unchanged(row: LayerPropagation) -> str:
    """The share in percent; neither 100 % where something changed, nor 0 % where something did not."""
    if row.changed == 0:
        return "100 %"
    if row.changed == row.elements:
        return "0 %"
    return f"{min(max(100 * (1 - row.changed_share), 0.01), 99.99):.2f} %"


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else f"…{name[1 - _LONGEST :]}"
