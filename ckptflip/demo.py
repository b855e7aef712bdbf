"""The whole story on the built-in digits: train, flip, resume, compare, draw."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ckptflip.errors import UsageError, WorkloadError
from ckptflip.training import harness
from ckptflip.training.track import Track, collapsed

WORKLOAD = "digits-cnn"
EPOCHS, FLIP_EPOCH = 15, 5
BUT_CRITICAL, CRITICAL = "all,!critical", "critical"
CONDITIONS = ((1, BUT_CRITICAL), (10, BUT_CRITICAL), (100, BUT_CRITICAL), (1000, BUT_CRITICAL),
              (1, CRITICAL), (10, CRITICAL))  # fmt: skip
# Flips are called absorbed when the run ends at most this far below the clean one: 3 of 360 test images.
TOLERANCE = 0.01


@dataclass(frozen=True, slots=True)
class Trial:
    """One resume from an altered checkpoint; accuracies from 0 to 1."""

    count: int
    bits: str
    seed: int
    effective: int
    right_after: float
    final: float
    collapsed: bool


@dataclass(frozen=True, slots=True)
class Findings:
    """What the demo measured.

    Attributes:
        before: accuracy of the clean checkpoint that the flips went into, 0 to 1.
        clean: final accuracy of the clean resume.
        trials: every resume from an altered checkpoint.
        figure: the convergence figure.
    """

    before: float
    clean: float
    trials: tuple[Trial, ...]
    figure: Path

    def table(self) -> str:
        """The trials by condition, as text; accuracies in percent, differences in percentage points."""
        head = (
            "flips",
            "bits",
            "seeds",
            "effective",
            "right after",
            "final",
            "range",
            "to clean",
            "collapsed",
        )
        clean = f"{100 * self.clean:.1f}"
        lines = [head, ("0", "-", "1", "0", f"{100 * self.before:.1f}", clean, clean, "+0.0", "0 of 1")]
        for (count, bits), trials in _by_condition(self.trials).items():
            final = [trial.final for trial in trials]
            middle = statistics.median(final)
            lines.append((
                str(count), "critical" if bits == CRITICAL else "others", str(len(trials)),
                f"{statistics.median(trial.effective for trial in trials):g}",
                f"{100 * statistics.median(trial.right_after for trial in trials):.1f}",
                f"{100 * middle:.1f}", f"{100 * min(final):.1f} to {100 * max(final):.1f}",
                f"{100 * (middle - self.clean):+.1f}", f"{sum(t.collapsed for t in trials)} of {len(trials)}",
            ))  # fmt: skip
        widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
        return "\n".join(
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines
        )

    def conclusions(self) -> tuple[str, str]:
        """Two sentences, on the bits in general and on the critical bit, as the trials came out."""
        return _on_others(self.clean, self.trials), _on_critical(self.clean, self.trials)


def run(out: str | Path, seeds: int = 5, *, progress: Callable[[str], None] | None = None) -> Findings:
    """Train the digits CNN, alter copies of one checkpoint, resume each, compare and draw.

    Args:
        out: folder for checkpoints, records, tracks and ``convergence.png``; a former demo there is replaced.
        seeds: altered copies per condition, 1 or more.
        progress: called with one line per step.

    Raises:
        WorkloadError: the clean resume differs from the uninterrupted run, so nothing could be compared.
    """
    if seeds < 1:
        raise UsageError(f"seeds must be 1 or more, not {seeds}")
    from ckptflip.report import convergence

    say = progress or (lambda line: None)
    out = Path(out)
    say(f"Training {WORKLOAD} for {EPOCHS} epochs")
    straight = harness.train(WORKLOAD, EPOCHS, out / "clean", label="clean", overwrite=True)
    start = out / "clean" / harness.checkpoint_name(FLIP_EPOCH)
    clean = harness.resume(WORKLOAD, start, EPOCHS, save=out / "resumed", label="clean", overwrite=True)
    _check_exact(out, straight, clean)
    say(
        f"Resumed from epoch {FLIP_EPOCH}: at epoch {EPOCHS} the checkpoint equals the uninterrupted run's, "
        f"bit for bit ({_percent(_final(clean))} accuracy)"
    )
    trials, tracks = [], []
    for count, bits in CONDITIONS:
        say(f"{_named(count, bits)} at epoch {FLIP_EPOCH}, resumed to {EPOCHS}: {seeds} seeds")
        for seed in range(1, seeds + 1):
            trial, track = _trial(start, out / "altered", count, bits, seed, _final(clean))
            trials.append(trial)
            tracks.append(track)
    figure = out / "convergence.png"
    title = f"{WORKLOAD}: bits flipped in the checkpoint of epoch {FLIP_EPOCH}"
    convergence.plot([straight, *tracks], figure, title=title)
    return Findings(clean.rows[0].accuracy or 0.0, _final(clean), tuple(trials), figure)


def _trial(start: Path, folder: Path, count: int, bits: str, seed: int, clean: float) -> tuple[Trial, Track]:
    import ckptflip

    folder.mkdir(parents=True, exist_ok=True)
    kind = "critical" if bits == CRITICAL else "others"
    altered = folder / f"{kind}_{count:04d}_seed{seed}.h5"
    record = ckptflip.inject(
        start, out=altered, roles=["model"], bits=bits, count=count, seed=seed, overwrite=True
    )
    track = harness.resume(
        WORKLOAD, altered, EPOCHS, label=_named(count, bits), overwrite=True,
        track=folder / f"{altered.stem}.track.jsonl",
    )  # fmt: skip
    right_after, final = track.rows[0].accuracy or 0.0, _final(track)
    trial = Trial(count, bits, seed, record.bits_effective, right_after, final, collapsed(track, clean))
    return trial, track


def _check_exact(out: Path, straight: Track, clean: Track) -> None:
    """Compare the two last checkpoints byte by byte, and what was measured on the way."""
    last = harness.checkpoint_name(EPOCHS)
    files = [(out / folder / last).read_bytes() for folder in ("clean", "resumed")]
    measured = [
        [(row.epoch, row.accuracy, row.loss) for row in track.rows if row.epoch >= FLIP_EPOCH]
        for track in (straight, clean)
    ]
    if files[0] != files[1] or measured[0] != measured[1]:
        raise WorkloadError(
            f"the clean resume from epoch {FLIP_EPOCH} differs from the uninterrupted run "
            f"({out / 'clean' / last}, {out / 'resumed' / last}): faulty runs cannot be compared with either"
        )


def _on_others(clean: float, trials: Sequence[Trial]) -> str:
    others = [trial for trial in trials if trial.bits == BUT_CRITICAL]
    most = max(trial.count for trial in others)
    worst = min(others, key=lambda trial: trial.final)
    below = [trial for trial in others if clean - trial.final > TOLERANCE or trial.collapsed]
    if not below:
        return (
            f"Training absorbed up to {most} flips of other bits than the critical one: "
            f"all {len(others)} runs ended within {100 * TOLERANCE:g} percentage point of the clean run's "
            f"{_percent(clean)}, or above it."
        )
    lost = sum(trial.collapsed for trial in others)
    return (
        f"Training did not absorb all flips of other bits than the critical one: {len(below)} of "
        f"{len(others)} runs ended more than {100 * TOLERANCE:g} percentage point below the clean run's "
        f"{_percent(clean)} or collapsed ({lost} collapsed); "
        f"the worst, with {_flips(worst.count)}, ended at {_percent(worst.final)}."
    )


def _on_critical(clean: float, trials: Sequence[Trial]) -> str:
    critical = [trial for trial in trials if trial.bits == CRITICAL]
    least = min(trial.count for trial in critical)
    few = [trial for trial in critical if trial.count == least]
    lost = [trial for trial in few if trial.collapsed]
    range_text = " to ".join(dict.fromkeys(_percent(f(t.final for t in few)) for f in (min, max)))
    subject = f"{_flips(least).capitalize()} of the critical bit"
    ended = f"(final accuracy {range_text}, clean {_percent(clean)})"
    if len(lost) == len(few):
        return f"{subject} was enough to make every one of {len(few)} runs collapse {ended}."
    if lost:
        return f"{subject} made {len(lost)} of {len(few)} runs collapse; the others survived it {ended}."
    return f"{subject} made none of {len(few)} runs collapse, against what is usually reported {ended}."


def _by_condition(trials: Sequence[Trial]) -> dict[tuple[int, str], list[Trial]]:
    grouped: dict[tuple[int, str], list[Trial]] = {}
    for trial in trials:
        grouped.setdefault((trial.count, trial.bits), []).append(trial)
    return grouped


def _named(count: int, bits: str) -> str:
    return f"{_flips(count)}, {'critical bit' if bits == CRITICAL else 'other bits'}"


def _flips(count: int) -> str:
    return f"{count} flip" if count == 1 else f"{count} flips"


def _final(track: Track) -> float:
    return track.rows[-1].accuracy or 0.0


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
