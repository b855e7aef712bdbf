"""The verbs that alter a checkpoint: inject, replay, undo."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from ckptflip import __version__, record_files
from ckptflip.checkpoints import Changes, Checkpoint, files, opened
from ckptflip.checkpoints.target import CHECKSUM_MODES, positions_by_name
from ckptflip.errors import CkptflipError, RecordError, UsageError
from ckptflip.faults import policy as policies_module
from ckptflip.faults.plan import Plan, draw
from ckptflip.faults.policy import Policy, combine
from ckptflip.faults.record import SCHEMA, Header, Record, counts_of, entries_of
from ckptflip.faults.stream import check_seed

Progress = Callable[[int], None]


class Undone(Struct, frozen=True):
    """What `undo` did.

    Attributes:
        restored: words that got their value back.
        already: words that had it already (an interrupted injection never reached them).
        digest_matches: whether the file is the original byte for byte; None where the record holds no digest.
    """

    restored: int
    already: int
    digest_matches: bool | None


class _Destination(Struct, frozen=True):
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


def inject(
    checkpoint: str | Path,
    *,
    out: str | Path | None = None,
    in_place: bool = False,
    policy: Policy | Sequence[Policy] | str | Path | None = None,
    tensors: str | Iterable[str] = (),
    layers: str | Iterable[str] = (),
    roles: str | Iterable[str] = (),
    rows: str | None = None,
    slice: str | None = None,
    bits: str = "all",
    count: int | None = None,
    fraction: float | None = None,
    ber: float | None = None,
    fault: str = "flip",
    design: str = "uniform",
    forbid: str | Iterable[str] = (),
    seed: int | None = None,
    record: str | Path | None = None,
    checksum: str = "repair",
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Record:
    """Draw faults and put them into a checkpoint.

    By default a new file is written (``ckpt.flipped.h5`` for ``ckpt.h5``) and the source stays untouched.

    Args:
        checkpoint: the file.
        out: name of the new file.
        in_place: alter the file itself; the record is on disk before the first byte changes.
        policy: a policy, several that act one after the other, or a TOML file of them; instead of the
            arguments from `tensors` to `forbid`, which are those of `ckptflip.faults.Policy`.
        tensors, layers, roles, rows, slice, bits, count, fraction, ber, fault, design, forbid: see
            `ckptflip.faults.Policy`; a single string stands for a list of one.
        seed: same seed, policy and checkpoint: same faults. Without one, one is drawn and recorded.
        record: name of the record; by default the output's name with ``.flips.jsonl`` added. A name ending
            in ``.h5`` stores columns, for millions of faults.
        checksum: ``repair`` or ``leave`` stored checksums that cover altered words.
        overwrite: whether `out` and `record` may replace existing files.
        dry_run: draw and return the faults; write nothing.
        progress: told the bytes copied, step by step.

    Returns:
        The record, as written.

    Raises:
        UsageError: arguments that make no sense, alone or together; files that exist.
        SelectionError: nothing is selected, or less than `count` asks for.
        GuardError: `forbid` leaves nothing to draw.
        CheckpointError: the file cannot be read, altered or written. Nothing was altered.

    Example:
        >>> import ckptflip, h5py, numpy, tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "ckpt.h5"
        >>> with h5py.File(path, "w") as f:
        ...     f["conv1/kernel"] = numpy.ones((3, 3), "float32")
        >>> record = ckptflip.inject(path, bits="critical", count=2, seed=7)
        >>> record.bits_hit, record.bits_effective, record.header.output
        (2, 2, 'ckpt.flipped.h5')
    """
    options: dict[str, object] = {
        "tensors": _several(tensors),
        "layers": _several(layers),
        "roles": _several(roles),
        "rows": rows,
        "slice": slice,
        "bits": bits,
        "count": count,
        "fraction": fraction,
        "ber": ber,
        "fault": fault,
        "design": design,
        "forbid": _several(forbid),
    }
    several, seed = _policies(policy, options, seed)
    destination = _destination(checkpoint, out, in_place, record, overwrite, dry_run)
    _check_checksum(checksum)
    with opened(destination.source, exclusive=in_place and not dry_run) as target:
        plan = draw(several, target.tensors, target.read, seed)
        made = _record(target, plan, destination, checksum, seed=seed, policies=several)
        return made if dry_run else _carry_out(target, plan, made, destination, checksum, progress)


def replay(
    record: Record | str | Path,
    checkpoint: str | Path,
    *,
    out: str | Path | None = None,
    in_place: bool = False,
    new_record: str | Path | None = None,
    checksum: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Record:
    """Put the faults of a record into a checkpoint: the same bits of the same elements of the same tensors.

    On the original this gives the identical file. On another checkpoint (of another epoch, say) the same bits
    are inverted that were inverted then.

    Args:
        record: a record, or its file.
        checkpoint: the file to alter.
        out, in_place, checksum, overwrite, dry_run, progress: as for `inject`; `checksum` as recorded
            unless given.
        new_record: name of the record of this replay.

    Returns:
        The record of this replay; `header.replay_of` names the original.

    Raises:
        RecordError: the record is damaged, or its tensors are not in this checkpoint in that shape and dtype.
        CheckpointError, UsageError: as for `inject`.
    """
    original = record if isinstance(record, Record) else record_files.read(record)
    destination = _destination(checkpoint, out, in_place, new_record, overwrite, dry_run)
    mode = checksum or original.header.checksum
    _check_checksum(mode)
    with opened(destination.source, exclusive=in_place and not dry_run) as target:
        plan = _on_target(original, target)
        current = _read_all(target, plan)
        plan = replace(plan, before=current, after=current ^ plan.before ^ plan.after)
        name = original.path and Path(original.path).name
        made = _record(target, plan, destination, mode, replay_of=name or "a record in memory")
        return made if dry_run else _carry_out(target, plan, made, destination, mode, progress)


def undo(
    checkpoint: str | Path,
    record: Record | str | Path,
    *,
    out: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Undone:
    """Give every recorded word its value back, also after an injection that was interrupted anywhere.

    Args:
        checkpoint: the altered file; it is restored in place unless `out` is given.
        record: its record, or the record's file.
        out: write the restored checkpoint to this new file instead.
        overwrite: whether `out` may replace an existing file.
        progress: told the bytes copied, if the file has to be copied.

    Raises:
        RecordError: a word is neither what the record says it was, nor what it became: the file was altered
            since, or the record belongs to another one. Nothing is altered.
        CheckpointError: the file cannot be read or written.
    """
    original = record if isinstance(record, Record) else record_files.read(record)
    destination = _Destination(Path(checkpoint), Path(out) if out else None, None, overwrite)
    _check_distinct(destination)
    with opened(destination.source, exclusive=out is None) as target:
        plan = _on_target(original, target)
        current = _read_all(target, plan)
        pending = current != plan.before
        foreign = _neither(current, plan)
        if foreign.any():
            raise RecordError(_foreign(target, plan, current, foreign))
        changes = Changes(plan.tensor, plan.word, current ^ plan.before, plan.before ^ plan.after)
        # Words that are right already stay in: an interrupted run may have left their checksum wrong.
        _alter(target, changes, destination, original.header.checksum, progress)
    digest = original.header.digest_before
    matches = None if digest is None else files.digest(destination.result, limit=None) == digest
    restored = int(np.count_nonzero(pending))
    return Undone(restored, int(np.count_nonzero(plan.before != plan.after)) - restored, matches)


def _policies(
    policy: Policy | Sequence[Policy] | str | Path | None, options: dict[str, object], seed: int | None
) -> tuple[tuple[Policy, ...], int]:
    if policy is None:
        several: tuple[Policy, ...] = (Policy(**options),)  # type: ignore[arg-type]
    else:
        changed = [k for k, v in options.items() if v != getattr(_DEFAULTS, k)]
        if changed:
            raise UsageError(
                f"a policy was given and {', '.join(changed)} too; put everything into the policy"
            )
        if isinstance(policy, str | Path):
            several, file_seed = policies_module.load(policy)
            seed = file_seed if seed is None else seed
        else:
            several = combine(policy)
    if seed is None:
        seed = int.from_bytes(os.urandom(6), "little")
    check_seed(seed)
    return several, seed


_DEFAULTS = Policy()


def _several(given: str | Iterable[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _check_checksum(mode: str) -> None:
    if mode not in CHECKSUM_MODES:
        raise UsageError(f"checksum must be {' or '.join(CHECKSUM_MODES)}, not {mode!r}")


def _destination(
    checkpoint: str | Path,
    out: str | Path | None,
    in_place: bool,
    record: str | Path | None,
    overwrite: bool,
    dry_run: bool,
) -> _Destination:
    source = Path(checkpoint)
    if in_place and out is not None:
        raise UsageError("an output and in-place were both asked for; choose one")
    target = (
        None if in_place else Path(out) if out else source.with_name(f"{source.stem}.flipped{source.suffix}")
    )
    result = target or source
    record_path = Path(record) if record else result.with_name(f"{result.name}.flips.jsonl")
    destination = _Destination(source, target, record_path, overwrite)
    if dry_run:
        return destination
    _check_distinct(destination)
    if record_path.exists() and (not overwrite or in_place):
        # In place, the old record is the only way back to the bytes before the earlier faults.
        hint = (
            "undo it first, or name another with --record" if in_place else "name another, or add --overwrite"
        )
        raise UsageError(f"the record {record_path} exists; {hint}")
    if target is not None and target.exists() and not overwrite:
        raise UsageError(f"{target} exists; name another output with -o, or replace it with --overwrite")
    return destination


def _check_distinct(destination: _Destination) -> None:
    named = [p.resolve() for p in (destination.source, destination.out, destination.record) if p is not None]
    if len(set(named)) < len(named):
        raise UsageError(
            f"checkpoint, output and record must be different files ({', '.join(p.name for p in named)})"
        )


def _record(
    target: Checkpoint,
    plan: Plan,
    destination: _Destination,
    checksum: str,
    *,
    seed: int | None = None,
    policies: tuple[Policy, ...] = (),
    replay_of: str | None = None,
) -> Record:
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


def _carry_out(
    target: Checkpoint,
    plan: Plan,
    record: Record,
    destination: _Destination,
    checksum: str,
    progress: Progress | None,
) -> Record:
    """Alter the checkpoint and write the record: in place the record first, else both at the end."""
    assert destination.record is not None
    masks = plan.before ^ plan.after
    changes = Changes(plan.tensor, plan.word, masks, masks)
    if destination.out is None:
        record_files.write(record, destination.record, overwrite=False, durable=True)
        try:
            _alter(target, changes, destination, checksum, progress)
        except CkptflipError:
            destination.record.unlink()
            raise
    else:
        with files.new_file(
            destination.out, overwrite=destination.overwrite, like=destination.source
        ) as temporary:
            files.copy(destination.source, temporary, progress)
            target.alter(changes, checksum, temporary)
            header = _with_digest(record.header, files.digest(temporary))
            record = Record(header, record.plan)
            record_files.write(record, destination.record, overwrite=destination.overwrite)
    return replace(record, path=str(destination.record))


def _with_digest(header: Header, digest: str | None) -> Header:
    import msgspec

    return msgspec.structs.replace(header, digest_after=digest)


def _alter(
    target: Checkpoint, changes: Changes, destination: _Destination, checksum: str, progress: Progress | None
) -> None:
    """Alter in place by patching where the layout allows it, else through a copy that replaces the file."""
    by_tensor = list(changes.by_tensor())
    patchable = target.by_patching([t for t, _ in by_tensor], [changes.word[rows] for _, rows in by_tensor])
    if destination.out is None and patchable:
        target.alter(changes, checksum)
        return
    replaced = destination.overwrite or destination.out is None
    # In place means the file that a symbolic link stands for, not the link.
    result = destination.out or destination.source.resolve()
    with files.new_file(result, overwrite=replaced, like=destination.source) as temporary:
        files.copy(destination.source, temporary, progress)
        target.alter(changes, checksum, temporary)


def _on_target(record: Record, target: Checkpoint) -> Plan:
    """The record's plan with positions in the target's catalogue.

    Raises:
        RecordError: a tensor is missing, or of another shape or dtype.
    """
    names = positions_by_name(target.tensors)
    positions = np.empty(len(record.header.tensors), np.int32)
    for i, entry in enumerate(record.header.tensors):
        at = next((names[n] for n in (entry.name, *entry.aliases) if n in names), None)
        if at is None:
            raise RecordError(
                f"{target.path} has no tensor {entry.name!r}, which the record hits: "
                "is it the right checkpoint?"
            )
        found = target.tensors[at]
        if (found.shape, found.number) != (entry.shape, entry.number):
            raise RecordError(
                f"{entry.name} is {found.dtype} {found.shape} in {target.path}, "
                f"{entry.dtype} {entry.shape} in the record"
            )
        positions[i] = at
    plan = replace(record.plan, tensor=positions[record.plan.tensor])
    plan = plan.take(np.lexsort((plan.word, plan.tensor)))
    twice = np.flatnonzero((np.diff(plan.tensor) == 0) & (np.diff(plan.word) == 0))
    if twice.size:
        name = target.tensors[plan.tensor[twice[0]]].name
        raise RecordError(f"the record hits {name} under two names, as two; in {target.path} they are one")
    return plan


def _read_all(target: Checkpoint, plan: Plan) -> NDArray[np.uint64]:
    found = np.empty(len(plan), np.uint64)
    for tensor, rows in plan.by_tensor():
        found[rows] = target.read(tensor, plan.word[rows])
    return found


def _neither(current: NDArray[np.uint64], plan: Plan) -> NDArray[np.bool_]:
    """Which words are neither the recorded ones before nor those after.

    Byte by byte: a write that is killed may stop inside a word, where the word crosses a page of the file.
    """
    now, before, after = (words.view(np.uint8) for words in (current, plan.before, plan.after))
    foreign: NDArray[np.bool_] = ((now != before) & (now != after)).reshape(-1, 8).any(axis=1)
    return foreign


def _foreign(target: Checkpoint, plan: Plan, current: NDArray[np.uint64], foreign: NDArray[np.bool_]) -> str:
    first = int(np.flatnonzero(foreign)[0])
    tensor = target.tensors[plan.tensor[first]]
    now, before, after = (int(words[first]) for words in (current, plan.before, plan.after))
    return (
        f"{int(foreign.sum())} of {len(plan)} words in {target.path} are neither what the record says they "
        f"were nor what they became; the first is {tensor.name}, "
        f"element {int(plan.word[first]) // tensor.number.parts}: "
        f"{now:#x}, recorded {before:#x} → {after:#x}. The file was altered since, or the record belongs to "
        "another file. Nothing was altered"
    )
