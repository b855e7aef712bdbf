"""A guard over chosen bits of tensors: checks kept beside them, flips found and put right where they are."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import numpy as np
from msgspec import Struct

from ckptflip.bits import BitSpec
from ckptflip.errors import LiveError, SelectionError
from ckptflip.faults.catalogue import Tensor, listed, select
from ckptflip.protect.bits.codes import GROUP, Code, code_of
from ckptflip.protect.bits.packing import Bytes, Packing, Words
from ckptflip.protect.bits.places import Place, place_of
from ckptflip.protect.bits.report import Found, Scrub
from ckptflip.protect.bits.sums import groups_of

_GIVEN = str | Iterable[str]


class Cost(Struct, frozen=True):
    """The memory that checks take.

    Attributes:
        checks: bytes.
        tensors: bytes of the tensors that they guard.
    """

    checks: int
    tensors: int

    @property
    def share(self) -> float:
        """Checks as a share of the tensors."""
        return self.checks / self.tensors


class _Kept(Struct):
    """The checks of one tensor's words, or of one part of complex ones."""

    tensor: int
    part: int
    packing: Packing
    checks: Bytes


class Guard:
    """Checks over chosen bits of tensors; made by `guard`.

    Whatever writes the tensors on purpose, such as a step of training, makes the checks stale: `refresh` them
    then. What PyTorch writes is noticed, and a scrub refused; what else writes them is not.
    """

    def __init__(self, place: Place, chosen: list[int], bits: BitSpec, code: Code) -> None:
        self._place, self._code, self._bits = place, code, bits
        self._kept: list[_Kept] = []
        for i in chosen:
            number = place.tensors[i].number
            for part in range(number.parts):
                mask = bits.mask(number) >> part * number.part_width & (1 << number.part_width) - 1
                if mask:
                    self._kept.append(_Kept(i, part, Packing(mask, number.word_dtype), np.empty(0, np.uint8)))
        self._names = {i: place.tensors[i] for i in chosen}
        self._marks: dict[int, Any] = {}
        self.refresh()

    def __repr__(self) -> str:
        code, cost = self._code, self.cost
        what = "1 tensor" if len(self._names) == 1 else f"{len(self._names)} tensors"
        together = f" of {code.group} elements" if code.group > 1 else ""
        return (
            f"<Guard of {what}: {code.name}{together} over {self._bits.text!r}, "
            f"{cost.checks} bytes of checks, {cost.share:.1%} of the tensors>"
        )

    @property
    def tensors(self) -> list[str]:
        """Names of the guarded tensors."""
        return [tensor.name for tensor in self._names.values()]

    @property
    def cost(self) -> Cost:
        """The memory that the checks take."""
        checks = sum(kept.checks.size for kept in self._kept)
        return Cost(checks, sum(tensor.nbytes for tensor in self._names.values()))

    def refresh(self) -> None:
        """Take the tensors as they are now for right.

        Raises:
            LiveError: they are no longer those that the guard was made for.
        """
        self._check_same()
        for kept in self._kept:
            kept.checks = self._code.encode(self._words(kept), kept.packing)
        self._marks = {i: self._place.mark(i) for i in self._names}

    def checks(self) -> list[Bytes]:
        """Copies of the checks, for `restore`."""
        return [kept.checks.copy() for kept in self._kept]

    def restore(self, checks: list[Bytes]) -> None:
        """Put checks back as they were: after flips that no code stands, a scrub may have changed them too.

        Args:
            checks: what `checks` gave.

        Raises:
            LiveError: they are of another guard.

        Example:
            >>> import numpy as np
            >>> guarded = guard(np.ones(8, np.float32))
            >>> kept = guarded.checks()
            >>> guarded.restore(kept)
        """
        now = [kept.checks for kept in self._kept]
        if [each.shape for each in now] != [each.shape for each in checks]:
            raise LiveError("these checks are of another guard: restore what this one's checks() gave")
        for kept, each in zip(self._kept, checks, strict=True):
            kept.checks = each.copy()

    def scrub(self, *, force: bool = False) -> Scrub:
        """Find flips in the guarded bits and put right, in place, those that the code locates.

        Args:
            force: scrub also what PyTorch has written since the checks were made.

        Raises:
            LiveError: the tensors are others, or PyTorch has written them: nothing tells flips from updates.
        """
        began = time.perf_counter()
        self._check_same()
        for i, mark in self._marks.items():
            if not force and self._place.mark(i) != mark:
                raise LiveError(
                    f"{self._names[i].name} was written since its checks were made, by training or "
                    "otherwise, and flips cannot be told from that: call refresh() after each change"
                )
        found = []
        for kept in self._kept:
            words = self._words(kept)
            flips = self._code.find(words, kept.packing, kept.checks)
            tensor = self._names[kept.tensor]
            if flips.words.size:
                at = flips.words * tensor.number.parts + kept.part
                self._place.xor(kept.tensor, at, flips.masks.astype(np.uint64))
            if flips.words.size or flips.groups.size or flips.checks:
                groups = groups_of(words.size, self._code.group)
                found.append(Found(tensor, kept.part, groups, flips))
        return Scrub(time.perf_counter() - began, found)

    def _words(self, kept: _Kept) -> Words:
        words = self._place.words(kept.tensor)
        parts = self._names[kept.tensor].number.parts
        return words if parts == 1 else words[kept.part :: parts]

    def _check_same(self) -> None:
        now = self._place.tensors
        for i, tensor in self._names.items():
            if i >= len(now) or not _is_same(now[i], tensor):
                raise LiveError(
                    f"{tensor.name} is no longer what it was when the guard was made: make a new guard"
                )


def guard(
    held: Any,
    bits: str = "sign,exponent",
    code: str = "secded",
    *,
    group: int = GROUP,
    tensors: _GIVEN = (),
    layers: _GIVEN = (),
    roles: _GIVEN = (),
) -> Guard:
    """Guard chosen bits of tensors in memory.

    Args:
        held: a PyTorch or Keras model, any `ckptflip.live.LiveTarget`, an array or a dict of arrays by name
            (C-contiguous, of any dtype of numpy and ml_dtypes).
        bits: which bits of an element, as in a policy: ``sign,exponent``, ``critical``, ``23-30``, ``all``.
        code: ``parity`` detects an odd number of flips in a bit column of a group; ``secded`` corrects one
            and detects two; ``tmr`` keeps two copies and takes the majority, bit by bit.
        group: elements that share their checks; more cost less memory and stand fewer flips.
        tensors, layers, roles: which tensors, as in a policy; all that have such bits, unless given.

    Raises:
        UsageError: an unknown code, bits that make no sense, arrays that cannot be altered.
        SelectionError: nothing is selected, or nothing that is selected has such bits.

    Example:
        >>> import torch
        >>> from ckptflip import live
        >>> from ckptflip.faults import Policy
        >>> model = torch.nn.Linear(64, 64)
        >>> guarded = guard(model)
        >>> with live.faults(model, Policy(bits="critical", count=3), seed=1):
        ...     report = guarded.scrub()
        >>> report.corrected, report.uncorrectable, f"{guarded.cost.share:.1%}"
        (3, 0, '3.6%')
    """
    place, spec = place_of(held), BitSpec(bits)
    chosen = select(place.tensors, names=listed(tensors), layers=listed(layers), roles=listed(roles))
    made = code_of(code, group)
    with_bits = [i for i in chosen if spec.mask(place.tensors[i].number) and place.tensors[i].size]
    if not with_bits:
        kinds = sorted({place.tensors[i].dtype for i in chosen})
        raise SelectionError(f"no selected tensor has the bits {bits!r}; they are of {', '.join(kinds)}")
    return Guard(place, with_bits, spec, made)


def _is_same(now: Tensor, then: Tensor) -> bool:
    return (now.name, now.shape, now.number) == (then.name, then.shape, then.number)
