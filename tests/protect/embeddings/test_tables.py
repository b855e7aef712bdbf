"""Check bytes: the exact bytes of a tiny table, and what the tag finds, for all single and double flips."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from ckptflip.errors import SelectionError, UsageError
from ckptflip.protect.embeddings import bad_rows, protect_table
from ckptflip.protect.embeddings.rows import MIX_NUMBERS, MIX_ROW, Row, digit_weights

WORDS = (1 << 64) - 1


def test_the_bytes_of_a_row():
    codes = [3, 200, 7, 255]
    scale_bias = np.array([0.5, -1.0], "<f4").tobytes()
    stored = np.array([[0] * 12, [*codes, *scale_bias]], np.uint8)
    row = protect_table(stored, "int8")[1]
    # 465 = 155 · 3 + 0: the digit that counts 1, then the one that counts D − 1.
    assert row[:6].tolist() == [*codes, 0, 155]
    mixed = (int.from_bytes(scale_bias, "little") * MIX_NUMBERS + MIX_ROW & WORDS) >> 48
    weighted = sum(code * (place - 128) for place, code in enumerate(codes))
    assert int.from_bytes(row[6:8].tobytes(), "little") == (mixed + weighted) % 65536
    assert row[8:].tobytes() == scale_bias


@pytest.mark.parametrize("bits", (2, 4, 8))
def test_digits_can_write_every_sum(bits):
    most = (1 << bits) - 1
    for dim in (*range(1, 70), 255, 256, 257, 258, 300):
        weights = digit_weights(dim, bits)
        assert sum(weights) == dim
        reach = 0
        for weight in weights:  # each digit goes on at most where those before it end
            assert weight <= reach + 1
            reach += most * weight


def flips_hidden(bits_of_numbers: int, at_once: int) -> int:
    """How many patterns of so many flips in scale, bias and row number may leave the tag as it is."""
    steps = [(MIX_NUMBERS << k) & WORDS for k in range(bits_of_numbers)]
    steps += [(MIX_ROW << k) & WORDS for k in range(32)]
    hidden = 0
    for some in combinations(steps, at_once):
        # A flip adds or takes away its step, as the bit was 0 or 1; the sign of all together changes nothing.
        sums = np.array([some[0]], np.uint64)
        for step in some[1:]:
            sums = np.concatenate([sums + np.uint64(step), sums - np.uint64(step)])
        top = sums >> np.uint64(48)
        hidden += int(((top == 0) | (top == 0xFFFF)).sum())
    return hidden


def test_any_flip_of_one_or_two_bits_of_scale_bias_and_row_number_changes_the_tag():
    # The tag is the top 16 bits of a sum modulo 2^64. It can only stay where those of what is added
    # are 0 or 65535.
    assert flips_hidden(64, 1) == flips_hidden(32, 1) == 0
    assert flips_hidden(64, 2) == flips_hidden(32, 2) == 0


def test_two_flips_among_the_codes_change_the_sum_or_the_tag():
    # Of the same bit in two columns, in opposite directions, the sum stays, and the weighted sum must differ.
    differences = np.arange(1, 256)
    for bit in range(8):
        assert ((differences << bit) % 65536).all()


def test_other_tables_are_refused():
    with pytest.raises(SelectionError, match="uint8"):
        protect_table(np.zeros((3, 20), np.float32), "int8")
    with pytest.raises(SelectionError, match="float32 with two axes"):
        protect_table(np.zeros((3, 20), np.uint8), "fp32")
    with pytest.raises(UsageError, match="ATen's layout"):
        protect_table(np.zeros((3, 20), np.uint8), "int8-tbe")
    with pytest.raises(UsageError, match="cannot be protected"):
        Row("fp16", 8)
    with pytest.raises(SelectionError, match="no protected int8 table"):
        bad_rows(np.zeros((3, 9), np.uint8), "int8")
