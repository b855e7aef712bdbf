"""Carrying plans out in memory: first the record, then the words, then a look whether they took effect."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from time import time
from typing import Any, cast
from weakref import WeakKeyDictionary

import msgspec
import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from ckptflip import __version__, record_files
from ckptflip.errors import LiveError, RecordError, UsageError
from ckptflip.faults.catalogue import Tensor
from ckptflip.faults.plan import Plan, runs
from ckptflip.faults.policy import Policy
from ckptflip.faults.record import SCHEMA, Header, Record, counts_of, entries_of
from ckptflip.live.protocol import LiveTarget
from ckptflip.matching import neither, on_target, read_all

_LIBRARIES = ("numpy", "torch", "keras", "tensorflow", "jax")
# Where the faults of a record lie, for as long as the record is kept.
_CARRIED_OUT: WeakKeyDictionary[Record, tuple[Sequence[Tensor], Plan]] = WeakKeyDictionary()


def carry_out(
    target: LiveTarget,
    tensors: Sequence[Tensor],
    plan: Plan,
    record: Record,
    path: str | Path | None,
    overwrite: bool,
) -> Record:
    """Write the record, if it has a path, then alter the words, then see that they are altered.

    Args:
        target: the tensors.
        tensors: the target's catalogue.
        plan: the faults, by positions in the target's catalogue.
        record: of these faults.
        path: where the record goes, or None.
        overwrite: whether that file may exist.

    Returns:
        The record, with its path.

    Raises:
        UsageError, CheckpointError: the record's file exists, or cannot be written. Nothing was altered.
        LiveError: a word is not what it should have become.
    """
    if path is not None:
        path = Path(path)
        if path.exists() and not overwrite:
            raise UsageError(f"the record {path} exists; name another file or folder")
        record_files.make_folder(path.parent)
        record_files.write(record, path, overwrite=True)
        record = replace(record, path=str(path))
    alter(target, plan, plan.before, plan.after)
    current = read_all(cast(Any, target), plan)
    missed = current != plan.after
    if np.count_nonzero(missed):
        raise LiveError(_missed(record, plan, current, np.flatnonzero(missed)))
    _CARRIED_OUT[record] = tensors, plan
    return record


def alter(target: LiveTarget, plan: Plan, now: NDArray[np.uint64], then: NDArray[np.uint64]) -> int:
    """Make the words of a plan, which are `now`, what they should be `then`; how many had to change."""
    tensors, words, masks = plan.tensor, plan.word, now ^ then
    changed = np.count_nonzero(masks)
    if changed < masks.size:
        rows = masks != 0
        tensors, words, masks = tensors[rows], words[rows], masks[rows]
    if changed == 1:
        target.xor(tensors.item(), words, masks)
        return 1
    for tensor, part in runs(tensors):
        target.xor(tensor, words[part], masks[part])
    return int(changed)


def record_of(
    kind: str,
    tensors: Sequence[Tensor],
    plan: Plan,
    where: str,
    size: int,
    *,
    seed: int | None = None,
    policies: tuple[Policy, ...] = (),
    replay_of: str | None = None,
) -> Record:
    """The record of a plan, before it is carried out.

    Args:
        kind: the target's format.
        tensors: its catalogue.
        plan: the faults.
        where: for the header, such as ``step 120``.
        size: bytes of all tensors of the catalogue.
        seed: of the draw, if there was one.
        policies: what was drawn.
        replay_of: the record that is replayed, if one is.
    """
    entries, renumbered = entries_of(plan, tensors)
    header = Header(
        ckptflip=__version__,
        schema=SCHEMA,
        created=_created(int(time())),
        checkpoint="",
        output=where,
        format=kind,
        checksum="leave",
        seed=seed,
        policies=policies,
        replay_of=replay_of,
        size=size,
        counts=counts_of(plan),
        tensors=entries,
        versions=_versions(),
    )
    return Record(header, renumbered)


@lru_cache(1)
def _created(seconds: int) -> str:
    """A time in UTC, in ISO 8601; there are many records in one second."""
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def _versions() -> dict[str, str]:
    """Of Python and of the libraries that are loaded."""
    found = {"python": sys.version.split()[0]}
    for name in _LIBRARIES:
        version = getattr(sys.modules.get(name), "__version__", None)
        if version is not None:
            found[name] = str(version)
    return found


def restore(target: LiveTarget, record: Record) -> tuple[int, int]:
    """Give those recorded words their value back that still hold the fault; never refuses.

    Args:
        target: the tensors.
        record: what was done to them.

    Returns:
        Words that were restored, and words that something else has altered since; these stay as they are.

    Raises:
        RecordError: a tensor of the record is gone.
        LiveError: the model is no longer the one that the target was made for.
    """
    _, plan = placed(record, target)
    current = read_all(cast(Any, target), plan)
    foreign = neither(current, plan)
    then = np.where(foreign, current, plan.before) if foreign.any() else plan.before
    return alter(target, plan, current, then), int(foreign.sum())


def undo(target: LiveTarget, record: Record | str | Path) -> int:
    """Give every recorded word its value back.

    Args:
        target: the tensors.
        record: what was done to them, or the record's file.

    Returns:
        Words that were restored; those that had their value back already are not counted.

    Raises:
        RecordError: a word is neither what the record says it was, nor what it became: training has gone on
            since, or the record belongs to another model. Nothing is altered.
    """
    original = record if isinstance(record, Record) else record_files.read(record)
    tensors, plan = placed(original, target)
    current = read_all(cast(Any, target), plan)
    foreign = neither(current, plan)
    if np.count_nonzero(foreign):
        raise RecordError(_refusal(tensors, plan, current, foreign))
    return alter(target, plan, current, plan.before)


class _Place(msgspec.Struct, frozen=True):
    """What `ckptflip.matching` asks of a checkpoint."""

    path: str
    tensors: Sequence[Tensor]


def placed(record: Record, target: LiveTarget) -> tuple[Sequence[Tensor], Plan]:
    """The catalogue, and a record's plan with positions in it."""
    done, holds = _CARRIED_OUT.get(record), getattr(target, "holds", None)
    # What was done a moment ago need not be looked up by its names.
    if done is not None and holds is not None and holds(done[0], dict.fromkeys(done[1].tensor.tolist())):
        return done
    tensors = target.tensors
    return tensors, located(record, target, tensors)


def located(record: Record, target: LiveTarget, tensors: Sequence[Tensor]) -> Plan:
    """The record's plan with positions in the catalogue."""
    return on_target(record, cast(Any, _Place(f"the running model ({target.format})", tensors)))


def _named(tensors: Sequence[Tensor], plan: Plan, row: int) -> str:
    tensor = tensors[plan.tensor[row]]
    return f"{tensor.name}, element {int(plan.word[row]) // tensor.number.parts}"


def _refusal(
    tensors: Sequence[Tensor], plan: Plan, current: NDArray[np.uint64], foreign: NDArray[np.bool_]
) -> str:
    first = int(np.flatnonzero(foreign)[0])
    now, before, after = (int(words[first]) for words in (current, plan.before, plan.after))
    return (
        f"{int(foreign.sum())} of {len(plan)} words in the running model are neither what the record says "
        f"they were nor what they became; the first is {_named(tensors, plan, first)}: {now:#x}, recorded "
        f"{before:#x} → {after:#x}. Training has gone on since, or the record belongs to another model: go "
        "back to a checkpoint from before the injection. Nothing was altered"
    )


def _missed(record: Record, plan: Plan, current: NDArray[np.uint64], missed: NDArray[np.int64]) -> str:
    first = int(missed[0])
    entry = record.header.tensors[record.plan.tensor[first]]
    element = int(plan.word[first]) // entry.number.parts
    now, after = int(current[first]), int(plan.after[first])
    return (
        f"{missed.size} of {len(plan)} faults did not take effect; the first is {entry.name}, "
        f"element {element}: {now:#x} instead of {after:#x}. Something else writes to this memory, or the "
        "framework keeps the tensor elsewhere; leave it out with a '!name' in the policy's tensors"
    )
