"""The plan: faults drawn from a policy and a catalogue, before anything is altered."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from ckptflip.bits import popcount
from ckptflip.errors import SelectionError
from ckptflip.faults.catalogue import Tensor
from ckptflip.faults.policy import Policy, combine
from ckptflip.faults.stream import check_seed

# Reads words of one tensor: (position of the tensor in the catalogue, ascending word positions) → words.
ReadWords = Callable[[int, NDArray[np.int64]], NDArray[np.unsignedinteger]]


class Plan(Struct, frozen=True, eq=False):
    """Drawn faults: one row per word that is hit, ordered by tensor and then by word.

    A word is an element, or one part of a complex element (word = 2 · element + part).

    Attributes:
        tensor: positions in the catalogue, int32.
        word: flat positions in the tensor, int64.
        hit: the bits that were drawn, uint64.
        before: words as read, uint64.
        after: words with the fault, uint64.
        policies: which of the combined policies hit the word, as a bit set, uint16.
    """

    tensor: NDArray[np.int32]
    word: NDArray[np.int64]
    hit: NDArray[np.uint64]
    before: NDArray[np.uint64]
    after: NDArray[np.uint64]
    policies: NDArray[np.uint16]

    def __len__(self) -> int:
        return self.tensor.size

    @property
    def bits_hit(self) -> int:
        """Bits that were drawn, whether or not they changed."""
        return popcount(self.hit)

    @property
    def bits_effective(self) -> int:
        """Bits that differ between before and after."""
        return popcount(self.before ^ self.after)

    @property
    def words_effective(self) -> int:
        """Words that differ between before and after."""
        return int(np.count_nonzero(self.before != self.after))

    def by_tensor(self) -> Iterator[tuple[int, slice]]:
        """The rows of each tensor that is hit: (position in the catalogue, slice of rows)."""
        return runs(self.tensor)

    def take(self, rows: NDArray[np.bool_] | NDArray[np.int64] | slice) -> Plan:
        """The plan with some of its rows."""
        columns: list[Any] = [getattr(self, column)[rows] for column in COLUMNS]
        return Plan(*columns)


COLUMNS = ("tensor", "word", "hit", "before", "after", "policies")
KINDS = (np.int32, np.int64, np.uint64, np.uint64, np.uint64, np.uint16)


def runs(tensor: NDArray[np.int32]) -> Iterator[tuple[int, slice]]:
    """The stretches of equal values in a column of ascending positions: (position, slice of rows).

    Example:
        >>> list(runs(np.array([2, 2, 5], np.int32)))
        [(2, slice(0, 2, None)), (5, slice(2, 3, None))]
    """
    size = tensor.size
    if not size:
        return
    first: int = tensor.item(0)
    if first == tensor.item(-1):
        yield first, slice(0, size)
        return
    changes = (np.flatnonzero(tensor[1:] != tensor[:-1]) + 1).tolist()
    for start, end in zip([0, *changes], [*changes, size], strict=True):
        yield int(tensor[start]), slice(start, end)


def empty() -> Plan:
    """A plan with no faults."""
    columns: list[Any] = [np.empty(0, kind) for kind in KINDS]
    return Plan(*columns)


def draw(policies: Policy | Sequence[Policy], tensors: Sequence[Tensor], read: ReadWords, seed: int) -> Plan:
    """Draw the faults of one policy, or of several that act one after the other.

    Args:
        policies: what to draw.
        tensors: the target's catalogue.
        read: hands out the target's words.
        seed: the same policies, catalogue, contents and seed give the same plan, on every machine.

    Raises:
        SelectionError: nothing may be hit, or more is wanted than there is or than memory holds.
        GuardError: `forbid` leaves nothing to draw.
        UsageError: a seed that is not a whole number from 0 to 2^64-1.
    """
    from ckptflip.faults.draw import Population

    check_seed(seed)
    words = [t.words for t in tensors]
    if sum(words) >= 2**63:
        raise SelectionError("the target claims more than 2^63 words, which no file holds: it is damaged")
    base = np.cumsum([0, *words], dtype=np.int64)
    plan = empty()
    for position, policy in enumerate(combine(policies)):
        reader = _overlaid(read, plan, base)
        drawn = Population(policy, tensors, reader, position, seed).draw(seed)
        plan = _merged(plan, drawn, base) if len(plan) else drawn
    return plan


def _overlaid(read: ReadWords, plan: Plan, base: NDArray[np.int64]) -> ReadWords:
    """Reads words as they will be once `plan` is applied."""
    if not len(plan):
        return read
    planned = base[plan.tensor] + plan.word

    def read_planned(tensor: int, words: NDArray[np.int64]) -> NDArray[np.unsignedinteger]:
        found = np.array(read(tensor, words))
        wanted = base[tensor] + words
        at = np.minimum(np.searchsorted(planned, wanted), planned.size - 1)
        known = planned[at] == wanted
        found[known] = plan.after[at[known]].astype(found.dtype)
        return found

    return read_planned


def _merged(first: Plan, second: Plan, base: NDArray[np.int64]) -> Plan:
    """One row per word: what was before the first, what is after the second."""
    keys = np.concatenate([base[p.tensor] + p.word for p in (first, second)])
    both = Plan(*(np.concatenate([getattr(first, c), getattr(second, c)]) for c in COLUMNS))
    order = np.argsort(keys, kind="stable")
    keys, both = keys[order], both.take(order)
    starts = np.flatnonzero(np.diff(keys, prepend=-1))
    lasts = np.append(starts[1:], keys.size) - 1
    return Plan(
        both.tensor[starts],
        both.word[starts],
        np.bitwise_or.reduceat(both.hit, starts),
        both.before[starts],
        both.after[lasts],
        np.bitwise_or.reduceat(both.policies, starts),
    )
