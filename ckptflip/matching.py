"""A record's faults on the checkpoint at hand: the same tensors, the words as they are now."""

from __future__ import annotations

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from ckptflip.checkpoints import Checkpoint
from ckptflip.checkpoints.target import position_of, positions_by_name
from ckptflip.errors import RecordError
from ckptflip.faults.plan import Plan
from ckptflip.faults.record import Record
from ckptflip.faults.rowwise import layout_of


def as_recorded(target: Checkpoint, record: Record) -> Checkpoint:
    """A checkpoint as a record sees it: row-wise quantised tables as their fields, where it hits those."""
    if not any(layout_of(entry.layout) for entry in record.header.tensors):
        return target
    from ckptflip.recsys.tables import views

    return views.as_recorded(target, record.header.tensors)


def on_target(record: Record, target: Checkpoint) -> Plan:
    """The record's plan with positions in the target's catalogue.

    Raises:
        RecordError: a tensor is missing, or of another shape or dtype.
    """
    names = positions_by_name(target.tensors)
    positions = np.empty(len(record.header.tensors), np.int32)
    for i, entry in enumerate(record.header.tensors):
        at = position_of(entry, names)
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
    return in_order(replace(record.plan, tensor=positions[record.plan.tensor]), target)[0]


def in_order(plan: Plan, target: Checkpoint) -> tuple[Plan, NDArray[np.int64]]:
    """A plan with positions in the target's catalogue, ordered as plans are, and where each row came from.

    Raises:
        RecordError: a word is hit twice.
    """
    order = np.lexsort((plan.word, plan.tensor))
    plan = plan.take(order)
    twice = np.flatnonzero((np.diff(plan.tensor) == 0) & (np.diff(plan.word) == 0))
    if twice.size:
        name = target.tensors[plan.tensor[twice[0]]].name
        raise RecordError(f"the record hits {name} under two names, as two; in {target.path} they are one")
    return plan, order


def read_all(target: Checkpoint, plan: Plan) -> NDArray[np.uint64]:
    """The words of a plan as they are in the target now, in the plan's order."""
    if len(plan) == 1:
        return target.read(plan.tensor.item(), plan.word).astype(np.uint64)
    found = np.empty(len(plan), np.uint64)
    for tensor, rows in plan.by_tensor():
        found[rows] = target.read(tensor, plan.word[rows])
    return found


def neither(current: NDArray[np.uint64], plan: Plan) -> NDArray[np.bool_]:
    """Which words are neither the recorded ones before nor those after.

    Byte by byte: a write that is killed may stop inside a word, where the word crosses a page of the file.
    """
    foreign: NDArray[np.bool_] = (current != plan.before) & (current != plan.after)
    if not np.count_nonzero(foreign):
        return foreign
    now, before, after = (words.view(np.uint8) for words in (current, plan.before, plan.after))
    odd: NDArray[np.bool_] = ((now != before) & (now != after)).reshape(-1, 8).any(axis=1)
    return odd


def refusal(target: Checkpoint, plan: Plan, current: NDArray[np.uint64], foreign: NDArray[np.bool_]) -> str:
    """Why an undo is refused, with the first word that does not fit."""
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


def in_effect(record: Record, target: Checkpoint) -> bool:
    """Whether a checkpoint holds what a record did to it: False once it was undone.

    Raises:
        RecordError: the record hits tensors that this checkpoint does not have.
    """
    target = as_recorded(target, record)
    plan = on_target(record, target)
    return bool((read_all(target, plan) != plan.before).any())
