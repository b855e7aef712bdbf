"""A record's faults on another framework's checkpoint: the same bits of the same logical weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from ckptflip.bits import NumberFormat
from ckptflip.checkpoints import Checkpoint
from ckptflip.equivalence.fields import field_masks, field_note
from ckptflip.equivalence.layouts import MisfitError
from ckptflip.equivalence.pairing import Paired, Pairing
from ckptflip.equivalence.rules import Rules
from ckptflip.errors import RecordError
from ckptflip.faults.catalogue import Tensor
from ckptflip.faults.plan import Plan
from ckptflip.faults.record import Record, TensorEntry, bits_of
from ckptflip.matching import in_order

# So many tensors without a counterpart are listed.
_MOST_LISTED = 12


class Became(Struct, frozen=True):
    """What one recorded word became.

    Attributes:
        tensor: its tensor in the record.
        element: flat C-order index.
        index: the same along each axis.
        bits: the bits hit, bit 0 the least significant of the element.
        to_tensor: the tensor in the other checkpoint.
        to_element: flat C-order index in it.
        to_index: the same along each axis.
        to_bits: the bits hit there.
        layout: how the one tensor is laid onto the other.
        notes: what else there is to say of the two tensors.
    """

    tensor: str
    element: int
    index: tuple[int, ...]
    bits: tuple[int, ...]
    to_tensor: str
    to_element: int
    to_index: tuple[int, ...]
    to_bits: tuple[int, ...]
    layout: str
    notes: tuple[str, ...] = ()


class Equivalent(Struct, frozen=True, eq=False):
    """A record's faults on another checkpoint.

    Attributes:
        plan: the faults with positions in the other catalogue; words before and after are still the record's.
        origin: for each row of `plan`, its row in the record.
        pairs: for each tensor of the record, its counterpart.
    """

    plan: Plan
    origin: NDArray[np.int64]
    pairs: tuple[Paired, ...]

    def became(self, record: Record, target: Checkpoint) -> Iterator[Became]:
        """What each word of the record became, in the record's order."""
        rows = np.argsort(self.origin)
        for tensor, part in record.plan.by_tensor():
            entry, pair = record.header.tensors[tensor], self.pairs[tensor]
            other = target.tensors[pair.position]
            here, there = record.plan.take(part), self.plan.take(rows[part])
            for (element, index, bits), (to_element, to_index, to_bits) in zip(
                _places(here, entry.shape, entry.number),
                _places(there, other.shape, other.number),
                strict=True,
            ):
                yield Became(
                    tensor=entry.name,
                    element=element,
                    index=index,
                    bits=bits,
                    to_tensor=other.name,
                    to_element=to_element,
                    to_index=to_index,
                    to_bits=to_bits,
                    layout=pair.layout.name,
                    notes=pair.notes,
                )


def equivalent(
    record: Record, target: Checkpoint, rules: Rules, source: Checkpoint | None = None
) -> Equivalent:
    """Find the counterpart of every fault of a record in another checkpoint.

    Args:
        record: the faults.
        target: the other checkpoint.
        rules: how tensors are paired.
        source: the record's own checkpoint, or one of the same architecture: its catalogue tells which
            parameter an optimizer's numbered state belongs to, and the order of the layers.

    Raises:
        RecordError: a tensor has no counterpart, or one that cannot be laid onto it; lists all of them.
        UsageError: `rules` name tensors or layers that the target does not have.
    """
    entries = [as_tensor(e) for e in record.header.tensors]
    pairing = Pairing(entries, target, rules, source)
    pairs: list[Paired] = []
    refused: list[str] = []
    for tensor, entry in enumerate(entries):
        try:
            pair = pairing.find(tensor)
            hit = record.plan.take(record.plan.tensor == tensor)
            _check_number(entry, target.tensors[pair.position], rules, hit)
            pairs.append(_noted(pair, entry, target.tensors[pair.position]))
        except MisfitError as why:
            shape = ", ".join(map(str, entry.shape))
            refused.append(f"{entry.name} {entry.dtype} ({shape}): {why}")
    if refused:
        raise RecordError(_refusal(refused, len(entries), target))
    plan, origin = _placed(record.plan, entries, pairs, target)
    return Equivalent(plan, origin, tuple(pairs))


def as_tensor(entry: TensorEntry) -> Tensor:
    """A record's tensor as one of a catalogue."""
    return Tensor(
        name=entry.name,
        shape=entry.shape,
        number=entry.number,
        order=">" if entry.dtype.startswith(">") else "<",
        layer=entry.layer,
        role=entry.role,
        aliases=entry.aliases,
    )


def _placed(
    plan: Plan, entries: Sequence[Tensor], pairs: Sequence[Paired], target: Checkpoint
) -> tuple[Plan, NDArray[np.int64]]:
    position = np.empty(len(plan), np.int32)
    columns = {name: getattr(plan, name).copy() for name in ("word", "hit", "before", "after")}
    for tensor, rows in plan.by_tensor():
        entry, pair = entries[tensor], pairs[tensor]
        number, other = entry.number, target.tensors[pair.position].number
        elements, part = np.divmod(plan.word[rows], number.parts)
        position[rows] = pair.position
        columns["word"][rows] = pair.layout.forward(elements) * number.parts + part
        if number != other:
            changed = plan.before[rows] ^ plan.after[rows]
            columns["hit"][rows] = field_masks(plan.hit[rows], number, other)
            columns["before"][rows] = 0
            columns["after"][rows] = field_masks(changed, number, other)
    return in_order(replace(plan, tensor=position, **columns), target)


def _check_number(entry: Tensor, other: Tensor, rules: Rules, plan: Plan) -> None:
    if entry.number == other.number:
        return
    if rules.dtypes == "same":
        both_float = {entry.number.kind, other.number.kind} == {"float"}
        hint = (
            '; to hit the bit in the same place of the same field, say dtypes "fields"' if both_float else ""
        )
        raise MisfitError(f"its counterpart {other.name} is {other.dtype}{hint}")
    field_masks(plan.hit, entry.number, other.number)


def _refusal(refused: Sequence[str], count: int, target: Checkpoint) -> str:
    more = f"; and {len(refused) - _MOST_LISTED} more" if len(refused) > _MOST_LISTED else ""
    return (
        f"{len(refused)} of the {count} tensors that the record hits cannot be placed in {target.path}; "
        f"nothing was altered. {'; '.join(refused[:_MOST_LISTED])}{more}"
    )


def _noted(pair: Paired, entry: Tensor, other: Tensor) -> Paired:
    if entry.number == other.number:
        return pair
    return replace(pair, notes=(*pair.notes, field_note(entry.number, other.number)))


def _places(
    plan: Plan, shape: tuple[int, ...], number: NumberFormat
) -> Iterator[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    elements, parts = np.divmod(plan.word, number.parts)
    bits = bits_of(plan.hit, number, parts)
    for element, each in zip(elements.tolist(), bits, strict=True):
        index = tuple(int(i) for i in np.unravel_index(element, shape)) if shape else ()
        yield element, index, tuple(each)
