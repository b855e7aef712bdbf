"""The same bit in another float type: in the same place of the same field."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ckptflip.bits import NumberFormat
from ckptflip.equivalence.layouts import MisfitError


def field_masks(masks: NDArray[np.uint64], number: NumberFormat, other: NumberFormat) -> NDArray[np.uint64]:
    """Masks of one float type as masks of another: bits keep their field and their distance from its top.

    Args:
        masks: bits of `number`.
        number: a float type.
        other: the float type of the result.

    Raises:
        MisfitError: one of the types is no float, or a bit has no such place in the other's field.

    Example:
        >>> from ckptflip.bits import lookup
        >>> critical = np.array([1 << 30], np.uint64)
        >>> field_masks(critical, lookup("float32"), lookup("float16")).tolist() == [1 << 14]
        True
    """
    if number.kind != "float" or other.kind != "float":
        raise MisfitError(f"a bit of {number.name} has no counterpart in {other.name}")
    moved = np.zeros_like(masks)
    for bit in range(number.part_width):
        hit = (masks >> np.uint64(bit)) & np.uint64(1)
        if hit.any():
            moved |= hit << np.uint64(_moved(bit, number, other))
    return moved


def field_note(number: NumberFormat, other: NumberFormat) -> str:
    """What a user has to know of bits that changed their type."""
    return (
        f"bits of {number.name} became those in the same place of the same field of {other.name}, counted "
        "from the field's most significant bit: the numbers change by other amounts"
    )


def _moved(bit: int, number: NumberFormat, other: NumberFormat) -> int:
    if bit == number.part_width - 1 and number.signed:
        if not other.signed:
            raise MisfitError(f"{other.name} has no sign for bit {bit} of {number.name}")
        return other.part_width - 1
    in_exponent = bit >= number.mantissa
    top = number.mantissa + number.exponent - 1 if in_exponent else number.mantissa - 1
    width = other.exponent if in_exponent else other.mantissa
    below = top - bit
    if below >= width:
        field = "exponent" if in_exponent else "mantissa"
        raise MisfitError(
            f"bit {bit} of {number.name} is {below} below the top of its {field}, which has {width} bits "
            f"in {other.name}"
        )
    return (other.mantissa if in_exponent else 0) + width - 1 - below
