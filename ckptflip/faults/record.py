"""The record: what was done to a target, enough to undo it, repeat it and explain it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from ckptflip.bits import NumberFormat, popcount
from ckptflip.bits.formats import lookup_name
from ckptflip.faults.catalogue import Tensor
from ckptflip.faults.plan import Plan
from ckptflip.faults.policy import Policy

SCHEMA = 1


class TensorEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor that was hit, as the catalogue described it. Fields as in `ckptflip.faults.Tensor`."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    layer: str = ""
    role: str = "other"
    aliases: tuple[str, ...] = ()
    layout: str = ""
    offset: int | None = None

    @property
    def number(self) -> NumberFormat:
        """The format of one element."""
        return lookup_name(self.dtype.removeprefix(">"))


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """How much was hit, and how much of it took effect (differs before and after)."""

    bits_hit: int
    bits_effective: int
    words_hit: int
    words_effective: int
    tensors: int


class ChecksumEntry(msgspec.Struct, frozen=True):
    """A stored CRC that was altered with the words it covers.

    Attributes:
        file: position among the checkpoint's files.
        offset: its first byte; it has four, little-endian.
        before: its value before.
        after: its value after.
    """

    file: Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
    offset: Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
    before: Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
    after: Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """The first line of a record.

    Attributes:
        ckptflip: version of this package.
        schema: version of the record's form.
        created: UTC, ISO 8601.
        checkpoint: name of the checkpoint that was read.
        output: name of the one that was written; the same when it was altered in place.
        format: the checkpoint's format.
        checksum: ``repair`` or ``leave``.
        seed: of the draw; None for a replay.
        policies: what was drawn; empty for a replay.
        ranks: of a distributed run, whose parts alone could be hit; empty where none were named.
        replay_of: the record that was replayed, or None.
        size: bytes of all files that were read.
        digest_before: of what was read, or None when it was too large to digest in passing.
        digest_after: of what was written, or None likewise and when altered in place.
        counts: how much was hit.
        tensors: those that were hit; faults refer to them by name.
        checksums: stored CRCs that were repaired; `undo` gives them their value back.
        versions: of Python and the libraries that took part.
    """

    ckptflip: str
    schema: int
    created: str
    checkpoint: str
    output: str
    format: str
    checksum: str
    seed: int | None
    policies: tuple[Policy, ...]
    size: int
    counts: Counts
    tensors: tuple[TensorEntry, ...]
    checksums: tuple[ChecksumEntry, ...] = ()
    versions: dict[str, str] = {}
    replay_of: str | None = None
    ranks: tuple[int, ...] = ()
    digest_before: str | None = None
    digest_after: str | None = None


class Record(Struct, frozen=True, eq=False, weakref=True):
    """What was done: a header and the faults with their words before and after.

    Attributes:
        header: what it was done to, and how it was drawn.
        plan: the faults; `plan.tensor` are positions in `header.tensors`.
        path: the file the record was written to, or None.
    """

    header: Header
    plan: Plan
    path: str | None = None

    @property
    def bits_hit(self) -> int:
        """Bits that were drawn."""
        return self.header.counts.bits_hit

    @property
    def bits_effective(self) -> int:
        """Bits that differ before and after."""
        return self.header.counts.bits_effective

    def __len__(self) -> int:
        return len(self.plan)


def counts_of(plan: Plan) -> Counts:
    """The counts of a plan."""
    changed = plan.before ^ plan.after
    return Counts(
        bits_hit=plan.bits_hit,
        bits_effective=popcount(changed),
        words_hit=len(plan),
        words_effective=int(np.count_nonzero(changed)),
        tensors=len([*plan.by_tensor()]),
    )


def entries_of(plan: Plan, tensors: Sequence[Tensor]) -> tuple[tuple[TensorEntry, ...], Plan]:
    """The tensors a plan hits, and the plan with positions among those."""
    hit = [tensor for tensor, _ in plan.by_tensor()]
    entries = tuple(
        TensorEntry(
            name=t.name,
            shape=t.shape,
            dtype=t.dtype,
            layer=t.layer,
            role=t.role,
            aliases=t.aliases,
            layout=t.layout,
            offset=t.offset,
        )
        for t in (tensors[i] for i in hit)
    )
    renumbered = np.zeros(len(plan), np.int32)
    if len(hit) > 1:
        renumbered = np.searchsorted(np.array(hit, np.int32), plan.tensor).astype(np.int32)
    return entries, Plan(renumbered, plan.word, plan.hit, plan.before, plan.after, plan.policies)


def bits_of(masks: NDArray[np.uint64], number: NumberFormat, parts: NDArray[np.int64]) -> list[list[int]]:
    """The bits in each mask, counted over the whole element (imaginary after real)."""
    known: dict[tuple[int, int], list[int]] = {}
    found = []
    for key in zip(masks.tolist(), parts.tolist(), strict=True):
        bits = known.get(key)
        if bits is None:
            mask, low = key[0], key[1] * number.part_width
            bits = known[key] = [low + b for b in range(number.part_width) if mask >> b & 1]
        found.append(bits)
    return found
