"""Carrying a plan out: where the altered checkpoint goes, what is written first, all or nothing."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from ckptflip import __version__, record_files
from ckptflip.checkpoints import Changes, Checkpoint, files
from ckptflip.checkpoints.files import Progress
from ckptflip.errors import CheckpointError, CkptflipError, PartlyAlteredError, UsageError
from ckptflip.faults.plan import Plan
from ckptflip.faults.policy import Policy
from ckptflip.faults.record import SCHEMA, Header, Record, counts_of, entries_of
from ckptflip.matching import in_effect


class Destination(Struct, frozen=True):
    """Where the altered checkpoint goes.

    Attributes:
        source: the checkpoint that is read.
        out: the new file; None: the checkpoint itself is altered.
        record: the record's file; None when none is written.
        overwrite: whether existing files may be replaced.
    """

    source: Path
    out: Path | None
    record: Path | None
    overwrite: bool

    @property
    def result(self) -> Path:
        return self.out or self.source


def destination(
    checkpoint: str | Path,
    out: str | Path | None,
    in_place: bool,
    record: str | Path | None,
    overwrite: bool,
    dry_run: bool,
) -> Destination:
    """Where an altered checkpoint and its record go, checked before anything is read.

    Args:
        checkpoint: the file that is read.
        out: the new file; by default ``ckpt.flipped.h5`` for ``ckpt.h5``.
        in_place: alter `checkpoint` itself.
        record: the record; by default the result's name with ``.flips.jsonl`` added.
        overwrite: whether existing files may be replaced; in place, a record only once it was undone.
        dry_run: nothing will be written, so nothing can be in the way.

    Raises:
        UsageError: contradictory wishes, or files that exist.
    """
    source = Path(checkpoint)
    if not source.name or source.is_dir():
        raise CheckpointError(f"{source} is a folder; name a file in it")
    if in_place and out is not None:
        raise UsageError("an output and in-place were both asked for; choose one")
    target = (
        None
        if in_place
        else Path(out)
        if out is not None
        else source.with_name(f"{source.stem}.flipped{source.suffix}")
    )
    result = target or source
    for named in (target, None if record is None else Path(record)):
        if named is not None:
            files.check_new(named, overwrite=True)
    record_path = Path(record) if record is not None else result.with_name(f"{result.name}.flips.jsonl")
    made = Destination(source, target, record_path, overwrite)
    if dry_run:
        return made
    check_distinct(made)
    if record_path.exists() and not overwrite:
        hint = (
            "undo it first and add --overwrite, or name another with --record"
            if in_place
            else "name another, or add --overwrite"
        )
        raise UsageError(f"the record {record_path} exists; {hint}")
    if target is not None:
        files.check_new(target, overwrite=overwrite)
    return made


def check_distinct(destination: Destination) -> None:
    """Raise UsageError when two of the files are one."""
    named = [p.resolve() for p in (destination.source, destination.out, destination.record) if p is not None]
    if len(set(named)) < len(named):
        raise UsageError(
            f"checkpoint, output and record must be different files ({', '.join(p.name for p in named)})"
        )


def record_of(
    target: Checkpoint,
    plan: Plan,
    destination: Destination,
    checksum: str,
    *,
    seed: int | None = None,
    policies: tuple[Policy, ...] = (),
    replay_of: str | None = None,
) -> Record:
    """The record of a plan on a target, before it is carried out.

    Args:
        target: what the plan is for.
        plan: the faults.
        destination: where they go.
        checksum: ``repair`` or ``leave``.
        seed: of the draw, if there was one.
        policies: what was drawn.
        replay_of: the record that is replayed, if one is.
    """
    entries, renumbered = entries_of(plan, target.tensors)
    header = Header(
        ckptflip=__version__,
        schema=SCHEMA,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        checkpoint=destination.source.name,
        output=destination.result.name,
        format=target.format,
        checksum=checksum,
        seed=seed,
        policies=policies,
        replay_of=replay_of,
        size=destination.source.stat().st_size,
        digest_before=files.digest(destination.source),
        counts=counts_of(plan),
        tensors=entries,
        versions=_versions(),
    )
    return Record(header, renumbered)


def _versions() -> dict[str, str]:
    """Of Python and of the libraries that took part: those that are loaded."""
    found = {"python": sys.version.split()[0]}
    for name in ("numpy", "h5py", "ml_dtypes"):
        if name in sys.modules:
            found[name] = sys.modules[name].__version__
    return found


def carry_out(
    target: Checkpoint,
    plan: Plan,
    record: Record,
    destination: Destination,
    checksum: str,
    progress: Progress | None,
) -> Record:
    """Alter the checkpoint and write the record: in place the record first, else both at the end.

    Returns:
        The record as written.

    Raises:
        CkptflipError: something failed; the checkpoint is as it was, and no new file is left.
        PartlyAlteredError: not even that could be restored, in place; the record is kept for `undo`.
    """
    assert destination.record is not None
    # A fault without effect alters nothing, not even where that would first have to be allocated.
    effective = plan.take(plan.before != plan.after)
    masks = effective.before ^ effective.after
    changes = Changes(effective.tensor, effective.word, masks, masks)
    if destination.out is None:
        if destination.record.exists():
            _check_spent(destination.record, target)
        record_files.write(record, destination.record, overwrite=destination.overwrite, durable=True)
        try:
            apply(target, changes, destination, checksum, progress)
        except PartlyAlteredError:
            raise  # the record stays: it is the only way back
        except CkptflipError:
            destination.record.unlink()
            raise
    else:
        stale = destination.record.exists()
        try:
            with files.new_file(
                destination.out, overwrite=destination.overwrite, like=destination.source
            ) as temporary:
                files.copy(destination.source, temporary, progress)
                target.alter(changes, checksum, temporary)
                header = replace(record.header, digest_after=files.digest(temporary))
                record = Record(header, record.plan)
                record_files.write(record, destination.record, overwrite=destination.overwrite)
        except CkptflipError:
            if not stale:
                destination.record.unlink(missing_ok=True)
            raise
    return replace(record, path=str(destination.record))


def _check_spent(path: Path, target: Checkpoint) -> None:
    """Refuse to replace a record that is the only way back to the bytes before earlier faults."""
    if in_effect(record_files.read(path), target):
        raise UsageError(
            f"the record {path} is still in effect, and the only way back: undo it first, or name another "
            "with --record"
        )


def apply(
    target: Checkpoint, changes: Changes, destination: Destination, checksum: str, progress: Progress | None
) -> None:
    """Alter in place by patching where the layout allows it, else through a copy that replaces the file."""
    by_tensor = list(changes.by_tensor())
    patchable = target.by_patching([t for t, _ in by_tensor], [changes.word[rows] for _, rows in by_tensor])
    if destination.out is None and patchable:
        target.alter(changes, checksum)
        return
    if destination.out is None and destination.source.stat().st_nlink > 1:
        raise CheckpointError(
            f"{destination.source} has other names (hard links), which would keep the old data: this layout "
            "is altered through a copy that takes the file's name. Write a new file with -o"
        )
    replaced = destination.overwrite or destination.out is None
    # In place means the file that a symbolic link stands for, not the link.
    result = destination.out or destination.source.resolve()
    with files.new_file(result, overwrite=replaced, like=destination.source) as temporary:
        files.copy(destination.source, temporary, progress)
        target.alter(changes, checksum, temporary)
