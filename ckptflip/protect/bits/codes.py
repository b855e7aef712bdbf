"""Codes over chosen bits of words: parity, SECDED Hamming, triplication."""

from __future__ import annotations

import difflib
from typing import Protocol

import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from ckptflip.errors import UsageError
from ckptflip.protect.bits.packing import Bytes, Packing, Words, joined
from ckptflip.protect.bits.sums import groups_of, sums

CODES = ("parity", "secded", "tmr")
GROUP = 64
_MOST = 1 << 16

Places = NDArray[np.int64]


class Flips(Struct, frozen=True, eq=False):
    """What a code found among the words of one tensor.

    Attributes:
        words: positions of words with flips that the code locates.
        masks: for each, the bits that flipped.
        groups: groups with flips that it detects and cannot locate; see `Code.members`.
        lost: for each, the bits.
        checks: bits of the checks themselves that flipped; they are put right.
    """

    words: Places
    masks: Words
    groups: Places
    lost: Words
    checks: int


class Code(Protocol):
    """A code over the chosen bits of words. Checks are kept as bytes, without the bits between.

    Attributes:
        name: of `CODES`.
        group: words that share their checks.
    """

    name: str
    group: int

    def encode(self, words: Words, packing: Packing) -> Bytes:
        """The checks of words."""
        ...

    def find(self, words: Words, packing: Packing, checks: Bytes) -> Flips:
        """What has flipped since; flips in the checks are put right, the words are left as they are."""
        ...

    def size(self, count: int, packing: Packing) -> int:
        """Bytes of the checks of so many words."""
        ...


def code_of(name: str, group: int = GROUP) -> Code:
    """A code by its name.

    Args:
        name: of `CODES`.
        group: words that share their checks; of no account for ``tmr``.

    Raises:
        UsageError: no such code, or a group that makes no sense.
    """
    if isinstance(group, bool) or not isinstance(group, int) or not 2 <= group <= _MOST:
        raise UsageError(f"a group has 2 to {_MOST} elements, not {group!r}")
    match name:
        case "parity":
            return Parity(group)
        case "secded":
            return Secded(group)
        case "tmr":
            return Triplication()
    near = difflib.get_close_matches(name, CODES, 1) if isinstance(name, str) else []
    hint = f"did you mean {near[0]!r}?" if near else f"use {', '.join(CODES)}"
    raise UsageError(f"no code is called {name!r}; {hint}")


class Parity:
    """The sum of every group: an odd number of flips in one bit column of a group is detected, not located.

    Example:
        >>> code, packing = Parity(4), Packing(0xFF, np.dtype(np.uint8))
        >>> words = np.arange(8, dtype=np.uint8)
        >>> checks = code.encode(words, packing)
        >>> words[3] ^= 16
        >>> found = code.find(words, packing, checks)
        >>> found.groups, found.lost
        (array([1]), array([16], dtype=uint8))
    """

    name = "parity"

    def __init__(self, group: int) -> None:
        self.group = group
        self._members = np.ones((1, group), bool)

    def encode(self, words: Words, packing: Packing) -> Bytes:
        return packing.pack(sums(words, self.group, self._members)[0])

    def find(self, words: Words, packing: Packing, checks: Bytes) -> Flips:
        count = groups_of(words.size, self.group)
        unused = packing.clear_unused(checks, count)
        groups, lost = packing.differences(self.encode(words, packing), checks, count)
        return Flips(*_none(packing), groups, lost, unused)

    def size(self, count: int, packing: Packing) -> int:
        return packing.size(groups_of(count, self.group))


class Secded:
    """An extended Hamming code over every bit column of a group: one flip is located, two are detected.

    Word i of a group has the i-th number that is no power of two, from 3 on; check j is the sum of the words
    whose number has bit j, and one more check is the sum of everything, checks included (Hamming, 1950). A
    flip in a check is located as well. Each bit of the word is a code of its own, so that all chosen bits of
    one word may flip at once.

    Example:
        >>> code, packing = Secded(4), Packing(0xFF, np.dtype(np.uint8))
        >>> words = np.arange(8, dtype=np.uint8)
        >>> checks = code.encode(words, packing)
        >>> words[3] ^= 0b10100
        >>> found = code.find(words, packing, checks)
        >>> found.words, found.masks
        (array([3]), array([20], dtype=uint8))
    """

    name = "secded"

    def __init__(self, group: int) -> None:
        self.group = group
        self._numbers = _numbers(group)
        self._order = int(self._numbers[-1]).bit_length()
        of_bits = [(self._numbers >> j & 1).astype(bool) for j in range(self._order)]
        self._members = np.stack([*of_bits, np.ones(group, bool)])
        # Which word of a group a number is of, and -1 where it is of none.
        self._word = np.full(1 << self._order, -1)
        self._word[self._numbers] = np.arange(group)

    def encode(self, words: Words, packing: Packing) -> Bytes:
        return np.concatenate([packing.pack(check) for check in self._checks(words)])

    def find(self, words: Words, packing: Packing, checks: Bytes) -> Flips:
        now = self.encode(words, packing)
        if np.array_equal(now, checks):
            return Flips(*_none(packing), *_none(packing), 0)
        count = groups_of(words.size, self.group)
        size = packing.size(count)
        unused, apart = 0, []
        for at in range(0, now.size, size):
            then = checks[at : at + size]
            unused += packing.clear_unused(then, count)
            apart.append(packing.differences(now[at : at + size], then, count))
        groups = np.unique(np.concatenate([places for places, _ in apart]))
        syndromes = np.zeros((len(apart), groups.size), packing.dtype)
        for row, (places, masks) in zip(syndromes, apart, strict=True):
            row[np.searchsorted(groups, places)] = masks
        found = self._located(groups, syndromes, words.size, packing, checks)
        return replace(found, checks=found.checks + unused)

    def size(self, count: int, packing: Packing) -> int:
        return (self._order + 1) * packing.size(groups_of(count, self.group))

    def _checks(self, words: Words) -> Words:
        found = sums(words, self.group, self._members)
        # The last one, of the words so far, takes in the other checks.
        found[-1] ^= np.bitwise_xor.reduce(found[:-1], axis=0)
        return found

    def _located(
        self, groups: Places, syndromes: Words, words: int, packing: Packing, checks: Bytes
    ) -> Flips:
        """What the differences between old and new checks say, bit column by bit column."""
        count = groups_of(words, self.group)
        one = packing.dtype.type(1)
        odd = np.bitwise_xor.reduce(syndromes, axis=0)
        places, masks, lost = [], [], np.zeros(groups.size, packing.dtype)
        flipped = 0
        seen = int(np.bitwise_or.reduce(syndromes, axis=None))
        for bit in (b for b in range(seen.bit_length()) if seen >> b & 1):
            shift = packing.dtype.type(bit)
            number = np.zeros(groups.size, np.int64)
            for j in range(self._order):
                number |= (syndromes[j] >> shift & one).astype(np.int64) << j
            is_odd = (odd >> shift & one).astype(bool)
            word = self._word[number]
            at = word * count + groups
            is_word = is_odd & (word >= 0) & (at < words)
            is_check = is_odd & ((number & (number - 1)) == 0)
            places.append(at[is_word])
            masks.append(np.full(int(is_word.sum()), 1 << bit, packing.dtype))
            lost |= np.where(~is_word & ~is_check & (is_odd | (number > 0)), one << shift, 0).astype(
                lost.dtype
            )
            flipped += self._mend(checks, groups[is_check], number[is_check], 1 << bit, count, packing)
        distinct, together = joined(places, masks, packing.dtype)
        return Flips(distinct, together, groups[lost > 0], lost[lost > 0], flipped)

    def _mend(
        self, checks: Bytes, groups: Places, numbers: Places, mask: int, count: int, packing: Packing
    ) -> int:
        """Flip a bit of checks back: of the one whose power of two the number is; of the last one for 0."""
        size = packing.size(count)
        for j in range(self._order + 1):
            hit = groups[numbers == (1 << j if j < self._order else 0)]
            if hit.size:
                part = checks[j * size : (j + 1) * size]
                packing.flip(part, hit, np.full(hit.size, mask, packing.dtype), count)
        return groups.size


class Triplication:
    """Two copies of the chosen bits: of three, the one that two agree on holds.

    Two flips of the same bit in two of the three are taken for one in the third; nothing tells them apart.

    Example:
        >>> code, packing = Triplication(), Packing(0xF0, np.dtype(np.uint8))
        >>> words = np.arange(4, dtype=np.uint8)
        >>> checks = code.encode(words, packing)
        >>> words[3] ^= 0b110000
        >>> found = code.find(words, packing, checks)
        >>> found.words, found.masks
        (array([3]), array([48], dtype=uint8))
    """

    name = "tmr"
    group = 1

    def encode(self, words: Words, packing: Packing) -> Bytes:
        return np.tile(packing.pack(words), 2)

    def find(self, words: Words, packing: Packing, checks: Bytes) -> Flips:
        now, (first, second) = packing.pack(words), np.split(checks, 2)
        if np.array_equal(now, first) and np.array_equal(now, second):
            return Flips(*_none(packing), *_none(packing), 0)
        unused = sum(packing.clear_unused(copy, words.size) for copy in (first, second))
        wrong = (now ^ first) & (now ^ second)
        places, masks = packing.differences(wrong, np.zeros_like(wrong), words.size)
        held = now ^ wrong
        flipped = sum(int(np.bitwise_count(copy ^ held).sum(dtype=np.int64)) for copy in (first, second))
        if flipped:
            first[:], second[:] = held, held
        return Flips(places, masks, *_none(packing), flipped + unused)

    def size(self, count: int, packing: Packing) -> int:
        return 2 * packing.size(count)


def _numbers(group: int) -> Places:
    """The first numbers that are no powers of two, from 3 on."""
    every = np.arange(3, 2 * group + 40)
    found: Places = every[(every & (every - 1)) != 0][:group].astype(np.int64)
    return found


def _none(packing: Packing) -> tuple[Places, Words]:
    return np.empty(0, np.int64), np.empty(0, packing.dtype)
