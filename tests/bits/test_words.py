"""Arrays as words and back, gather, XOR and popcount, in both byte orders; no other bit is touched."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from number_formats import EVERY, SIGNALLING, dtype_of

from ckptflip.bits import as_words, from_words, gather, lookup, popcount, xor_at
from ckptflip.bits.words import valid_mask
from ckptflip.errors import UsageError

ORDERS = [(n, o) for n in EVERY for o in "<>" if o == "<" or lookup(n).word_size > 1]


def random_words(number, n, seed=0):
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 256, n * number.parts * number.word_size, np.uint8).view(number.word_dtype)
    return words & number.word_dtype.type(valid_mask(number))


@pytest.mark.parametrize(("name", "order"), ORDERS)
def test_words_and_arrays_are_the_same_memory(name, order):
    number = lookup(name)
    words = random_words(number, 24)
    array = from_words(words, name, (2, 3, 4))
    assert array.dtype == dtype_of(name)
    # Bytes are swapped as words: astype could make signalling NaN quiet.
    stored = words.astype(words.dtype.newbyteorder(order))
    swapped = stored.view(array.dtype.newbyteorder(order)).reshape(array.shape)
    seen = as_words(swapped)
    assert np.shares_memory(seen, swapped)
    assert seen.tolist() == words.tolist()
    assert from_words(seen, swapped.dtype, swapped.shape).tobytes() == array.tobytes()


@pytest.mark.parametrize(("name", "order"), [(n, o) for n, o in ORDERS if n in SIGNALLING])
def test_signalling_nan_survive_words_and_xor(name, order):
    number = lookup(name)
    stored = np.array([SIGNALLING[name]] * 3, number.word_dtype.newbyteorder(order))
    array = stored.view(dtype_of(name).newbyteorder(order))
    before = array.tobytes()
    words = as_words(array)
    assert [int(w) for w in words] == [SIGNALLING[name]] * 3
    assert from_words(words, array.dtype, (3,)).view(number.word_dtype).tolist() == [SIGNALLING[name]] * 3
    xor_at(words, np.array([1]), np.array([2]))
    assert gather(words, np.array([0, 1])).tolist() == [SIGNALLING[name], SIGNALLING[name] ^ 2]
    xor_at(words, np.array([1]), np.array([2]))
    assert array.tobytes() == before


@pytest.mark.parametrize(("name", "order"), ORDERS)
def test_each_bit_of_a_number_is_one_bit_in_memory(name, order):
    number = lookup(name)
    array = np.zeros(2, dtype_of(name)).view(dtype_of(name).newbyteorder(order))
    for bit in range(number.part_width):
        words = as_words(array)
        xor_at(words, np.array([1]), np.array([1 << bit], np.uint64))
        changed = np.frombuffer(array.tobytes(), np.uint8)
        assert popcount(changed) == 1
        assert int(words[1]) == 1 << bit
        xor_at(words, np.array([1]), np.array([1 << bit], np.uint64))
        assert not array.view(np.uint8).any()


@st.composite
def hits(draw):
    width = draw(st.sampled_from([8, 16, 32, 64]))
    order = draw(st.sampled_from("<>"))
    words = draw(st.lists(st.integers(0, 2**width - 1), min_size=1, max_size=40))
    n = draw(st.integers(0, 60))
    at = draw(st.lists(st.integers(0, len(words) - 1), min_size=n, max_size=n))
    masks = draw(st.lists(st.integers(0, 2**width - 1), min_size=n, max_size=n))
    return np.array(words, f"{order}u{width // 8}"), at, masks


@given(hits())
def test_xor_and_gather_equal_a_loop(case):
    words, at, masks = case
    expected = words.tolist()
    for i, mask in zip(at, masks, strict=True):
        expected[i] ^= mask
    before = words.copy()
    positions, wide = np.array(at, np.int64), np.array(masks, np.uint64)
    xor_at(words, positions, wide)
    assert words.tolist() == expected
    taken = gather(words, positions)
    assert taken.tolist() == [expected[i] for i in at]
    assert taken.dtype.isnative
    xor_at(words, positions[::-1], wide[::-1])
    assert words.tobytes() == before.tobytes()


@given(st.lists(st.integers(0, 2**64 - 1)))
def test_popcount_equals_a_loop(words):
    assert popcount(np.array(words, np.uint64)) == sum(w.bit_count() for w in words)


def test_popcount_of_many_bytes_does_not_wrap():
    assert popcount(np.full(100_000, 255, np.uint8)) == 800_000


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1, 1, 1, 1, 1, 1)])
def test_any_shape(shape):
    array = np.ones(shape, np.float32)
    words = as_words(array)
    assert words.tolist() == [0x3F800000] * array.size
    assert from_words(words, "float32", shape).shape == shape


def test_an_array_that_is_not_contiguous_is_refused():
    with pytest.raises(UsageError, match="C-contiguous"):
        as_words(np.zeros((4, 4), np.float32).T[1:])


@pytest.mark.parametrize(
    "array",
    [np.array(["ab"]), np.array([b"ab"]), np.array([None]), np.zeros(2, "f4,i4"), np.zeros(2, np.longdouble)],
    ids=lambda a: str(a.dtype),
)
def test_arrays_without_words_are_refused(array):
    with pytest.raises(UsageError, match="not a dtype whose bits can be altered"):
        as_words(array)


@pytest.mark.parametrize("mask", [256, -1, 2**40])
def test_a_mask_wider_than_the_words_is_refused_and_nothing_altered(mask):
    words = np.zeros(2, np.uint8)
    with pytest.raises(UsageError, match="does not fit words of 8 bits"):
        xor_at(words, np.array([0, 1]), np.array([1, mask]))
    assert words.tolist() == [0, 0]
