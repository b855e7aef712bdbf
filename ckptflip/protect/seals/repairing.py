"""Repairing a checkpoint by its seal: into a new one, or in place; every byte is proven before it counts."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from msgspec import Struct

from ckptflip.checkpoints import container, files
from ckptflip.checkpoints.files import Progress, locked
from ckptflip.errors import CheckpointError, UsageError
from ckptflip.protect.seals.checking import Checked, checked
from ckptflip.protect.seals.findings import Findings
from ckptflip.protect.seals.members import paths_of
from ckptflip.protect.seals.mending import Cell, mended
from ckptflip.protect.seals.passing import digest_of
from ckptflip.protect.seals.verifying import Verdict, opened_seal, verdict
from ckptflip.protect.seals.work import workers_for

_MOST_LOCKS = 64
# Mended cells that are held between the decision to write and the writing; more are mended again.
_MOST_HELD = 1 << 26


class Repaired(Struct, frozen=True):
    """What was repaired.

    Attributes:
        out: the mended checkpoint, or the copy of one that was whole; None where nothing was written.
        found: the damage before, named by the mended checkpoint where there is one.
        mended: cells that were given their bytes back.
        left: cells that could not be.
        whole: whether every sealed byte is now what it was.
    """

    out: Path | None
    found: Verdict
    mended: int
    left: int
    whole: bool


def repair(
    checkpoint: str | Path,
    *,
    out: str | Path | None = None,
    in_place: bool = False,
    seal: str | Path | None = None,
    overwrite: bool = False,
    partial: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Repaired:
    """Give every damaged byte of a checkpoint back what it was when it was sealed.

    Nothing is written where some bytes cannot be told, unless `partial`. Where nothing was damaged, `out` is
    a copy; without `out` nothing is written. A new checkpoint is read once more against the seal before it
    gets its name. In place, only damaged blocks are written, each with bytes that its digest proves: a kill
    at any moment leaves no more damage than there was, and repair can be run again.

    Args:
        checkpoint: as it was named when it was sealed, or its seal.
        out: the new checkpoint: a file for a file; a folder for a folder, or for several files. By default
            the name with ``.repaired`` before its suffix.
        in_place: repair `checkpoint` itself.
        seal: its seal, where that does not lie beside it.
        overwrite: whether a file that is there may be replaced.
        partial: mend what can be mended even if some cannot.
        workers: threads; by default one for each processor, eight at most.
        progress: told the bytes read.

    Raises:
        SealError: there is no seal, or it is cut or damaged.
        CheckpointError: something cannot be read or written, or is in use.
        UsageError: contradictory wishes, or a file is in the way.
    """
    if in_place and out is not None:
        raise UsageError("an output and in-place were both asked for; choose one")
    threads = workers_for(workers)
    path, read = opened_seal(Path(checkpoint), seal)
    target = None if in_place else Path(out) if out is not None else _default(path, read.header.kind)
    if target is not None:
        _check_new(target, path, read.path, overwrite=overwrite, folder=read.header.kind != "file")
    paths, root = paths_of(read.header, path)
    with ExitStack() as held:
        for file in paths[:_MOST_LOCKS]:
            if file.is_file():
                held.enter_context(locked(file, exclusive=in_place))
        found = checked(read, path, threads, progress)
        findings, cells = _all(found)
        left = len(findings.unmended)
        if (found.whole and out is None) or (left and not partial):
            return Repaired(None, verdict(found, path, findings), 0, left, found.whole)
        if target is None:
            _check_links(paths, root)
            _in_place(found, cells)
        else:
            _to_new(found, cells, target, findings.unmended, threads, overwrite=overwrite)
    # The lock that writing takes would keep the names from being read.
    shown = verdict(found, path, findings, _shown(found, path, target))
    return Repaired(target or path, shown, len(found.bad) - left, left, not left)


def _all(found: Checked) -> tuple[Findings, Callable[[], Iterable[Cell]]]:
    """The damage, and the mended cells once more: held, or mended again where they take too much memory."""
    findings = Findings(found)
    kept: list[Cell] | None = []
    held = 0
    for cell in mended(found):
        findings.add(cell)
        held += 2 * cell.now.size
        if held > _MOST_HELD:
            kept = None
        if kept is not None:
            kept.append(cell)
    if kept is None:
        return findings, lambda: mended(found)
    cells = kept
    return findings, lambda: cells


def _in_place(found: Checked, cells: Callable[[], Iterable[Cell]]) -> None:
    """Write mended cells into the files themselves; files that are missing appear whole."""
    missing = found.missing
    for folder in {found.paths[i].parent for i in missing}:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as why:
            raise CheckpointError(
                f"{folder}, a folder of missing files, cannot be made: {why.strerror}. Write a new "
                "checkpoint with -o"
            ) from None
    with (
        files.new_files([found.paths[i] for i in missing], overwrite=False) if missing else _nothing() as made
    ):
        paths = list(found.paths)
        for i, temporary in zip(missing, made, strict=True):
            paths[i] = temporary
        _write(found, cells(), paths)
    for path in found.paths:
        files.sync(path)


def _write(found: Checked, cells: Iterable[Cell], paths: Sequence[Path]) -> None:
    """Write mended cells, cut what is too long, and read back what was written."""
    cuts = found.seal.cuts
    for cell in cells:
        if cell.good is None:
            continue
        file, start, _ = cuts.in_file(cell.number)
        descriptor = os.open(paths[file], os.O_RDWR | os.O_CLOEXEC)
        try:
            # What is the same already is not written, but for bytes that are not there at all.
            there = min(cell.now.size, max(0, os.fstat(descriptor).st_size - start))
            differs = np.flatnonzero(cell.now[:there] ^ cell.good[:there])
            low = int(differs[0]) if differs.size else there
            high = cell.good.size if there < cell.good.size else int(differs[-1]) + 1 if differs.size else low
            view = cell.good[low:high].data
            while view:
                done = os.pwrite(descriptor, view, start + low)
                view, low = view[done:], low + done
            back = os.pread(descriptor, cell.good.size, start)
        except OSError as why:
            raise CheckpointError(
                f"{paths[file]} cannot be written: {why.strerror}; no more is damaged than was. Mend the "
                "disk, and repair again"
            ) from None
        finally:
            os.close(descriptor)
        if digest_of(np.frombuffer(back, np.uint8)) != found.seal.digest(cell.number):
            raise CheckpointError(
                f"{paths[file]} does not give back what was written to it: the disk is at fault"
            )
    for path, (_, due) in zip(paths, found.seal.header.files, strict=True):
        if path.exists() and path.stat().st_size > due:
            os.truncate(path, due)


def _to_new(
    found: Checked,
    cells: Callable[[], Iterable[Cell]],
    target: Path,
    unmended: Sequence[int],
    workers: int,
    *,
    overwrite: bool,
) -> None:
    """A mended copy under another name, which appears when all of it was read against the seal."""
    header = found.seal.header
    if header.kind == "file":
        source = found.paths[0]
        with files.new_file(
            target, overwrite=overwrite, like=source if source.exists() else None
        ) as temporary:
            _copy(found, cells, [temporary], unmended, workers)
        files.sync(target)
        return
    temporary = files.temporary_beside(target)
    try:
        copies = [temporary / name for name, _ in header.files]
        for copy in copies:
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.touch()
        _copy(found, cells, copies, unmended, workers)
        for source, copy in zip(found.paths, copies, strict=True):
            if source.exists():
                copy.chmod(source.stat().st_mode & 0o7777)
        if target.exists():
            files.swap(temporary, target)
        else:
            temporary.rename(target)
    except OSError as why:
        raise CheckpointError(
            f"{target} cannot be written: {why.strerror or why}; nothing was left behind"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _copy(
    found: Checked,
    cells: Callable[[], Iterable[Cell]],
    copies: Sequence[Path],
    unmended: Sequence[int],
    workers: int,
) -> None:
    for source, size, copy in zip(found.paths, found.sizes, copies, strict=True):
        if size is not None:
            files.copy(source, copy)
    _write(found, cells(), copies)
    again = Checked(found.seal, copies).run(workers, None)
    if set(again.bad) - set(unmended):
        raise CheckpointError(f"{copies[0].parent} does not give back what was written: the disk is at fault")


def _default(path: Path, kind: str) -> Path:
    if kind == "file":
        return container.flipped_name(path, "repaired")
    return path.with_name(f"{path.name}.repaired")


def _check_new(target: Path, source: Path, seal: Path, *, overwrite: bool, folder: bool) -> None:
    if seal.resolve().is_relative_to(target.resolve()):
        raise UsageError(f"{target} is, or holds, the seal that the checkpoint is repaired by; name another")
    container.check_new(target, overwrite=overwrite, folder=folder)
    wished, own = target.resolve(), source.resolve()
    if wished == own or (folder and (wished.is_relative_to(own) or own.is_relative_to(wished))):
        raise UsageError(
            f"{target} is, or holds, or lies in the checkpoint itself; name another, or use --in-place"
        )
    if folder:
        container.check_replaceable(target)


def _check_links(paths: Sequence[Path], root: Path) -> None:
    """Refuse to write through a link to elsewhere: the seal and the links may be a stranger's."""
    home = root.resolve()
    for path in paths:
        if not path.resolve().is_relative_to(home):
            raise CheckpointError(
                f"{path} is a link out of the checkpoint's folder: it is not repaired in place. Write a new "
                "checkpoint with -o"
            )


def _shown(found: Checked, path: Path, target: Path | None) -> Path:
    """The checkpoint that gives the names: the mended one."""
    if target is None or found.seal.header.kind != "files":
        return target or path
    return target / found.seal.header.files[0][0]


@contextmanager
def _nothing() -> Iterator[list[Path]]:
    yield []
