"""What words mean as numbers: for guards, records and reports. Words are read here, never written back.

The two exceptions compute a *new* word: `encode` (set to a value) and `scale` (multiply).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ckptflip.bits.formats import NumberFormat, numpy_dtype
from ckptflip.errors import UsageError

EXTREME = 1e10


class Classes(NamedTuple):
    """Boolean arrays of the words' shape: which are NaN, infinite, extreme (finite, but too large)."""

    nan: NDArray[np.bool_]
    inf: NDArray[np.bool_]
    extreme: NDArray[np.bool_]


def to_values(words: NDArray[Any], number: NumberFormat) -> NDArray[Any]:
    """The numbers that words stand for.

    Args:
        words: unsigned words of `number.word_dtype`, any shape.
        number: their format.

    Returns:
        float64 for floats and parts of complex numbers (exact), integers otherwise; same shape.

    Example:
        >>> from ckptflip.bits import lookup
        >>> to_values(np.array([0x3f80, 0x7f80], np.uint16), lookup("bfloat16"))
        array([ 1., inf])
    """
    native = np.ascontiguousarray(words, dtype=number.word_dtype)
    if number.kind == "bool":
        return native
    if number.part_width < 8:
        native = native & np.uint8((1 << number.part_width) - 1)
    numbers = native.view(numpy_dtype(number))
    with np.errstate(all="ignore"):
        if number.is_float:
            return numbers.astype(np.float64)
        return numbers.astype(np.int8 if number.signed else np.uint8) if number.part_width < 8 else numbers


def classify(words: NDArray[Any], number: NumberFormat, threshold: float = EXTREME) -> Classes:
    """Find NaN, infinite and extreme numbers (N-EV) among words. Integers are none of them.

    Args:
        words: unsigned words, any shape.
        number: their format.
        threshold: a finite number is extreme when its magnitude is larger than this.

    Example:
        >>> from ckptflip.bits import lookup
        >>> w = np.array([0x3f800000, 0x7fc00000, 0x7f800000, 0x7e967699], np.uint32)
        >>> [int(mask.sum()) for mask in classify(w, lookup("float32"))]
        [1, 1, 1]
    """
    if not number.is_float:
        none = np.zeros(np.shape(words), bool)
        return Classes(none, none, none)
    values = to_values(words, number)
    nan, inf = np.isnan(values), np.isinf(values)
    with np.errstate(invalid="ignore"):
        return Classes(nan, inf, (np.abs(values) > threshold) & ~inf)


def encode(text: str, number: NumberFormat) -> int:
    """The word of a value, given as a decimal number or as the word itself in hexadecimal.

    Args:
        text: such as ``0``, ``-1.5``, ``nan``, ``inf`` or ``0x7fc00001``.
        number: the format to encode for.

    Raises:
        UsageError: not a number, or one that the format cannot hold.

    Example:
        >>> from ckptflip.bits import lookup
        >>> hex(encode("-2", lookup("float16"))), hex(encode("0x7f800001", lookup("float32")))
        ('0xc000', '0x7f800001')
    """
    top = (1 << number.part_width) - 1
    try:
        if text.lower().startswith("0x"):
            word = int(text, 16)
            if word > top:
                raise UsageError(
                    f"the word {text} does not fit the {number.part_width} bits of {number.name}"
                )
            return word
        value = float(text) if number.is_float else int(text)
    except ValueError as why:
        if isinstance(why, UsageError):
            raise
        kind = "a number" if number.is_float else "an integer"
        raise UsageError(f"{text!r} is not {kind} that {number.name} can hold") from None
    if isinstance(value, int):
        low = -(1 << (number.part_width - 1)) if number.signed else 0
        if not low <= value <= low + top:
            raise UsageError(f"{value} is outside {low} … {low + top}, the range of {number.name}")
        return value & top
    with np.errstate(all="ignore"):
        made = np.array(value).astype(numpy_dtype(number))
    _check_held(text, value, float(made), number)
    return int(made.reshape(1).view(number.word_dtype)[0]) & top


def _check_held(text: str, value: float, made: float, number: NumberFormat) -> None:
    """Raise UsageError unless `made`, of this format, is the number that the text asks for.

    Formats without NaN or infinity silently give another value for them, and the narrowest also for
    numbers beyond their largest.
    """
    if "n" in text.lower():  # nan, inf, infinity
        if math.isnan(value) != math.isnan(made) or math.isinf(value) != math.isinf(made):
            raise UsageError(f"{number.name} has no {'nan' if math.isnan(value) else 'infinity'}")
    elif not math.isfinite(made) or (number.part_width < 8 and abs(value) > _largest(number)):
        hint = "; use inf to set an infinity" if math.isinf(made) else ""
        raise UsageError(f"{text} is beyond the range of {number.name}{hint}")


def _largest(number: NumberFormat) -> float:
    every = np.arange(1 << number.part_width, dtype=np.uint8)
    return float(to_values(every, number).max())


def scale(words: NDArray[Any], number: NumberFormat, factor: float) -> NDArray[Any]:
    """The words of the numbers multiplied by a factor, rounded to the format; integers saturate.

    NaN stay as they are, payload and all: multiplying would quieten the signalling ones.

    Example:
        >>> from ckptflip.bits import lookup
        >>> scale(np.array([100, 3], np.uint8), lookup("int8"), 2.0)
        array([127,   6], dtype=uint8)
    """
    native = np.ascontiguousarray(words, dtype=number.word_dtype)
    values = to_values(native, number)
    if not number.is_float:
        return _saturated(values, number, factor)
    with np.errstate(all="ignore"):
        scaled = (values * factor).astype(numpy_dtype(number)).view(number.word_dtype)
    return np.where(np.isnan(values), native, scaled)


def _saturated(values: NDArray[Any], number: NumberFormat, factor: float) -> NDArray[Any]:
    from fractions import Fraction

    top = (1 << number.part_width) - 1
    low = -(1 << (number.part_width - 1)) if number.signed else 0
    # Python's integers, because 64-bit ones are not all floats: even a factor of 1 would change some.
    up, down = factor.as_integer_ratio()
    whole = [round(Fraction(v * up, down)) for v in values.ravel().tolist()]
    held = [min(max(w, low), low + top) & top for w in whole]
    return np.array(held, number.word_dtype).reshape(values.shape)
