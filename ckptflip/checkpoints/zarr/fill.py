"""The value of elements that were never written: what JSON calls it, and its bytes."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from ckptflip.bits import NumberFormat
from ckptflip.bits.formats import numpy_dtype
from ckptflip.checkpoints.zarr.metadata import ArrayHeader, UnsupportedError

_BITS = re.compile(r"0x[0-9a-fA-F]{2,16}")
_SPECIAL = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}


def fill_bytes(header: ArrayHeader) -> bytes:
    """One element of the fill value, as it would lie in a chunk.

    Raises:
        UnsupportedError: the metadata name no such value.

    Example:
        >>> from ckptflip.bits import lookup
        >>> from ckptflip.checkpoints.zarr.metadata import Chain
        >>> chain = Chain((0,), ">")
        >>> fill_bytes(ArrayHeader((4,), lookup("float32"), (2,), "c", "/", chain, None, 1.0)).hex()
        '3f800000'
    """
    number, given = header.number, header.fill
    parts = given if number.parts == 2 and isinstance(given, list) else [given]
    if number.parts == 2 and len(parts) == 1:
        parts = [parts[0], 0]
    if len(parts) != number.parts:
        raise _no_value(given)
    words = [_word(number, part) for part in parts]
    return np.array(words, number.word_dtype.newbyteorder(header.chain.order)).tobytes()  # type: ignore[arg-type]


def _word(number: NumberFormat, given: Any) -> int:
    """The bits of one word."""
    if isinstance(given, str) and _BITS.fullmatch(given):
        word = int(given, 16)
        if word >> number.part_width:
            raise _no_value(given)
        return word
    value = _SPECIAL.get(given, given) if isinstance(given, str) else given
    if isinstance(value, str) or not isinstance(value, bool | int | float):
        raise _no_value(given)
    if number.is_float:
        return _float_bits(number, value)
    whole = int(value) if value == value and abs(value) < 1 << 64 else None
    low = -(1 << number.part_width - 1) if number.signed else 0
    high = 1 if number.kind == "bool" else (1 << number.part_width - number.signed) - 1
    if whole is None or whole != value or not low <= whole <= high:
        raise _no_value(given)
    return whole & ((1 << number.part_width) - 1)


def _float_bits(number: NumberFormat, value: float) -> int:
    try:
        with np.errstate(all="ignore"):
            stored = np.asarray(float(value)).astype(numpy_dtype(number))
    except OverflowError:
        raise _no_value(value) from None
    return int(stored.reshape(1).view(number.word_dtype)[0])


def _no_value(given: Any) -> UnsupportedError:
    return UnsupportedError(f"chunks that were never written, and no usable fill value ({str(given)[:40]})")
