"""Codes over bits: what each finds, corrects and only detects, for random words, masks, groups and flips."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptflip.errors import UsageError
from ckptflip.protect.bits import sums as sums_module
from ckptflip.protect.bits.codes import Parity, Secded, Triplication, code_of
from ckptflip.protect.bits.packing import Packing
from ckptflip.protect.bits.sums import groups_of, sums

DTYPES = [np.dtype(kind) for kind in ("u1", "u2", "u4", "u8")]


@st.composite
def guarded(draw, codes=("parity", "secded", "tmr")):
    """Words, a packing of some of their bits, a code and its checks."""
    dtype = draw(st.sampled_from(DTYPES))
    bits = dtype.itemsize * 8
    mask = draw(st.one_of(st.integers(1, (1 << bits) - 1), st.just((1 << bits) - 1)))
    count = draw(st.integers(1, 300))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    words = (
        random.integers(0, 1 << bits, count, dtype, endpoint=False) if bits < 64 else random.bytes(8 * count)
    )
    words = np.frombuffer(words, dtype).copy() if bits == 64 else words
    if draw(st.booleans()):
        words = words.astype(dtype.newbyteorder(">"))
    code = code_of(draw(st.sampled_from(codes)), draw(st.integers(2, 100)))
    packing = Packing(mask, dtype)
    return words, packing, code, code.encode(words, packing)


def bits_of(mask):
    return [bit for bit in range(mask.bit_length()) if mask >> bit & 1]


def flip(words, at, bit):
    words[at] ^= words.dtype.type(1 << bit)


@given(guarded())
def test_no_false_alarm_and_the_size_is_as_said(case):
    words, packing, code, checks = case
    before = checks.copy()
    found = code.find(words, packing, checks)
    assert not (found.words.size or found.groups.size or found.checks)
    assert np.array_equal(checks, before) and checks.size == code.size(words.size, packing)


@given(guarded(), st.data())
def test_flips_of_other_bits_are_no_concern(case, data):
    words, packing, code, checks = case
    words ^= words.dtype.type(~packing.mask & ((1 << words.dtype.itemsize * 8) - 1))
    found = code.find(words, packing, checks)
    assert not (found.words.size or found.groups.size or found.checks)


@given(guarded(["secded", "tmr"]), st.data())
def test_every_single_flip_is_located(case, data):
    words, packing, code, checks = case
    at = data.draw(st.integers(0, words.size - 1))
    bit = data.draw(st.sampled_from(bits_of(packing.mask)))
    flip(words, at, bit)
    found = code.find(words, packing, checks)
    assert (found.words.tolist(), found.masks.tolist()) == ([at], [1 << bit])
    assert not found.groups.size and not found.checks


@given(guarded(["secded", "tmr"]), st.data())
def test_all_bits_of_one_word_are_located(case, data):
    words, packing, code, checks = case
    at = data.draw(st.integers(0, words.size - 1))
    words[at] ^= words.dtype.type(packing.mask)
    found = code.find(words, packing, checks)
    assert (found.words.tolist(), found.masks.tolist()) == ([at], [packing.mask])


@given(guarded(["parity"]), st.data())
def test_parity_detects_a_flip_and_names_its_group(case, data):
    words, packing, code, checks = case
    at = data.draw(st.integers(0, words.size - 1))
    bit = data.draw(st.sampled_from(bits_of(packing.mask)))
    flip(words, at, bit)
    found = code.find(words, packing, checks)
    assert found.groups.tolist() == [at % groups_of(words.size, code.group)]
    assert found.lost.tolist() == [1 << bit] and not found.words.size


@given(guarded(["secded"]), st.data())
def test_two_flips_in_a_column_of_a_group_are_detected(case, data):
    words, packing, code, checks = case
    count = groups_of(words.size, code.group)
    group = data.draw(st.integers(0, count - 1))
    members = list(range(group, words.size, count))
    bit = data.draw(st.sampled_from(bits_of(packing.mask)))
    if len(members) < 2:
        return
    first, second = data.draw(st.lists(st.sampled_from(members), min_size=2, max_size=2, unique=True))
    flip(words, first, bit), flip(words, second, bit)
    found = code.find(words, packing, checks)
    assert not found.words.size and not found.checks
    assert (found.groups.tolist(), found.lost.tolist()) == ([group], [1 << bit])


@given(guarded(["secded", "tmr"]), st.data())
def test_a_flip_in_the_checks_is_put_right_and_the_words_are_let_be(case, data):
    words, packing, code, checks = case
    before = checks.copy()
    place = data.draw(st.integers(0, checks.size * 8 - 1))
    checks[place // 8] ^= np.uint8(1 << place % 8)
    found = code.find(words, packing, checks)
    assert not found.words.size and not found.groups.size and found.checks == 1
    assert np.array_equal(checks, before)


@given(guarded(), st.data())
def test_bits_of_checks_that_belong_to_no_word_alter_and_report_none(case, data):
    """The last byte of packed bits is filled in part: whatever flips behind its end, in as many checks."""
    words, packing, code, checks = case
    clean, before = words.copy(), checks.copy()
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    noise = np.frombuffer(random.bytes(checks.size), np.uint8)
    used = kept_bits(words, packing, code)
    checks ^= noise & ~used
    flipped = int(np.bitwise_count(noise & ~used).sum())
    found = code.find(words, packing, checks)
    assert not found.words.size and not found.groups.size and found.checks == flipped
    assert np.array_equal(checks, before) and np.array_equal(words, clean)


def kept_bits(words, packing, code):
    """The bits of checks that stand for a word's, as bytes: those that some checks have set."""
    ones, count = np.full_like(words, -1 & (1 << words.itemsize * 8) - 1), words.size
    if code.name == "tmr":
        return code.encode(ones, packing)
    groups = groups_of(count, code.group)
    each = packing.pack(np.full(groups, ones[0], packing.dtype))
    return np.tile(each, code.size(count, packing) // each.size)


@given(guarded(["secded"]), st.data())
def test_a_flip_of_a_word_and_one_in_its_checks_never_alter_another_word(case, data):
    words, packing, code, checks = case
    clean = words.copy()
    at = data.draw(st.integers(0, words.size - 1))
    flip(words, at, data.draw(st.sampled_from(bits_of(packing.mask))))
    place = data.draw(st.integers(0, checks.size * 8 - 1))
    checks[place // 8] ^= np.uint8(1 << place % 8)
    found = code.find(words, packing, checks)
    words[found.words] ^= found.masks.astype(words.dtype)
    others = np.arange(words.size) != at
    assert np.array_equal(words[others], clean[others])


@given(guarded(["tmr"]), st.integers(0, 2**32))
def test_triplication_stands_any_flips_of_words_alone(case, seed):
    words, packing, code, checks = case
    clean = words.copy()
    noise = np.frombuffer(np.random.default_rng(seed).bytes(words.nbytes), packing.dtype)
    words ^= (noise & packing.dtype.type(packing.mask)).astype(words.dtype)
    found = code.find(words, packing, checks)
    words[found.words] ^= found.masks.astype(words.dtype)
    assert np.array_equal(words, clean)


@given(guarded(["secded"]), st.integers(0, 2**32))
def test_a_flip_in_every_group_is_located(case, seed):
    words, packing, code, checks = case
    clean, count = words.copy(), groups_of(words.size, code.group)
    random = np.random.default_rng(seed)
    for group in range(count):
        at = random.choice(np.arange(group, words.size, count))
        flip(words, at, random.choice(bits_of(packing.mask)).item())
    found = code.find(words, packing, checks)
    words[found.words] ^= found.masks.astype(words.dtype)
    assert np.array_equal(words, clean) and found.words.size == count


@given(guarded(["secded"]))
def test_sums_of_rows_and_of_copies_agree(case):
    words, _, code, _ = case
    members = code._members
    kept = sums_module._SMALL, sums_module._AT_A_TIME
    try:
        sums_module._SMALL, sums_module._AT_A_TIME = 0, 7
        by_rows = sums(words, code.group, members)
    finally:
        sums_module._SMALL, sums_module._AT_A_TIME = kept
    assert np.array_equal(by_rows, sums(words, code.group, members))


@given(st.integers(1, (1 << 32) - 1), st.integers(1, 50), st.integers(0, 2**32))
def test_packed_words_are_flipped_and_compared_bit_for_bit(mask, count, seed):
    random = np.random.default_rng(seed)
    packing = Packing(mask, np.dtype(np.uint32))
    left, right = random.integers(0, 1 << 32, (2, count), np.uint32)
    packed = packing.pack(left)
    at, masks = packing.differences(packed, packing.pack(right), count)
    expected = (left ^ right) & np.uint32(mask)
    assert at.tolist() == np.flatnonzero(expected).tolist() and masks.tolist() == expected[at].tolist()
    packing.flip(packed, at, masks, count)
    assert np.array_equal(packed, packing.pack(right))


def test_numbers_of_a_group_are_distinct_and_no_powers_of_two():
    for group in (2, 4, 11, 57, 64, 120, 1 << 16):
        numbers = Secded(group)._numbers
        assert len(set(numbers.tolist())) == group and not any((numbers & (numbers - 1)) == 0)
    assert [Secded(group)._order for group in (4, 11, 12, 57, 58)] == [3, 4, 5, 6, 7]


def test_memory_of_sign_and_exponent():
    packing = Packing(0x1FF << 23, np.dtype(np.uint32))
    sizes = {
        type(c).__name__: 8 * c.size(64_000, packing) / 64_000
        for c in (Parity(64), Secded(64), Triplication())
    }
    assert sizes == {"Parity": 9 / 64, "Secded": 9 * 8 / 64, "Triplication": 18.0}


@pytest.mark.parametrize(
    ("name", "group", "said"),
    [("secde", 64, "did you mean 'secded'"), ("x", 64, "use parity"), ("secded", 1, "a group has 2 to"),
     (None, 64, "use parity"), (5, 64, "use parity"), ("secded", 2.5, "a group has"),
     ("secded", True, "a group has")],
)  # fmt: skip
def test_codes_that_make_no_sense(name, group, said):
    with pytest.raises(UsageError, match=said):
        code_of(name, group)
