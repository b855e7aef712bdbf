"""Cells are decoded as Python decodes them, and what is no number is told."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptflip.recsys.data import cells


def decoded(decode: Callable[..., Any], texts: list[bytes]) -> tuple[list[int], list[bool]]:
    lengths = np.array([len(text) for text in texts])
    ends = np.cumsum(lengths + 1) - 1
    whole = b"".join(text + b"\t" for text in texts) + bytes(cells.PADDING - 1)
    values, sound = decode(np.frombuffer(whole, np.uint8), ends - lengths, ends)
    return values.tolist(), sound.tolist()


NEAR = (
    st.binary(max_size=18) | st.from_regex(rb"\A-?[0-9]{0,18}\Z") | st.from_regex(rb"\A[0-9a-fA-FgG]{0,9}\Z")
)


@given(st.lists(NEAR, min_size=1, max_size=30))
def test_integers_are_those_that_python_reads(texts: list[bytes]) -> None:
    values, sound = decoded(cells.integers, texts)
    for text, value, is_sound in zip(texts, values, sound, strict=True):
        assert is_sound == (re.fullmatch(rb"(-?[0-9]{1,16})?", text) is not None), text
        if is_sound:
            assert value == int(text or b"0")


@given(st.lists(NEAR, min_size=1, max_size=30))
def test_hexadecimals_are_those_that_python_reads(texts: list[bytes]) -> None:
    values, sound = decoded(cells.hexadecimals, texts)
    for text, value, is_sound in zip(texts, values, sound, strict=True):
        assert is_sound == (re.fullmatch(rb"[0-9a-fA-F]{0,8}", text) is not None), text
        if is_sound:
            assert value == int(text or b"0", 16)


@pytest.mark.parametrize("decode", [cells.integers, cells.hexadecimals])
def test_no_other_byte_passes_for_a_digit(decode: Callable[..., Any]) -> None:
    digits = b"0123456789" if decode is cells.integers else b"0123456789abcdefABCDEF"
    _, sound = decoded(decode, [bytes([byte]) for byte in range(256)])
    assert [byte for byte in range(256) if sound[byte]] == sorted(digits)


def test_the_largest_numbers() -> None:
    assert decoded(cells.integers, [b"9999999999999999", b"-9999999999999999"])[0] == [10**16 - 1, 1 - 10**16]
    assert decoded(cells.hexadecimals, [b"ffffffff", b"FFFFFFFF", b"0000000f"])[0] == [2**32 - 1] * 2 + [15]
