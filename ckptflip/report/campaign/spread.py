"""The figures of propagation: how far each layer of the faulty runs lies from the clean one, as box plots."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ckptflip.report.campaign.drawing import INK, MUTED, Drawn, canvas, legend_below, powers, stem
from ckptflip.report.campaign.gathering import Gathered
from ckptflip.report.campaign.words import many
from ckptflip.report.style import COLOURS, short

if TYPE_CHECKING:
    from ckptflip.campaign.store.rows import SpreadRow

# Cells and layers that are drawn; the rest is in the export.
MOST_CELLS, _MOST_LAYERS = 16, 40
_INCHES = 0.24
_FACES = (COLOURS[5], COLOURS[4], COLOURS[2], COLOURS[3])


class _Box(NamedTuple):
    """A layer at an epoch, over all trials of a cell.

    Attributes:
        numbers: minimum, quartiles and maximum: medians of the trials' own; empty where nothing changed.
        changed: trials in which something in the layer changed.
        trials: all that were measured.
        strange: trials with NaN, infinite or extreme elements in it.
    """

    numbers: tuple[float, ...]
    changed: int
    trials: int
    strange: int


def figures(gathered: Gathered) -> Iterator[Drawn]:
    """One figure for each cell in which it was measured."""
    cell_of = dict(zip(gathered.trials.id.tolist(), gathered.trials.cell.tolist(), strict=True))
    by_cell: dict[int, list[SpreadRow]] = {}
    for row in gathered.spread:
        by_cell.setdefault(cell_of[row.trial], []).append(row)
    cells = [cell for cell in gathered.cells if cell.id in by_cell]
    found = [_boxes(by_cell[cell.id]) for cell in cells[:MOST_CELLS]]
    finite = [
        n for _, _, boxes in found for box in boxes.values() for n in box.numbers if np.isfinite(n) and n > 0
    ]
    # One scale for all cells, so that they can be compared.
    limits = (min(finite) / 2, max(finite) * 2) if finite else (1e-8, 1.0)
    left = f" The first {MOST_CELLS} of {len(cells)} cells are drawn." if len(cells) > MOST_CELLS else ""
    for place, (cell, (layers, epochs, boxes)) in enumerate(zip(cells, found, strict=False)):
        cut = f" Of {len(layers)} layers the first {_MOST_LAYERS} are drawn."
        yield Drawn(
            stem("propagation", place, len(found)),
            gathered.name(cell),
            _CAPTION + (cut if len(layers) > _MOST_LAYERS else "") + left,
            _figure(layers[:_MOST_LAYERS], cell.epoch, epochs, boxes, limits),
        )


_CAPTION = (
    "Relative difference |A2 − A1| / |A1| to the clean run of the same epoch (A1 clean, A2 faulty), of the "
    "elements that differ. Each box is the median over the trials of the trial's own minimum, quartiles and "
    "maximum. Beside: in how many of the trials the layer changed at all, and in how many it holds NaN, "
    "infinite or extreme values."
)


def _boxes(rows: Sequence[SpreadRow]) -> tuple[list[str], list[int], dict[tuple[str, int], _Box]]:
    position: dict[str, int] = {}
    by_place: dict[tuple[str, int], list[SpreadRow]] = {}
    for row in rows:
        position.setdefault(row.layer, row.position)
        by_place.setdefault((row.layer, row.epoch), []).append(row)
    boxes = {}
    for key, of_trials in by_place.items():
        changes = np.array([row.changes for row in of_trials if len(row.changes) == 5])
        boxes[key] = _Box(
            tuple(np.median(changes, axis=0).tolist()) if changes.size else (),
            sum(row.changed > 0 for row in of_trials),
            len(of_trials),
            sum(row.nev > 0 for row in of_trials),
        )
    layers = sorted(position, key=lambda layer: (position[layer], layer))
    return layers, sorted({epoch for _, epoch in by_place}), boxes


def _figure(
    layers: list[str],
    start: int,
    epochs: list[int],
    boxes: dict[tuple[str, int], _Box],
    limits: tuple[float, float],
) -> Any:
    from matplotlib.patches import Patch

    lines = len(layers) * len(epochs)
    figure, (panel,) = canvas(max(1.5 + _INCHES * lines + 0.08 * len(layers), 2.4))
    for row, epoch in enumerate(epochs):
        shift = (row + 0.5) / len(epochs) * 0.84 - 0.42
        rows = [
            (at + shift, boxes[layer, epoch]) for at, layer in enumerate(layers) if (layer, epoch) in boxes
        ]
        _draw(panel, rows, 0.6 / len(epochs), _FACES[row % len(_FACES)], limits)
    panel.set_xscale("log")
    powers(panel.xaxis)
    panel.set_xlim(*limits)
    panel.set_ylim(len(layers) - 0.45, -0.55)
    panel.set_yticks(range(len(layers)), [short(layer, 26) for layer in layers])
    panel.set_xlabel("|A2 − A1| / |A1| of the elements that differ")
    panel.set_ylabel("layer")
    panel.grid(axis="x")
    panel.tick_params(axis="y", length=0)
    for column, head in ((62, "changed"), (98, "N-EV")):
        panel.annotate(
            head, (1.0, 1.0), xycoords="axes fraction", xytext=(column, 3), textcoords="offset points",
            ha="right",             fontsize=8.5, color=MUTED, annotation_clip=False,
        )  # fmt: skip
    handles = [
        Patch(facecolor=_FACES[row % len(_FACES)], label=f"{many(epoch - start, 'epoch')} after the restart")
        for row, epoch in enumerate(epochs)
    ]
    legend_below(figure, handles)
    return figure


def _draw(
    axes: Any, rows: Sequence[tuple[float, _Box]], width: float, colour: str, limits: tuple[float, float]
) -> None:
    """The boxes of one epoch, and the columns of numbers beside them."""
    stats = []
    for _, box in rows:
        held = [min(max(n, limits[0]), limits[1]) if np.isfinite(n) else limits[1] for n in box.numbers]
        if held:
            stats.append(dict(zip(("whislo", "q1", "med", "q3", "whishi"), held, strict=True)))
    axes.bxp(
        stats, positions=[at for at, box in rows if box.numbers], orientation="horizontal", showfliers=False,
        widths=width, patch_artist=True, manage_ticks=False,
        boxprops={"facecolor": colour, "edgecolor": MUTED}, medianprops={"color": "#000000", "linewidth": 2},
        whiskerprops={"color": MUTED}, capprops={"color": MUTED},
    )  # fmt: skip
    for at, box in rows:
        strange = f"{box.strange}/{box.trials}" if box.strange else "–"
        for column, said, ink in (
            (62, f"{box.changed}/{box.trials}", INK),
            (98, strange, COLOURS[0] if box.strange else MUTED),
        ):
            axes.annotate(
                said, (1.0, at), xycoords=axes.get_yaxis_transform(), xytext=(column, 0),
                textcoords="offset points", ha="right", va="center", fontsize=8.5, color=ink,
                annotation_clip=False,
            )  # fmt: skip
