"""Fault models: what happens to a word that is hit."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from ckptflip.bits import NumberFormat, encode, lookup, scale
from ckptflip.bits.words import valid_mask
from ckptflip.errors import UsageError

KINDS = "flip, set0, set1, burst:N, mask:101101, scale:F or value:X"


class FaultModel(Struct, frozen=True):
    """A parsed fault model.

    Attributes:
        kind: ``flip``, ``set0``, ``set1``, ``mask`` (bursts are masks of ones), ``scale`` or ``value``.
        pattern: for ``mask``, the bits to flip, the lowest at bit 0.
        span: for ``mask``, how many bits the pattern covers.
        factor: for ``scale``.
        value: for ``value``, as given.
    """

    kind: str
    pattern: int = 1
    span: int = 1
    factor: float = 1.0
    value: str = ""

    @property
    def hits_words(self) -> bool:
        """Whether a fault concerns a whole word, so that no bits are chosen."""
        return self.kind in ("scale", "value")

    @property
    def is_wide(self) -> bool:
        """Whether one fault hits several chosen bits, so that two in a word can overlap."""
        return self.kind == "mask" and self.span > 1

    def placements(self, number: NumberFormat, eligible: int) -> list[tuple[int, int]]:
        """Every way to hit one element: (part of the element, mask of the bits hit in its word).

        Args:
            number: the element's format.
            eligible: the bits that may be hit, over the whole element.
        """
        width, every = number.part_width, (1 << number.part_width) - 1
        found: list[tuple[int, int]] = []
        for part in range(number.parts):
            bits = eligible >> (part * width) & every
            if self.hits_words:
                found.append((part, every))
                continue
            for low in range(width - self.span + 1):
                mask = self.pattern << low
                if mask & ~bits == 0:
                    found.append((part, mask))
        return found

    def apply(self, before: NDArray[Any], hit: NDArray[Any], number: NumberFormat) -> NDArray[np.uint64]:
        """The words after the fault.

        Args:
            before: words, unsigned, any width.
            hit: the bits hit in each, uint64.
            number: their format.

        Returns:
            uint64 words.
        """
        words: NDArray[np.uint64] = before.astype(np.uint64, copy=False)
        hits: NDArray[np.uint64] = hit
        made: Any
        match self.kind:
            case "set0":
                return words & ~hits
            case "set1":
                return words | hits
            case "scale":
                made = scale(before.astype(number.word_dtype), number, self.factor).astype(np.uint64)
            case "value":
                made = np.uint64(encode(self.value, number))
            case _:
                return words ^ hits
        # A sub-byte number lies in a byte whose other bits are not its own; they stay as they are.
        own = np.uint64(valid_mask(number))
        kept: NDArray[np.uint64] = words & ~own | made & own
        return kept


def parse(text: str) -> FaultModel:
    """Read a fault model.

    Args:
        text: ``flip``, ``set0``, ``set1``; ``burst:N`` (N adjacent bits, placed at random); ``mask:101101``
            (an XOR pattern, most significant bit first, placed at random); ``scale:F`` (multiply);
            ``value:X`` (set to a number, or to a word such as 0x7fc00000).

    Raises:
        UsageError: anything else.

    Example:
        >>> parse("burst:3") == parse("mask:111")
        True
    """
    kind, colon, argument = text.partition(":")
    if kind in ("flip", "set0", "set1") and not colon:
        return FaultModel(kind)
    if kind == "burst" and argument.isdecimal() and 1 <= int(argument) <= 64:
        return FaultModel("mask", pattern=(1 << int(argument)) - 1, span=int(argument))
    if kind == "mask" and argument and set(argument) <= {"0", "1"} and "1" in argument:
        pattern = argument.strip("0")
        if len(pattern) <= 64:
            return FaultModel("mask", pattern=int(pattern, 2), span=len(pattern))
    if kind == "scale":
        return FaultModel("scale", factor=_factor(argument))
    if kind == "value" and argument:
        encode(argument, lookup("float64"))
        return FaultModel("value", value=argument)
    raise UsageError(f"fault {text!r} is not a fault model; use {KINDS} (bursts and masks up to 64 bits)")


def _factor(text: str) -> float:
    try:
        factor = float(text)
    except ValueError:
        factor = math.nan
    if not math.isfinite(factor):
        raise UsageError(
            f"fault 'scale:{text}': the factor must be a finite number, such as scale:4 or scale:-0.5"
        )
    return factor
