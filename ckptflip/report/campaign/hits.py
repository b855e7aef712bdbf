"""What single flips hit, bit and layer, and the heat map of what became of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptflip.bits.formats import lookup_name
from ckptflip.campaign.spec import BAD
from ckptflip.errors import UsageError
from ckptflip.report.campaign.drawing import GRID, MUTED, PAPER, Drawn, canvas, pages, stem
from ckptflip.report.campaign.gathering import Gathered
from ckptflip.report.style import short

FIELDS = ("sign", "critical", "exponent", "mantissa", "value")
_FIELD_NAMES = ("sign", "exponent, critical bit", "exponent, other bits", "mantissa", "integer")
_COLUMNS = 10
_STEPS = ((0.0, "0"), (0.25, "¼"), (0.5, "½"), (0.75, "¾"), (1.0, "1"))
# With more bits than this between the highest and the lowest, or where most were not hit, those that no trial
# hit are left out.
_MOST_ROWS = 34


@dataclass(frozen=True, slots=True, eq=False)
class Hits:
    """Trials that hit one bit, a row each.

    Attributes:
        trial: int64[n], positions in the columns of trials.
        bit: int64[n], 0 the least significant of its element.
        layer: int64[n], positions in `layers`.
        field: int64[n], positions in `fields`.
        dtype: int64[n], positions in `dtypes`.
        layers: names, in the order of the network where it is known: strangers' text.
        fields: names of bit fields.
        dtypes: names of number formats.
    """

    trial: NDArray[np.int64]
    bit: NDArray[np.int64]
    layer: NDArray[np.int64]
    field: NDArray[np.int64]
    dtype: NDArray[np.int64]
    layers: list[str]
    fields: tuple[str, ...]
    dtypes: list[str]


def hits(gathered: Gathered) -> Hits:
    """What the trials hit that hit a single bit; those alone say what one flip does."""
    flips = gathered.singles
    tensors = gathered.tensors
    # One word with one bit: what a trial's counts said is checked against its flips.
    sound = (flips.hit != 0) & (flips.hit & (flips.hit - np.uint64(1)) == 0)
    sound &= np.isin(flips.tensor, list(tensors))
    tensor, word, hit = flips.tensor[sound], flips.word[sound], flips.hit[sound]
    layers, dtypes = _layers(gathered), sorted({row.dtype for row in tensors.values()})
    bit = np.frexp(hit.astype(np.float64))[1].astype(np.int64) - 1  # powers of two are exact in float64
    layer, field, dtype = (np.zeros(len(tensor), np.int64) for _ in range(3))
    for one in np.unique(tensor).tolist():
        inside = np.flatnonzero(tensor == one)
        row = tensors[one]
        layer[inside] = layers.index(row.layer or row.name)
        dtype[inside] = dtypes.index(row.dtype)
        by_bit, parts, width = _fields(row.dtype)
        # Of complex numbers, odd words are the second part, whose bits lie above the first's.
        bit[inside] += (word[inside] % parts) * width
        field[inside] = by_bit[np.minimum(bit[inside], len(by_bit) - 1)]
    place = _positions(gathered.trials.id, flips.trial[sound])
    return Hits(place, bit, layer, field, dtype, layers, _FIELD_NAMES, dtypes)


def _layers(gathered: Gathered) -> list[str]:
    """The layers that were hit: in the order of the network where it was measured, else by name."""
    position = {row.layer: row.position for row in reversed(gathered.spread)}
    names = {row.layer or row.name for row in gathered.tensors.values()}
    return sorted(names, key=lambda name: (position.get(name, len(position)), _by_number(name)))


def _by_number(name: str) -> list[tuple[int, str]]:
    """Sorts conv2 before conv10."""
    return [
        (int(part), "") if part.isdecimal() and len(part) < 19 else (-1, part)
        for part in re.split(r"(\d+)", name)
    ]


def _fields(dtype: str) -> tuple[NDArray[np.int64], int, int]:
    """The field of each bit of a format, its parts and the width of one."""
    try:
        number = lookup_name(dtype.removeprefix(">"))
    except UsageError:
        return np.full(1, FIELDS.index("value")), 1, 64
    by_bit = np.array([FIELDS.index(number.field_of(bit)) for bit in range(number.width)])
    return by_bit, number.parts, number.part_width


def _positions(ids: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    order = np.argsort(ids)
    found: NDArray[np.int64] = order[np.searchsorted(ids[order], wanted)]
    return found


def figures(gathered: Gathered, found: Hits) -> Iterator[Drawn]:
    """Heat maps of bit × layer, one for each number format, in parts where there are many layers."""
    parts = []
    for place, dtype in enumerate(found.dtypes):
        of_these = np.flatnonzero(found.dtype == place)
        if len(of_these):
            layers = sorted(set(found.layer[of_these].tolist()))
            parts += [(dtype, of_these, part) for part in pages(layers, _COLUMNS)]
    bad = np.isin(gathered.trials.outcome[found.trial], BAD)
    for place, (dtype, of_these, layers) in enumerate(parts):
        seen, hit = _table(found, of_these, layers), _table(found, of_these[bad[of_these]], layers)
        rows = _shown_rows(_table(found, of_these, sorted(set(found.layer[of_these].tolist()))))
        yield Drawn(
            stem("heatmap", place, len(parts)), f"Bad outcomes by bit and layer, {dtype}", _caption(),
            _figure(found, dtype, layers, rows, hit[rows], seen[rows]),
        )  # fmt: skip


def _table(found: Hits, chosen: NDArray[np.int64], layers: list[int]) -> NDArray[np.int64]:
    """Trials by bit (from 0) and layer."""
    table = np.zeros((int(found.bit.max(initial=0)) + 1, len(found.layers)), np.int64)
    np.add.at(table, (found.bit[chosen], found.layer[chosen]), 1)
    return table[:, layers]


def _shown_rows(seen: NDArray[np.int64]) -> NDArray[np.int64]:
    """Which bits have a row, the most significant first."""
    hit = np.flatnonzero(seen.sum(axis=1))
    every = np.arange(hit[0], hit[-1] + 1)
    return (every if len(every) <= min(_MOST_ROWS, 3 * len(hit)) else hit)[::-1]


def _figure(
    found: Hits, dtype: str, layers: list[int], rows: NDArray[np.int64], bad: NDArray[np.int64],
    seen: NDArray[np.int64],
) -> Any:  # fmt: skip
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    figure, (panel,) = canvas(min(1.9 + 0.21 * len(rows), 10.5))
    # Light to dark in steady steps, to be read without colours as well; the darkest end hides numbers.
    colours = ListedColormap(colormaps["YlOrBr"](np.linspace(0, 0.85, 256)))
    _fill(panel, colours, bad, seen)
    panel.set_xlim(-0.5, len(layers) - 0.5)
    panel.set_ylim(len(rows) - 0.5, -0.5)
    names = [short(found.layers[layer], 22) for layer in layers]
    turned = max(map(len, names)) * len(names) > 56
    panel.set_xticks(
        range(len(layers)),
        names,
        rotation=40 if turned else 0,
        ha="right" if turned else "center",
        rotation_mode="anchor",
    )
    by_bit = _fields(dtype)[0]
    named = [_row_name(int(bit), by_bit, rows, place) for place, bit in enumerate(rows)]
    panel.set_yticks(range(len(rows)), named, fontsize=8)
    panel.set_ylabel("bit (0: least significant)")
    panel.set_xlabel("layer")
    panel.tick_params(length=0)
    for edge in _edges(by_bit, rows):
        panel.axhline(edge - 0.5, color=MUTED, linewidth=1)
    panel.spines[["left", "bottom"]].set_color(GRID)
    steps = [
        Patch(facecolor=colours(share), edgecolor=MUTED, linewidth=0.5, label=name) for share, name in _STEPS
    ]
    title = "share of trials that ended degraded or collapsed"
    figure.legend(handles=steps, loc="outside upper center", ncols=len(steps), title=title, title_fontsize=9)
    return figure


def _fill(panel: Any, colours: Any, bad: NDArray[np.int64], seen: NDArray[np.int64]) -> None:
    """A coloured cell with its counts for each bit and layer that was hit."""
    from matplotlib.patches import Rectangle

    for row, column in np.argwhere(seen).tolist():
        share = float(bad[row, column] / seen[row, column])
        place = (column - 0.5, row - 0.5)
        panel.add_patch(Rectangle(place, 1, 1, facecolor=colours(share), edgecolor=PAPER, linewidth=0.8))
        panel.text(
            column, row, f"{bad[row, column]}/{seen[row, column]}", ha="center", va="center",
            fontsize=8 if seen.shape[1] <= 8 else 7, color="#ffffff" if share > 0.6 else "#000000",
        )  # fmt: skip


def _row_name(bit: int, by_bit: NDArray[np.int64], rows: NDArray[np.int64], place: int) -> str:
    """The bit's number, after the name of its field where that begins."""
    field = by_bit[min(bit, len(by_bit) - 1)]
    above = by_bit[min(int(rows[place - 1]), len(by_bit) - 1)] if place else -1
    return f"{FIELDS[field]}  {bit}" if field != above and FIELDS[field] != "value" else str(bit)


def _edges(by_bit: NDArray[np.int64], rows: NDArray[np.int64]) -> list[int]:
    of_rows = by_bit[np.minimum(rows, len(by_bit) - 1)]
    return (np.flatnonzero(np.diff(of_rows)) + 1).tolist()


def _caption() -> str:
    return (
        "Each cell says how many of the trials whose only flip hit this bit of this layer ended degraded or "
        "collapsed, of how many. Empty: no trial hit it. Trials with more flips are left out, since which of "
        "them did the harm is not known. All cells of the campaign are pooled."
    )
