"""One trial: alter a copy of a clean checkpoint, resume it, follow it until its outcome is settled."""

from __future__ import annotations

import glob
import os
import platform
import shutil
import tempfile
import time
from functools import cache
from pathlib import Path

import msgspec

from ckptflip.campaign import worker
from ckptflip.campaign.outcomes import nonfinite
from ckptflip.campaign.task import Flips, Spread, TrialResult, TrialTask
from ckptflip.errors import WorkloadError
from ckptflip.faults.record import Record
from ckptflip.propagation import propagation
from ckptflip.training import harness
from ckptflip.training.track import Row
from ckptflip.training.workload import Workload

_COLUMNS = {"tensor": "<i4", "word": "<i8", "hit": "<u8", "before": "<u8", "after": "<u8"}
# Not a result: it differs from run to run.
_TIMES = ("epoch", "seconds", "extra")


# Where a trial's altered checkpoint lies: by machine and process, so that a dead one's is known.
_PREFIX = f"ckptflip-trial-{platform.node()}-"


@cache
def _sweep() -> None:
    """Remove what processes of this machine left that were killed amid a trial."""
    for path in Path(tempfile.gettempdir()).glob(f"{glob.escape(_PREFIX)}*-*"):
        owner = path.name.removeprefix(_PREFIX).partition("-")[0]
        try:
            os.kill(int(owner), 0)
        except ProcessLookupError:
            shutil.rmtree(path, ignore_errors=True)
        except (OSError, ValueError, OverflowError):
            continue


class Rows:
    """A trial's rows as columns; what was not measured in a row is None."""

    def __init__(self) -> None:
        self.epochs: list[int] = []
        self.values: dict[str, list[float | None]] = {}

    def append(self, row: Row) -> None:
        """Add a row."""
        measured: dict[str, float | None] = {
            name: getattr(row, name) for name in row.__struct_fields__ if name not in _TIMES
        }
        measured |= row.extra
        for name in [
            *self.values,
            *(n for n, v in measured.items() if v is not None and n not in self.values),
        ]:
            column = self.values.setdefault(name, [None] * len(self.epochs))
            value = measured.get(name)
            column.append(None if value is None else float(value))
        self.epochs.append(row.epoch)

    def columns(self) -> dict[str, tuple[float | None, ...]]:
        """The columns by metric."""
        return {name: tuple(values) for name, values in self.values.items()}


def run(task: TrialTask) -> TrialResult:
    """Carry out a trial.

    Raises:
        CkptflipError: the checkpoint cannot be altered or taken up, or the recipe fails.
    """
    began = time.perf_counter()
    workload = worker.workload_of(task.workload, _seed_of_run(task), task.keras_backend)
    _sweep()
    folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
    try:
        altered, record = _altered(task, folder)
        injected = time.perf_counter()
        _load(workload, altered, task)
        loaded = time.perf_counter()
        rows, ended, spread = _followed(workload, task, folder)
        return TrialResult(
            epochs=tuple(rows.epochs),
            values=rows.columns(),
            ended=ended,
            digest=_digest(workload),
            counts=record.header.counts if record is not None else None,
            flips=_flips(record, task.most_flips) if record is not None else None,
            spread=spread,
            seconds={
                "inject": injected - began,
                "load": loaded - injected,
                "train": time.perf_counter() - loaded,
                "total": time.perf_counter() - began,
            },
            versions=harness.versions(),
            host=worker.host(),
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _seed_of_run(task: TrialTask) -> int:
    """Which clean run a checkpoint is of, as its folder says; it only chooses among kept models."""
    digits = Path(task.checkpoint).parent.name.rpartition("_")[2]
    return int(digits) if digits.isdecimal() else 0


def _altered(task: TrialTask, folder: Path) -> tuple[Path, Record | None]:
    """The checkpoint that the trial starts from, and what was altered in it."""
    import ckptflip

    source = Path(task.checkpoint)
    if task.policy is None:
        return source, None
    out = folder / f"altered{source.suffix}"
    if task.reference is None:
        return out, ckptflip.inject(source, out=out, policy=task.policy, seed=task.seed)
    drawn = ckptflip.inject(task.reference, out=out, policy=task.policy, seed=task.seed, dry_run=True)
    return out, ckptflip.replay(drawn, source, out=out, map="auto", source=task.reference)


def _load(workload: Workload, path: Path, task: TrialTask) -> None:
    getattr(workload, "reload", workload.load)(path)
    if workload.epoch != task.epoch:
        raise WorkloadError(
            f"{task.checkpoint} should be of epoch {task.epoch}; altered, it says {workload.epoch}: "
            "leave counters out of what may be hit (roles)"
        )


def _followed(workload: Workload, task: TrialTask, folder: Path) -> tuple[Rows, str, tuple[Spread, ...]]:
    rows = Rows()
    spread: list[Spread] = []
    for row in harness.follow(workload, task.until):
        rows.append(row)
        if row.epoch in task.propagation:
            spread.append(_spread(workload, row.epoch, task, folder))
        if task.collapsed and nonfinite(rows.values, len(rows.epochs) - 1):
            return rows, "collapsed", tuple(spread)
        looked = task.identical and row.epoch < task.until and row.epoch in task.clean
        if looked and _digest(workload) == task.clean[row.epoch]:
            # From here on nothing differs, in any layer.
            later = [epoch for epoch in task.propagation if epoch > row.epoch]
            spread += [_unspread(task.propagation[epoch], epoch) for epoch in later]
            return rows, "identical", tuple(spread)
    return rows, "horizon", tuple(spread)


def _spread(workload: Workload, epoch: int, task: TrialTask, folder: Path) -> Spread:
    path = folder / f"spread{harness.suffix_of(workload)}"
    workload.save(path)
    layers = propagation(task.propagation[epoch], path)
    return Spread(epoch=epoch, layers=tuple(msgspec.structs.asdict(layer) for layer in layers))


def _unspread(clean: str, epoch: int) -> Spread:
    """What is found where nothing differs: the clean checkpoint against itself."""
    layers = propagation(clean, clean)
    return Spread(epoch=epoch, layers=tuple(msgspec.structs.asdict(layer) for layer in layers))


def _digest(workload: Workload) -> str:
    digest = getattr(workload, "digest", None)
    return digest() if digest is not None else ""


def _flips(record: Record, most: int) -> Flips | None:
    if len(record) > most:
        return None
    columns = {name: getattr(record.plan, name).astype(kind).tobytes() for name, kind in _COLUMNS.items()}
    return Flips(tensors=record.header.tensors, **columns)
