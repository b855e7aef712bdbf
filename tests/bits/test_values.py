"""Words as numbers, and the two places that make a new word: encode and scale."""

import math
import struct
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from number_formats import INTEGERS, SIGNALLING

from ckptflip.bits import classify, encode, lookup, scale, to_values
from ckptflip.bits.formats import ML_FLOATS
from ckptflip.errors import UsageError


def words(dtype, *values):
    return np.array(values, lookup(dtype).word_dtype)


@given(st.integers(0, 2**32 - 1))
def test_float32_values_equal_struct(word):
    expected = struct.unpack("<f", word.to_bytes(4, "little"))[0]
    found = to_values(words("float32", word), lookup("float32"))
    np.testing.assert_array_equal(found, [expected])


def test_bfloat16_values_are_the_upper_half_of_float32():
    every = np.arange(1 << 16, dtype=np.uint16)
    with np.errstate(invalid="ignore"):
        expected = (every.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    np.testing.assert_array_equal(to_values(every, lookup("bfloat16")), expected)


@pytest.mark.parametrize("name", [n for n in ML_FLOATS if n != "bfloat16"])
def test_small_floats_are_decoded_as_the_format_says(name):
    """sign · 2^(e - bias) · (1 or 0).m, with the bias read off the word for 1.0."""
    number = lookup(name)
    every = np.arange(1 << number.width, dtype=np.uint8)
    found = to_values(every, number)
    one = encode("1", number)
    bias = one >> number.mantissa & ((1 << number.exponent) - 1)
    for word, value in zip(every.tolist(), found.tolist(), strict=True):
        if not math.isfinite(value):
            continue
        mantissa = word & number.field("mantissa")
        exponent = (word & number.field("exponent")) >> number.mantissa
        normal = exponent > 0 or not number.mantissa
        fraction = normal + mantissa / (1 << number.mantissa)
        sign = -1 if word & number.field("sign") else 1
        assert value == sign * 2.0 ** ((exponent if normal else 1) - bias) * fraction


@pytest.mark.parametrize("name", ["float4_e2m1fn", "float6_e3m2fn", "int4", "uint2", "int1"])
def test_bits_beside_a_narrow_number_mean_nothing(name):
    number = lookup(name)
    every = np.arange(256, dtype=np.uint8)
    inside = every & np.uint8((1 << number.width) - 1)
    np.testing.assert_array_equal(to_values(every, number), to_values(inside, number))


@pytest.mark.parametrize(
    ("dtype", "word", "value"),
    [("int8", 0x80, -128), ("int64", 2**63, -(2**63)), ("uint64", 2**64 - 1, 2**64 - 1), ("int4", 8, -8),
     ("int1", 1, -1), ("int2", 2, -2), ("uint4", 15, 15), ("bool", 2, 2)],
)  # fmt: skip
def test_integer_values(dtype, word, value):
    assert to_values(words(dtype, word), lookup(dtype)).tolist() == [value]


@pytest.mark.parametrize("order", ["<", ">"])
def test_values_keep_shape_and_accept_either_order(order):
    stored = np.array([[0x3F800000, 0x40000000]], f"{order}u4")
    assert to_values(stored, lookup("float32")).tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize("name", SIGNALLING)
def test_signalling_nan_are_seen_as_nan(name):
    found = classify(words(name, SIGNALLING[name]), lookup(name))
    assert [c.tolist() for c in found] == [[True], [False], [False]]


def test_classes_exclude_each_other():
    w = words(
        "float64", *np.array([math.nan, math.inf, -math.inf, 1e10, -1.1e10, 0.0]).view(np.uint64).tolist()
    )
    nan, inf, extreme = classify(w, lookup("float64"))
    assert nan.tolist() == [True, False, False, False, False, False]
    assert inf.tolist() == [False, True, True, False, False, False]
    assert extreme.tolist() == [False, False, False, False, True, False]
    assert classify(w, lookup("float64"), 1.0).extreme.tolist() == [False, False, False, True, True, False]


def test_integers_are_never_extreme():
    assert not any(c.any() for c in classify(words("uint64", 2**64 - 1), lookup("uint64")))


@pytest.mark.parametrize(
    ("text", "dtype", "word"),
    [
        ("1", "float32", 0x3F800000),
        ("-2", "float16", 0xC000),
        ("-0.0", "float64", 1 << 63),
        ("inf", "bfloat16", 0x7F80),
        ("-Infinity", "float32", 0xFF800000),
        ("nan", "float32", 0x7FC00000),
        ("0x7f800001", "float32", 0x7F800001),
        ("0XFF", "uint8", 0xFF),
        ("-128", "int8", 0x80),
        ("127", "int8", 0x7F),
        ("18446744073709551615", "uint64", 2**64 - 1),
        ("-9223372036854775808", "int64", 2**63),
        ("9223372036854775807", "int64", 2**63 - 1),
        ("-8", "int4", 8),
        ("-1", "int1", 1),
        ("3", "uint2", 3),
        ("1", "bool", 1),
        ("6", "float4_e2m1fn", 7),
        ("-7.5", "float6_e2m3fn", 0x3F),
        ("448", "float8_e4m3fn", 0x7E),
        ("1", "complex64", 0x3F800000),
        ("3.4028235e38", "float32", 0x7F7FFFFF),
        ("1e-400", "float64", 0),
    ],
)
def test_encode(text, dtype, word):
    assert encode(text, lookup(dtype)) == word


@pytest.mark.parametrize(
    ("text", "dtype", "message"),
    [
        ("128", "int8", "128 is outside -128 … 127, the range of int8"),
        ("-129", "int8", "outside -128 … 127"),
        ("18446744073709551616", "uint64", "outside 0 … 18446744073709551615"),
        ("-1", "uint8", "outside 0 … 255"),
        ("8", "int4", "outside -8 … 7"),
        ("256", "bool", "outside 0 … 255"),
        ("1.5", "int32", "'1.5' is not an integer that int32 can hold"),
        ("nan", "int32", "not an integer"),
        ("one", "float32", "'one' is not a number"),
        ("", "float32", "not a number"),
        ("0x", "float32", "not a number"),
        ("0x1ffffffff", "float32", "does not fit the 32 bits of float32"),
        ("0x10", "float4_e2m1fn", "does not fit the 4 bits"),
        ("70000", "float16", "beyond the range of float16; use inf"),
        ("1e39", "float32", "beyond the range of float32; use inf"),
        ("1e400", "float64", "1e400 is beyond the range of float64; use inf"),
        ("-1e400", "float32", "beyond the range"),
        ("1000", "float8_e4m3fn", "beyond the range of float8_e4m3fn"),
        ("6.5", "float4_e2m1fn", "beyond the range of float4_e2m1fn"),
        ("-8", "float6_e2m3fn", "beyond the range"),
        ("nan", "float4_e2m1fn", "float4_e2m1fn has no nan"),
        ("inf", "float6_e3m2fn", "float6_e3m2fn has no infinity"),
        ("inf", "float8_e4m3fn", "float8_e4m3fn has no infinity"),
        ("-inf", "float8_e5m2fnuz", "has no infinity"),
        ("-1", "float8_e8m0fnu", "beyond the range of float8_e8m0fnu"),
        ("0", "float8_e8m0fnu", "beyond the range"),
    ],
)  # fmt: skip
def test_encode_refuses_what_the_format_cannot_hold(text, dtype, message):
    with pytest.raises(UsageError) as caught:
        encode(text, lookup(dtype))
    assert message in str(caught.value)


def test_no_infinity_is_offered_where_there_is_none():
    with pytest.raises(UsageError) as caught:
        encode("1000", lookup("float8_e4m3fn"))
    assert "inf" not in str(caught.value)


@pytest.mark.parametrize("name", ["float16", *ML_FLOATS])
def test_every_finite_number_encodes_to_its_own_word(name):
    number = lookup(name)
    every = np.arange(1 << min(number.width, 12), dtype=number.word_dtype)
    values = to_values(every, number)
    for word, value in zip(every.tolist(), values.tolist(), strict=True):
        if math.isfinite(value):
            assert encode(repr(value), number) == word


@given(st.integers(0, 2**32 - 1), st.floats(-1e6, 1e6, allow_nan=False))
def test_scaling_float32_equals_numpy_and_leaves_nan_alone(word, factor):
    found = int(scale(words("float32", word), lookup("float32"), factor)[0])
    value = np.array([word], np.uint32).view(np.float32)
    if np.isnan(value[0]):
        assert found == word
        return
    with np.errstate(all="ignore"):
        expected = (value.astype(np.float64) * factor).astype(np.float32)
    np.testing.assert_array_equal(np.array([found], np.uint32).view(np.float32), expected)


@pytest.mark.parametrize("name", SIGNALLING)
def test_scaling_keeps_signalling_nan(name):
    assert scale(words(name, SIGNALLING[name]), lookup(name), -3.0).tolist() == [SIGNALLING[name]]


@pytest.mark.parametrize("name", INTEGERS)
def test_scaling_integers_saturates(name):
    number = lookup(name)
    low = -(1 << (number.width - 1)) if number.signed else 0
    high = low + (1 << number.width) - 1
    ends = words(name, low & (2**number.width - 1), high)
    mask = 2**number.width - 1
    assert scale(ends, number, 1e30).tolist() == [low & mask, high & mask]
    assert scale(ends, number, -1e30).tolist() == [high & mask if low else 0, low & mask if high else 0]
    assert scale(ends, number, 1.0).tolist() == ends.tolist()


@given(st.sampled_from(INTEGERS), st.data(), st.floats(-4, 4))
def test_scaling_integers_is_exact(name, data, factor):
    number = lookup(name)
    word = data.draw(st.integers(0, 2**number.width - 1))
    value = int(to_values(words(name, word), number)[0])
    low = -(1 << (number.width - 1)) if number.signed else 0
    expected = min(max(round(value * Fraction(factor)), low), low + 2**number.width - 1)
    found = scale(words(name, word), number, factor)
    assert int(to_values(found, number)[0]) == expected


@pytest.mark.parametrize(
    ("dtype", "word", "factor", "expected"),
    [
        ("uint64", 2**53 + 1, 1.0, 2**53 + 1),  # not a float64
        ("uint64", 2**64 - 1, 0.5, 2**63),  # halves go to the even neighbour
        ("int8", 0x80, -1.0, 0x7F),
        ("float16", 0x7BFF, 2.0, 0x7C00),
        ("float4_e2m1fn", 0x7, 2.0, 0x7),
    ],
)
def test_scaling_at_the_ends(dtype, word, factor, expected):
    assert scale(words(dtype, word), lookup(dtype), factor).tolist() == [expected]


def test_scaling_keeps_shape():
    assert scale(np.full((2, 3), 3, np.uint8), lookup("int8"), 2.0).tolist() == [[6, 6, 6]] * 2


def test_float8_words_are_those_of_ml_dtypes():
    every = np.arange(256, dtype=np.uint8)
    theirs = every.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    np.testing.assert_array_equal(to_values(every, lookup("float8_e4m3fn")), theirs)
