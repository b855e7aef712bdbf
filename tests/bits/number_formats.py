"""Every number format there is, with its layout stated a second time, and helpers to make words of them."""

import ml_dtypes
import numpy as np

from ckptflip.bits import as_words, lookup, to_values
from ckptflip.bits.formats import COMPLEX_PARTS, ML_FLOATS, ML_INTEGERS, NUMPY_FLOATS

NUMPY_INTEGERS = tuple(f"{kind}{width}" for kind in ("int", "uint") for width in (8, 16, 32, 64))
FLOATS = (*NUMPY_FLOATS, *ML_FLOATS)
INTEGERS = (*NUMPY_INTEGERS, *ML_INTEGERS)
EVERY = (*FLOATS, *INTEGERS, *COMPLEX_PARTS, "bool")

# name: (width, exponent, mantissa), from IEEE 754, the OCP MX and FP8 papers, and the formats' own names.
LAYOUTS = {
    "float64": (64, 11, 52),
    "float32": (32, 8, 23),
    "float16": (16, 5, 10),
    "bfloat16": (16, 8, 7),
    "float8_e3m4": (8, 3, 4),
    "float8_e4m3": (8, 4, 3),
    "float8_e4m3b11fnuz": (8, 4, 3),
    "float8_e4m3fn": (8, 4, 3),
    "float8_e4m3fnuz": (8, 4, 3),
    "float8_e5m2": (8, 5, 2),
    "float8_e5m2fnuz": (8, 5, 2),
    "float8_e8m0fnu": (8, 8, 0),
    "float6_e2m3fn": (6, 2, 3),
    "float6_e3m2fn": (6, 3, 2),
    "float4_e2m1fn": (4, 2, 1),
}


def dtype_of(name):
    return np.dtype(getattr(ml_dtypes, name)) if hasattr(ml_dtypes, name) else np.dtype(name)


def word(value, name):
    """The word that numpy or ml_dtypes stores for a number."""
    return int(as_words(np.array([value]).astype(dtype_of(name)))[0])


def value(word, name):
    number = lookup(name)
    return float(to_values(np.array([word], number.word_dtype), number)[0])


# Signalling NaN: a quiet bit of 0 and a payload. A trip through any float makes them quiet.
SIGNALLING = {
    "float64": 0x7FF0_0000_0000_0001,
    "float32": 0xFF80_0001,
    "float16": 0x7C01,
    "bfloat16": 0xFF81,
    "float8_e5m2": 0x7D,
    "float8_e4m3": 0x79,
    "float8_e3m4": 0x71,
}
