"""A clean run: trained once, its checkpoints kept for trials; an interrupted one goes on where it was."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
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
from ckptflip.errors import CampaignError, WorkloadError
from ckptflip.training import harness
from ckptflip.training.workload import Workload

# What is known so far, renewed after every epoch.
PROGRESS = "clean.msgpack"


def run(task: CleanTask) -> CleanResult:
    """Train a clean run to its last epoch, from the last checkpoint in its folder that is of use.

    What lies there complete is taken up only as it was left, and if a resume still repeats it here and now.

    Raises:
        CkptflipError: the recipe fails, or the folder cannot be written.
        WorkloadError: a resume no longer repeats the run.
    """
    began = time.perf_counter()
    folder = Path(task.folder)
    folder.mkdir(parents=True, exist_ok=True)
    known = noted(folder)
    workload = worker.workload_of(task.workload, task.seed, task.keras_backend)
    suffix = harness.suffix_of(workload)
    if _complete(known, task):
        if known.exact and not _is_exact(workload, task, folder, known, suffix):
            raise WorkloadError(
                f"a resume no longer repeats the run in {folder}: the workload's code, the libraries or the "
                "machine are others than when it was trained. Begin a new store, or go back to those"
            )
        return known
    rows, digests = _begun(workload, task, folder, known, suffix)
    files = dict(known.files)
    for row in harness.follow(workload, task.until):
        # A resumed run measures its first state again: the row is there already.
        if row.epoch in rows.epochs:
            continue
        rows.append(row)
        digests += [workload.digest()] if hasattr(workload, "digest") else []
        name = harness.checkpoint_name(row.epoch, suffix)
        files[name] = _saved(workload, folder / name)
        _drop_superseded(folder, row.epoch, task, suffix, files)
        _keep(folder, _result(task, rows, digests, files, suffix))
    result = _result(task, rows, digests, files, suffix)
    result = msgspec.structs.replace(
        result, exact=_is_exact(workload, task, folder, result, suffix),
        seconds=time.perf_counter() - began, versions=harness.versions(), host=worker.host(),
    )  # fmt: skip
    _keep(folder, result)
    return result


def digest_of(path: Path) -> str:
    """A digest of a checkpoint's bytes: of a file, or of all files of a folder with their names.

    Returns:
        32 hexadecimal digits; empty where there is no such checkpoint.
    """
    if path.is_dir():
        inside = sorted(one for one in path.rglob("*") if one.is_file())
        parts = [f"{one.relative_to(path)}:{digest_of(one)}" for one in inside]
        return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError:
        return ""


def noted(folder: Path) -> CleanResult:
    """What is noted in a clean run's folder, less the files that are gone or no longer what they were."""
    try:
        found = tasks.decode_result((folder / PROGRESS).read_bytes())
    except (OSError, msgspec.MsgspecError):
        return CleanResult()
    if not isinstance(found, CleanResult):
        return CleanResult()
    files = {name: digest for name, digest in found.files.items() if digest_of(folder / name) == digest}
    return msgspec.structs.replace(found, files=files)


def _saved(workload: Workload, path: Path) -> str:
    """Save a checkpoint, under its name only when it is complete and on disk; its digest.

    Raises:
        CampaignError: the disk is full.
    """
    draft = path.with_name(f"draft{path.suffix}")
    if draft.is_dir():
        shutil.rmtree(draft)
    try:
        workload.save(draft)
    except Exception as why:
        # HDF5 says it in the midst of its own words, with pointers.
        if getattr(why, "errno", None) != errno.ENOSPC and os.strerror(errno.ENOSPC) not in str(why):
            raise
        with contextlib.suppress(OSError):
            shutil.rmtree(draft) if draft.is_dir() else draft.unlink()
        raise CampaignError(
            f"{path} cannot be written: {os.strerror(errno.ENOSPC)}. Free space there, and run the same "
            "command again"
        ) from None
    for one in draft.rglob("*") if draft.is_dir() else [draft]:
        if one.is_file():
            with one.open("rb") as file:
                os.fsync(file.fileno())
    if path.is_dir():
        shutil.rmtree(path)
    draft.rename(path)
    return digest_of(path)


def _complete(known: CleanResult, task: CleanTask) -> bool:
    kept = all(known.checkpoints.get(epoch, "-") in known.files for epoch in task.keep)
    return bool(known.versions and known.epochs) and known.epochs[-1] >= task.until and kept


def _begun(
    workload: Workload, task: CleanTask, folder: Path, known: CleanResult, suffix: str
) -> tuple[Rows, list[str]]:
    """Start, or take up the last checkpoint before which none is missing; the rows up to it are kept."""
    names = {epoch: harness.checkpoint_name(epoch, suffix) for epoch in known.epochs}
    there = [epoch for epoch, name in names.items() if name in known.files]
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


def _result(
    task: CleanTask, rows: Rows, digests: list[str], files: dict[str, str], suffix: str
) -> CleanResult:
    return CleanResult(
        epochs=tuple(rows.epochs),
        values=rows.columns(),
        digests=tuple(digests),
        checkpoints={epoch: harness.checkpoint_name(epoch, suffix) for epoch in task.keep},
        files=dict(files),
    )


def _keep(folder: Path, result: CleanResult) -> None:
    with new_file(folder / PROGRESS, overwrite=True) as draft:
        draft.write_bytes(tasks.encode(result))


def _drop_superseded(folder: Path, epoch: int, task: CleanTask, suffix: str, files: dict[str, str]) -> None:
    """Remove checkpoints that only served to go on from; the last one stays for a longer run."""
    for path in folder.iterdir():
        match = re.fullmatch(rf"epoch_(\d+){re.escape(suffix)}", path.name)
        if match and int(match[1]) < epoch and int(match[1]) not in task.keep:
            files.pop(path.name, None)
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
    if result.digests and workload.digest() != result.digests[at]:  # type: ignore[attr-defined]
        return False
    # What is measured counts as much as the state: another test set is another campaign.
    return all(
        value is None or repr(value) == repr(result.values[name][at - 1 + k])
        for name, values in again.values.items()
        if name in result.values
        for k, value in enumerate(values)
    )
