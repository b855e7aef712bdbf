"""The verbs that alter a checkpoint: inject, replay, undo."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from ckptflip import application, record_files
from ckptflip.application import Destination, carry_out, check_distinct, record_of, restore
from ckptflip.checkpoints import Changes, Checkpoint, container, opened
from ckptflip.checkpoints.files import Progress
from ckptflip.checkpoints.target import CHECKSUM_MODES
from ckptflip.errors import RecordError, UsageError
from ckptflip.faults import policy as policies_module
from ckptflip.faults.catalogue import listed
from ckptflip.faults.plan import draw
from ckptflip.faults.policy import Policy, combine
from ckptflip.faults.record import Record
from ckptflip.faults.stream import check_seed
from ckptflip.matching import as_recorded, neither, on_target, read_all, refusal

if TYPE_CHECKING:
    from ckptflip.equivalence import Became, Rules


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
    rows_weight: str | Path | None = None,
    slice: str | None = None,
    rowwise: str | None = None,
    fields: str | Iterable[str] = (),
    ranks: str | None = None,
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
        tensors, layers, roles, rows, rows_weight, slice, rowwise, fields, ranks, bits, count, fraction, ber,
            fault, design, forbid: see `ckptflip.faults.Policy`; a single string stands for a list of one.
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
        "tensors": listed(tensors),
        "layers": listed(layers),
        "roles": listed(roles),
        "rows": rows,
        "rows_weight": None if rows_weight is None else str(rows_weight),
        "slice": slice,
        "rowwise": rowwise,
        "fields": listed(fields),
        "ranks": ranks,
        "bits": bits,
        "count": count,
        "fraction": fraction,
        "ber": ber,
        "fault": fault,
        "design": design,
        "forbid": listed(forbid),
    }
    several, seed = _policies(policy, options, seed)
    destination = application.destination(checkpoint, out, in_place, record, overwrite, dry_run)
    _check_checksum(checksum)
    with opened(destination.source, exclusive=in_place and not dry_run) as stored:
        target = _as_asked(stored, several)
        plan = draw(several, target.tensors, target.read, seed)
        made = record_of(target, plan, destination, checksum, seed=seed, policies=several)
        return made if dry_run else carry_out(target, plan, made, destination, checksum, progress)


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
    map: str | Path | Rules | None = None,
    source: str | Path | None = None,
    dtypes: str | None = None,
    told: Callable[[Became], None] | None = None,
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
        map: for a checkpoint of another framework: ``auto``, a map's file, or `ckptflip.equivalence.Rules`.
            The same bits of the same logical weights are hit; see `ckptflip.equivalence`.
        source: with a map, the record's own checkpoint, or one of its architecture.
        dtypes: with a map, ``same`` or ``fields``, instead of what the map says.
        told: with a map, told what each word became, in the record's order.

    Returns:
        The record of this replay; `header.replay_of` names the original.

    Raises:
        RecordError: the record is damaged, or its tensors are not in this checkpoint in that shape and dtype;
            with a map, some have no counterpart.
        CheckpointError, UsageError: as for `inject`.
    """
    original = record if isinstance(record, Record) else record_files.read(record)
    destination = application.destination(checkpoint, out, in_place, new_record, overwrite, dry_run)
    mode = checksum or original.header.checksum
    if map is None and (source, dtypes, told) != (None, None, None):
        raise UsageError("source, dtypes and told belong to a map; give one, such as map='auto'")
    _check_checksum(mode)
    with opened(destination.source, exclusive=in_place and not dry_run) as stored:
        target = stored
        if map is None:
            target = as_recorded(stored, original)
            plan = on_target(original, target)
        else:
            from ckptflip.equivalence.replaying import placed

            plan = placed(original, target, map, source, dtypes, told)
        current = read_all(target, plan)
        plan = replace(plan, before=current, after=current ^ plan.before ^ plan.after)
        name = original.path and Path(original.path).name
        made = record_of(target, plan, destination, mode, replay_of=name or "a record in memory")
        return made if dry_run else carry_out(target, plan, made, destination, mode, progress)


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
    if original.header.checksum not in CHECKSUM_MODES:
        raise RecordError(f"the record asks for checksums {original.header.checksum!r}: it is damaged")
    destination = Destination(Path(checkpoint), Path(out) if out else None, None, overwrite)
    check_distinct(destination)
    with opened(destination.source, exclusive=out is None) as stored:
        target = as_recorded(stored, original)
        plan = on_target(original, target)
        current = read_all(target, plan)
        pending = current != plan.before
        foreign = neither(current, plan)
        if foreign.any():
            raise RecordError(refusal(target, plan, current, foreign))
        changes = Changes(plan.tensor, plan.word, current ^ plan.before, plan.before ^ plan.after)
        header = original.header
        # Places of checksums are those of one file: in another one with the same words they are worked out.
        same = header.format == target.format and header.size == container.size(target.files)
        recorded = header.checksums or None if same else None
        paths = target.files if out is None else container.names(target, Path(out))
        # Words that are right already stay in: an interrupted run may have left their checksum wrong.
        restore(target, changes, recorded, destination, header.checksum, progress)
    matches = None
    if header.digest_before is not None and header.format == target.format:
        matches = container.digest(paths, limit=None) == header.digest_before
    restored = int(np.count_nonzero(pending))
    return Undone(restored, int(np.count_nonzero(plan.before != plan.after)) - restored, matches)


def _as_asked(target: Checkpoint, policies: Sequence[Policy]) -> Checkpoint:
    """A checkpoint with the row-wise quantised tables that policies name as their fields."""
    if all(p.rowwise is None for p in policies):
        return target
    from ckptflip.recsys.tables.views import as_asked

    return as_asked(target, policies)


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
    if isinstance(seed, np.integer):
        seed = int(seed)
    check_seed(seed)
    return several, seed


_DEFAULTS = Policy()


def _check_checksum(mode: str) -> None:
    if mode not in CHECKSUM_MODES:
        raise UsageError(f"checksum must be {' or '.join(CHECKSUM_MODES)}, not {mode!r}")
