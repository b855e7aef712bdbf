"""What a stored number is: its words, its bits and their fields. Knows no files and no frameworks."""

from ckptflip.bits.fields import BitSpec
from ckptflip.bits.formats import NumberFormat, lookup
from ckptflip.bits.values import classify, encode, scale, to_values
from ckptflip.bits.words import as_words, from_words, gather, popcount, xor_at

__all__ = [
    "BitSpec",
    "NumberFormat",
    "as_words",
    "classify",
    "encode",
    "from_words",
    "gather",
    "lookup",
    "popcount",
    "scale",
    "to_values",
    "xor_at",
]
