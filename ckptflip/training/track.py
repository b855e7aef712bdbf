"""What one run recorded: a header and one row per epoch, as JSON lines on disk."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import msgspec

from ckptflip.checkpoints.files import open_plain
from ckptflip.errors import RecordError

SCHEMA = "track/1"
# What a model has that knows nothing; 0 for metrics that are not listed.
CHANCE = {"auc": 0.5}


class Flips(msgspec.Struct, frozen=True, kw_only=True):
    """What was altered in the checkpoint a run started from.

    Attributes:
        record: the record's file name.
        counts: the counts in the record's header, as they stand there; empty where it has none.
    """

    record: str
    counts: dict[str, Any] = {}


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """Which run the rows belong to.

    Attributes:
        workload: the workload's name.
        seed: seed of a run from the start; None for a resumed one, whose checkpoint holds it.
        checkpoint: the checkpoint that was resumed, as given; None for a run from the start.
        start_epoch: epoch of the first row.
        until: epoch of the last row if nothing stops the run.
        label: what runs of the same kind share, for figures.
        flips: what was altered in the checkpoint; None for a clean run.
        versions: of ckptflip, Python and the framework.
    """

    schema: str = SCHEMA
    workload: str
    seed: int | None = None
    checkpoint: str | None = None
    start_epoch: int
    until: int
    label: str | None = None
    flips: Flips | None = None
    versions: dict[str, str] = {}


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One epoch. None: not measured, as the training loss of a state that was only evaluated.

    Attributes:
        epoch: epochs trained when this was measured.
        train_loss: mean loss over the epoch's samples.
        grad_norm: L2 norm of the gradient, mean over the epoch's steps.
        loss: loss on the test set.
        accuracy: on the test set, 0 to 1.
        nan: weights that are NaN.
        inf: weights that are infinite.
        extreme: weights beyond the workload's threshold.
        seconds: wall time of training and evaluation.
        extra: whatever else the workload returned; names of training's values begin with ``train_``.
    """

    epoch: int
    train_loss: float | None = None
    grad_norm: float | None = None
    loss: float | None = None
    accuracy: float | None = None
    nan: int | None = None
    inf: int | None = None
    extreme: int | None = None
    seconds: float = 0.0
    extra: dict[str, float] = {}

    def value(self, metric: str) -> float | None:
        """A measured value by its name, or None.

        Example:
            >>> Row(epoch=1, accuracy=0.9, extra={"auc": 0.8}).value("auc")
            0.8
        """
        if metric in self.__struct_fields__ and metric != "extra":
            value: float | None = getattr(self, metric)
            return value
        return self.extra.get(metric)


class Track(msgspec.Struct, frozen=True):
    """A run's header and rows, in the order of the epochs."""

    header: Header
    rows: tuple[Row, ...]

    @property
    def clean(self) -> bool:
        """Whether nothing was altered before the run."""
        return self.header.flips is None


class Writer:
    """Appends rows to a track's file; each is on its way to disk before the next epoch begins."""

    def __init__(self, file: TextIO, header: Header) -> None:
        self._file = file
        self._header = header
        self._rows: list[Row] = []
        self._line(header)

    @property
    def track(self) -> Track:
        """What was written so far."""
        return Track(self._header, tuple(self._rows))

    def append(self, row: Row) -> None:
        """Write one row and flush it."""
        self._rows.append(row)
        self._line(row)

    def _line(self, content: msgspec.Struct) -> None:
        # JSON has no NaN: msgspec would write null, which says "not measured".
        self._file.write(msgspec.json.encode(_spelled(msgspec.to_builtins(content))).decode() + "\n")
        self._file.flush()


@contextmanager
def writing(path: Path, header: Header) -> Iterator[Writer]:
    """Open a track for writing; an existing file is replaced, the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        yield Writer(file, header)


def collapsed(track: Track, clean: float, metric: str = "accuracy") -> bool:
    """Whether a run collapsed: its last loss is not finite, or its last value fell too far.

    Too far is below half the clean run's value; for the AUC, where a model that knows nothing has 0.5, below
    halfway between that and the clean run's value.

    Args:
        track: the run.
        clean: the clean run's final value, 0 to 1.
        metric: ``accuracy``, ``auc`` or another value of which more is better.

    Example:
        >>> header = Header(workload="w", start_epoch=3, until=3)
        >>> collapsed(Track(header, (Row(epoch=3, extra={"auc": 0.55}),)), 0.8, "auc")
        True
        >>> collapsed(Track(header, (Row(epoch=3, accuracy=0.55),)), 0.8)
        False
    """
    last = track.rows[-1]
    broken = last.loss is not None and not math.isfinite(last.loss)
    value, chance = last.value(metric), CHANCE.get(metric, 0.0)
    return broken or value is None or not value >= chance + (clean - chance) / 2


def read(path: str | Path) -> Track:
    """Read a track: its file, or the folder of a run that holds ``track.jsonl``.

    A last line that was cut off, as a killed run leaves it, is left out.

    Raises:
        RecordError: the file is missing or not a track; the message names the line.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "track.jsonl"
    try:
        with open_plain(path) as file:
            lines = file.read().split(b"\n")
    except FileNotFoundError as error:
        raise RecordError(f"there is no track {path}") from error
    except OSError as error:
        raise RecordError(f"track {path} cannot be read: {error.strerror}") from error
    # Every complete line ends with a newline, so what follows the last one is the cut-off rest.
    del lines[-1]
    if not lines:
        raise RecordError(f"{path} is not a track: it has no header")
    header = _parsed(lines[0], Header, path, 1)
    if header.schema != SCHEMA:
        raise RecordError(f"{path} is not a track of the form {SCHEMA}, but {header.schema!r}")
    rows = (_parsed(line, Row, path, number) for number, line in enumerate(lines[1:], start=2))
    return Track(header, tuple(rows))


def _parsed(line: bytes, kind: type, path: Path, number: int) -> Any:
    try:
        decoded = msgspec.json.decode(line)
        if isinstance(decoded, dict) and "policies" in decoded:
            raise RecordError(f"{path} is a record of flips, not a track of a run (.track.jsonl)")
        return msgspec.convert(decoded, kind, strict=False)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise RecordError(f"{path}, line {number}: not a track's {kind.__name__.lower()}: {error}") from error


def _spelled(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if isinstance(value, dict):
        return {key: _spelled(item) for key, item in value.items()}
    return value
