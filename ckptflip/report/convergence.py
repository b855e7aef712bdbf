"""The convergence figure: runs from altered checkpoints against the clean run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ckptflip.errors import UsageError
from ckptflip.report.style import COLOURS, LINES, NAMES, blank, checked
from ckptflip.report.style import save as _save
from ckptflip.training.track import Track, collapsed, read

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Values from 0 to 1 of which more is better: runs can collapse in them.
_SHARES = ("accuracy", "auc")
# Measures of click predictions of which less is better.
_LOWER = ("ne", "ece", "auc_se", "unscored")
# More labels than this no legend can hold: the rest share one grey.
_MOST_LABELS = 12
# The whole picture of such a value.
_WHOLE = (-0.02, 1.02)
# A panel that shows only the clean run's surroundings is added when these are so much smaller than the whole.
_ZOOM = 5.0


@dataclass(frozen=True, slots=True)
class _Group:
    """Tracks of one label, and how they are drawn."""

    label: str
    tracks: list[Track]
    colour: str
    line: str = "-"
    clean: bool = False


def plot(
    tracks: Sequence[Track | str | Path],
    out: str | Path,
    metric: str = "accuracy",
    *,
    clean: Track | str | Path | None = None,
    title: str | None = None,
) -> None:
    """Draw a metric over the epochs: one colour per label, thin lines for runs, a thick one for their median.

    Values that are not finite leave a gap, and a cross at the edge where the first one occurred. A dotted
    line marks each epoch at which a checkpoint was altered. Where a picture from 0 to 1 squeezes runs
    together, a second panel shows the surroundings of the clean run.

    Args:
        tracks: tracks, their files, or folders of runs.
        out: a file ending in .png, .svg or .pdf.
        metric: ``accuracy``, ``loss``, ``train_loss``, ``grad_norm`` or another value that the tracks hold.
        clean: the clean run. By default every track whose header says that nothing was altered.
        title: over the figure; none by default.

    Raises:
        UsageError: another suffix, no tracks, or none that holds the metric.
        RecordError: a track cannot be read.
    """
    out = checked(out)
    loaded = [track if isinstance(track, Track) else read(track) for track in tracks]
    if clean is not None:
        chosen = clean if isinstance(clean, Track) else read(clean)
        loaded = [chosen, *(track for track in loaded if track != chosen)]
    usable = [track for track in loaded if any(row.value(metric) is not None for row in track.rows)]
    if not usable:
        held = ", ".join(sorted({name for track in loaded for name in _metrics(track)}))
        raise UsageError(f"no track holds the metric {metric!r}; held are: {held or 'none'}")
    groups = _grouped(usable, None if clean is None else loaded[0])
    _save(_figure(groups, metric, title), out)


def _figure(groups: list[_Group], metric: str, title: str | None) -> Figure:
    near = _surroundings(groups, metric)
    figure = blank(9.6, 6.4 if near else 4.8)
    panels = figure.subplots(2 if near else 1, 1, sharex=True, squeeze=False)[:, 0]
    for axes in panels:
        for group in groups:
            _draw(axes, group, metric)
        _mark_flips(axes, groups)
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.02)
    _scale(panels[-1], groups, metric)
    if near:
        panels[0].set_ylim(*near)
        panels[0].set_title("around the clean run", loc="right", fontsize=9, color="0.35")
        panels[1].set_title("all of it", loc="right", fontsize=9, color="0.35")
    panels[-1].set_xlabel("epoch")
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    figure.supylabel(NAMES.get(metric, metric), fontsize=10)
    _legend(figure, groups, metric)
    if title:
        figure.suptitle(title)
    return figure


def _draw(axes: Axes, group: _Group, metric: str) -> None:
    curves = [_curve(track, metric) for track in group.tracks]
    many = len(curves) > 1
    # The clean curve is wide and lies below, so that a curve which equals it leaves it visible.
    width, below = (3.6, 2.0) if group.clean else (1.6, 3.0)
    style: dict[str, Any] = {"color": group.colour, "linestyle": group.line, "solid_capstyle": "round"}
    for epochs, values in curves:
        look = style | ({"linewidth": 0.8, "alpha": 0.45} if many else {"linewidth": width})
        look |= {"marker": "o", "markersize": 4} if len(epochs) == 1 else {}
        axes.plot(epochs, np.where(np.isfinite(values), values, np.nan), zorder=below, **look)
        lost = epochs[~np.isfinite(values)]
        if len(lost):
            axes.plot(
                lost[0], 0.02 if _higher_is_better(metric) else 0.98, "x", color=group.colour, markersize=7,
                markeredgewidth=1.8, transform=axes.get_xaxis_transform(), clip_on=False, zorder=5,
            )  # fmt: skip
    if many:
        epochs, values = _median(curves, metric)
        axes.plot(epochs, values, linewidth=max(width, 2.0), zorder=below + 0.5, **style)


def _curve(track: Track, metric: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(row.epoch, row.value(metric)) for row in track.rows]
    measured = [(epoch, value) for epoch, value in pairs if value is not None]
    return np.array([epoch for epoch, _ in measured]), np.array([value for _, value in measured], dtype=float)


def _median(curves: list[tuple[np.ndarray, np.ndarray]], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """The median run per epoch; a value that is not finite counts as the worst of all."""
    worst = -math.inf if _higher_is_better(metric) else math.inf
    epochs = np.unique(np.concatenate([epochs for epochs, _ in curves]))
    medians = np.full(len(epochs), np.nan)
    for place, epoch in enumerate(epochs):
        found = np.concatenate([values[when == epoch] for when, values in curves])
        # A value that occurred: between two the mean could be infinity less infinity.
        middle = np.quantile(np.where(np.isfinite(found), found, worst), 0.5, method="lower")
        medians[place] = middle if math.isfinite(middle) else np.nan
    return epochs, medians


def _grouped(tracks: list[Track], chosen: Track | None) -> list[_Group]:
    clean = [track for track in tracks if (track.clean if chosen is None else track is chosen)]
    faulty: dict[str, list[Track]] = {}
    unlabelled = sum(track.header.label is None for track in tracks) - len(clean)
    for track in tracks:
        if not any(track is one for one in clean):
            faulty.setdefault(_label(track, unlabelled), []).append(track)
    groups = [_Group("clean", clean, "#000000", clean=True)] if clean else []
    labels = list(faulty)
    shown = labels if len(labels) <= _MOST_LABELS else labels[: _MOST_LABELS - 1]
    for place, label in enumerate(shown):
        line = LINES[place // len(COLOURS) % len(LINES)]
        groups.append(_Group(label, faulty[label], COLOURS[place % len(COLOURS)], line))
    if rest := labels[len(shown) :]:
        groups.append(
            _Group(f"{len(rest)} further labels", [t for label in rest for t in faulty[label]], "0.6")
        )
    return groups


def _label(track: Track, unlabelled: int) -> str:
    """A track's label; a few without one go by their checkpoint, many are one crowd."""
    header = track.header
    if header.label is not None:
        return header.label
    if unlabelled > _MOST_LABELS // 2:
        return "altered" if header.flips else "not altered"
    return Path(header.checkpoint).stem if header.checkpoint else header.workload


def _mark_flips(axes: Axes, groups: list[_Group]) -> None:
    epochs = {track.header.start_epoch for group in groups if not group.clean for track in group.tracks}
    for epoch in sorted(epochs):
        axes.axvline(epoch, color="0.45", linestyle=(0, (1, 2)), linewidth=1.2, zorder=1)
    if len(epochs) == 1:
        axes.annotate(
            "bits flipped", (epochs.pop(), 1.0), xycoords=("data", "axes fraction"), xytext=(0, 3),
            textcoords="offset points", fontsize=8, color="0.35", ha="center",
        )  # fmt: skip


def _scale(axes: Axes, groups: list[_Group], metric: str) -> None:
    if metric in _SHARES:
        axes.set_ylim(*_WHOLE)
        return
    values = _finite(groups, metric)
    positive = values[values > 0]
    if len(positive) and (values >= 0).all() and positive.max() > 1e3 * positive.min():
        axes.set_yscale("log")


def _surroundings(groups: list[_Group], metric: str) -> tuple[float, float] | None:
    """Limits around the clean run from the flip on, where the whole picture would hide them."""
    faulty = [track for group in groups if not group.clean for track in group.tracks]
    if metric not in _SHARES or not faulty:
        return None
    start = min(track.header.start_epoch for track in faulty)
    near = _finite([group for group in groups if group.clean], metric, start)
    if not len(near):
        return None
    low, high = near.min(), near.max()
    pad = max(high - low, 0.01)
    if _WHOLE[1] - _WHOLE[0] < _ZOOM * 2 * pad:
        return None
    return low - pad, min(high + pad, 1.005)


def _finite(groups: list[_Group], metric: str, start: int = 0) -> Any:
    curves = [_curve(track, metric) for group in groups for track in group.tracks]
    values = np.concatenate([values[epochs >= start] for epochs, values in curves] or [np.empty(0)])
    return values[np.isfinite(values)]


def _legend(figure: Figure, groups: list[_Group], metric: str) -> None:
    from matplotlib.lines import Line2D

    handles: list[Any] = []
    lost = False
    for group in groups:
        notes = [f"{len(group.tracks)} runs"] if len(group.tracks) > 1 else []
        if lost_runs := _collapsed(group, groups, metric):
            notes.append(f"{lost_runs} collapsed" if notes else "collapsed")
        count = f" ({', '.join(notes)})" if notes else ""
        width = 3.6 if group.clean else 2.0
        handles.append(
            Line2D(
                [], [], color=group.colour, linestyle=group.line, linewidth=width, label=group.label + count
            )
        )
        lost = lost or any(not np.isfinite(_curve(track, metric)[1]).all() for track in group.tracks)
    if any(len(group.tracks) > 1 for group in groups):
        handles.append(
            Line2D([], [], color="0.4", linewidth=0.8, alpha=0.6, label="single runs (bold: median)")
        )
    if lost:
        handles.append(Line2D([], [], color="0.4", marker="x", linestyle="", label="no longer finite"))
    figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=8.5)


def _collapsed(group: _Group, groups: list[_Group], metric: str) -> int:
    """Runs that collapsed (see `ckptflip.training.track.collapsed`); 0 where no share is measured."""
    ends = [_curve(track, metric)[1][-1] for one in groups if one.clean for track in one.tracks]
    if metric not in _SHARES or not ends or group.clean:
        return 0
    return sum(collapsed(track, min(ends), metric) for track in group.tracks)


def _metrics(track: Track) -> set[str]:
    numbers = {"accuracy", "loss", "train_loss", "grad_norm", "nan", "inf", "extreme"}
    return {name for row in track.rows for name in numbers | row.extra.keys() if row.value(name) is not None}


def _higher_is_better(metric: str) -> bool:
    return not (metric in _LOWER or metric.endswith(("loss", "norm", "nan", "inf", "extreme")))
