"""What a scrub found: corrected flips, flips it could not locate, and what that took."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from msgspec import Struct

from ckptflip.bits import popcount
from ckptflip.faults.catalogue import Tensor
from ckptflip.protect.bits.codes import Flips


class Flip(Struct, frozen=True):
    """A flip that was put right.

    Attributes:
        tensor: its name.
        element: flat position in C order.
        bit: bit of the element, 0 the least significant.
    """

    tensor: str
    element: int
    bit: int


class Lost(Struct, frozen=True):
    """Flips in one bit column of a group, detected and not located.

    Attributes:
        tensor: its name.
        bit: bit of the element.
        elements: the group, as flat positions: some of these elements, or their checks, are wrong.
    """

    tensor: str
    bit: int
    elements: range


class Found(Struct, frozen=True, eq=False):
    """What was found in one tensor, in the words of one part of its elements.

    Attributes:
        tensor: as in the catalogue.
        part: 0, or 1 for imaginary parts.
        groups: how many groups its words make.
        flips: what was found.
    """

    tensor: Tensor
    part: int
    groups: int
    flips: Flips


class Scrub(Struct, frozen=True, eq=False):
    """The outcome of `Guard.scrub`.

    Attributes:
        seconds: what it took.
        found: tensors with flips, by tensor.
    """

    seconds: float
    found: Sequence[Found]

    def __repr__(self) -> str:
        return (
            f"<Scrub: {self.corrected} corrected, {self.uncorrectable} uncorrectable, {self.checks} of the "
            f"checks; {self.seconds:.3g} s>"
        )

    @property
    def corrected(self) -> int:
        """Bits of tensors that were put right."""
        return sum(popcount(one.flips.masks) for one in self.found)

    @property
    def uncorrectable(self) -> int:
        """Bit columns of groups with flips that could not be located; they are as they were."""
        return sum(popcount(one.flips.lost) for one in self.found)

    @property
    def checks(self) -> int:
        """Bits of the checks that were put right."""
        return sum(one.flips.checks for one in self.found)

    @property
    def clean(self) -> bool:
        """Whether nothing had flipped, as far as the code tells."""
        return not (self.corrected or self.uncorrectable or self.checks)

    def corrections(self) -> Iterator[Flip]:
        """Each flip that was put right."""
        for one in self.found:
            number, flips = one.tensor.number, one.flips
            for word, mask in zip(flips.words.tolist(), flips.masks.tolist(), strict=True):
                for bit in _bits(mask):
                    yield Flip(one.tensor.name, word, one.part * number.part_width + bit)

    def losses(self) -> Iterator[Lost]:
        """Each bit column of a group with flips that could not be located."""
        for one in self.found:
            number, flips = one.tensor.number, one.flips
            for group, mask in zip(flips.groups.tolist(), flips.lost.tolist(), strict=True):
                for bit in _bits(mask):
                    members = range(group, one.tensor.size, one.groups)
                    yield Lost(one.tensor.name, one.part * number.part_width + bit, members)


def _bits(mask: int) -> Iterator[int]:
    return (bit for bit in range(mask.bit_length()) if mask >> bit & 1)
