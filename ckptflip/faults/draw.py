"""Drawing the faults of one policy: the population of units, the draw, the guards."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from ckptflip.bits import BitSpec, NumberFormat, classify
from ckptflip.errors import GuardError, SelectionError
from ckptflip.faults import elements, models, ranks, rowwise, sampling
from ckptflip.faults.catalogue import Tensor, select
from ckptflip.faults.plan import Plan, ReadWords, empty
from ckptflip.faults.policy import Policy
from ckptflip.faults.row_counts import RowCounts
from ckptflip.faults.stream import Stream

# A guard that rejects all but one draw in a hundred still ends well within this many rounds.
MOST_ROUNDS = 1000
# Up to so many units are searched to the end for those that the guards allow.
SEARCHED = 1 << 17
# What a drawn fault takes at the peak, in columns and in what they are made from.
BYTES_PER_FAULT = 100
_FIRST = np.zeros(1, np.int64)


class _Stratum(Struct, frozen=True, eq=False):
    """The units of one tensor, or of a part of one: eligible elements × placements, numbered from `start`."""

    tensor: int
    number: NumberFormat
    elements: elements.Elements
    parts: NDArray[np.int64]
    masks: NDArray[np.uint64]
    start: int

    @property
    def units(self) -> int:
        return self.elements.size * self.masks.size


class _Columns(NamedTuple):
    """The rows of a plan that lie in one tensor."""

    tensor: int
    word: NDArray[np.int64]
    hit: NDArray[np.uint64]
    before: NDArray[np.uint64]
    after: NDArray[np.uint64]


class Population:
    """All units that one policy may hit in a catalogue.

    A unit is the smallest thing drawn: a bit, a placement of a burst or mask, or a word.

    Args:
        policy: what may be hit.
        tensors: the catalogue.
        read: hands out the target's words.
        position: of this policy among those combined; part of the random key.
        seed: chooses among ranks, where the policy leaves that to chance.

    Attributes:
        units: how many there are.
        lone: whether every draw is one flip, whatever the words hold: then `one` draws it without reading.

    Raises:
        SelectionError: there is nothing to hit.
    """

    def __init__(
        self,
        policy: Policy,
        tensors: Sequence[Tensor],
        read: ReadWords,
        position: int = 0,
        seed: int = 0,
    ) -> None:
        self.policy = policy
        self.model = models.parse(policy.fault)
        self._read = read
        self._position = position
        chosen = select(tensors, names=policy.tensors, layers=policy.layers, roles=policy.roles)
        if policy.rowwise is not None or policy.fields:
            chosen = rowwise.of_fields(chosen, tensors, policy.fields, policy.rowwise)
        self._counts = None if policy.rows_weight is None else RowCounts(policy.rows_weight)
        self._ranks = None if policy.ranks is None else ranks.chosen(policy.ranks, tensors, seed, position)
        groups = _groups(chosen, tensors, policy.design)
        self._strata: list[_Stratum] = []
        self._ends: list[int] = []
        self.units = 0
        for group in groups:
            for tensor in group:
                self._add(tensor, tensors[tensor])
            if self.units > (self._ends[-1] if self._ends else 0):
                self._ends.append(self.units)
        if self.units >= 2**63:
            raise SelectionError(
                f"{self.units} eligible bits are more than can be numbered; select fewer tensors"
            )
        if not self.units:
            raise SelectionError(_nothing_eligible(policy, [tensors[i] for i in chosen]))
        self._starts_listed = [s.start for s in self._strata]
        self._starts = np.array(self._starts_listed, np.int64)
        single = policy.ber is None and policy.fraction is None and policy.count in (None, 1)
        plain = self.model.kind == "flip" and not policy.forbid
        self.lone = single and plain and (policy.design == "uniform" or len(self._ends) == 1)

    def _add(self, position: int, tensor: Tensor) -> None:
        eligible = BitSpec(self.policy.bits).mask(tensor.number)
        placements = self.model.placements(tensor.number, eligible)
        extreme = None if self._counts is None else partial(self._counts.extreme, tensor)
        chosen = elements.choose(tensor.shape, self.policy.rows, self.policy.slice, extreme)
        parts = np.array([part for part, _ in placements], np.int64)
        masks = np.array([mask for _, mask in placements], np.uint64)
        for each in [chosen] if self._ranks is None else ranks.within(chosen, tensor, self._ranks):
            if placements and each.size:
                stratum = _Stratum(position, tensor.number, each, parts, masks, self.units)
                self._strata.append(stratum)
                self.units += stratum.units

    def draw(self, seed: int) -> Plan:
        """The faults of this policy for a seed.

        Raises:
            SelectionError: more is wanted than there is.
            GuardError: the guards, or overlaps of wide faults, cannot be met.
        """
        policy = self.policy
        stream = Stream(seed, self._position)
        if self.lone:
            return self._alone(stream.one_below(self.units))
        if policy.ber is not None:
            _check_memory(policy.ber * self.units)
            units = sampling.bernoulli(stream, self.units, policy.ber)
        else:
            units = self._distinct(stream, self._amount())
        guards = policy.guards()
        separate = self.model.is_wide and policy.ber is None
        if not guards and not separate:
            return self._resolve(units)[0]
        return self._guarded(stream, units, guards, separate)

    def one(self, seed: int) -> tuple[int, int, int]:
        """The flip that `draw` gives where a draw is a `lone` one.

        Returns:
            The tensor's position in the catalogue, the word, the bit as a mask.
        """
        stratum, word, placement = self._place(Stream(seed, self._position).one_below(self.units))
        return stratum.tensor, word, int(stratum.masks[placement])

    def _amount(self) -> int:
        policy = self.policy
        if policy.fraction is not None:
            _check_memory(policy.fraction * self.units)
            return max(1, round(policy.fraction * self.units))
        count = 1 if policy.count is None else policy.count
        if count > self.units:
            unit = "words" if self.model.hits_words else "placements" if self.model.is_wide else "bits"
            raise SelectionError(
                f"count {count} is larger than the {self.units} eligible {unit}; "
                "ask for fewer or widen the selection"
            )
        _check_memory(count)
        return count

    def _distinct(self, stream: Stream, n: int, taken: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        """`n` more units by the policy's design, none of them in `taken`; ascending."""
        if len(self._ends) == 1 or self.policy.design == "uniform":
            return sampling.distinct(stream, self.units, n, taken)
        barred = np.empty(0, np.int64) if taken is None else taken
        starts = [0, *self._ends[:-1]]
        cuts = np.searchsorted(barred, [*starts, self.units])
        room = np.diff([0, *self._ends]) - np.diff(cuts)
        wanted = _even_draw(stream, room, n).tolist()
        groups = zip(starts, self._ends, wanted, cuts[:-1], cuts[1:], strict=True)
        drawn = [
            low + sampling.distinct(stream, end - low, k, barred[a:b] - low)
            for low, end, k, a, b in groups
            if k
        ]
        return np.concatenate(drawn) if drawn else np.empty(0, np.int64)

    def _guarded(
        self, stream: Stream, units: NDArray[np.int64], guards: dict[str, float], separate: bool
    ) -> Plan:
        wanted = drawn = units.size
        refused = 0
        rejected = np.empty(0, np.int64)
        for _ in range(MOST_ROUNDS if not separate or self._has_room(wanted) else 0):
            plan, owner = self._resolve(units)
            bad = self._forbidden(plan, guards)[owner]
            refused += int(bad.sum())
            # Of several faults in one word, only those that are bad by themselves are out for good.
            rejected = sampling.union(rejected, self._bad_alone(units[bad], guards))
            if separate:
                bad |= self._overlapping(plan, owner)
            if not bad.any():
                return plan
            units = units[~bad]
            taken = sampling.union(units, rejected)
            missing = wanted - units.size
            if missing > self.units - taken.size or self._hopeless(drawn, wanted, refused):
                break
            drawn += missing
            units = sampling.union(units, self._distinct(stream, missing, taken))
        raise GuardError(self._impossible(wanted, guards, separate))

    def _has_room(self, wanted: int) -> bool:
        """Whether so many wide faults have enough bits to lie side by side."""
        bits = sum(s.elements.size * _distinct_bits(s) for s in self._strata)
        return wanted * self.model.pattern.bit_count() <= bits

    def _hopeless(self, drawn: int, wanted: int, refused: int) -> bool:
        """Whether the guards reject more than 99 in 100, and there is too much left to try it all."""
        tried = drawn >= wanted + MOST_ROUNDS
        return tried and refused * 100 > drawn * 99 and self.units > SEARCHED

    def _located(
        self, units: NDArray[np.int64]
    ) -> Iterator[tuple[_Stratum, slice, NDArray[np.int64], NDArray[np.uint64]]]:
        """For each tensor that ascending units lie in: which of them, their words and the bits they hit."""
        cuts = np.searchsorted(units, [*self._starts_listed, self.units])
        for stratum, low, high in zip(self._strata, cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
            if low < high:
                rank, placement = np.divmod(units[low:high] - stratum.start, stratum.masks.size)
                words = stratum.elements.flat(rank) * stratum.number.parts + stratum.parts[placement]
                yield stratum, slice(low, high), words, stratum.masks[placement]

    def _resolve(self, units: NDArray[np.int64]) -> tuple[Plan, NDArray[np.int64]]:
        """The plan of drawn units, and for each unit the row of the plan it became part of."""
        if units.size == 1:
            return self._alone(int(units[0])), np.zeros(1, np.int64)
        columns: list[_Columns] = []
        owner = np.empty(units.size, np.int64)
        rows = 0
        for stratum, here, words, masks in self._located(units):
            firsts = np.concatenate([_FIRST, np.flatnonzero(words[1:] != words[:-1]) + 1])
            owner[here] = rows + np.repeat(np.arange(firsts.size), np.diff(firsts, append=words.size))
            hit = np.bitwise_or.reduceat(masks, firsts)
            words = words[firsts]
            before = self._read(stratum.tensor, words)
            after = self.model.apply(before, hit, stratum.number)
            columns.append(_Columns(stratum.tensor, words, hit, before.astype(np.uint64), after))
            rows += words.size
        return self._assembled(columns, owner)

    def _alone(self, unit: int) -> Plan:
        """The plan of one unit: the same as for several, without what only several need."""
        stratum, word, placement = self._place(unit)
        words = np.array([word], np.int64)
        hit = stratum.masks[placement : placement + 1]
        before = self._read(stratum.tensor, words).astype(np.uint64)
        after = self.model.apply(before, hit, stratum.number)
        tensor, policies = np.array([stratum.tensor], np.int32), np.array([1 << self._position], np.uint16)
        return Plan(tensor, words, hit, before, after, policies)

    def _place(self, unit: int) -> tuple[_Stratum, int, int]:
        """Where a unit lies: its stratum, the word, and which of the stratum's placements it is."""
        stratum = self._strata[bisect_right(self._starts_listed, unit) - 1]
        rank, placement = divmod(unit - stratum.start, stratum.masks.size)
        if stratum.elements.axes is not None:
            rank = int(stratum.elements.flat(np.array([rank]))[0])
        return stratum, rank * stratum.number.parts + stratum.parts.item(placement), placement

    def _assembled(
        self,
        columns: list[_Columns],
        owner: NDArray[np.int64],
    ) -> tuple[Plan, NDArray[np.int64]]:
        # Strata follow the groups of the design; the rows of a plan follow the catalogue.
        order = sorted(range(len(columns)), key=lambda i: columns[i].tensor)
        sizes = np.array([c.word.size for c in columns], np.int64)
        if order != list(range(len(columns))):
            old_starts = np.cumsum(sizes) - sizes
            new_starts = np.empty_like(old_starts)
            new_starts[order] = np.cumsum(sizes[order]) - sizes[order]
            block = np.searchsorted(old_starts, owner, side="right") - 1
            owner = owner + (new_starts - old_starts)[block]
        parts = [columns[i] for i in order]
        if not parts:
            return empty(), owner
        tensors = np.repeat(np.array([p.tensor for p in parts], np.int32), [p.word.size for p in parts])
        policies = np.full(tensors.size, 1 << self._position, np.uint16)
        plan = Plan(
            tensors,
            np.concatenate([p.word for p in parts]),
            np.concatenate([p.hit for p in parts]),
            np.concatenate([p.before for p in parts]),
            np.concatenate([p.after for p in parts]),
            policies,
        )
        if self._ranks is not None:
            # Parts of one tensor may lie side by side, so that their words alternate.
            ascending = np.lexsort((plan.word, plan.tensor))
            back = np.empty_like(ascending)
            back[ascending] = np.arange(ascending.size)
            plan, owner = plan.take(ascending), back[owner]
        return plan, owner

    def _forbidden(self, plan: Plan, guards: dict[str, float]) -> NDArray[np.bool_]:
        """The rows whose result a guard forbids."""
        bad = np.zeros(len(plan), bool)
        numbers = {s.tensor: s.number for s in self._strata}
        for tensor, rows in plan.by_tensor() if guards else ():
            bad[rows] = _is_forbidden(plan.after[rows], numbers[tensor], guards)
        return bad

    def _bad_alone(self, units: NDArray[np.int64], guards: dict[str, float]) -> NDArray[np.int64]:
        """Those of the units whose result a guard forbids even when nothing else hits the word."""
        bad = np.zeros(units.size, bool)
        for stratum, here, words, masks in self._located(units):
            each, back = np.unique(words, return_inverse=True)
            before = self._read(stratum.tensor, each)[back]
            bad[here] = _is_forbidden(self.model.apply(before, masks, stratum.number), stratum.number, guards)
        return units[bad]

    def _overlapping(self, plan: Plan, owner: NDArray[np.int64]) -> NDArray[np.bool_]:
        """The units that share a bit with another: all of them, so that no placement is favoured."""
        bits = np.bincount(owner, minlength=len(plan)) * self.model.pattern.bit_count()
        crowded = bits != np.bitwise_count(plan.hit)
        shared: NDArray[np.bool_] = crowded[owner]
        return shared

    def _impossible(self, wanted: int, guards: dict[str, float], separate: bool) -> str:
        if separate and not guards:
            return (
                f"{wanted} faults of {self.policy.fault!r} cannot be placed without overlap "
                f"in {self.units} places; ask for fewer"
            )
        return (
            f"{wanted} faults without {' or '.join(guards)} cannot be drawn from these {self.units} places: "
            "too many of them would produce it; ask for fewer, or take bits out (as in bits 'all,!critical')"
        )


def _check_memory(faults: float) -> None:
    """Refuse what would be drawn for minutes and then not fit."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if faults * BYTES_PER_FAULT > memory:
        needed = f"{faults * BYTES_PER_FAULT / 1e9:.3g} GB"
        raise SelectionError(
            f"some {faults:.3g} faults would need {needed} of memory, more than this machine has; "
            "ask for fewer, or select fewer tensors"
        )


def _groups(chosen: list[int], tensors: Sequence[Tensor], design: str) -> list[list[int]]:
    """The chosen tensors by what the design draws first."""
    if design == "uniform":
        return [chosen]
    if design == "tensor":
        return [[i] for i in chosen]
    layers: dict[str, list[int]] = {}
    for i in chosen:
        layers.setdefault(tensors[i].layer or tensors[i].name, []).append(i)
    return list(layers.values())


def _even_draw(stream: Stream, room: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """How many of `n` faults fall on each group: each on any group with room, with the same chance."""
    counts = np.zeros(room.size, np.int64)
    while (missing := n - int(counts.sum())) > 0:
        open_groups = np.flatnonzero(counts < room)
        drawn = stream.below(open_groups.size, missing)
        counts[open_groups] += np.bincount(drawn, minlength=open_groups.size)
        counts = np.minimum(counts, room)
    return counts


def _is_forbidden(
    words: NDArray[np.uint64], number: NumberFormat, guards: dict[str, float]
) -> NDArray[np.bool_]:
    found = classify(words.astype(number.word_dtype), number, guards.get("extreme", np.inf))
    bad = np.zeros(words.size, bool)
    for kind in guards:
        bad |= getattr(found, kind)
    return bad


def _distinct_bits(stratum: _Stratum) -> int:
    """Bits of one element that some placement covers."""
    covered = {int(p): 0 for p in stratum.parts}
    for part, mask in zip(stratum.parts.tolist(), stratum.masks.tolist(), strict=True):
        covered[part] |= mask
    return sum(mask.bit_count() for mask in covered.values())


def _nothing_eligible(policy: Policy, chosen: Sequence[Tensor]) -> str:
    model = models.parse(policy.fault)
    kinds = sorted({t.dtype for t in chosen})
    if all(t.size == 0 for t in chosen):
        return "the selected tensors are empty: they hold no bits"
    if not any(model.placements(t.number, BitSpec(policy.bits).mask(t.number)) for t in chosen):
        return (
            f"no selected tensor has bits {policy.bits!r} with room for {policy.fault!r}; "
            f"their dtypes: {', '.join(kinds)}"
        )
    if policy.rows is None and policy.slice is None:
        return f"ranks {policy.ranks!r} wrote nothing of the selected tensors"
    where = f"rows {policy.rows!r}" if policy.rows is not None else f"slice {policy.slice!r}"
    shapes = ", ".join(f"{t.name} {t.shape}" for t in chosen[:3])
    return f"{where} lies outside every selected tensor ({shapes}{' …' if len(chosen) > 3 else ''})"
