"""Carrying a plan out: where the altered checkpoint goes, what is written first, all or nothing."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from ckptflip import __version__, record_files
from ckptflip.checkpoints import Changes, Checkpoint, container, files, patch
from ckptflip.checkpoints.files import Progress
from ckptflip.checkpoints.target import Prepared
from ckptflip.errors import CheckpointError, CkptflipError, PartlyAlteredError, RecordError, UsageError
from ckptflip.faults import ranks
from ckptflip.faults.plan import Plan
from ckptflip.faults.policy import Policy
from ckptflip.faults.record import SCHEMA, ChecksumEntry, Header, Record, counts_of, entries_of
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
    if source.name in ("", ".."):
        # The working directory, or one above it, may be the checkpoint.
        source = source.resolve()
    target = None if in_place else Path(out) if out is not None else container.flipped_name(source)
    if in_place and out is not None:
        raise UsageError("an output and in-place were both asked for; choose one")
    result = target or source
    if target is not None:
        container.check_new(target, overwrite=True, folder=source.is_dir())
    if record is not None:
        files.check_new(Path(record), overwrite=True)
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
        container.check_new(target, overwrite=overwrite, folder=source.is_dir())
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
        ranks=ranks.of_policies(policies, target.tensors, seed),
        size=container.size(target.files),
        digest_before=container.digest(target.files),
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
    carry = _in_place if destination.out is None else _to_copy
    header = carry(target, changes, record, destination, checksum, progress)
    return Record(header, record.plan, str(destination.record))


def _in_place(
    target: Checkpoint,
    changes: Changes,
    record: Record,
    destination: Destination,
    checksum: str,
    progress: Progress | None,
) -> Header:
    assert destination.record is not None
    path, header = destination.record, record.header
    if path.exists():
        _check_spent(path, target)
    written = False
    try:
        with _alteration(target, changes, destination, checksum, progress) as prepared:
            header = replace(header, checksums=prepared.checksums)
            record_files.write(
                Record(header, record.plan), path, overwrite=destination.overwrite, durable=True
            )
            written = True
    except PartlyAlteredError:
        raise  # the record stays: it is the only way back
    except CkptflipError:
        if written:
            path.unlink()
        raise
    return header


def _to_copy(
    target: Checkpoint,
    changes: Changes,
    record: Record,
    destination: Destination,
    checksum: str,
    progress: Progress | None,
) -> Header:
    assert destination.record is not None and destination.out is not None
    path = destination.record
    ours = False
    try:
        with container.copied(
            target, destination.out, overwrite=destination.overwrite, progress=progress
        ) as copies:
            prepared = target.prepare(changes, checksum, copies)
            _write(target, prepared)
            header = replace(
                record.header, checksums=prepared.checksums, digest_after=container.digest(copies)
            )
            replaced = path.exists()
            record_files.write(Record(header, record.plan), path, overwrite=destination.overwrite)
            # Another process may write under the same names: only what is our own is taken back.
            ours = not replaced
    except CkptflipError:
        if ours:
            path.unlink(missing_ok=True)
        raise
    return header


def _check_spent(path: Path, target: Checkpoint) -> None:
    """Refuse to replace a record that is the only way back to the bytes before earlier faults."""
    try:
        in_force = in_effect(record_files.read(path), target)
    except RecordError as why:
        raise UsageError(
            f"{path} is a record of another checkpoint, or damaged ({why}); name another with --record"
        ) from None
    if in_force:
        raise UsageError(
            f"the record {path} is still in effect, and the only way back: undo it first, or name another "
            "with --record"
        )


def restore(
    target: Checkpoint,
    changes: Changes,
    recorded: Sequence[ChecksumEntry] | None,
    destination: Destination,
    checksum: str,
    progress: Progress | None,
) -> None:
    """Alter words back, in place or in a new checkpoint; no record is written.

    Args:
        target: the checkpoint.
        changes: what gives its words their value back.
        recorded: the CRCs that the injection altered; None when it was of another checkpoint or format.
        destination: where the restored checkpoint goes.
        checksum: as recorded.
        progress: told the bytes copied.
    """
    if destination.out is None:
        with _alteration(target, changes, destination, checksum, progress, recorded):
            pass
        return
    with container.copied(
        target, destination.out, overwrite=destination.overwrite, progress=progress
    ) as copies:
        _write(target, target.prepare(changes, checksum, copies, recorded))


@contextlib.contextmanager
def _alteration(
    target: Checkpoint,
    changes: Changes,
    destination: Destination,
    checksum: str,
    progress: Progress | None,
    recorded: Sequence[ChecksumEntry] | None = None,
) -> Iterator[Prepared]:
    """What alters a checkpoint in place; it is done when the block ends well.

    Words are patched where the layout allows it, else in a copy that takes the checkpoint's name.
    """
    by_tensor = list(changes.by_tensor())
    if target.by_patching([t for t, _ in by_tensor], [changes.word[rows] for _, rows in by_tensor]):
        prepared = target.prepare(changes, checksum, None, recorded)
        yield prepared
        _write(target, prepared)
        return
    for file in target.files:
        if file.stat().st_nlink > 1:
            raise CheckpointError(
                f"{file} has other names (hard links), which would keep the old data: this layout "
                "is altered through a copy that takes the file's name. Write a new file with -o"
            )
    with container.copied(target, target.path, overwrite=True, progress=progress) as copies:
        prepared = target.prepare(changes, checksum, copies, recorded)
        yield prepared
        _write(target, prepared)


def _write(target: Checkpoint, prepared: Prepared) -> None:
    target.close()
    patch.apply_patches(prepared.patches)
    if prepared.finish is not None:
        prepared.finish()
