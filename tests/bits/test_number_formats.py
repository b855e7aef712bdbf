"""Widths and fields of every number format, against what numpy and ml_dtypes themselves encode."""

import ml_dtypes
import numpy as np
import pytest
from number_formats import EVERY, FLOATS, INTEGERS, LAYOUTS, NUMPY_INTEGERS, dtype_of, value, word

from ckptflip.bits import as_words, lookup, to_values
from ckptflip.bits.formats import COMPLEX_PARTS, numpy_dtype
from ckptflip.bits.words import valid_mask
from ckptflip.errors import UsageError


def test_no_number_type_of_ml_dtypes_is_forgotten():
    theirs = {n for n in dir(ml_dtypes) if isinstance(getattr(ml_dtypes, n), type)} - {"finfo", "iinfo"}
    assert theirs <= set(EVERY)


def test_layouts_of_all_floats_are_stated_here():
    assert set(LAYOUTS) == set(FLOATS)


@pytest.mark.parametrize("name", FLOATS)
def test_float_layout(name):
    number = lookup(name)
    assert (number.width, number.exponent, number.mantissa) == LAYOUTS[name]
    assert number.kind == "float"
    assert number.is_float
    assert number.parts == 1
    assert number == lookup(dtype_of(name))


@pytest.mark.parametrize("name", FLOATS)
def test_fields_partition_the_number(name):
    number = lookup(name)
    sign, exponent, mantissa = (number.field(f) for f in ("sign", "exponent", "mantissa"))
    assert sign ^ exponent ^ mantissa == number.field("all") == sign | exponent | mantissa
    assert number.field("all") == (1 << number.width) - 1 == valid_mask(number)
    assert number.field("critical") == 1 << (exponent.bit_length() - 1)
    assert number.field("msb") == 0


@pytest.mark.parametrize("name", [n for n in FLOATS if n != "float8_e8m0fnu"])
def test_negation_is_exactly_the_sign_bit(name):
    for x in (1.0, 1.5, 2.0):
        assert word(x, name) ^ word(-x, name) == lookup(name).field("sign")


@pytest.mark.parametrize("name", FLOATS)
def test_doubling_adds_one_at_the_exponents_lowest_bit(name):
    exponent = lookup(name).field("exponent")
    lowest = exponent & -exponent
    assert word(2.0, name) - word(1.0, name) == lowest


@pytest.mark.parametrize("name", [n for n in FLOATS if LAYOUTS[n][2]])
def test_the_next_number_is_one_mantissa_step_away(name):
    mantissa = LAYOUTS[name][2]
    assert word(1.0 + 2.0**-mantissa, name) - word(1.0, name) == 1
    assert word(2.0 - 2.0**-mantissa, name) & lookup(name).field("mantissa") == lookup(name).field("mantissa")


@pytest.mark.parametrize("name", FLOATS)
def test_flipping_the_critical_bit_moves_the_exponent_by_half_its_range(name):
    """Exactly 2^(2^(exponent bits - 1)) times more or less, from a number that stays normal on both sides."""
    number = lookup(name)
    jump = 2 ** (number.exponent - 1)
    low = 1 << number.mantissa  # exponent field 1, mantissa 0: the smallest normal number
    high = low ^ number.field("critical")
    ratio = np.log2(value(high, name)) - np.log2(value(low, name))
    assert ratio == jump


@pytest.mark.parametrize("name", INTEGERS)
def test_integer_layout(name):
    number = lookup(name)
    width = int(name.lstrip("uint"))
    assert (number.width, number.kind) == (width, name.rstrip("0123456789"))
    assert not number.is_float
    assert number.field("exponent") == number.field("mantissa") == number.field("critical") == 0
    assert number.field("msb") == 1 << (width - 1)
    assert number.field("sign") == (1 << (width - 1) if name.startswith("int") else 0)
    assert number == lookup(dtype_of(name))


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_are_words_in_twos_complement(name):
    number = lookup(name)
    for bit in range(number.width):
        top = bit == number.width - 1 and number.signed
        found = to_values(np.array([1 << bit], number.word_dtype), number)
        assert int(found[0]) == (-(1 << bit) if top else 1 << bit)


@pytest.mark.parametrize(("name", "part"), COMPLEX_PARTS.items())
def test_complex_numbers_are_two_parts_real_first(name, part):
    number, real = lookup(name), lookup(part)
    assert number == lookup(dtype_of(name))
    assert (number.parts, number.part_width, number.width) == (2, real.width, 2 * real.width)
    assert dtype_of(name).itemsize * 8 == number.width
    for field in ("all", "sign", "exponent", "mantissa", "critical"):
        assert number.field(field) == real.field(field) | real.field(field) << real.width
    pair = np.zeros(1, dtype_of(name))
    pair[:] = 1 - 2j
    assert as_words(pair).tolist() == [word(1.0, part), word(-2.0, part)]
    assert numpy_dtype(number) == dtype_of(part)


def test_bool_is_a_byte_of_which_any_bit_can_be_lost():
    number = lookup(bool)
    assert (number.kind, number.width, number.field("all"), number.field("msb")) == ("bool", 8, 0xFF, 1)
    assert number.field("sign") == number.field("exponent") == 0


@pytest.mark.parametrize(
    "name", ["float64", "float32", "float16", "complex64", "complex128", *NUMPY_INTEGERS]
)
def test_byte_order_does_not_change_the_format(name):
    assert (
        lookup(np.dtype(name).newbyteorder(">")) == lookup(np.dtype(name).newbyteorder("<")) == lookup(name)
    )


@pytest.mark.parametrize("name", EVERY)
def test_word_dtype_is_what_numpy_stores(name):
    number = lookup(name)
    assert number.word_size * number.parts == dtype_of(name).itemsize
    assert number.word_dtype == np.dtype(f"u{number.word_size}")
    assert lookup(number.name) == number


@pytest.mark.parametrize("name", EVERY)
def test_every_bit_has_one_field(name):
    number = lookup(name)
    for bit in range(number.width):
        field = number.field_of(bit)
        assert field == "value" or number.field(field) >> bit & 1
    fields = [number.field_of(b) for b in range(number.width)]
    assert fields.count("critical") == number.field("critical").bit_count()
    assert fields.count("mantissa") == number.field("mantissa").bit_count()


def test_field_names_are_checked():
    with pytest.raises(UsageError, match="no bit field is called 'exponents'"):
        lookup("float32").field("exponents")


@pytest.mark.parametrize(
    "dtype",
    [
        "S3",
        "U3",
        "O",
        "V4",
        "f4,f4",
        [("a", "f4")],
        np.longdouble,
        np.clongdouble,
        "M8[s]",
        "m8",
        np.dtypes.StringDType(),
        "float7",
        "",
        3.5,
        object(),
        "i4,(2",
        "3f4(",
        {"names": ["a"]},
    ],
    ids=lambda dtype: type(dtype).__name__ if type(dtype) is object else repr(dtype),
)
def test_what_holds_no_words_is_refused(dtype):
    with pytest.raises(UsageError, match="dtype"):
        lookup(dtype)
