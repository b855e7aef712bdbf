"""The grammar of bit specifications."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptflip.bits import BitSpec, lookup
from ckptflip.errors import UsageError


@pytest.mark.parametrize(
    ("spec", "dtype", "mask"),
    [
        ("all", "float32", 0xFFFFFFFF),
        ("sign", "float32", 0x80000000),
        ("exponent", "float32", 0x7F800000),
        ("mantissa", "float32", 0x007FFFFF),
        ("critical", "float32", 1 << 30),
        ("critical", "float64", 1 << 62),
        ("critical", "float16", 1 << 14),
        ("critical", "bfloat16", 1 << 14),
        ("critical", "complex64", 1 << 30 | 1 << 62),
        ("30", "float32", 1 << 30),
        ("0", "float32", 1),
        ("23-30", "float32", 0x7F800000),
        ("23-30", "float16", 0),
        ("10-100", "float16", 0xFC00),
        ("7-7", "uint8", 0x80),
        ("msb", "int16", 0x8000),
        ("msb", "bool", 1),
        ("msb", "float32", 0),
        ("sign", "uint8", 0),
        ("all,!critical", "float32", 0xBFFFFFFF),
        ("!critical,!sign", "float32", 0x3FFFFFFF),
        ("!0-29", "float32", 0xC0000000),
        ("!critical,exponent", "float32", 0x3F800000),
        (" sign , 0 ", "float32", 0x80000001),
        ("all,!all", "float32", 0),
        ("exponent,exponent,30", "float32", 0x7F800000),
        ("critical", "int8", 0),
        ("40", "complex64", 1 << 40),
        ("all", "float4_e2m1fn", 0xF),
        ("127", "complex128", 1 << 127),
    ],
)
def test_masks(spec, dtype, mask):
    assert BitSpec(spec).mask(lookup(dtype)) == mask


@given(st.data())
def test_terms_equal_sets_of_bits(data):
    number = lookup(data.draw(st.sampled_from(["float32", "float64", "int8", "complex64", "float6_e2m3fn"])))
    terms, wanted, unwanted, plain = [], set(), set(), False
    for _ in range(data.draw(st.integers(1, 5))):
        first = data.draw(st.integers(0, 127))
        last = data.draw(st.integers(first, 127))
        bits = set(range(first, last + 1)) & set(range(number.width))
        if data.draw(st.booleans()):
            terms.append(f"!{first}-{last}")
            unwanted |= bits
        else:
            terms.append(f"{first}-{last}")
            wanted |= bits
            plain = True
    chosen = (wanted if plain else set(range(number.width))) - unwanted
    assert BitSpec(",".join(terms)).mask(number) == sum(1 << b for b in chosen)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("exponnet", "did you mean 'exponent'"),
        ("all,!critcal", "did you mean 'critical'"),
        ("mantisa", "did you mean 'mantissa'"),
        ("xyz", "use all, sign, exponent, mantissa, critical, msb, a bit such as 30 or a range"),
        ("", "'' is not a bit field"),
        ("sign,", "'' is not a bit field"),
        ("!", "'' is not a bit field"),
        ("!!sign", "'!sign' is not a bit field"),
        ("30-23", "runs backwards; write 23-30"),
        ("128", "no number has a bit 128; bit 0 is the least significant"),
        ("0-128", "no number has a bit 128"),
        ("-5", "'-5' is not a bit field"),
        ("5-", "'5-' is not a bit field"),
        ("1.5", "'1.5' is not a bit field"),
        ("0x1f", "'0x1f' is not a bit field"),
        ("Sign", "did you mean 'sign'"),
    ],
)
def test_errors_say_what_and_suggest(spec, message):
    with pytest.raises(UsageError) as caught:
        BitSpec(spec)
    assert message in str(caught.value)
    assert repr(spec) in str(caught.value)
