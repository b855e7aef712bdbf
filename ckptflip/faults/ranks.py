"""Which ranks of a distributed run are hit: the elements that they wrote into the checkpoint."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ckptflip.errors import SelectionError, UsageError
from ckptflip.faults import sampling
from ckptflip.faults.catalogue import Tensor
from ckptflip.faults.elements import Axis, Elements
from ckptflip.faults.stream import Stream

if TYPE_CHECKING:
    from ckptflip.faults.policy import Policy

_SOME = re.compile(r"(\d{1,9})\s+of\s+(\d{1,9})")
_RANGE = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?")
# A policy's own stream uses its position, 0 to 15; the choice of ranks must not share its numbers.
_OWN_KEY = 16
_MOST = 1 << 20


def check(spec: str | None) -> None:
    """Raise UsageError unless a specification of ranks can be read."""
    if spec is not None and not _SOME.fullmatch(spec.strip()):
        _listed(spec)


def chosen(spec: str, tensors: Sequence[Tensor], seed: int, position: int) -> frozenset[int]:
    """The ranks that a policy hits.

    Args:
        spec: ``0,3-5``: these; ``2 of 8``: two of the eight that wrote the checkpoint, drawn for this seed.
        tensors: the catalogue.
        seed: of the draw.
        position: of the policy among those combined.

    Raises:
        UsageError: a specification that cannot be read.
        SelectionError: the checkpoint does not tell ranks, or has not these.
    """
    present = sorted({s.rank for t in tensors for s in t.shards})
    if not present:
        raise SelectionError(
            "ranks were named, and this checkpoint does not tell which rank wrote what "
            "(torch's distributed checkpoints do)"
        )
    some = _SOME.fullmatch(spec.strip())
    if some is None:
        wanted = _listed(spec)
        missing = sorted(wanted.difference(present))
        if missing:
            raise SelectionError(
                f"ranks {spec!r}: no rank {missing[0]} wrote this checkpoint; there are {len(present)}, "
                f"{present[0]} to {present[-1]}"
            )
        return wanted
    count, of = int(some[1]), int(some[2])
    if of != len(present) or not 1 <= count <= of:
        raise SelectionError(f"ranks {spec!r}: {len(present)} ranks wrote this checkpoint")
    drawn = sampling.distinct(Stream(seed, position + _OWN_KEY), of, count)
    return frozenset(present[i] for i in drawn.tolist())


def of_policies(policies: Sequence[Policy], tensors: Sequence[Tensor], seed: int | None) -> tuple[int, ...]:
    """The ranks that policies hit, those drawn by the seed included; () where none names any."""
    named = [(i, p.ranks) for i, p in enumerate(policies) if p.ranks is not None]
    if seed is None or not named:
        return ()
    return tuple(sorted({rank for i, spec in named for rank in chosen(spec, tensors, seed, i)}))


def within(elements: Elements, tensor: Tensor, ranks: frozenset[int]) -> list[Elements]:
    """The eligible elements of a tensor that these ranks wrote, as disjoint products."""
    axes = elements.axes or tuple(range(n) for n in tensor.shape)
    boxes = []
    for shard in tensor.shards:
        if shard.rank in ranks:
            cut = [_cut(a, s, s + n) for a, s, n in zip(axes, shard.start, shard.shape, strict=True)]
            boxes.append(Elements(elements.shape, tuple(cut)))
    return boxes


def _listed(spec: str) -> frozenset[int]:
    wanted: set[int] = set()
    for term in spec.split(","):
        match = _RANGE.fullmatch(term.strip())
        if match is None or int(match[2] or match[1]) < int(match[1]) or int(match[2] or match[1]) > _MOST:
            raise UsageError(f"ranks {spec!r}: {term.strip()!r} is not a rank (3), a range (0-3) or '2 of 8'")
        wanted.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return frozenset(wanted)


def _cut(axis: Axis, low: int, high: int) -> Axis:
    """The positions of an axis in low … high-1."""
    if isinstance(axis, range):
        first = max(0, -(-(low - axis.start) // axis.step))
        last = max(first, -(-(high - axis.start) // axis.step))
        return axis[first:last]
    return axis[np.searchsorted(axis, low) : np.searchsorted(axis, high)]
