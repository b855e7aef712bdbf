"""Bit specifications: ``all``, ``exponent``, ``23-30``, ``all,!critical``."""

from __future__ import annotations

from msgspec import Struct

from ckptflip.bits.formats import NumberFormat
from ckptflip.errors import UsageError

FIELDS = ("all", "sign", "exponent", "mantissa", "critical", "msb")
MAX_WIDTH = 128


class BitSpec(Struct, frozen=True):
    """Which bits of an element may be hit, for any number format.

    Terms are joined by commas: a field (`FIELDS`), a bit (``30``), a range (``23-30``, both ends
    included); a ``!`` before a term takes its bits away. With exclusions alone, all other bits are meant.

    Attributes:
        text: the specification as given.

    Raises:
        UsageError: on construction, when the text is not such a list.

    Example:
        >>> from ckptflip.bits import lookup
        >>> hex(BitSpec("exponent,!critical").mask(lookup("float32")))
        '0x3f800000'
        >>> BitSpec("30").mask(lookup("float16"))
        0
    """

    text: str

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise UsageError(f"bits are a text such as 'sign,exponent' or '23-30', not {self.text!r}")
        for term in self._terms():
            _check(term.removeprefix("!"), self.text)

    def _terms(self) -> list[str]:
        return [term.strip() for term in self.text.split(",")]

    def mask(self, number: NumberFormat) -> int:
        """The eligible bits of one element, as a mask; 0 where the format has none of them."""
        terms = self._terms()
        wanted = 0 if any(not t.startswith("!") for t in terms) else number.field("all")
        unwanted = 0
        for term in terms:
            if term.startswith("!"):
                unwanted |= _bits(term[1:], number)
            else:
                wanted |= _bits(term, number)
        return wanted & ~unwanted


def _check(term: str, text: str) -> None:
    if term in FIELDS:
        return
    low, dash, high = term.partition("-")
    if low.isdecimal() and (high.isdecimal() if dash else True):
        first, last = int(low), int(high or low)
        if first > last:
            raise UsageError(f"bits {text!r}: the range {term} runs backwards; write {last}-{first}")
        if last >= MAX_WIDTH:
            raise UsageError(f"bits {text!r}: no number has a bit {last}; bit 0 is the least significant")
        return
    import difflib

    near = difflib.get_close_matches(term, FIELDS, 1)
    known = f"use {', '.join(FIELDS)}, a bit such as 30 or a range such as 23-30"
    hint = f"did you mean {near[0]!r}?" if near else known
    raise UsageError(f"bits {text!r}: {term!r} is not a bit field; {hint}")


def _bits(term: str, number: NumberFormat) -> int:
    if term in FIELDS:
        return number.field(term)
    low, _, high = term.partition("-")
    first, last = int(low), int(high or low)
    return ((1 << (last + 1)) - (1 << first)) & number.field("all")
