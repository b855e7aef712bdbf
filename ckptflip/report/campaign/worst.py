"""The worst trials with what was flipped in them, and the trials that came to no end."""

from __future__ import annotations

import signal
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ckptflip.bits import to_values
from ckptflip.bits.formats import NumberFormat, lookup_name
from ckptflip.errors import UsageError
from ckptflip.report.campaign.gathering import Gathered
from ckptflip.report.campaign.words import NONE, exactly

# Words that are listed of a trial, and failed trials that are listed at all.
_MOST_FLIPS, _MOST_FAILED = 8, 50


class FlipRow(NamedTuple):
    """A word that was hit, as text; names are strangers'."""

    tensor: str
    element: str
    bits: str
    before: str
    after: str
    value_before: str
    value_after: str


class WorstRow(NamedTuple):
    """A trial that ended badly.

    Attributes:
        cell: name of its cell.
        number: in its cell.
        stratum: what it was drawn from; empty where there are no strata.
        seed: of its draw.
        run_seed: of the clean run.
        outcome: degraded or collapsed.
        ended: the last epoch that was trained; -1 where not known.
        final: the metric there; NaN of a collapsed trial.
        clean: the clean run's.
        words: how many words were hit.
        kept: whether they were kept one by one.
        flips: the first of them.
        more: how many more there are.
    """

    cell: str
    number: int
    stratum: str
    seed: int
    run_seed: int | None
    outcome: str
    ended: int
    final: float
    clean: float
    words: int
    kept: bool
    flips: list[FlipRow]
    more: int


class FailedRow(NamedTuple):
    """A trial that came to no end."""

    cell: str
    number: int
    state: str
    signal: str
    message: str


def worst(gathered: Gathered) -> list[WorstRow]:
    """The worst trials, collapsed ones first."""
    trials = gathered.trials
    names = {cell.id: gathered.name(cell) for cell in gathered.cells}
    seeds = {run.id: run.seed for run in gathered.runs}
    strata = {
        s.id: " · ".join(filter(None, (s.layer, s.field))) for each in gathered.strata.values() for s in each
    }
    rows = []
    for at in gathered.worst:
        places = np.flatnonzero(gathered.worst_flips.trial == trials.id[at])
        rows.append(
            WorstRow(
                names[int(trials.cell[at])], int(trials.number[at]), strata.get(int(trials.stratum[at]), ""),
                int(trials.seed[at]), seeds.get(int(trials.run[at])), str(trials.outcome[at]),
                int(trials.ended_epoch[at]), float(trials.final[at]), float(trials.clean_final[at]),
                int(trials.words_hit[at]), bool(trials.flips_kept[at]),
                [_flip(gathered, int(place)) for place in _drastic(gathered, places)[:_MOST_FLIPS]],
                max(int(trials.words_hit[at]), len(places)) - min(len(places), _MOST_FLIPS),
            )
        )  # fmt: skip
    return rows


def _drastic(gathered: Gathered, places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Flips by what they did to the value: no longer finite ones first, then by how far it moved."""
    flips = gathered.worst_flips
    moved = np.zeros(len(places))
    for tensor in np.unique(flips.tensor[places]).tolist():
        row = gathered.tensors.get(tensor)
        number = _number(row.dtype) if row else None
        inside = flips.tensor[places] == tensor
        words = [column[places[inside]] for column in (flips.before, flips.after)]
        if number is None or any((word >> np.uint64(number.part_width - 1) > 1).any() for word in words):
            continue
        before, after = (to_values(w.astype(number.word_dtype), number).astype(np.float64) for w in words)
        with np.errstate(all="ignore"):
            far = np.abs(after - before)
        moved[inside] = np.where(np.isfinite(after) & np.isfinite(before), far, np.inf)
    return places[np.argsort(-moved, kind="stable")]


def _flip(gathered: Gathered, place: int) -> FlipRow:
    flips = gathered.worst_flips
    before, after, hit = (int(column[place]) for column in (flips.before, flips.after, flips.hit))
    word = int(flips.word[place])
    row = gathered.tensors.get(int(flips.tensor[place]))
    if row is None:
        return FlipRow("?", str(word), _bits(hit), f"{before:x}", f"{after:x}", NONE, NONE)
    number = _number(row.dtype)
    parts = number.parts if number else 1
    digits = number.word_size * 2 if number else 1
    element = _element(word // parts, row.shape) + (f" part {word % parts}" if parts > 1 else "")
    return FlipRow(
        row.name, element, _bits(hit), f"{before:0{digits}x}", f"{after:0{digits}x}",
        _value(before, number), _value(after, number),
    )  # fmt: skip


def _number(dtype: str) -> NumberFormat | None:
    try:
        return lookup_name(dtype.removeprefix(">"))
    except UsageError:
        return None


def _element(flat: int, shape: tuple[int, ...]) -> str:
    if not shape or flat >= int(np.prod(shape, dtype=object)):
        return str(flat)
    return f"[{', '.join(str(int(i)) for i in np.unravel_index(flat, shape))}]"


def _bits(hit: int) -> str:
    return ", ".join(str(bit) for bit in range(hit.bit_length() - 1, -1, -1) if hit >> bit & 1)


def _value(word: int, number: NumberFormat | None) -> str:
    if number is None or word >> number.part_width:
        return NONE
    value: Any = to_values(np.array([word], number.word_dtype), number)[0]
    return exactly(value.item())


def failed(gathered: Gathered) -> tuple[list[FailedRow], int]:
    """The trials that came to no end, in the order of the spec, and how many more there are."""
    trials = gathered.trials
    names = {cell.id: (cell.position, gathered.name(cell)) for cell in gathered.cells}
    names |= {
        cell.id: (cell.position, f"{cell.label}, {cell.workload}, epoch {cell.epoch}")
        for cell in gathered.controls
    }
    found = np.flatnonzero(trials.state != "done").tolist()
    found.sort(key=lambda at: (names[int(trials.cell[at])][0], int(trials.number[at])))
    rows = [
        FailedRow(
            names[int(trials.cell[at])][1], int(trials.number[at]), str(trials.state[at]),
            signal_name(int(trials.signal[at])), str(trials.message[at]),
        )
        for at in found[:_MOST_FAILED]
    ]  # fmt: skip
    return rows, len(found) - len(rows)


def signal_name(code: int) -> str:
    """The name of a signal; empty for none.

    Example:
        >>> signal_name(9), signal_name(0)
        ('SIGKILL (9)', '')
    """
    if not code:
        return ""
    try:
        return f"{signal.Signals(abs(code)).name} ({abs(code)})"
    except ValueError:
        return str(abs(code))
