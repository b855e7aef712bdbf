"""CRCs worked out from alterations alone, against libraries that read every byte."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptflip.checkpoints import crc


def reference(algorithm: str, data: bytes) -> int:
    if algorithm == "crc32":
        return zlib.crc32(data)
    return pytest.importorskip("google_crc32c").value(data)


def delta_of(algorithm: str, old: bytes, new: bytes) -> int:
    xored = np.frombuffer(old, np.uint8) ^ np.frombuffer(new, np.uint8)
    at = np.flatnonzero(xored)
    return crc.delta(algorithm, len(old) - 1 - at, xored[at])


ALGORITHMS = pytest.mark.parametrize("algorithm", ["crc32", "crc32c"])


@ALGORITHMS
@settings(max_examples=300)
@given(st.data())
def test_altered_bytes_change_a_crc_as_reading_all_of_them_does(algorithm, data):
    old = data.draw(st.binary(min_size=1, max_size=2000))
    new = bytearray(old)
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, len(old) - 1), st.integers(0, 255)))):
        new[at] = value
    changed = reference(algorithm, old) ^ delta_of(algorithm, old, bytes(new))
    assert changed == reference(algorithm, bytes(new))


@ALGORITHMS
def test_thousands_of_altered_bytes(algorithm):
    random = np.random.default_rng(5)
    old = random.integers(0, 256, 100_000, np.uint8)
    new = old.copy()
    new[random.integers(0, old.size, 5000)] ^= 0x10
    changed = reference(algorithm, old.tobytes()) ^ delta_of(algorithm, old.tobytes(), new.tobytes())
    assert changed == reference(algorithm, new.tobytes())


@ALGORITHMS
@given(st.binary(max_size=3000), st.integers(0, 3))
def test_the_crc_of_bytes(algorithm, data, zeros):
    data = bytes(zeros * 1000) + data
    assert crc.checksum(algorithm, data) == reference(algorithm, data)
    assert crc.checksum(algorithm, memoryview(data)) == reference(algorithm, data)


@pytest.mark.parametrize(("algorithm", "period"), [("crc32", (1 << 32) - 1), ("crc32c", (1 << 31) - 1)])
@given(st.integers(0, 1 << 50), st.integers(1, 255))
def test_alterations_far_from_the_end(algorithm, period, behind, value):
    """A register repeats after its polynomial's period; that of CRC-32C is x + 1 times one of degree 31."""
    xored = np.array([value], np.uint8)
    far = crc.delta(algorithm, np.array([behind]), xored)
    assert far == crc.delta(algorithm, np.array([behind % period]), xored)
    assert crc.delta(algorithm, np.array([behind, behind]), np.array([value, value], np.uint8)) == 0


@given(st.integers(0, (1 << 32) - 1))
def test_masks(value):
    assert crc.unmask(crc.mask(value)) == value


def test_a_mask_that_tensorflow_stored():
    """Of the empty string, whose CRC is 0."""
    assert crc.mask(0) == 0xA282EAD8
