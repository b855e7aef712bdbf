"""A clean run: trained once, its checkpoints kept for trials; an interrupted one goes on where it was."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path

import msgspec

from ckptflip.campaign import task as tasks
from ckptflip.campaign import worker
from ckptflip.campaign.task import CleanResult, CleanTask
from ckptflip.campaign.trial import Rows
from ckptflip.checkpoints.files import new_file
from ckptflip.training import harness
from ckptflip.training.workload import Workload

# What is known so far, renewed after every epoch.
PROGRESS = "clean.msgpack"


def run(task: CleanTask) -> CleanResult:
    """Train a clean run to its last epoch, from the last checkpoint in its folder that is of use.

    Raises:
        CkptflipError: the recipe fails, or the folder cannot be written.
    """
    began = time.perf_counter()
    folder = Path(task.folder)
    folder.mkdir(parents=True, exist_ok=True)
    known = _known(folder)
    if _complete(known, task, folder):
        return known
    workload = worker.workload_of(task.workload, task.seed, task.keras_backend)
    suffix = harness.suffix_of(workload)
    rows, digests = _begun(workload, task, folder, known)
    for row in harness.follow(workload, task.until):
        # A resumed run measures its first state again: the row is there already.
        if row.epoch in rows.epochs:
            continue
        rows.append(row)
        digests += [workload.digest()] if hasattr(workload, "digest") else []
        workload.save(folder / harness.checkpoint_name(row.epoch, suffix))
        _keep(folder, _result(task, rows, digests, suffix))
        _drop_superseded(folder, row.epoch, task, suffix)
    result = _result(task, rows, digests, suffix)
    result = msgspec.structs.replace(
        result, exact=_is_exact(workload, task, folder, result, suffix),
        seconds=time.perf_counter() - began, versions=harness.versions(), host=worker.host(),
    )  # fmt: skip
    _keep(folder, result)
    return result


def _known(folder: Path) -> CleanResult:
    try:
        found = tasks.decode_result((folder / PROGRESS).read_bytes())
    except (OSError, msgspec.MsgspecError):
        return CleanResult()
    return found if isinstance(found, CleanResult) else CleanResult()


def _complete(known: CleanResult, task: CleanTask, folder: Path) -> bool:
    kept = all((folder / known.checkpoints.get(epoch, "-")).exists() for epoch in task.keep)
    return bool(known.versions and known.epochs) and known.epochs[-1] >= task.until and kept


def _begun(workload: Workload, task: CleanTask, folder: Path, known: CleanResult) -> tuple[Rows, list[str]]:
    """Start, or take up the last checkpoint before which none is missing; the rows up to it are kept."""
    names = {epoch: harness.checkpoint_name(epoch, harness.suffix_of(workload)) for epoch in known.epochs}
    there = [epoch for epoch, name in names.items() if (folder / name).exists()]
    missing = [epoch for epoch in task.keep if epoch not in there]
    usable = [epoch for epoch in there if epoch <= min([task.until, *missing])]
    rows = Rows()
    digests: list[str] = []
    if not usable:
        workload.start(task.seed)
        return rows, digests
    workload.load(folder / names[usable[-1]])
    count = known.epochs.index(usable[-1]) + 1
    rows.epochs = list(known.epochs[:count])
    rows.values = {name: list(values[:count]) for name, values in known.values.items()}
    return rows, list(known.digests[:count])


def _result(task: CleanTask, rows: Rows, digests: list[str], suffix: str) -> CleanResult:
    return CleanResult(
        epochs=tuple(rows.epochs),
        values=rows.columns(),
        digests=tuple(digests),
        checkpoints={epoch: harness.checkpoint_name(epoch, suffix) for epoch in task.keep},
    )


def _keep(folder: Path, result: CleanResult) -> None:
    with new_file(folder / PROGRESS, overwrite=True) as draft:
        draft.write_bytes(tasks.encode(result))


def _drop_superseded(folder: Path, epoch: int, task: CleanTask, suffix: str) -> None:
    """Remove checkpoints that only served to go on from; the last one stays for a longer run."""
    for path in folder.iterdir():
        match = re.fullmatch(rf"epoch_(\d+){re.escape(suffix)}", path.name)
        if match and int(match[1]) < epoch and int(match[1]) not in task.keep:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _is_exact(
    workload: Workload, task: CleanTask, folder: Path, result: CleanResult, suffix: str
) -> bool | None:
    """Whether a resume repeats the run: one epoch from the first checkpoint that trials start from."""
    first = min((epoch for epoch in task.keep if epoch < task.until), default=None)
    if first is None:
        return None
    workload.load(folder / harness.checkpoint_name(first, suffix))
    again = Rows()
    for row in harness.follow(workload, first + 1):
        again.append(row)
    at = result.epochs.index(first + 1)
    if result.digests:
        return bool(workload.digest() == result.digests[at])  # type: ignore[attr-defined]
    return all(repr(values[-1]) == repr(result.values[name][at]) for name, values in again.values.items())
