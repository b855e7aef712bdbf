"""A running training against a stored baseline: compared epoch by epoch, and written down as a track."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from ckptflip import __version__
from ckptflip.errors import UsageError
from ckptflip.training.track import Flips, Header, Row, Track, Writer, collapsed, read, writing

# What frameworks and their users call what a track's rows hold; the first that was logged counts.
LOGGED = {
    "train_loss": ("train_loss", "loss"),
    "loss": ("val_loss", "valid_loss", "eval_loss", "test_loss"),
    "accuracy": (
        *("val_accuracy", "val_acc", "valid_accuracy", "valid_acc", "eval_accuracy", "test_accuracy"),
        *("val_sparse_categorical_accuracy", "val_categorical_accuracy", "val_binary_accuracy"),
    ),
}


class Comparison(Struct, frozen=True):
    """One epoch of the live run beside the same epoch of the baseline.

    Attributes:
        epoch: epochs trained when this was measured.
        metric: what is compared.
        value: the live run's; None where it was not measured.
        baseline: the stored run's; None where it has no such epoch, or did not measure it.
        collapsed: as `ckptflip.training.track.collapsed` says of a run that ends here, measured against the
            baseline's accuracy at this epoch; False where the baseline has none.
    """

    epoch: int
    metric: str
    value: float | None
    baseline: float | None
    collapsed: bool

    @property
    def difference(self) -> float | None:
        """The live value less the baseline's; None where either is missing."""
        if self.value is None or self.baseline is None:
            return None
        return self.value - self.baseline

    def __str__(self) -> str:
        said = f"epoch {self.epoch}: {self.metric} "
        said += "not measured" if self.value is None else f"{self.value:.4g}"
        if self.baseline is not None:
            said += f", baseline {self.baseline:.4g}"
        if self.difference is not None:
            said += f" ({self.difference:+.4g})"
        return said + (", collapsed" if self.collapsed else "")


class ConvergenceTracker:
    """Compares a live run with a stored baseline and writes the run's own track, for ``ckptflip plot``.

    The adapters `KerasTracker`, `LightningTracker`, `TrainerTracker` and `SkorchTracker` feed it what their
    frameworks log. A loop of your own calls `begin`, then `epoch` after every epoch, then `end`, or uses it
    in a ``with`` statement.

    Args:
        baseline: the clean run: a `Track`, its file, or the folder of a run that holds ``track.jsonl``.
        out: where the live run's track goes; None keeps it in memory alone. Rows of an interrupted run that
            is resumed are kept.
        metric: what is compared: ``accuracy``, ``loss``, ``train_loss`` or another value of the baseline. By
            default the first of these three that it holds.
        names: what your framework logs a value as, where that is not found: ``{"accuracy": "my_top1"}``.
        workload: the run's name in its track; by default the baseline's.
        label: what runs of the same kind share, for figures.
        altered: the name of the record, or whatever tells why this run is not clean; None: it is clean.
        overwrite: whether `out` may replace another run's track.
        report: called with every `Comparison`.

    Attributes:
        comparisons: one for each epoch so far.

    Raises:
        RecordError: the baseline cannot be read.
        UsageError: it holds nothing to compare, or `out` exists.

    Example:
        >>> clean = Track(Header(workload="w", start_epoch=0, until=2), (Row(epoch=1, accuracy=0.8),))
        >>> with ConvergenceTracker(clean) as tracker:
        ...     print(tracker.epoch(Row(epoch=1, accuracy=0.3)))
        epoch 1: accuracy 0.3, baseline 0.8 (-0.5), collapsed
    """

    def __init__(
        self,
        baseline: Track | str | Path,
        out: str | Path | None = None,
        *,
        metric: str | None = None,
        names: Mapping[str, str] | None = None,
        workload: str | None = None,
        label: str | None = None,
        altered: str | None = None,
        overwrite: bool = False,
        report: Callable[[Comparison], None] | None = None,
    ) -> None:
        self.baseline = baseline if isinstance(baseline, Track) else read(baseline)
        self._out = Path(out) if out is not None else None
        self._metric = _metric(self.baseline, metric)
        self._names = dict(names or {})
        self._about = (workload or self.baseline.header.workload, label, altered)
        self._overwrite, self._report = overwrite, report
        self._rows = {row.epoch: row for row in self.baseline.rows}
        self._stack = contextlib.ExitStack()
        self._writer: Writer | None = None
        self._header: Header | None = None
        self._kept: list[Row] = []
        self._began = 0.0
        self.comparisons: list[Comparison] = []
        if self._out is not None and self._out.is_dir():
            raise UsageError(
                f"{self._out} is a folder: name the track's file, such as {self._out}/track.jsonl"
            )

    @property
    def track(self) -> Track:
        """What the live run recorded so far."""
        if self._header is None:
            raise UsageError("the run has not begun: there is no track yet")
        return Track(self._header, tuple(self._kept))

    @property
    def collapsed(self) -> bool:
        """Whether the live run had collapsed at its last epoch."""
        return bool(self.comparisons) and self.comparisons[-1].collapsed

    def begin(self, until: int | None = None, start: int = 0, seed: int | None = None) -> None:
        """Start the run's track.

        Args:
            until: the last epoch if nothing stops the run; by default the baseline's.
            start: epochs trained already. Above 0, rows that `out` holds of the epochs up to it are kept.
            seed: the run's, where it has one.

        Raises:
            UsageError: `out` exists, and this run does not go on from what it holds.
            RecordError: it is to be gone on from, and is no track.
        """
        self.end()
        name, label, altered = self._about
        flips = Flips(record=altered) if altered is not None else None
        header = Header(
            workload=name, seed=seed, start_epoch=start, until=until or self.baseline.header.until,
            label=label, flips=flips, versions=_versions(),
        )  # fmt: skip
        self.comparisons.clear()
        self._kept.clear()
        earlier = self._earlier(start)
        self._header = replace(header, start_epoch=min([start, *(row.epoch for row in earlier)]))
        if self._out is not None:
            self._writer = self._stack.enter_context(writing(self._out, self._header))
        for row in earlier:
            self._add(row)
        self._began = time.perf_counter()

    def epoch(self, row: Row) -> Comparison:
        """Record one epoch and compare it."""
        if self._header is None:
            self.begin()
        self._add(row)
        now = self.comparisons[-1]
        if self._report is not None:
            self._report(now)
        return now

    def logged(self, epoch: int, values: Mapping[str, Any]) -> Comparison:
        """Record one epoch of what a framework logged, by the names it has there (see `LOGGED`).

        Values that are no numbers are left out; those that a row has no field for are kept as its extras.

        Args:
            epoch: epochs trained.
            values: by name: numbers, or anything that ``float()`` takes.
        """
        now = time.perf_counter()
        seconds, self._began = now - self._began if self._header is not None else 0.0, now
        return self.epoch(row_of(epoch, values, self._names, seconds))

    def end(self) -> None:
        """Close the track; calling it twice is allowed."""
        self._stack.close()
        self._writer = None

    def __enter__(self) -> ConvergenceTracker:
        self.begin()
        return self

    def __exit__(self, *raised: object) -> None:
        self.end()

    def _add(self, row: Row) -> None:
        self._kept.append(row)
        if self._writer is not None:
            self._writer.append(row)
        base = self._rows.get(row.epoch)
        fell = base is not None and base.accuracy is not None and self._fell(row, base.accuracy)
        lost = row.loss is not None and not math.isfinite(row.loss)
        there = None if base is None else base.value(self._metric)
        self.comparisons.append(
            Comparison(row.epoch, self._metric, row.value(self._metric), there, fell or lost)
        )

    def _fell(self, row: Row, clean: float) -> bool:
        assert self._header is not None
        return row.accuracy is not None and collapsed(Track(self._header, (row,)), clean)

    def _earlier(self, start: int) -> list[Row]:
        """Rows of the run that this one goes on from."""
        if self._out is None or not self._out.exists() or self._overwrite:
            return []
        if start == 0:
            raise UsageError(f"{self._out} exists already: choose another place, or pass overwrite=True")
        return [row for row in read(self._out).rows if row.epoch <= start]


def row_of(epoch: int, values: Mapping[str, Any], names: Mapping[str, str], seconds: float = 0.0) -> Row:
    """A track's row of what a framework logged.

    Example:
        >>> row = row_of(1, {"loss": 0.5, "val_loss": 0.7, "val_acc": 0.9, "lr": 0.1}, {})
        >>> row.train_loss, row.loss, row.accuracy, row.extra
        (0.5, 0.7, 0.9, {'lr': 0.1})
    """
    numbers = {name: number for name, value in values.items() if (number := _number(value)) is not None}
    fields: dict[str, float] = {}
    for field, usual in LOGGED.items():
        wanted = (names[field],) if field in names else usual
        found = next((name for name in wanted if name in numbers), None)
        if found is not None:
            fields[field] = numbers.pop(found)
    return Row(
        epoch=epoch,
        train_loss=fields.get("train_loss"),
        loss=fields.get("loss"),
        accuracy=fields.get("accuracy"),
        seconds=seconds,
        extra=numbers,
    )


def _number(value: Any) -> float | None:
    try:
        return None if isinstance(value, (str, bytes, bool)) else float(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def _metric(baseline: Track, metric: str | None) -> str:
    """What is compared, checked against what the baseline holds."""
    wanted = (metric,) if metric is not None else ("accuracy", "loss", "train_loss")
    for name in wanted:
        if any(row.value(name) is not None for row in baseline.rows):
            return name
    held = sorted({n for row in baseline.rows for n in (*LOGGED, *row.extra) if row.value(n) is not None})
    asked = repr(metric) if metric else " or ".join(wanted)
    raise UsageError(f"the baseline holds no {asked}; it holds {', '.join(held) or 'nothing measured'}")


def _versions() -> dict[str, str]:
    loaded = ("numpy", "torch", "keras", "tensorflow", "jax", "lightning", "transformers", "skorch")
    found = {
        name: str(getattr(sys.modules[name], "__version__", "")) for name in loaded if name in sys.modules
    }
    return {"ckptflip": __version__, "python": sys.version.split()[0], **found}
