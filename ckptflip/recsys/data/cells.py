"""Numbers out of text, a whole column at a time: eight characters are one 64-bit word.

A cell of up to eight characters is loaded as one little-endian word, its first character in the lowest
byte, and decoded by arithmetic on all its bytes at once. No cell is ever a Python object.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]
Words = NDArray[np.uint64]

# Bytes that must follow the last cell, so that every cell can be loaded as two words.
PADDING = 16
MOST_DIGITS = 16


def _of(byte: int) -> np.uint64:
    return np.uint64(int.from_bytes(bytes([byte]) * 8, "little"))


_ZEROS = _of(ord("0"))
_EIGHT = np.uint64(8)
# Characters "0" that fill a cell of n characters up to eight, n = 0 … 8.
_FILL = np.array([int.from_bytes(b"0" * (8 - n), "little") for n in range(9)], np.uint64)


def integers(text: Bytes, starts: Integers, ends: Integers) -> tuple[Integers, Flags]:
    """Decimal whole numbers with an optional minus sign.

    Args:
        text: uint8; `PADDING` bytes lie after the last cell.
        starts: where each cell begins, any shape.
        ends: where it ends, likewise; an empty cell is the number 0.

    Returns:
        int64 of that shape, and whether each cell is empty or such a number of at most 16 digits.

    Example:
        >>> text = np.frombuffer(b"-12 7x " + bytes(16), np.uint8)
        >>> values, sound = integers(text, np.array([0, 4]), np.array([3, 6]))
        >>> int(values[0]), sound.tolist()
        (-12, [True, False])
    """
    minus = (text[starts] == ord("-")) & (ends > starts)
    starts = starts + minus
    lengths = ends - starts
    short = np.minimum(lengths, 8)
    values, sound = _digits(text, ends - short, short)
    sound &= (lengths <= MOST_DIGITS) & ~(minus & (lengths == 0))
    long = np.nonzero((lengths > 8) & (lengths <= MOST_DIGITS))
    if long[0].size:
        upper, fine = _digits(text, starts[long], lengths[long] - 8)
        values[long] += upper * 100_000_000
        sound[long] &= fine
    return np.where(minus, -values, values), sound


def hexadecimals(text: Bytes, starts: Integers, ends: Integers) -> tuple[Integers, Flags]:
    """Hexadecimal numbers of at most eight digits of either case; see `integers`.

    Example:
        >>> text = np.frombuffer(b"68fd1e64 G" + bytes(16), np.uint8)
        >>> values, sound = hexadecimals(text, np.array([0, 9]), np.array([8, 10]))
        >>> hex(values[0]), sound.tolist()
        ('0x68fd1e64', [True, False])
    """
    lengths = ends - starts
    word = _load(text, starts, np.minimum(lengths, 8))
    letter = word >> np.uint64(6) & _of(1)
    nibble = (word & _of(0x0F)) + letter * np.uint64(9)
    # Written again in lower case, a sound cell is what it was; "g" and beyond would be 16 and more.
    above = (nibble + _of(6)) >> np.uint64(4) & _of(1)
    again = nibble + _ZEROS + above * np.uint64(0x27)
    sound = ((word | letter << np.uint64(5)) == again) & (nibble & _of(0xF0) == 0) & (lengths <= 8)
    pairs = (nibble << np.uint64(4) | nibble >> _EIGHT) & np.uint64(0x00FF00FF00FF00FF)
    fours = (pairs << _EIGHT | pairs >> np.uint64(16)) & np.uint64(0x0000FFFF0000FFFF)
    values = (fours << np.uint64(16) | fours >> np.uint64(32)) & np.uint64(0xFFFFFFFF)
    return values.astype(np.int64), sound


def _digits(text: Bytes, starts: Integers, lengths: Integers) -> tuple[Integers, Flags]:
    """Decimal numbers of up to eight digits, and whether they are."""
    word = _load(text, starts, lengths)
    digit = word ^ _ZEROS
    # A byte above 9 carries into its upper half when 6 is added; upper halves must stay empty.
    sound = ((digit | (digit & _of(0x0F)) + _of(6)) & _of(0xF0)) == 0
    pairs = (digit * np.uint64(10) + (digit >> _EIGHT)) & np.uint64(0x00FF00FF00FF00FF)
    fours = (pairs * np.uint64(100) + (pairs >> np.uint64(16))) & np.uint64(0x0000FFFF0000FFFF)
    values = (fours * np.uint64(10_000) + (fours >> np.uint64(32))) & np.uint64(0xFFFFFFFF)
    return values.astype(np.int64), sound


def _load(text: Bytes, starts: Integers, lengths: Integers) -> Words:
    """Cells of 0 … 8 characters as words, filled up with "0" before the first."""
    everywhere = np.ndarray((text.size - 7,), np.dtype("<u8"), text, strides=(1,))
    word = everywhere[starts].astype(np.uint64, copy=False)
    # A shift by 64 has no meaning: an empty cell is shifted by 56 and 8.
    missing = (8 - lengths).astype(np.uint64) << np.uint64(3)
    last = lengths == 0
    word = word << np.minimum(missing, np.uint64(56))
    word[last] = 0
    filled: Words = word | _FILL[lengths]
    return filled
