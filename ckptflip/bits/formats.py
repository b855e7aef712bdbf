"""Number formats: the width of an element and where its sign, exponent and mantissa lie."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec import Struct

from ckptflip.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import DTypeLike

# What ml_dtypes adds to numpy. Named here so that the library is imported only when one of them turns up.
ML_FLOATS = (
    "bfloat16",
    "float8_e3m4",
    "float8_e4m3",
    "float8_e4m3b11fnuz",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
    "float6_e2m3fn",
    "float6_e3m2fn",
    "float4_e2m1fn",
)
ML_INTEGERS = ("int4", "uint4", "int2", "uint2", "int1", "uint1")
# Complex formats are two parts of a real one, the real part in the low bits.
COMPLEX_PARTS = {
    "complex128": "float64",
    "complex64": "float32",
    "complex32": "float16",
    "bcomplex32": "bfloat16",
}
NUMPY_FLOATS = ("float64", "float32", "float16")
# By bytes; making a dtype anew takes longer than reading a word.
_WORDS = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}


class NumberFormat(Struct, frozen=True):
    """How one element is laid out in bits. Bit 0 is the least significant bit of the element.

    Attributes:
        name: numpy's or ml_dtypes' name of the dtype, without byte order.
        kind: ``float``, ``complex``, ``int``, ``uint`` or ``bool``.
        parts: words per element: 2 for complex numbers (real part first), else 1.
        part_width: significant bits of one word. A bool has 8: it is stored as a byte, and memory
            can lose any bit of it.
        exponent: exponent bits of one word (0 for integers).
        mantissa: stored mantissa bits of one word (0 for integers).
        signed: whether the top bit of a word is a sign.
    """

    name: str
    kind: str
    parts: int
    part_width: int
    exponent: int
    mantissa: int
    signed: bool

    @property
    def width(self) -> int:
        """Bits of one element; a complex64 has 64."""
        return self.parts * self.part_width

    @property
    def word_dtype(self) -> np.dtype[Any]:
        """The unsigned dtype of one word as numpy keeps it; sub-byte formats take a byte each."""
        return _WORDS[self.word_size]

    @property
    def word_size(self) -> int:
        """Bytes of one word."""
        return max(self.part_width, 8) // 8

    @property
    def is_float(self) -> bool:
        """Whether words are floating-point numbers (parts of complex numbers included)."""
        return self.exponent > 0

    def field(self, name: str) -> int:
        """The bits of a field, as a mask over the whole element.

        Args:
            name: ``all``, ``sign``, ``exponent``, ``mantissa``, ``critical`` (the exponent's most
                significant bit) or ``msb`` (the most significant bit of an integer).

        Returns:
            The mask; 0 where the format has no such field.

        Example:
            >>> hex(lookup("float32").field("critical"))
            '0x40000000'
            >>> hex(lookup("complex64").field("sign"))
            '0x8000000080000000'
        """
        part = self._part_field(name)
        return sum(part << (i * self.part_width) for i in range(self.parts))

    def _part_field(self, name: str) -> int:
        top = 1 << (self.part_width - 1)
        match name:
            case "all":
                return (1 << self.part_width) - 1
            case "sign":
                return top if self.signed else 0
            case "exponent":
                return ((1 << self.exponent) - 1) << self.mantissa
            case "mantissa":
                return (1 << self.mantissa) - 1
            case "critical":
                return 1 << (self.mantissa + self.exponent - 1) if self.exponent else 0
            case "msb":
                return 0 if self.is_float else (1 if self.kind == "bool" else top)
        raise UsageError(f"no bit field is called {name!r}")

    def field_of(self, bit: int) -> str:
        """The name of the field a bit of the element belongs to.

        Example:
            >>> [lookup("bfloat16").field_of(b) for b in (0, 7, 14, 15)]
            ['mantissa', 'exponent', 'critical', 'sign']
            >>> lookup("int8").field_of(3)
            'value'
        """
        for name in ("sign", "critical", "exponent", "mantissa"):
            if self.field(name) >> bit & 1:
                return name
        return "value"


@cache
def lookup_name(name: str) -> NumberFormat:
    """The format of a dtype name of numpy or ml_dtypes, without byte order.

    Raises:
        UsageError: the name is not that of a number of fixed IEEE-like layout.
    """
    if name == "bool":
        return NumberFormat(name, "bool", 1, 8, 0, 0, signed=False)
    if name in COMPLEX_PARTS:
        part = lookup_name(COMPLEX_PARTS[name])
        return NumberFormat(name, "complex", 2, part.part_width, part.exponent, part.mantissa, signed=True)
    if name in NUMPY_FLOATS:
        info = np.finfo(name)
        return NumberFormat(name, "float", 1, info.bits, info.nexp, info.nmant, signed=True)
    if name in ML_FLOATS:
        import ml_dtypes

        ml_info = ml_dtypes.finfo(getattr(ml_dtypes, name))
        signed = ml_info.nexp + ml_info.nmant < ml_info.bits
        return NumberFormat(name, "float", 1, ml_info.bits, ml_info.nexp, ml_info.nmant, signed=signed)
    kind, digits = name.rstrip("0123456789"), name.lstrip("uint")
    if kind in ("int", "uint") and (name in ML_INTEGERS or digits in ("8", "16", "32", "64")):
        return NumberFormat(name, kind, 1, int(digits), 0, 0, signed=kind == "int")
    raise UsageError(f"{name!r} is not a dtype whose bits can be altered")


def lookup(dtype: DTypeLike) -> NumberFormat:
    """The format of a dtype, whatever its byte order.

    Args:
        dtype: anything that names a dtype of numpy or ml_dtypes.

    Raises:
        UsageError: strings, objects, structured and extended-precision dtypes.

    Example:
        >>> lookup(">f4").width, lookup("bfloat16").exponent, lookup("float8_e4m3fn").mantissa
        (32, 8, 3)
    """
    if isinstance(dtype, str) and (dtype in ML_FLOATS or dtype in ML_INTEGERS or dtype in COMPLEX_PARTS):
        return lookup_name(dtype)
    try:
        return lookup_name(np.dtype(dtype).name)
    except (TypeError, ValueError, SyntaxError) as why:
        if isinstance(why, UsageError):
            raise
        raise UsageError(f"{dtype!r} is not a dtype: {why}") from None


def numpy_dtype(number: NumberFormat) -> np.dtype[Any]:
    """The numpy (or ml_dtypes) dtype of one part of a format, in native byte order.

    Example:
        >>> numpy_dtype(lookup("complex64"))
        dtype('float32')
    """
    name = COMPLEX_PARTS.get(number.name, number.name)
    if name in ML_FLOATS or name in ML_INTEGERS:
        import ml_dtypes

        name = getattr(ml_dtypes, name)
    made: np.dtype[Any] = np.dtype(name)
    return made
