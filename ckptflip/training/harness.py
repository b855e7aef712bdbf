"""Run a workload epoch by epoch: from the start, or on from a clean or an altered checkpoint."""

from __future__ import annotations

import platform
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from ckptflip import __version__, record_files
from ckptflip.checkpoints import opened
from ckptflip.errors import CheckpointError, CkptflipError, UsageError, WorkloadError
from ckptflip.matching import in_effect
from ckptflip.protect.seals import seal as write_seal
from ckptflip.protect.seals import verified
from ckptflip.training.track import Flips, Header, Row, Track, Writer, writing
from ckptflip.training.workload import Workload, find

Progress = Callable[[Row], None]
TRACK = "track.jsonl"
# A record or a seal beside a checkpoint goes with it: it would call the checkpoint that replaces it altered.
_EPOCH_FILE = re.compile(r"epoch_\d{3,}(\.h5|\.keras|\.dcp)(\.flips\.(jsonl|h5)|\.seal)?")


def checkpoint_name(epoch: int, suffix: str = ".h5") -> str:
    """Name of the checkpoint after so many epochs.

    Example:
        >>> checkpoint_name(5)
        'epoch_005.h5'
        >>> checkpoint_name(12, ".keras")
        'epoch_012.keras'
    """
    return f"epoch_{epoch:03d}{suffix}"


def train(
    workload: str | Workload,
    epochs: int,
    save: str | Path,
    *,
    seed: int = 0,
    label: str | None = None,
    overwrite: bool = False,
    seal: float | None = None,
    progress: Progress | None = None,
) -> Track:
    """Train from the start; one checkpoint per epoch, the initial state included, and a track.

    Args:
        workload: a workload or its name (see `find`).
        epochs: how many to train, 1 or more.
        save: the folder for ``epoch_000.h5``, ``epoch_001.h5``, … and ``track.jsonl``; the checkpoints of
            Keras workloads end in ``.keras``.
        seed: 0 or more; initial weights, order of the samples and dropout follow from it.
        label: what runs of the same kind share, for figures.
        overwrite: replace the run that the folder holds.
        seal: seal each checkpoint as it is saved, with an erasure code of this share of its size; 0: digests
            alone; None: no seals.
        progress: called with each row as it is recorded.

    Raises:
        UsageError: the folder holds a run already, or a number makes no sense.
    """
    if epochs < 1:
        raise UsageError(f"epochs must be 1 or more, not {epochs}")
    if seed < 0:
        raise UsageError(f"a seed is 0 or more, not {seed}")
    workload = _workload(workload)
    folder = Path(save)
    began = time.perf_counter()
    _asked(workload, "the start", lambda: workload.start(seed))
    _clear(folder, folder / TRACK, overwrite)
    header = Header(
        workload=workload.name, seed=seed, start_epoch=0, until=epochs, label=label, versions=versions()
    )
    with writing(folder / TRACK, header) as writer:
        return _follow(workload, epochs, writer, folder, progress, began, seal)


def resume(
    workload: str | Workload,
    checkpoint: str | Path,
    until: int,
    *,
    save: str | Path | None = None,
    track: str | Path | None = None,
    record: str | Path | None = None,
    label: str | None = None,
    overwrite: bool = False,
    verify: bool = False,
    seal: float | None = None,
    progress: Progress | None = None,
) -> Track:
    """Go on from a checkpoint. The first row is the checkpoint itself, measured before any training.

    Args:
        workload: a workload or its name (see `find`).
        checkpoint: the file to go on from, clean or altered.
        until: the epoch to stop after. The checkpoint's own: it is measured, and nothing is trained.
        save: a folder for a checkpoint per epoch and the track; without it only the track is kept.
        track: the track's file; by default in `save`, else ``<checkpoint's stem>.track.jsonl`` beside it.
        record: the record of what was altered in the checkpoint; by default ``<checkpoint>.flips.jsonl`` or
            ``.flips.h5`` beside it. It marks the run as altered, unless it was undone.
        label: what runs of the same kind share, for figures.
        overwrite: replace the track, and the run in `save`.
        verify: hold the checkpoint against its seal first.
        seal: as for `train`, of the checkpoints in `save`.
        progress: called with each row as it is recorded.

    Raises:
        UsageError: `until` lies before the checkpoint, or a run would be overwritten.
        CheckpointError, WorkloadError: the checkpoint cannot be taken up.
        DamagedCheckpointError, SealError: it was to be verified, and is damaged or has no whole seal.
    """
    workload = _workload(workload)
    checkpoint = Path(checkpoint)
    if checkpoint.is_dir() and checkpoint.suffix != suffix_of(workload):
        raise CheckpointError(f"{checkpoint} is a folder; name a file in it")
    folder = Path(save) if save is not None else None
    track = track_path(checkpoint, folder, track)
    if folder and checkpoint.parent.resolve() == folder.resolve():
        raise UsageError(f"{folder} holds the checkpoint itself: save the resumed run in another folder")
    if verify:
        verified(checkpoint)
    began = time.perf_counter()
    workload.load(checkpoint)
    start = workload.epoch
    if until < start:
        raise UsageError(f"{checkpoint} is at epoch {start}: --until must be {start} or more, not {until}")
    _clear(folder, track, overwrite)
    header = Header(
        workload=workload.name, checkpoint=str(checkpoint), start_epoch=start, until=until, label=label,
        flips=_flips(checkpoint, Path(record) if record is not None else None), versions=versions(),
    )  # fmt: skip
    with writing(track, header) as writer:
        return _follow(workload, until, writer, folder, progress, began, seal)


def track_path(
    checkpoint: str | Path, save: str | Path | None = None, track: str | Path | None = None
) -> Path:
    """Where `resume` keeps its track: as told, else in the folder of the run, else beside the checkpoint.

    Example:
        >>> track_path("runs/epoch_005.h5").name
        'epoch_005.track.jsonl'
    """
    if track is not None:
        return Path(track)
    if save is not None:
        return Path(save) / TRACK
    checkpoint = Path(checkpoint)
    return checkpoint.with_name(f"{checkpoint.stem}.track.jsonl")


def _follow(
    workload: Workload,
    until: int,
    writer: Writer,
    folder: Path | None,
    progress: Progress | None,
    began: float,
    seal: float | None,
) -> Track:
    for row in follow(workload, until, began):
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / checkpoint_name(workload.epoch, suffix_of(workload))
            workload.save(path)
            if seal is not None:
                write_seal(path, repair=seal or None, overwrite=True)
        writer.append(row)
        if progress:
            progress(row)
    return writer.track


def follow(workload: Workload, until: int, began: float | None = None) -> Iterator[Row]:
    """Measure the present state, then train and measure epoch by epoch.

    Args:
        workload: started or loaded.
        until: the epoch to stop after.
        began: when the first row's work began, by `time.perf_counter`; by default now.

    Yields:
        One row per epoch, the present one first; the workload's state is that of the row.

    Raises:
        WorkloadError: the recipe failed; the message says in which epoch.
    """
    began = time.perf_counter() if began is None else began
    trained: dict[str, float] = {}
    while True:
        tested = _asked(workload, f"the evaluation of epoch {workload.epoch}", workload.evaluate)
        yield _row(workload.epoch, trained, tested, time.perf_counter() - began)
        if workload.epoch >= until:
            return
        began = time.perf_counter()
        trained = _trained(workload)


def suffix_of(workload: Workload) -> str:
    """How the names of a workload's checkpoints end."""
    suffix: str = getattr(workload, "suffix", ".h5")
    return suffix


def _trained(workload: Workload) -> dict[str, float]:
    """One epoch, counted."""
    before = workload.epoch
    measured: dict[str, float] = _asked(workload, f"training epoch {before + 1}", workload.train_epoch)
    if workload.epoch != before + 1:
        raise WorkloadError(
            f"{workload.name}: train_epoch() must count one epoch; it went from {before} to {workload.epoch}"
        )
    return measured


def _asked(workload: Workload, what: str, call: Callable[[], Any]) -> Any:
    """Call a workload. An altered state, or a user's recipe, can fail anywhere: that is said in a line."""
    try:
        return call()
    except CkptflipError:
        raise
    except Exception as error:
        raise WorkloadError(
            f"{workload.name}: {what} failed: {type(error).__name__}: {error}. Epochs done before are kept"
        ) from error


def _row(epoch: int, trained: dict[str, float], tested: dict[str, float], seconds: float) -> Row:
    counts = {"nan", "inf", "extreme"}
    known = {"loss", "accuracy"} | counts
    values: dict[str, Any] = {
        name: int(tested[name]) if name in counts else float(tested[name]) for name in known & tested.keys()
    }
    extra = {name: float(value) for name, value in tested.items() if name not in known}
    extra |= {f"train_{name}": float(v) for name, v in trained.items() if name not in ("loss", "grad_norm")}
    return Row(
        epoch=epoch, train_loss=trained.get("loss"), grad_norm=trained.get("grad_norm"), **values,
        seconds=round(seconds, 4), extra=extra,
    )  # fmt: skip


def _workload(workload: str | Workload) -> Workload:
    return find(workload) if isinstance(workload, str) else workload


def _clear(folder: Path | None, track: Path, overwrite: bool) -> None:
    """Make room for a run, or refuse when there is one; files that are no part of a run are left alone."""
    if folder and folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file: name a folder to save the run in")
    old = (
        [path for path in folder.iterdir() if _EPOCH_FILE.fullmatch(path.name)]
        if folder and folder.is_dir()
        else []
    )
    if track.exists():
        old.append(track)
    if old and not overwrite:
        raise UsageError(f"{old[0]} exists already: choose another place, or overwrite the run (--overwrite)")
    for path in old:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _flips(checkpoint: Path, record: Path | None) -> Flips | None:
    """What a record says was altered in a checkpoint; None where there is no record, or it was undone.

    A record that is named must fit; one that merely lies beside the checkpoint is named even if it is odd.
    """
    beside = (checkpoint.with_name(f"{checkpoint.name}.flips{suffix}") for suffix in (".jsonl", ".h5"))
    found = record or next((path for path in beside if path.exists()), None)
    if found is None:
        return None
    try:
        made = record_files.read(found)
        with opened(checkpoint) as target:
            altered = in_effect(made, target)
    except CkptflipError:
        if record is not None:
            raise
        return Flips(record=found.name)
    return Flips(record=found.name, counts=msgspec.structs.asdict(made.header.counts)) if altered else None


def versions() -> dict[str, str]:
    """Of ckptflip, Python and those frameworks that are loaded."""
    found = {"ckptflip": __version__, "python": platform.python_version()}
    for package in ("numpy", "torch", "keras", "tensorflow", "jax"):
        if package in sys.modules:
            try:
                found[package] = metadata.version(package)
            except metadata.PackageNotFoundError:
                continue
    return found
