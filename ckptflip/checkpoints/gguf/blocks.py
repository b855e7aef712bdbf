"""The blocks of ggml's quantised types: where scales, minima and codes lie in each, bit for bit.

A quantised row is a run of blocks of equal size. Every field of a block becomes a tensor of its own. Codes
that lie at regular distances come in the order of the elements they stand for, and have the tensor's shape;
what is woven together otherwise is given as the bytes or words that hold it. Source: the block structures of
ggml, and the reference dequantisation in the `gguf` package, version 0.19.
"""

from __future__ import annotations

from math import prod

from msgspec import Struct


class Part(Struct, frozen=True):
    """One field of a block.

    Attributes:
        suffix: what the tensor's name gets, after a dot.
        dtype: the format of a word.
        offset: the field's first byte in the block.
        dims: how the words of one block are numbered, in C order; () for a single one.
        strides: bits from one word to the next along each of these axes.
        bits: the width of words packed tighter than bytes, else 0.
    """

    suffix: str
    dtype: str
    offset: int
    dims: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    bits: int = 0

    @property
    def words(self) -> int:
        """Words of one block."""
        return prod(self.dims)


class Block(Struct, frozen=True):
    """A type of block.

    Attributes:
        name: ggml's name of the type.
        elements: how many elements a block stands for.
        size: bytes of a block.
        parts: its fields, in the order of their bytes.
    """

    name: str
    elements: int
    size: int
    parts: tuple[Part, ...]


def _half(suffix: str, offset: int) -> Part:
    return Part(suffix, "float16", offset)


def _bytes(suffix: str, offset: int, count: int, dtype: str = "uint8") -> Part:
    return Part(suffix, dtype, offset, (count,), (8,))


def _packed(suffix: str, offset: int, count: int, bits: int) -> Part:
    """Words side by side, the first in the low bits."""
    return Part(suffix, f"uint{bits}", offset, (count,), (bits,), bits)


def _woven(suffix: str, offset: int, bits: int, groups: int, run: int, dtype: str = "") -> Part:
    """Codes in groups of `run` bytes: a group's first elements have the low bits of its bytes, and so on."""
    dims: tuple[int, ...] = (groups, 8 // bits, run)
    strides: tuple[int, ...] = (run * 8, bits, 8)
    if groups == 1:
        dims, strides = dims[1:], strides[1:]
    return Part(suffix, dtype or f"uint{bits}", offset, dims, strides, bits)


def _block(name: str, elements: int, size: int, *parts: Part) -> Block:
    return Block(name, elements, size, parts)


# By ggml's number of the type.
BLOCKS = {
    2: _block("Q4_0", 32, 18, _half("scale", 0), _woven("codes", 2, 4, 1, 16)),
    3: _block("Q4_1", 32, 20, _half("scale", 0), _half("min", 2), _woven("codes", 4, 4, 1, 16)),
    6: _block(
        "Q5_0", 32, 22, _half("scale", 0), _packed("codes_high", 2, 32, 1), _woven("codes", 6, 4, 1, 16)
    ),
    7: _block(
        "Q5_1",
        32,
        24,
        _half("scale", 0),
        _half("min", 2),
        _packed("codes_high", 4, 32, 1),
        _woven("codes", 8, 4, 1, 16),
    ),
    8: _block("Q8_0", 32, 34, _half("scale", 0), _bytes("codes", 2, 32, "int8")),
    10: _block(
        "Q2_K",
        256,
        84,
        Part("scales", "uint4", 0, (16, 2), (8, 4), 4),
        _woven("codes", 16, 2, 2, 32),
        _half("scale", 80),
        _half("min", 82),
    ),
    11: _block(
        "Q3_K",
        256,
        110,
        _woven("codes_high", 0, 1, 1, 32),
        _woven("codes", 32, 2, 2, 32),
        _woven("scales", 96, 4, 1, 8),
        _woven("scales_high", 104, 2, 1, 4),
        _half("scale", 108),
    ),
    12: _block(
        "Q4_K",
        256,
        144,
        _half("scale", 0),
        _half("min", 2),
        _bytes("scales", 4, 12),
        _woven("codes", 16, 4, 4, 32),
    ),
    13: _block(
        "Q5_K",
        256,
        176,
        _half("scale", 0),
        _half("min", 2),
        _bytes("scales", 4, 12),
        _woven("codes_high", 16, 1, 1, 32),
        _woven("codes", 48, 4, 4, 32),
    ),
    14: _block(
        "Q6_K",
        256,
        210,
        _woven("codes", 0, 4, 2, 64),
        _woven("codes_high", 128, 2, 2, 32),
        _bytes("scales", 192, 16, "int8"),
        _half("scale", 208),
    ),
    15: _block(
        "Q8_K",
        256,
        292,
        Part("scale", "float32", 0),
        _bytes("codes", 4, 256, "int8"),
        Part("sums", "int16", 260, (16,), (16,)),
    ),
    16: _block(
        "IQ2_XXS",
        256,
        66,
        _half("scale", 0),
        Part("codes", "uint8", 2, (8, 4), (64, 8)),
        Part("signs", "uint32", 6, (8,), (64,)),
    ),
    17: _block(
        "IQ2_XS",
        256,
        74,
        _half("scale", 0),
        Part("codes", "uint16", 2, (32,), (16,)),
        _packed("scales", 66, 16, 4),
    ),
    18: _block(
        "IQ3_XXS",
        256,
        98,
        _half("scale", 0),
        _bytes("codes", 2, 64),
        Part("signs", "uint32", 66, (8,), (32,)),
    ),
    19: _block(
        "IQ1_S",
        256,
        50,
        _half("scale", 0),
        _bytes("codes", 2, 32),
        Part("codes_high", "uint16", 34, (8,), (16,)),
    ),
    20: _block("IQ4_NL", 32, 18, _half("scale", 0), _woven("codes", 2, 4, 1, 16)),
    21: _block(
        "IQ3_S",
        256,
        110,
        _half("scale", 0),
        _bytes("codes", 2, 64),
        _packed("codes_high", 66, 64, 1),
        _packed("signs", 74, 256, 1),
        _packed("scales", 106, 8, 4),
    ),
    22: _block(
        "IQ2_S",
        256,
        82,
        _half("scale", 0),
        _bytes("codes", 2, 32),
        _packed("signs", 34, 256, 1),
        _packed("codes_high", 66, 32, 2),
        _packed("scales", 74, 16, 4),
    ),
    23: _block(
        "IQ4_XS",
        256,
        136,
        _half("scale", 0),
        Part("scales_high", "uint16", 2),
        _packed("scales", 4, 8, 4),
        _woven("codes", 8, 4, 8, 16),
    ),
    29: _block(
        "IQ1_M",
        256,
        56,
        _bytes("codes", 0, 32),
        _packed("codes_high", 32, 32, 4),
        Part("scales", "uint16", 48, (4,), (16,)),
    ),
    34: _block("TQ1_0", 256, 54, _bytes("codes", 0, 52), _half("scale", 52)),
    35: _block("TQ2_0", 256, 66, _woven("codes", 0, 2, 2, 32), _half("scale", 64)),
    39: _block(
        "MXFP4",
        32,
        17,
        Part("scale", "float8_e8m0fnu", 0),
        _woven("codes", 1, 4, 1, 16, "float4_e2m1fn"),
    ),
    40: _block(
        "NVFP4",
        64,
        36,
        _bytes("scale", 0, 4, "float8_e4m3fn"),
        _woven("codes", 4, 4, 4, 8, "float4_e2m1fn"),
    ),
    41: _block("Q1_0", 128, 18, _half("scale", 0), _packed("codes", 2, 128, 1)),
}
# Types whose elements have words of their own.
PLAIN = {
    0: "float32",
    1: "float16",
    24: "int8",
    25: "int16",
    26: "int32",
    27: "int64",
    28: "float64",
    30: "bfloat16",
}
# Types that no file should hold: what ggml works with in between, and what it has given up.
UNUSED = {
    9: "Q8_1, of which ggml and gguf disagree how long a block is; no file should hold it",
    **dict.fromkeys((4, 5, 31, 32, 33, 36, 37, 38), "a type that ggml has given up; convert the model anew"),
}
